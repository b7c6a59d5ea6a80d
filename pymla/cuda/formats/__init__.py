"""Blocks of the ggml types, as kernels read them. Twin of `pymla.cpu.formats`.

Kernels of products copy a *run* of blocks to shared memory, in the pieces of 16 bytes that lie around it, and read
whole blocks of 32 weights there. Rows of q4_0, q8_0 and q6_K begin at any multiple of 2, so that words are put together
from two aligned ones. The first and the last piece may hold bytes of other rows, or of no row: allocations are
multiples of 512 bytes (`pymla.cuda.memory`).

Kernels that read a few blocks only take *pieces* of them from global memory: four neighbouring lanes share 32 weights,
and lane w of them has the eight weights 4w to 4w + 3 and 16 + 4w to 16 + 4w + 3, as two words of four int8 codes.

A weight is ``scale * code + minimum``. Codes of 4 and 6 bits stay in the high bits of their bytes, where it takes one
operation to make them signed: they are 16 or 4 times what the file says, and the scale is as much smaller, exactly.
"""

from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cuda.machine.ptx import (
    cp_async_16,
    dp4a,
    f16_value,
    fma,
    funnel_shift_r,
    load_bf16,
    load_f16,
    load_f32,
    load_f32x4,
    load_i8,
    load_shared_u16,
    load_shared_u32,
    load_u16,
    load_u32,
    load_u32x2,
    prmt,
    to_f32,
    unpack_bf16x2,
    unpack_f16x2,
)
from pymla.cuda.runtime.jit import device

__all__ = ["FLOATS", "FORMATS", "FloatFormat", "Format", "Run", "copying"]


class Format(NamedTuple):
    """What a kernel's factory takes for a quantised type: device functions, and what the numbers of a block mean."""

    #: (row, block, w) -> (word, word, float32, float32): a piece of block `block` of 32 weights of the row at an
    #: address, and two numbers, the first of which is the scale.
    piece: object
    #: (piece) -> the eight weights, float32.
    weights: object
    #: (address, i) -> (eight words, float32, float32): block i of 32 weights of a run at an address of shared memory.
    block: object
    #: (block, eight words, scale, total, sum) -> float32: ``sum`` and the block's product with words of activation
    #: codes, where activations are ``scale * code`` and all 32 of them add up to `total`.
    dot: object
    halves: bool  # the second number is the scale of the second half
    minimum: bool  # the second number is the minimum


