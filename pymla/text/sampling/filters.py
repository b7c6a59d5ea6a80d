"""Samplers that leave some of the tokens and change no logit.

Tokens that bias or a mask bans are none of the candidates; llama.cpp keeps them with a logit of -inf, and so counts
them in `min_keep` and in the largest entropy of the dynamic temperature.
"""

import math
from dataclasses import dataclass

import numpy as np

from pymla.text.sampling.pool import Pool
from pymla.text.sampling.selection import descending, fewest, likeliest
from pymla.text.sampling.state import State


@dataclass(frozen=True)
class TopK:
    """The `k` likeliest tokens. llama.cpp: ``llama_sampler_top_k_impl``."""

    k: int
    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        return pool.likeliest(self.k)


@dataclass(frozen=True)
class TopP:
    """The fewest tokens that have the probability `p` together (Holtzman et al., "The curious case of neural text
    degeneration", 2020, section 3.1). llama.cpp: ``llama_sampler_top_p_apply``."""

    p: float
    min_keep: int
    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        nucleus = pool.nucleus(self.p)
        return nucleus if len(nucleus.logits) >= self.min_keep else pool.likeliest(self.min_keep)


@dataclass(frozen=True)
class MinP:
    """Tokens that are at least `p` times as likely as the likeliest one (Nguyen et al., "Turning up the heat: min-p
    sampling", 2024). llama.cpp: ``llama_sampler_min_p_apply``."""

    p: float
    min_keep: int
    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        pool = pool.exact()
        left = np.flatnonzero(pool.logits >= pool.highest + math.log(self.p))
        return pool.at(left) if len(left) >= self.min_keep else pool.likeliest(self.min_keep)


@dataclass(frozen=True)
class Typical:
    """The fewest tokens that have more than the probability `p` together, beginning with those whose surprise is next
    to the entropy: ``|-log p(x) - H|`` (Meister et al., "Locally typical sampling", 2023).

    llama.cpp: ``llama_sampler_typical_apply``.
    """

    p: float
    min_keep: int
    keeps_likeliest = False

    def __call__(self, pool: Pool, state: State) -> Pool:
        log_shares = pool.log_shares()
        shares = np.exp(log_shares)
        entropy = -(shares * log_shares).sum()
        distances = np.abs(-log_shares - entropy)
        left = np.concatenate(fewest(distances, shares, self.p, "right"))
        if len(left) < self.min_keep:
            left = likeliest(-distances, self.min_keep)
        return pool.at(np.sort(left))


@dataclass(frozen=True)
class TopNSigma:
    """Tokens whose logit is at most `n` standard deviations of all logits below the largest (Tang et al., "Top-nσ: not
    all logits are you need", 2024). llama.cpp: ``llama_sampler_top_n_sigma_apply``."""

    n: float
    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        pool = pool.exact()
        return pool.at(np.flatnonzero(pool.logits >= pool.highest - self.n * pool.logits.std()))


@dataclass(frozen=True)
class Xtc:
    """Exclude top choices: of the tokens with a probability of at least `threshold`, where they are several, only the
    least likely one is left. It works on a token with the chance `probability`.

    llama.cpp: ``llama_sample_xtc_apply``.
    """

    probability: float
    threshold: float
    min_keep: int
    keeps_likeliest = False

    def __call__(self, pool: Pool, state: State) -> Pool:
        if state.coin >= self.probability:
            return pool
        above = np.flatnonzero(pool.shares() >= self.threshold)
        if len(above) < 2 or len(pool.logits) - len(above) + 1 < self.min_keep:
            return pool
        excluded = descending(pool.logits, above)[:-1]
        return pool.at(np.delete(np.arange(len(pool.logits)), excluded))
