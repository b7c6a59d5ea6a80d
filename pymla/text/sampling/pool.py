"""Tokens that may come next, with their logits: what the steps of a chain take and give."""

from typing import NamedTuple

import numpy as np

from pymla.text.sampling.selection import fewest, likeliest


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

    def nucleus(self, mass: float) -> "Pool":
        """The fewest of the likeliest tokens that have at least a probability together."""
        first, last = fewest(-self.logits, self.shares(), mass, "left")
        return self.at(np.sort(np.concatenate([first, last])))

    def token_at(self, number: float) -> int:
        """The token that `draw` finds at a number among `candidates`, without sorting them all."""
        _, last = fewest(-self.logits, self.shares(), number, "right")
        return int(last[-1] if self.ids is None else self.ids[last[-1]])

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
