"""Mirostat: tokens whose surprise, ``-log2 p``, is around a target on average (Basu et al., "Mirostat: a neural text
decoding algorithm that directly controls perplexity", 2021).

The bits of surprise that a token may have, μ, begin with twice the target τ, and follow the surprise S of each token
that is chosen: ``μ -= η (S - τ)``. A token that is accepted without having been a candidate leaves μ as it is.
"""

import abc
import math
from dataclasses import dataclass

import numpy as np

from pymla.text.sampling.pool import Pool
from pymla.text.sampling.state import State

#: Tokens that the exponent of Zipf's law is estimated from, llama.cpp's ``m``.
_ESTIMATED_FROM = 100

#: The least exponent that is taken: equal logits have none.
_FLATTEST = 1e-6


@dataclass(frozen=True)
class _Mirostat(abc.ABC):
    tau: float
    eta: float
    keeps_likeliest = True

    def begin(self, state: State) -> None:
        state.mu = 2 * self.tau

    def accept(self, state: State, probability: float) -> None:
        """Learn from the probability of the chosen token."""
        state.mu -= self.eta * (-math.log2(probability) - self.tau)

    def __call__(self, pool: Pool, state: State) -> Pool:
        left = self._left(pool, state.mu)
        state.observed = left.candidates()
        return left

    @abc.abstractmethod
    def _left(self, pool: Pool, mu: float) -> Pool:
        """The tokens that are left where surprise is to be `mu` bits at most."""


@dataclass(frozen=True)
class Mirostat(_Mirostat):
    """Version 1: the k likeliest tokens, where a token of rank k has the surprise μ if probabilities follow Zipf's law
    (algorithm 1). llama.cpp: ``llama_sampler_mirostat_apply``."""

    def _left(self, pool: Pool, mu: float) -> Pool:
        first = pool.exact().likeliest(_ESTIMATED_FROM).logits
        if len(first) == 1:
            return pool
        t = np.log(np.arange(2, len(first) + 1) / np.arange(1, len(first)))
        exponent = max(float(t @ -np.diff(first) / (t @ t)), _FLATTEST)
        log_k = (_log_inverse_sum(exponent - 1, len(pool.logits)) + mu * math.log(2)) / exponent
        count = math.floor(math.exp(min(log_k, math.log(len(pool.logits)) + 1)))
        return pool.likeliest(min(max(count, 1), len(pool.logits)))


def _log_inverse_sum(epsilon: float, tokens: int) -> float:
    """``log(ε / (1 - N ** -ε))``; it is continuous at 0."""
    x = epsilon * math.log(tokens)
    if abs(x) < 1e-9:
        return -math.log(math.log(tokens))
    return math.log(epsilon / -math.expm1(-x))


@dataclass(frozen=True)
class MirostatV2(_Mirostat):
    """Version 2: tokens whose surprise is at most μ, at least one. llama.cpp: ``llama_sampler_mirostat_v2_apply``."""

    def _left(self, pool: Pool, mu: float) -> Pool:
        left = np.flatnonzero(pool.log_shares() >= -mu * math.log(2))
        return pool.at(left) if len(left) else pool.likeliest(1)
