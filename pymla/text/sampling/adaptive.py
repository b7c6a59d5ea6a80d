"""Adaptive-p: tokens whose probability is next to a target, which moves so that it is met on average."""

from dataclasses import dataclass

import numpy as np

from pymla.text.sampling.pool import Pool
from pymla.text.sampling.state import State

#: The logit of a token that meets the target, how fast logits fall beside it, and how far from it they begin to.
_PEAK, _SHARPNESS, _WIDTH = 5.0, 10.0, 0.3


@dataclass(frozen=True)
class AdaptiveP:
    """Gives a token of probability p the logit ``5 - 10 d² / (1 + d)`` with ``d = |p - a| / 0.3``.

    a is ``2 target - mean`` between 0 and 1. The mean is that of the probabilities of chosen tokens, each of which
    weighs `decay` times as much as the one after it; it begins with the target. A token that is accepted without having
    been a candidate does not count. llama.cpp: ``llama_sampler_adaptive_p_apply``, pull request 17927.
    """

    target: float
    decay: float
    keeps_likeliest = False

    def begin(self, state: State) -> None:
        state.weighted_sum, state.total_weight = self.target / (1 - self.decay), 1 / (1 - self.decay)

    def accept(self, state: State, probability: float) -> None:
        """Count the probability of the chosen token."""
        state.weighted_sum = probability + self.decay * state.weighted_sum
        state.total_weight = 1 + self.decay * state.total_weight

    def __call__(self, pool: Pool, state: State) -> Pool:
        before = state.observed = pool.candidates()
        target = min(max(2 * self.target - state.weighted_sum / state.total_weight, 0.0), 1.0)
        distance = np.abs(before.probabilities - target) / _WIDTH
        order = np.argsort(before.ids)
        return Pool((_PEAK - _SHARPNESS * distance**2 / (1 + distance))[order], before.ids[order])
