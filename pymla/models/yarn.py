"""YaRN: how a model's context is extended beyond the one that it was trained with (arXiv:2309.00071)."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Yarn:
    """How rope's frequencies and the softmax scale change.

    Frequencies whose wave fits the original context more than `beta_fast` times stay; frequencies whose wave fits it
    less than `beta_slow` times are divided by `factor`; between the two they are mixed.
    """

    factor: float
    original_context_length: int
    log_multiplier: float  # 0.1 * mscale_all_dim; 0 where the model has no mscale_all_dim
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def mscale(self) -> float:
        """Factor on queries and keys of attention, ``1 + log_multiplier * ln(factor)``."""
        return 1.0 + self.log_multiplier * math.log(self.factor)

    @property
    def rope_magnitude(self) -> float:
        """Factor on cos and sin.

        DeepSeek's is ``(1 + 0.1 mscale ln(factor)) / (1 + 0.1 mscale_all_dim ln(factor))``. A file stores
        ``mscale_all_dim`` only, as ``10 log_multiplier``; all models that have it have an equal ``mscale``, so the
        factor is 1. A model without it has ``mscale`` 1: then the numerator remains, as in transformers'
        ``_compute_yarn_parameters``. (llama.cpp has it in the softmax scale as well, then.)
        """
        return 1.0 if self.log_multiplier else 1.0 + 0.1 * math.log(self.factor)

    def mixed(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Frequencies of rope, each mixed from itself and itself divided by `factor`, along a ramp over the pairs.

        As ``rope_yarn`` in ggml and ``_compute_yarn_parameters`` in transformers.

        Parameters
        ----------
        frequencies : float64 array (pairs,)
        theta : float
            ``frequencies[i]`` is ``theta ** (-i / pairs)``.
        """
        pairs = len(frequencies)
        low = max(math.floor(self._pair_that_turns(self.beta_fast, 2 * pairs, theta)), 0)
        high = min(math.ceil(self._pair_that_turns(self.beta_slow, 2 * pairs, theta)), 2 * pairs - 1)
        interpolated = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0.0, 1.0)
        return frequencies / self.factor * interpolated + frequencies * (1 - interpolated)

    def _pair_that_turns(self, rotations: float, dim: int, theta: float) -> float:
        """The pair, as a fraction, that makes `rotations` turns over the original context."""
        wavelength = self.original_context_length / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))
