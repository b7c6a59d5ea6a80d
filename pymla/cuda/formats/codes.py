"""Steps that several types share: words at any even address, and products of codes with activations."""

import numpy as np

from pymla.cuda.machine.ptx import dp4a, f16_value, fma, funnel_shift_r, load_shared_u32, load_u32_around, prmt, to_f32
from pymla.cuda.runtime.jit import device

#: Four codes of one.
_ONES = 0x01010101


@device
def unaligned_word(at):
    """The word at an address that 2 divides, from the one or two aligned words that hold it."""
    return funnel_shift_r(load_u32_around(at & -4), load_u32_around(at + 2 & -4), at << 3)


@device
def low_half(word, skip):
    """The half at byte `skip`, 0 or 2, of a word, as float32."""
    return f16_value(prmt(word, 0, 0x4410 + 0x11 * skip))


@device
def words4(at, skip):
    """Four words, and `skip` bytes, 0 to 4, behind an address of shared memory that 4 divides."""
    selector = 0x3210 + 0x1111 * skip
    w0, w1, w2 = load_shared_u32(at), load_shared_u32(at + 4), load_shared_u32(at + 8)
    w3, w4 = load_shared_u32(at + 12), load_shared_u32(at + 16)
    return prmt(w0, w1, selector), prmt(w1, w2, selector), prmt(w2, w3, selector), prmt(w3, w4, selector)


@device
def words8(at, skip):
    """`words4`, eight of them."""
    return words4(at, skip) + words4(at + 16, skip)


@device
def code_values(word):
    """Four signed bytes as float32."""
    return (
        to_f32(prmt(word, 0, 0x8880)),
        to_f32(prmt(word, 0, 0x9991)),
        to_f32(prmt(word, 0, 0xAAA2)),
        to_f32(prmt(word, 0, 0xBBB3)),
    )


def weights_of(halves=False, minimum=False):
    """`Format.weights` of a type whose blocks have a scale for each half, or a minimum."""

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


@device
def weights_with_minima(piece):
    """`Format.weights` of a type whose blocks have a minimum for each half."""
    c0, c1, d, minima = piece
    e0, e1, e2, e3 = code_values(c0)
    e4, e5, e6, e7 = code_values(c1)
    step = f16_value(minima >> 16)
    m0, m1 = step * to_f32(minima & 255), step * to_f32(minima >> 8 & 255)
    return (
        fma(d, e0, m0),
        fma(d, e1, m0),
        fma(d, e2, m0),
        fma(d, e3, m0),
        fma(d, e4, m1),
        fma(d, e5, m1),
        fma(d, e6, m1),
        fma(d, e7, m1),
    )


@device
def half_dot(c0, c1, c2, c3, x0, x1, x2, x3, sum):
    """`sum` and the product of 16 codes, integers."""
    return dp4a(c3, x3, dp4a(c2, x2, dp4a(c1, x1, dp4a(c0, x0, sum))))


@device
def whole_dot(c, x):
    """The product of 32 codes, as float32."""
    first = half_dot(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], 0)
    return to_f32(half_dot(c[4], c[5], c[6], c[7], x[4], x[5], x[6], x[7], first))


@device
def dot(block, x, scale, total, sum):
    """`Format.dot` of blocks with one scale."""
    codes, d, _ = block
    return fma(scale * d, whole_dot(codes, x), sum)


@device
def dot_with_minimum(block, x, scale, total, sum):
    """`Format.dot` of blocks with a scale and a minimum."""
    codes, d, m = block
    return fma(scale * d, whole_dot(codes, x), fma(m, total, sum))


@device
def dot_of_halves(block, x, scale, total, sum):
    """`Format.dot` of blocks with a scale for each half."""
    c, d0, d1 = block
    first = to_f32(half_dot(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], 0))
    second = to_f32(half_dot(c[4], c[5], c[6], c[7], x[4], x[5], x[6], x[7], 0))
    return fma(scale, fma(d0, first, d1 * second), sum)


@device
def dot_with_minima(block, x, scale, total, sum):
    """`Format.dot` of blocks with a scale, and a minimum for each half."""
    codes, d, minima = block
    # The sums of activations are computed once for all rows.
    first = half_dot(_ONES, _ONES, _ONES, _ONES, x[0], x[1], x[2], x[3], 0)
    second = half_dot(_ONES, _ONES, _ONES, _ONES, x[4], x[5], x[6], x[7], 0)
    lows = (minima & 255) * first + (minima >> 8 & 255) * second
    return fma(scale * d, whole_dot(codes, x), fma(scale * f16_value(minima >> 16), to_f32(lows), sum))
