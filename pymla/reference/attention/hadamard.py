"""Rows of the cache times a Hadamard matrix (`pymla.pages.HADAMARD_TYPES`)."""

import numpy as np

from pymla.pages import MIXED


def mix(x: np.ndarray) -> np.ndarray:
    """Every 32 neighbours times the Hadamard matrix of 32 rows of 1 and -1, which Sylvester made: in their dtype, by
    sums and differences of two numbers.

    Parameters
    ----------
    x : float array (..., n), n a multiple of 32
    """
    shape, distance = x.shape, 1
    while distance < MIXED:
        pairs = x.reshape(-1, 2, distance)
        x, distance = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1), 2 * distance
    return x.reshape(shape)
