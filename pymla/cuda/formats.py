"""Blocks of the ggml types, as kernels read them. Twin of `pymla.cpu.formats`.

Threads read *pieces*: four neighbouring lanes share 32 weights, and lane w of them has the eight weights 4w to 4w + 3
and 16 + 4w to 16 + 4w + 3, as two words of four int8 codes that multiply words w and w + 4 of 32 activation codes. So a
warp reads 8 blocks that follow each other, every byte once, and no address needs to be a multiple of more than 2: rows
of q4_0, q8_0 and q6_K begin anywhere.

A weight is ``scale * code + minimum``. Codes of 4 and 6 bits stay in the high bits of their bytes, where it takes one
operation to make them signed: they are 16 or 4 times what the file says, and the scale is as much smaller, exactly.
"""

from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cuda.jit import device
from pymla.cuda.ptx import (
    dp4a,
    f16_value,
    fma,
    load_bf16,
    load_f16,
    load_f32,
    load_f32x4,
    load_i8,
    load_u16,
    load_u32,
    load_u32x2,
    prmt,
    to_f32,
    unpack_bf16x2,
    unpack_f16x2,
)

__all__ = ["FLOATS", "FORMATS", "FloatFormat", "Format"]


class Format(NamedTuple):
    """What a kernel's factory takes for a quantised type: device functions, and what the numbers of a piece mean."""

    #: (row, block, w) -> (word, word, float32, float32): codes of block `block` of 32 weights of the row at an address,
    #: and two numbers, the first of which is the scale.
    piece: object
    #: (piece, x0, x1, scale, total, sum) -> float32: ``sum`` and the piece's product with two words of activation
    #: codes, where activations are ``scale * code`` and all 32 of them add up to `total`.
    dot: object
    #: (piece) -> the eight weights, float32.
    weights: object
    halves: bool  # the second number is the scale of the second word
    minimum: bool  # the second number is the minimum


class FloatFormat(NamedTuple):
    """What a kernel's factory takes for a float type: device functions of an address."""

    one: object  # a weight, as float32
    four: object  # four weights; the address is a multiple of their bytes
    nbytes: int  # of a weight


@device
def unaligned_word(at):
    """The word at an address that 2 divides."""
    return load_u16(at) | load_u16(at + 2) << 16


@device
def _q4_0(row, block, w):
    at = row + 18 * block
    codes = unaligned_word(at + 2 + 4 * w)
    d = load_f16(at) * np.float32(1 / 16)
    return (codes << 4 & 0xF0F0F0F0) ^ 0x80808080, (codes & 0xF0F0F0F0) ^ 0x80808080, d, d


@device
def _q4_1(row, block, w):
    at = row + 20 * block
    codes = load_u32(at + 4 + 4 * w)
    d, m = unpack_f16x2(load_u32(at))
    return codes & 0x0F0F0F0F, codes >> 4 & 0x0F0F0F0F, d, m


@device
def _q8_0(row, block, w):
    at = row + 34 * block
    d = load_f16(at)
    return unaligned_word(at + 2 + 4 * w), unaligned_word(at + 18 + 4 * w), d, d


@device
def _q6_k(row, block, w):
    """Of a half of 128 weights, 32 at a time: bytes of `low` hold the first two and, in their high nibbles, the last
    two; bytes of `high` two bits of each of the four."""
    at, half, quarter = row + 210 * (block >> 3), block >> 2 & 1, block & 3
    low, high = at + 64 * half + 32 * (quarter & 1) + 4 * w, at + 128 + 32 * half + 4 * w
    right, left = quarter & 2, 6 - 2 * quarter
    d, scales = f16_value(load_u16(at + 208)) * np.float32(1 / 4), at + 192 + 8 * half + 2 * quarter
    low0, low1 = unaligned_word(low) << 2 >> 2 * right, unaligned_word(low + 16) << 2 >> 2 * right
    high0, high1 = unaligned_word(high) << left, unaligned_word(high + 16) << left
    return (
        (low0 & 0x3C3C3C3C | high0 & 0xC0C0C0C0) ^ 0x80808080,
        (low1 & 0x3C3C3C3C | high1 & 0xC0C0C0C0) ^ 0x80808080,
        d * to_f32(load_i8(scales)),
        d * to_f32(load_i8(scales + 1)),
    )


@device
def _dot(piece, x0, x1, scale, total, sum):
    c0, c1, d, _ = piece
    return fma(scale * d, to_f32(dp4a(c1, x1, dp4a(c0, x0, 0))), sum)


@device
def _dot_minimum(piece, x0, x1, scale, total, sum):
    c0, c1, d, m = piece
    # Each of four lanes adds a quarter.
    return fma(scale * d, to_f32(dp4a(c1, x1, dp4a(c0, x0, 0))), fma(m, total * np.float32(1 / 4), sum))


@device
def _dot_halves(piece, x0, x1, scale, total, sum):
    c0, c1, d0, d1 = piece
    return fma(scale, fma(d0, to_f32(dp4a(c0, x0, 0)), d1 * to_f32(dp4a(c1, x1, 0))), sum)


@device
def code_values(word):
    """Four signed bytes as float32."""
    return (
        to_f32(prmt(word, 0, 0x8880)),
        to_f32(prmt(word, 0, 0x9991)),
        to_f32(prmt(word, 0, 0xAAA2)),
        to_f32(prmt(word, 0, 0xBBB3)),
    )


def _weights(halves, minimum):
    """`Format.weights`."""

    @device
    def weights(piece):
        c0, c1, d, other = piece
        e0, e1, e2, e3 = code_values(c0)
        e4, e5, e6, e7 = code_values(c1)
        second = other if halves else d
        m = other if minimum else np.float32(0)
        return (
            fma(d, e0, m),
            fma(d, e1, m),
            fma(d, e2, m),
            fma(d, e3, m),
            fma(second, e4, m),
            fma(second, e5, m),
            fma(second, e6, m),
            fma(second, e7, m),
        )

    return weights


#: Quantised types.
FORMATS = {
    ggml.Q4_0: Format(_q4_0, _dot, _weights(False, False), halves=False, minimum=False),
    ggml.Q4_1: Format(_q4_1, _dot_minimum, _weights(False, True), halves=False, minimum=True),
    ggml.Q8_0: Format(_q8_0, _dot, _weights(False, False), halves=False, minimum=False),
    ggml.Q6_K: Format(_q6_k, _dot_halves, _weights(True, False), halves=True, minimum=False),
}


@device
def _f16x4(at):
    low, high = load_u32x2(at)
    a, b = unpack_f16x2(low)
    c, d = unpack_f16x2(high)
    return a, b, c, d


@device
def _bf16x4(at):
    low, high = load_u32x2(at)
    a, b = unpack_bf16x2(low)
    c, d = unpack_bf16x2(high)
    return a, b, c, d


#: Float types.
FLOATS = {
    ggml.F32: FloatFormat(load_f32, load_f32x4, 4),
    ggml.F16: FloatFormat(load_f16, _f16x4, 2),
    ggml.BF16: FloatFormat(load_bf16, _bf16x4, 2),
}
