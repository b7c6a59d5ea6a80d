"""SiLU of gate times up."""

import numpy as np

from pymla.cpu.array_types import F2
from pymla.cpu.machine.simd import add, address, div, exp, load_f32x8, mul, splat_f32, store_f32x8, sub
from pymla.cpu.runtime.jit import helper, kernel


@helper
def silu_mul(x, y, out, count):
    """``out = x / (1 + exp(-x)) * y`` of `count` float32; addresses. Up to 7 more are written where `count` is no
    multiple of 8."""
    one, zero = splat_f32(np.float32(1)), splat_f32(np.float32(0))
    for i in range(0, 4 * count, 32):
        value = load_f32x8(x + i)
        value = div(value, add(one, exp(sub(zero, value))))
        store_f32x8(out + i, mul(value, load_f32x8(y + i)))


@helper
def silu(x):
    """``x / (1 + exp(-x))`` of one number."""
    return x / (np.float32(1) + np.exp(-x))


@kernel(F2, F2)
def silu_mul_tokens(first, last, x, y):
    """``x = silu(x) * y`` over tokens."""
    count = x.shape[1]
    for t in range(first, last):
        silu_mul(address(x[t]), address(y[t]), address(x[t]), count // 8 * 8)
        for i in range(count // 8 * 8, count):
            x[t, i] = silu(x[t, i]) * y[t, i]
