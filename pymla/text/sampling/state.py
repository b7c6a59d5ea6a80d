"""What a sampler remembers of its sequence."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from pymla.text.sampling.pool import Candidates


class History:
    """The tokens of a sequence so far."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._tokens = np.array(list(tokens), np.int64)  # with room at its end
        self._length = len(self._tokens)

    def append(self, token: int) -> None:
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty(self._length + 64, np.int64)])
        self._tokens[self._length] = token
        self._length += 1

    def last(self, count: int) -> np.ndarray:
        """The last `count` tokens, int64, or all where it is 0."""
        return self._tokens[max(0, self._length - count) if count else 0 : self._length]

    def copy(self) -> "History":
        other = History()
        other._tokens, other._length = self.last(0).copy(), self._length
        return other


@dataclass
class State:
    """What changes from token to token."""

    history: History
    coin: float = 0.0  # in [0, 1): decides whether XTC works on the next token
    mu: float = 0.0  # Mirostat: bits of surprise that a token may have
    weighted_sum: float = 0.0  # adaptive-p: of the probabilities of chosen tokens, the older the lighter
    total_weight: float = 0.0
    observed: Candidates | None = None  # where Mirostat and adaptive-p look up the probability of the accepted token

    def copy(self) -> "State":
        return replace(self, history=self.history.copy())
