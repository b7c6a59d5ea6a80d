"""RMS normalisation and the residual sum. Twin of `pymla.reference.norm`."""

import numpy as np
from numba import cuda, types

from pymla.cuda.jit import kernel
from pymla.cuda.ptx import WARP, div, fma, lane, sqrt, to_f32, warp_sum

F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "C")
ROWS = types.Array(types.float32, 2, "A")

THREADS = 256
_WARPS = THREADS // WARP


def rms_norm(x, weight, eps, out):
    """``out = x / sqrt(mean(x²) + eps) * weight`` along the last axis; float32 (T, K), `weight` float32 (K,).

    `x` may be columns of a wider array.
    """
    _rms_norm[len(x), THREADS](x, weight, eps, out)
    return out


def add(x, y):
    """``x += y``, both float32 (T, K), contiguous."""
    _add[-(-x.size // THREADS), THREADS](x.reshape(-1), y.reshape(-1))
    return x


@kernel(ROWS, F1, types.float32, F2, max_threads=THREADS)
def _rms_norm(x, weight, eps, out):
    """A block takes a token."""
    partial = cuda.shared.array(_WARPS, np.float32)
    t, i = cuda.blockIdx.x, cuda.threadIdx.x
    columns = x.shape[1]
    square = np.float32(0)
    for k in range(i, columns, THREADS):
        square = fma(x[t, k], x[t, k], square)
    square = warp_sum(square)
    if lane() == 0:
        partial[i // WARP] = square
    cuda.syncthreads()
    square = np.float32(0)
    for warp in range(_WARPS):
        square += partial[warp]
    scale = div(np.float32(1), sqrt(div(square, to_f32(columns)) + eps))
    for k in range(i, columns, THREADS):
        out[t, k] = x[t, k] * scale * weight[k]


@kernel(F1, F1, max_threads=THREADS)
def _add(x, y):
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < len(x):
        x[i] += y[i]
