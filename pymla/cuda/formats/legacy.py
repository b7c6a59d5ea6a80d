"""Types of 32 weights with a float16 scale, and of some a float16 minimum: q4_0, q4_1, q5_0, q5_1,
q8_0.

Rows of q4_0, q5_0 and q8_0 begin at any multiple of 2, so that words are put together from two aligned ones.
"""

import numpy as np

from pymla.cuda.formats.codes import dot, dot_with_minimum, low_half, unaligned_word, weights_of, words4, words8
from pymla.cuda.formats.format import Format
from pymla.cuda.machine.ptx import load_f16, load_shared_u32, load_u32, prmt, unpack_f16x2
from pymla.cuda.runtime.jit import device


@device
def _q4_0_piece(row, block, w):
    at = row + 18 * block
    codes = unaligned_word(at + 2 + 4 * w)
    d = load_f16(at) * np.float32(1 / 16)
    return _high_nibbles(codes << 4), _high_nibbles(codes), d, d


@device
def _q4_0_block(at, i):
    at += 18 * i
    aligned, skip = at - (at & 2), at & 2
    w0, w1, w2, w3 = words4(aligned, skip + 2)
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
    d = low_half(load_shared_u32(aligned), skip) * np.float32(1 / 16)
    return codes, d, d


@device
def _high_nibbles(word):
    """Signed codes of 4 bits, of which 8 is zero."""
    return (word & 0xF0F0F0F0) ^ 0x80808080


@device
def _q4_1_piece(row, block, w):
    at = row + 20 * block
    codes = load_u32(at + 4 + 4 * w)
    d, m = unpack_f16x2(load_u32(at))
    return codes & 0x0F0F0F0F, codes >> 4 & 0x0F0F0F0F, d, m


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
def _fifth_bits(bits):
    """The low four bits, each as the lowest one of a byte."""
    return (bits & 15) * 0x00204081 & 0x01010101


@device
def _signed_five(low, bits):
    """Signed codes of 5 bits, of which 16 is zero, from bytes that hold their low four bits from bit 3 on, and the
    fifth bits."""
    return (low & 0x78787878 | _fifth_bits(bits) << 7) ^ 0x80808080


@device
def _five(low, bits):
    """Codes of 5 bits from bytes that hold their low four bits, and the fifth bits."""
    return low & 0x0F0F0F0F | _fifth_bits(bits) << 4


@device
def _q5_0_piece(row, block, w):
    at = row + 22 * block
    fifth, codes = unaligned_word(at + 2) >> 4 * w, unaligned_word(at + 6 + 4 * w)
    d = load_f16(at) * np.float32(1 / 8)
    return _signed_five(codes << 3, fifth), _signed_five(codes >> 1, fifth >> 16), d, d


@device
def _q5_0_block(at, i):
    at += 22 * i
    aligned, skip = at - (at & 2), at & 2
    first = load_shared_u32(aligned)
    fifth = prmt(first, load_shared_u32(aligned + 4), 0x5432 + 0x1111 * skip)
    w0, w1, w2, w3 = words4(aligned + 4, skip + 2)
    codes = (
        _signed_five(w0 << 3, fifth),
        _signed_five(w1 << 3, fifth >> 4),
        _signed_five(w2 << 3, fifth >> 8),
        _signed_five(w3 << 3, fifth >> 12),
        _signed_five(w0 >> 1, fifth >> 16),
        _signed_five(w1 >> 1, fifth >> 20),
        _signed_five(w2 >> 1, fifth >> 24),
        _signed_five(w3 >> 1, fifth >> 28),
    )
    d = low_half(first, skip) * np.float32(1 / 8)
    return codes, d, d


@device
def _q5_1_piece(row, block, w):
    at = row + 24 * block
    fifth, codes = load_u32(at + 4) >> 4 * w, load_u32(at + 8 + 4 * w)
    d, m = unpack_f16x2(load_u32(at))
    return _five(codes, fifth), _five(codes >> 4, fifth >> 16), d, m


@device
def _q5_1_block(at, i):
    at += 24 * i
    fifth = load_shared_u32(at + 4)
    w0, w1 = load_shared_u32(at + 8), load_shared_u32(at + 12)
    w2, w3 = load_shared_u32(at + 16), load_shared_u32(at + 20)
    codes = (
        _five(w0, fifth),
        _five(w1, fifth >> 4),
        _five(w2, fifth >> 8),
        _five(w3, fifth >> 12),
        _five(w0 >> 4, fifth >> 16),
        _five(w1 >> 4, fifth >> 20),
        _five(w2 >> 4, fifth >> 24),
        _five(w3 >> 4, fifth >> 28),
    )
    d, m = unpack_f16x2(load_shared_u32(at))
    return codes, d, m


@device
def _q8_0_piece(row, block, w):
    at = row + 34 * block
    d = load_f16(at)
    return unaligned_word(at + 2 + 4 * w), unaligned_word(at + 18 + 4 * w), d, d


@device
def _q8_0_block(at, i):
    at += 34 * i
    aligned, skip = at - (at & 2), at & 2
    d = low_half(load_shared_u32(aligned), skip)
    return words8(aligned, skip + 2), d, d


Q4_0 = Format(_q4_0_piece, weights_of(), _q4_0_block, dot)
Q4_1 = Format(_q4_1_piece, weights_of(minimum=True), _q4_1_block, dot_with_minimum, minimum=True)
Q5_0 = Format(_q5_0_piece, weights_of(), _q5_0_block, dot)
Q5_1 = Format(_q5_1_piece, weights_of(minimum=True), _q5_1_block, dot_with_minimum, minimum=True)
Q8_0 = Format(_q8_0_piece, weights_of(), _q8_0_block, dot)
