"""Types of 256 weights with scales for 16 or 32 of them: q6_K."""

import numpy as np

from pymla.cuda.formats.codes import dot_of_halves, unaligned_word, weights_of, words8
from pymla.cuda.formats.format import Format
from pymla.cuda.machine.ptx import f16_value, load_i8, load_shared_u16, load_u16, prmt, to_f32
from pymla.cuda.runtime.jit import device


@device
def _q6_k_piece(row, block, w):
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
def _q6_k_block(at, i):
    """As `_q6_k_piece`."""
    at, half, quarter = at + 210 * (i >> 3), i >> 2 & 1, i & 3
    aligned, skip = at - (at & 2), at & 2
    right, left = quarter & 2, 6 - 2 * quarter
    l0, l1, l2, l3, l4, l5, l6, l7 = words8(aligned + 64 * half + 32 * (quarter & 1), skip)
    h0, h1, h2, h3, h4, h5, h6, h7 = words8(aligned + 128 + 32 * half, skip)
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


Q6_K = Format(_q6_k_piece, weights_of(halves=True), _q6_k_block, dot_of_halves, halves=True)
