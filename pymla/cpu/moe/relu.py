"""The square of ReLU."""

import numpy as np

from pymla.cpu.runtime.array_types import F2
from pymla.cpu.runtime.jit import kernel


@kernel(F2)
def relu_squared_tokens(first, last, x):
    """``x = max(x, 0)²`` over tokens."""
    for t in range(first, last):
        for i in range(x.shape[1]):
            value = max(x[t, i], np.float32(0))
            x[t, i] = value * value
