"""Types of 32 weights with a float16 scale, and of some a float16 minimum: q4_0, q4_1, q8_0.

Rows of q4_0 and q8_0 begin at any multiple of 2, so that words are put together from two aligned ones.
"""

import numpy as np

from pymla.cuda.formats.codes import dot, dot_with_minimum, low_half, unaligned_word, weights_of, words4, words8
from pymla.cuda.formats.format import Format
from pymla.cuda.machine.ptx import load_f16, load_shared_u32, load_u32, unpack_f16x2
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
Q8_0 = Format(_q8_0_piece, weights_of(), _q8_0_block, dot)
