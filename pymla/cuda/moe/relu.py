"""The square of ReLU."""

import numpy as np
from numba import cuda

from pymla.cuda.matmul.operands import THREADS
from pymla.cuda.runtime.array_types import F1
from pymla.cuda.runtime.jit import kernel


@kernel(F1, max_threads=THREADS)
def relu_squared(x):
    """``x = max(x, 0)²``"""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < len(x):
        value = max(x[i], np.float32(0))
        x[i] = value * value
