"""Rotary position embedding, on interleaved pairs and on halves, and the attention temperature. Twin of
`pymla.reference.rope`.

>>> import numpy as np
>>> from pymla.cpu import rope
>>> quarter = rope.angles(np.array([1], np.int32), np.array([np.pi / 2]), 1.0, np.empty((1, 1, 2), np.float32))
>>> rope.rope_interleaved(np.array([[[7, 1, 0]]], np.float32), quarter).round(5).tolist()
[[[7.0, 0.0, 1.0]]]
"""

import numpy as np
from numba import types

from pymla.cpu.contract import check
from pymla.cpu.runtime.array_types import A3, D1, F3, I1
from pymla.cpu.runtime.jit import Kernel, kernel


def angles(positions: np.ndarray, inv_freq: np.ndarray, magnitude: float, out: np.ndarray) -> np.ndarray:
    """Cosines and sines: ``out[t, i] = magnitude * (cos, sin)(positions[t] * inv_freq[i])``.

    `positions` int32 (T,), `inv_freq` float64 (n,), `out` float32 (T, n, 2).
    """
    check.angles(positions, inv_freq, magnitude, out)
    _angles[len(positions), 16](positions, inv_freq, magnitude, out)
    return out


def rope_interleaved(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """Rotate the last ``2 * cos_sin.shape[1]`` values of every head of x, float32 (T, H, D), in place."""
    check.rope_interleaved(x, cos_sin)
    _rope_interleaved[len(x)](x, cos_sin)
    return x


def rope_neox(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """As `rope_interleaved`, but a pair is a number of the first half of the rotated ones and one of the second."""
    check.rope_neox(x, cos_sin)
    _rope_neox[len(x)](x, cos_sin)
    return x


def temper(x: np.ndarray, positions: np.ndarray, scale: float, length: int) -> np.ndarray:
    """``x[t] *= 1 + scale * ln(1 + positions[t] // length)``, in place.

    `x` float32 (T, H, D), `positions` int32 (T,).
    """
    check.temper(x, positions, scale, length)
    _temper[len(x)](x, positions, scale, length)
    return x


def kernels(config) -> list[Kernel]:
    """The kernels that this module launches for a model with this configuration, or for any one where it is None."""
    if config is None:
        return [_angles, _rope_interleaved, _rope_neox, _temper]
    rotate = [_rope_interleaved if interleave else _rope_neox for interleave in config.rope_layouts]
    return [_angles, *rotate, *([_temper] if config.attention_temperature else [])]


@kernel(I1, D1, types.float64, F3)
def _angles(first, last, positions, inv_freq, magnitude, out):
    for t in range(first, last):
        for i in range(len(inv_freq)):
            angle = positions[t] * inv_freq[i]
            out[t, i, 0] = magnitude * np.cos(angle)
            out[t, i, 1] = magnitude * np.sin(angle)


@kernel(A3, A3)
def _rope_interleaved(first, last, x, cos_sin):
    _, heads, size = x.shape
    pairs = cos_sin.shape[1]
    for t in range(first, last):
        for h in range(heads):
            for i in range(pairs):
                at = size - 2 * pairs + 2 * i
                even, odd = x[t, h, at], x[t, h, at + 1]
                cos, sin = cos_sin[t, i, 0], cos_sin[t, i, 1]
                x[t, h, at] = even * cos - odd * sin
                x[t, h, at + 1] = even * sin + odd * cos


@kernel(A3, A3)
def _rope_neox(first, last, x, cos_sin):
    _, heads, size = x.shape
    pairs = cos_sin.shape[1]
    for t in range(first, last):
        for h in range(heads):
            for i in range(pairs):
                at = size - 2 * pairs + i
                one, other = x[t, h, at], x[t, h, at + pairs]
                cos, sin = cos_sin[t, i, 0], cos_sin[t, i, 1]
                x[t, h, at] = one * cos - other * sin
                x[t, h, at + pairs] = one * sin + other * cos


@kernel(F3, I1, types.float64, types.int64)
def _temper(first, last, x, positions, scale, length):
    _, heads, size = x.shape
    for t in range(first, last):
        lengths = positions[t] // length
        if lengths:
            factor = np.float32(1 + scale * np.log(1.0 + lengths))
            for h in range(heads):
                for i in range(size):
                    x[t, h, i] *= factor
