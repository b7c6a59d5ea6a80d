"""The nonlinearity between gate, up and down."""

import numpy as np
from numba import cuda

from pymla.constants import LOG2E
from pymla.cuda.machine.ptx import div, exp2
from pymla.cuda.matmul.operands import THREADS
from pymla.cuda.runtime.array_types import F1
from pymla.cuda.runtime.jit import device, kernel

_ONE = np.float32(1)

_LOG2E = np.float32(LOG2E)


@device
def silu(x):
    """``x / (1 + exp(−x))``"""
    return div(x, _ONE + exp2(-x * _LOG2E))


@kernel(F1, F1, max_threads=THREADS)
def silu_mul(x, y):
    """``x = silu(x) * y``"""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < len(x):
        x[i] = silu(x[i]) * y[i]


def multiply_gated(x, y):
    """``x = silu(x) * y`` of contiguous arrays."""
    silu_mul[-(-x.size // THREADS), THREADS](x.reshape(-1), y.reshape(-1))
