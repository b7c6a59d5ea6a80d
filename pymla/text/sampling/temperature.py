"""Temperature: what the logits are divided by."""

from dataclasses import dataclass

import numpy as np

from pymla.text.sampling.pool import Pool
from pymla.text.sampling.state import State

#: Below it, quotients would leave the range of float64. As float32 numbers differ by 1e-45 at least, all but the
#: likeliest token have no probability there already.
_LOWEST = 1e-260


@dataclass(frozen=True)
class Greedy:
    """The likeliest token alone: temperature 0."""

    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        return pool.likeliest(1) if pool.is_sorted else pool.at(np.array([pool.logits.argmax()]))


@dataclass(frozen=True)
class Temperature:
    """Logits divided by a number above 0. llama.cpp: ``llama_sampler_temp_impl``."""

    value: float
    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        pool = pool.exact()
        return pool._replace(logits=pool.logits / max(self.value, _LOWEST))


@dataclass(frozen=True)
class DynamicTemperature:
    """A temperature between ``value - spread``, at least 0, and ``value + spread``: the lowest one plus what is between
    them times ``(H / log n) ** exponent``, with the entropy H of the n tokens.

    llama.cpp: ``llama_sampler_temp_ext_apply``.
    """

    value: float
    spread: float
    exponent: float
    keeps_likeliest = True

    def __call__(self, pool: Pool, state: State) -> Pool:
        if len(pool.logits) == 1:
            return pool
        log_shares = pool.log_shares()
        entropy = -(np.exp(log_shares) * log_shares).sum()
        part = max(0.0, entropy / np.log(len(log_shares))) ** self.exponent
        low, high = max(0.0, self.value - self.spread), self.value + self.spread
        temperature = low + (high - low) * part
        return Temperature(temperature)(pool, state) if temperature > 0 else Greedy()(pool, state)
