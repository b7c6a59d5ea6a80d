"""Tokens that may come next, with their logits: what the steps of a chain take and give."""

import math
from typing import Literal, NamedTuple

import numpy as np

#: So many of the likeliest tokens are sorted first where the last one is not known yet, and then so many times more.
_SORTED, _GROWTH = 256, 16

#: So many numbers are sorted by a vectorised algorithm, which leaves equal ones in any order.
_MANY = 4096


class Candidates(NamedTuple):
    """A distribution over the tokens that may come next, the likeliest one first."""

    ids: np.ndarray  # int64 (n,)
    probabilities: np.ndarray  # float64 (n,)

    def probability(self, token: int) -> float:
        """The probability of a token, 0 where it is none of the candidates."""
        at = np.flatnonzero(self.ids == token)
        return float(self.probabilities[at[0]]) if len(at) else 0.0


def draw(candidates: Candidates, number: float) -> int:
    """The token at a number in [0, 1), where each candidate takes as much of it as its probability."""
    at = int(np.searchsorted(np.cumsum(candidates.probabilities), number, side="right"))
    return int(candidates.ids[min(at, len(candidates.ids) - 1)])


class Pool(NamedTuple):
    """Tokens that may come next, and their logits, none of which is -inf. At least one.

    Ids ascend, or else the pool is sorted: the likeliest token comes first, and of equally likely ones the lower.
    """

    logits: np.ndarray  # float32 or float64 (n,)
    ids: np.ndarray | None = None  # int64 (n,); None: all tokens of the vocabulary
    is_sorted: bool = False

    def exact(self) -> "Pool":
        """The same with logits in float64."""
        return self._replace(logits=self.logits.astype(np.float64, copy=False))

    @property
    def highest(self) -> float:
        """The largest logit."""
        return float(self.logits[0] if self.is_sorted else self.logits.max())

    def at(self, positions: np.ndarray) -> "Pool":
        """Some of the tokens, by their positions, which ascend."""
        return Pool(self.logits[positions], positions if self.ids is None else self.ids[positions], self.is_sorted)

    def likeliest(self, count: int | None = None) -> "Pool":
        """The `count` likeliest tokens, or all, sorted."""
        count = len(self.logits) if count is None else count
        if self.is_sorted:
            return self if count >= len(self.logits) else Pool(self.logits[:count], self._ids()[:count], True)
        return self.at(likeliest(self.logits, count))._replace(is_sorted=True)

    def nucleus(self, mass: float, side: Literal["left", "right"], floor: float = 0.0) -> "Pool":
        """The fewest of the likeliest tokens, sorted, that have a probability of at least `mass` together (side
        "left"), or of more (side "right"); all where rounding keeps them below it.

        Tokens that are less likely than the likeliest one times `floor`, which the caller drops anyway, may be missing.
        """
        pool = self.exact()
        highest = pool.highest
        total = np.exp(pool.logits - highest).sum()
        if floor and not pool.is_sorted:
            # A bit lower, because the bound is rounded.
            pool = pool.at(np.flatnonzero(pool.logits >= highest + math.log(floor) - 1e-6))
        size = len(pool.logits) if pool.is_sorted else _SORTED
        while True:
            first = pool.likeliest(size)
            count = int(np.searchsorted(np.cumsum(np.exp(first.logits - highest) / total), mass, side)) + 1
            if count <= size or size >= len(pool.logits):
                return first.likeliest(count)
            size *= _GROWTH

    def token_at(self, number: float) -> int:
        """The token that `draw` finds at a number among `candidates`, of which as few are made as it takes."""
        return int(self.nucleus(number, "right")._ids()[-1])

    def find(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where some tokens are, int64 (T,), which ascend: positions in the pool, and the index of each one's token."""
        if self.ids is None:
            which = np.flatnonzero(tokens < len(self.logits))
            return tokens[which], which
        which = np.searchsorted(tokens, self.ids)
        at = np.flatnonzero(tokens[np.minimum(which, len(tokens) - 1)] == self.ids)
        return at, which[at]

    def edited(self, positions: np.ndarray, logits: np.ndarray) -> "Pool":
        """The same tokens with other logits at some positions."""
        new = self.logits.astype(np.float64)  # a copy
        new[positions] = logits
        if not self.is_sorted:
            return self._replace(logits=new)
        order = np.argsort(self._ids())
        return Pool(new[order], self._ids()[order])

    def shares(self) -> np.ndarray:
        """The softmax of the logits, float64 (n,)."""
        weights = np.exp(self.logits.astype(np.float64, copy=False) - self.highest)
        return weights / weights.sum()

    def log_shares(self) -> np.ndarray:
        """The logarithm of the softmax, float64 (n,), which is finite also where a probability is rounded to 0."""
        relative = self.logits.astype(np.float64, copy=False) - self.highest
        return relative - np.log(np.exp(relative).sum())

    def candidates(self) -> Candidates:
        """The distribution of the tokens: softmax of their logits."""
        first = self.likeliest()
        return Candidates(first._ids(), first.shares())

    def _ids(self) -> np.ndarray:
        return np.arange(len(self.logits)) if self.ids is None else self.ids


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
    runs = np.cumsum(is_new[equal])
    order[equal] = np.sort(runs * len(order) + order[equal]) % len(order)
    return positions[order]
