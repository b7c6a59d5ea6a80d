"""Rotary position embedding on interleaved pairs. Twin of `pymla.reference.rope`."""

from numba import prange, types

from pymla.cpu.jit import kernel
from pymla.reference.rope import angles

__all__ = ["angles", "rope_interleaved"]

F3 = types.Array(types.float32, 3, "A")


def rope_interleaved(x, cos_sin):
    """Rotate the last ``2 * cos_sin.shape[1]`` values of every head of x, float32 (T, H, D), in place."""
    _rope_interleaved(x, cos_sin)
    return x


@kernel(F3, F3)
def _rope_interleaved(x, cos_sin):
    tokens, heads, size = x.shape
    pairs = cos_sin.shape[1]
    for t in prange(tokens):
        for h in range(heads):
            for i in range(pairs):
                at = size - 2 * pairs + 2 * i
                even, odd = x[t, h, at], x[t, h, at + 1]
                cos, sin = cos_sin[t, i, 0], cos_sin[t, i, 1]
                x[t, h, at] = even * cos - odd * sin
                x[t, h, at + 1] = even * sin + odd * cos