class Run(NamedTuple):
    """Blocks of 32 weights of a row that follow each other."""

    blocks: int
    nbytes: int
    pieces: int  # of 16 bytes, where they lie anywhere

    @classmethod
    def of(cls, qtype, blocks):
        """`blocks` blocks of a type, or as few more as its own blocks take."""
        blocks = max(blocks, ggml.BLOCK_SIZE[qtype] // 32)
        nbytes = ggml.row_bytes(qtype, 32 * blocks)
        return cls(blocks, nbytes, -(-(nbytes + 14) // 16))


def copying(run, step):
    """A device function (to, start, nbytes, first): begins to copy the first `nbytes` bytes of a run at address `start`
    to shared memory. Of the pieces of 16 bytes that hold them it copies those from number `first`, which is below
    `step`, on, `step` apart. The first byte comes to ``to + start % 16``, where `to` is a multiple of 16."""
    most = -(-run.pieces // step)

    @device
    def copy(to, start, nbytes, first):
        skip = start & 15
        for k in range(most):
            piece = 16 * (first + step * k)
            # 32 bits are enough, and half as many instructions.
            if np.int32(piece) < np.int32(skip + nbytes):
                cp_async_16(to + piece, start - skip + piece, 16)

    return copy


class FloatFormat(NamedTuple):
    """What a kernel's factory takes for a float type: device functions of an address."""

    one: object  # a weight, as float32
    four: object  # four weights; the address is a multiple of their bytes
    nbytes: int  # of a weight


@device
def unaligned_word(at):
    """The word at an address that 2 divides, from the one or two aligned words that hold it."""
    return funnel_shift_r(load_u32(at & -4), load_u32(at + 2 & -4), at << 3)


@device
def _q4_0(row, block, w):
    at = row + 18 * block
    codes = unaligned_word(at + 2 + 4 * w)
    d = load_f16(at) * np.float32(1 / 16)
    return _high_nibbles(codes << 4), _high_nibbles(codes), d, d


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
    return (
        _six_bits(unaligned_word(low), unaligned_word(high), right, left),
        _six_bits(unaligned_word(low + 16), unaligned_word(high + 16), right, left),
        d * to_f32(load_i8(scales)),
        d * to_f32(load_i8(scales + 1)),
    )


@device
def _low_half(word, skip):
    """The half at byte `skip`, 0 or 2, of a word, as float32."""
    return f16_value(prmt(word, 0, 0x4410 + 0x11 * skip))


@device
def _words4(at, skip):
    """Four words, and `skip` bytes, 0 to 4, behind an address of shared memory that 4 divides."""
    selector = 0x3210 + 0x1111 * skip
    w0, w1, w2 = load_shared_u32(at), load_shared_u32(at + 4), load_shared_u32(at + 8)
    w3, w4 = load_shared_u32(at + 12), load_shared_u32(at + 16)
    return prmt(w0, w1, selector), prmt(w1, w2, selector), prmt(w2, w3, selector), prmt(w3, w4, selector)


@device
def _words8(at, skip):
    """`_words4`, eight of them."""
    return _words4(at, skip) + _words4(at + 16, skip)


@device
def _q4_0_block(at, i):
    at += 18 * i
    aligned, skip = at - (at & 2), at & 2
    w0, w1, w2, w3 = _words4(aligned, skip + 2)
    codes = (
        _high_nibbles(w0 << 4),
        _high_nibbles(w1 << 4),
        _high_nibbles(w2 << 4),
        _high_nibbles(w3 << 4),
        _high_nibbles(w0),
        _high_nibbles(w1),
        _high_nibbles(w2),
        _high_nibbles(w3),
    )
    d = _low_half(load_shared_u32(aligned), skip) * np.float32(1 / 16)
    return codes, d, d


@device
def _high_nibbles(word):
    """Signed codes of 4 bits, of which 8 is zero."""
    return (word & 0xF0F0F0F0) ^ 0x80808080


@device
def _q4_1_block(at, i):
    at += 20 * i
    w0, w1 = load_shared_u32(at + 4), load_shared_u32(at + 8)
    w2, w3 = load_shared_u32(at + 12), load_shared_u32(at + 16)
    codes = (
        w0 & 0x0F0F0F0F,
        w1 & 0x0F0F0F0F,
        w2 & 0x0F0F0F0F,
        w3 & 0x0F0F0F0F,
        w0 >> 4 & 0x0F0F0F0F,
        w1 >> 4 & 0x0F0F0F0F,
        w2 >> 4 & 0x0F0F0F0F,
        w3 >> 4 & 0x0F0F0F0F,
    )
    d, m = unpack_f16x2(load_shared_u32(at))
    return codes, d, m


@device
def _q8_0_block(at, i):
    at += 34 * i
    aligned, skip = at - (at & 2), at & 2
    d = _low_half(load_shared_u32(aligned), skip)
    return _words8(aligned, skip + 2), d, d


@device
def _q6_k_block(at, i):
    """As `_q6_k`."""
    at, half, quarter = at + 210 * (i >> 3), i >> 2 & 1, i & 3
    aligned, skip = at - (at & 2), at & 2
    right, left = quarter & 2, 6 - 2 * quarter
    l0, l1, l2, l3, l4, l5, l6, l7 = _words8(aligned + 64 * half + 32 * (quarter & 1), skip)
    h0, h1, h2, h3, h4, h5, h6, h7 = _words8(aligned + 128 + 32 * half, skip)
    codes = (
        _six_bits(l0, h0, right, left),
        _six_bits(l1, h1, right, left),
        _six_bits(l2, h2, right, left),
        _six_bits(l3, h3, right, left),
        _six_bits(l4, h4, right, left),
        _six_bits(l5, h5, right, left),
        _six_bits(l6, h6, right, left),
        _six_bits(l7, h7, right, left),
    )
    scales = load_shared_u16(at + 192 + 8 * half + 2 * quarter)
    d = f16_value(load_shared_u16(at + 208)) * np.float32(1 / 4)
    return codes, d * to_f32(prmt(scales, 0, 0x8880)), d * to_f32(prmt(scales, 0, 0x9991))


@device
def _six_bits(low, high, right, left):
    """Signed codes of 6 bits, of which 32 is zero, from bytes that hold their low four bits and their high two."""
    return (low << 2 >> 2 * right & 0x3C3C3C3C | high << left & 0xC0C0C0C0) ^ 0x80808080


@device
def _half_dot(c0, c1, c2, c3, x0, x1, x2, x3, sum):
    """`sum` and the product of 16 codes, integers."""
    return dp4a(c3, x3, dp4a(c2, x2, dp4a(c1, x1, dp4a(c0, x0, sum))))


@device
def _whole_dot(c, x):
    """The product of 32 codes, as float32."""
    first = _half_dot(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], 0)
    return to_f32(_half_dot(c[4], c[5], c[6], c[7], x[4], x[5], x[6], x[7], first))


@device
def _dot(block, x, scale, total, sum):
    codes, d, _ = block
    return fma(scale * d, _whole_dot(codes, x), sum)


@device
def _dot_minimum(block, x, scale, total, sum):
    codes, d, m = block
    return fma(scale * d, _whole_dot(codes, x), fma(m, total, sum))


@device
def _dot_halves(block, x, scale, total, sum):
    c, d0, d1 = block
    first = to_f32(_half_dot(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], 0))
    second = to_f32(_half_dot(c[4], c[5], c[6], c[7], x[4], x[5], x[6], x[7], 0))
    return fma(scale, fma(d0, first, d1 * second), sum)


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
    ggml.Q4_0: Format(_q4_0, _weights(False, False), _q4_0_block, _dot, halves=False, minimum=False),
    ggml.Q4_1: Format(_q4_1, _weights(False, True), _q4_1_block, _dot_minimum, halves=False, minimum=True),
    ggml.Q8_0: Format(_q8_0, _weights(False, False), _q8_0_block, _dot, halves=False, minimum=False),
    ggml.Q6_K: Format(_q6_k, _weights(True, False), _q6_k_block, _dot_halves, halves=True, minimum=False),
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
