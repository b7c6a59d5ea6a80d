"""Changes of single logits: bias, and penalties on tokens that occurred."""

from dataclasses import dataclass

import numpy as np

from pymla.errors import PymlaError
from pymla.text.sampling.pool import Pool
from pymla.text.sampling.state import State


def biased(pool: Pool, biases: dict[int, float]) -> Pool:
    """All tokens of the vocabulary with biases added to some logits; one of -inf bans its token.

    Raises
    ------
    PymlaError
        A token is outside the vocabulary, or all are banned.
    """
    if not biases:
        return pool
    for token in biases:
        if token >= len(pool.logits):
            raise PymlaError(f"`logit_bias` for token {token}: the vocabulary has {len(pool.logits)} tokens")
    tokens, values = np.array(list(biases)), np.array(list(biases.values()))
    pool = pool.edited(tokens, pool.logits[tokens] + values)
    if values.min() > -np.inf:
        return pool
    left = np.flatnonzero(pool.logits > -np.inf)
    if not len(left):
        raise PymlaError("`logit_bias` bans every token of the vocabulary; leave one")
    return pool.at(left)


@dataclass(frozen=True)
class Penalties:
    """Lowers the logits of tokens that occurred: ``x / repetition`` where x > 0 and ``x * repetition`` elsewhere, then
    minus ``count * frequency + presence``. Keskar et al., "CTRL", 2019, section 4.1, have the division alone.

    llama.cpp: ``llama_sampler_penalties_apply``.
    """

    repetition: float
    frequency: float
    presence: float
    window: int  # tokens that are looked back on; 0: all
    keeps_likeliest = False

    def __call__(self, pool: Pool, state: State) -> Pool:
        tokens, counts = np.unique(state.history.last(self.window), return_counts=True)
        if not len(tokens):
            return pool
        at, which = pool.find(tokens)
        seen = pool.logits[at].astype(np.float64)
        seen = np.where(seen > 0, seen / self.repetition, seen * self.repetition)
        return pool.edited(at, seen - counts[which] * self.frequency - self.presence)
