"""Rotary position embedding, on interleaved pairs and on halves, and the attention temperature. Twin of
`pymla.reference.rope`."""

import math

import numpy as np
from numba import cuda, types

from pymla.cuda.contract import check
from pymla.cuda.runtime.array_types import D1, F2, F3, F32, I1, I64, STRIDED3
from pymla.cuda.runtime.jit import kernel

#: Threads of a block: pairs, and heads.
_PAIRS, _HEADS = 32, 4
#: Threads of a block that multiplies queries.
_TEMPERING = 256
#: Positions are below it, and a length from there on tempers nothing.
_LONGEST = 2**31


def angles(positions, inv_freq, magnitude, out):
    """Cosines and sines: ``out[t, i] = magnitude * (cos, sin)(positions[t] * inv_freq[i])``.

    `positions` int32 (T,), `inv_freq` float64 (n,), `out` float32 (T, n, 2). Once per step, in float64.
    """
    check.angles(positions, inv_freq, magnitude, out)
    _angles[len(positions), _PAIRS](positions, inv_freq, magnitude, out)
    return out


def rope_interleaved(x, cos_sin):
    """Rotate the last ``2 * cos_sin.shape[1]`` values of every head of x, float32 (T, H, D), in place.

    `x` may be part of a wider array.
    """
    check.rope_interleaved(x, cos_sin)
    _rope_interleaved[_grid(x), (_PAIRS, _HEADS)](x, cos_sin)
    return x


def rope_neox(x, cos_sin):
    """As `rope_interleaved`, but a pair is a number of the first half of the rotated ones and one of the second."""
    check.rope_neox(x, cos_sin)
    _rope_neox[_grid(x), (_PAIRS, _HEADS)](x, cos_sin)
    return x


def _grid(x):
    """Blocks for the tokens and the heads of `x`."""
    return len(x), -(-x.shape[1] // _HEADS)


def temper(x, positions, scale, length):
    """``x[t] *= 1 + scale * ln(1 + positions[t] // length)``, in place; `x` float32 (T, H, D), contiguous, `positions`
    int32 (T,)."""
    check.temper(x, positions, scale, length)
    rows = x.reshape(len(x), -1)
    _temper[(len(x), -(-rows.shape[1] // _TEMPERING)), _TEMPERING](rows, positions, scale, min(length, _LONGEST))
    return x


def kernels(config):
    """The kernels that this module launches, for a model with this configuration, or for any one where it is None."""
    if config is None:
        return [_angles, _rope_interleaved, _rope_neox, _temper]
    rotate = [_rope_interleaved if interleave else _rope_neox for interleave in config.rope_layouts]
    return [_angles, *rotate, *([_temper] if config.attention_temperature else [])]


@kernel(I1, D1, types.float64, F3, max_threads=_PAIRS, hot=False)
def _angles(positions, inv_freq, magnitude, out):
    """A block takes a token."""
    t = cuda.blockIdx.x
    for i in range(cuda.threadIdx.x, len(inv_freq), _PAIRS):
        angle = positions[t] * inv_freq[i]
        out[t, i, 0] = magnitude * math.cos(angle)
        out[t, i, 1] = magnitude * math.sin(angle)


@kernel(STRIDED3, F3, max_threads=_PAIRS * _HEADS)
def _rope_interleaved(x, cos_sin):
    """A block takes some heads of a token, a warp one of them."""
    t, h = cuda.blockIdx.x, cuda.blockIdx.y * _HEADS + cuda.threadIdx.y
    if h < x.shape[1]:
        pairs = cos_sin.shape[1]
        for i in range(cuda.threadIdx.x, pairs, _PAIRS):
            at = x.shape[2] - 2 * pairs + 2 * i
            even, odd = x[t, h, at], x[t, h, at + 1]
            cos, sin = cos_sin[t, i, 0], cos_sin[t, i, 1]
            x[t, h, at] = even * cos - odd * sin
            x[t, h, at + 1] = even * sin + odd * cos


@kernel(STRIDED3, F3, max_threads=_PAIRS * _HEADS)
def _rope_neox(x, cos_sin):
    """Blocks and warps as for `_rope_interleaved`."""
    t, h = cuda.blockIdx.x, cuda.blockIdx.y * _HEADS + cuda.threadIdx.y
    if h < x.shape[1]:
        pairs = cos_sin.shape[1]
        for i in range(cuda.threadIdx.x, pairs, _PAIRS):
            at = x.shape[2] - 2 * pairs + i
            one, other = x[t, h, at], x[t, h, at + pairs]
            cos, sin = cos_sin[t, i, 0], cos_sin[t, i, 1]
            x[t, h, at] = one * cos - other * sin
            x[t, h, at + pairs] = one * sin + other * cos


@kernel(F2, I1, F32, I64, max_threads=_TEMPERING)
def _temper(x, positions, scale, length):
    """A block takes some numbers of a token."""
    t, i = cuda.blockIdx.x, cuda.blockIdx.y * _TEMPERING + cuda.threadIdx.x
    # In 32 bits: a division of 64 bits takes some 100 instructions.
    lengths = np.uint32(positions[t]) // np.uint32(length)
    if lengths > 0 and i < x.shape[1]:
        x[t, i] *= np.float32(1) + scale * math.log(np.float32(1 + lengths))
