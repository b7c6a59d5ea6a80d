"""The largest numbers, and the first that have a share together, without sorting all: a vocabulary has 100,000."""

from typing import Literal

import numpy as np

#: So many numbers are sorted in any case.
_FEW = 1024

#: Keys that are not few are put into so many bins, so many to the unit of the key; the last has all that are larger.
_BINS, _PER_UNIT = 1024, 32

#: So many numbers are sorted by a vectorised algorithm, which leaves equal ones in any order.
_MANY = 4096


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest logits, in the order of `descending`; sorting all 100,000 takes a quarter of a
    decode step."""
    width = max(1, len(logits) // (8 * count))
    # So many parts of the vocabulary have a token that is as likely as the count-th of their maxima, or likelier.
    maxima = logits[: len(logits) // width * width].reshape(-1, width).max(1)
    bound = np.partition(maxima, -count)[-count] if count < len(maxima) else -np.inf
    return descending(logits, np.flatnonzero(logits >= bound))[:count]


def descending(logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Positions, which ascend, from the largest logit on; of equal ones the first comes first."""
    values = -logits[positions]
    if len(values) < _MANY:
        return positions[np.argsort(values, kind="stable")]
    order = np.argsort(values)
    is_new = np.diff(values[order], prepend=-np.inf) != 0
    equal = np.flatnonzero(~(is_new & np.append(is_new[1:], True)))
    runs = np.cumsum(is_new)[equal]
    order[equal] = np.sort(runs * len(order) + order[equal]) % len(order)
    return positions[order]


def fewest(
    keys: np.ndarray, shares: np.ndarray, mass: float, side: Literal["left", "right"]
) -> tuple[np.ndarray, np.ndarray]:
    """The fewest positions, those of the smallest keys first and of equal ones the first, whose shares have a sum of at
    least `mass` (side "left"), or of more (side "right"); all positions where rounding keeps them below it.

    Parameters
    ----------
    keys : float array (n,)
    shares : float64 array (n,)
        With a sum of 1.

    Returns
    -------
    first : int64 array
        Positions that come before those of `last`. They ascend.
    last : int64 array
        The rest, in the order of their keys: at least one.
    """
    if len(keys) <= _FEW:
        return np.empty(0, np.int64), _prefix(np.argsort(keys, kind="stable"), shares, 0.0, mass, side)
    bins = np.minimum((keys - keys.min()) * _PER_UNIT, _BINS - 1).astype(np.int64)
    sums = np.cumsum(np.bincount(bins, shares))
    last_bin = min(int(np.searchsorted(sums, mass, side)), len(sums) - 1)
    below = float(sums[last_bin - 1]) if last_bin else 0.0
    last = descending(-keys, np.flatnonzero(bins == last_bin))
    return np.flatnonzero(bins < last_bin), _prefix(last, shares, below, mass, side)


def _prefix(
    order: np.ndarray, shares: np.ndarray, below: float, mass: float, side: Literal["left", "right"]
) -> np.ndarray:
    """The first positions whose shares reach a mass, beside what is below them."""
    return order[: int(np.searchsorted(below + np.cumsum(shares[order]), mass, side)) + 1]
