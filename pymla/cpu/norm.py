"""RMS normalisation and the residual sum. Twin of `pymla.reference.norm`.

>>> import numpy as np
>>> from pymla.cpu import norm
>>> x = np.ones((2, 64), np.float32)
>>> float(norm.rms_norm(x, np.full(64, 3, np.float32), 0.0, np.empty_like(x))[1, 5])
3.0
"""

import numpy as np
from numba import prange, types

from pymla.cpu.jit import kernel

MATRIX = types.Array(types.float32, 2, "C")
ROWS = types.Array(types.float32, 2, "A")
VECTOR = types.Array(types.float32, 1, "C", readonly=True)


def rms_norm(x, weight, eps, out):
    """``out = x / sqrt(mean(x²) + eps) * weight`` along the last axis; float32 (T, K), `weight` float32 (K,).

    `x` may be rows of a wider array.
    """
    _rms_norm(x, weight, eps, out)
    return out


def add(x, y):
    """``x += y``, both float32 (T, K)."""
    _add(x, y)
    return x


@kernel(ROWS, VECTOR, types.float64, MATRIX)
def _rms_norm(x, weight, eps, out):
    columns = x.shape[1]
    for t in prange(len(x)):
        square = np.float32(0)
        for i in range(columns):
            square += x[t, i] * x[t, i]
        scale = np.float32(1 / np.sqrt(np.float64(square) / columns + eps))
        for i in range(columns):
            out[t, i] = x[t, i] * scale * weight[i]


@kernel(MATRIX, MATRIX)
def _add(x, y):
    for t in prange(len(x)):
        for i in range(x.shape[1]):
            x[t, i] += y[t, i]
