"""Rows of K-quants times the activations of one token, in registers of 32 bytes.

The halves of a register have sixteen codes of two blocks of 32 weights, four blocks apart (`orders.FOURS`). The four
rows follow each other: there are too few registers for more than one.
"""

import numpy as np

from pymla.cpu.machine.simd import (
    bit_or,
    bits_2,
    fma,
    high_nibbles,
    load_f16,
    load_f32x8,
    load_i8x32,
    load_pair,
    low_nibbles,
    mul,
    splat_f32,
    total,
)
from pymla.cpu.machine.simd_bytes import (
    add_times,
    dot_i16,
    dot_u6,
    load_i8_as_i16,
    load_i16x16,
    subtract_i32,
    sum_blocks_i32,
    times_32,
    to_f32,
    zero_i32x8,
    zero_sums,
)
from pymla.cpu.runtime.compiling import helper, inlined


@inlined
def dot_q6_k(rows, codes, scale, sum16, columns):
    """Four rows of Q6_K."""
    a, b, c, d = rows
    return (
        _row_q6_k(a, codes, scale, sum16, columns),
        _row_q6_k(b, codes, scale, sum16, columns),
        _row_q6_k(c, codes, scale, sum16, columns),
        _row_q6_k(d, codes, scale, sum16, columns),
    )


@helper
def _row_q6_k(row, codes, scale, sum16, columns):
    """Codes stay unsigned, from 0 to 63; a block's products meet the scales of its sixteens as integers."""
    acc = splat_f32(np.float32(0))
    zero = zero_i32x8()
    for _ in range(columns // 256):
        # Register n of a half's 64 bytes has weights 16 n to 16 n + 15 in its low nibbles, 64 further ones in its high.
        n0, n1 = load_pair(row, row + 64), load_pair(row + 16, row + 80)
        n2, n3 = load_pair(row + 32, row + 96), load_pair(row + 48, row + 112)
        high0, high1 = load_pair(row + 128, row + 160), load_pair(row + 144, row + 176)
        s = load_i8_as_i16(row + 192)
        a = add_times(zero, _dot_q6(low_nibbles(n0), high0, 0, codes), s, 0)
        a = add_times(a, _dot_q6(low_nibbles(n1), high1, 0, codes + 32), s, 1)
        b = add_times(zero, _dot_q6(low_nibbles(n2), high0, 2, codes + 64), s, 2)
        b = add_times(b, _dot_q6(low_nibbles(n3), high1, 2, codes + 96), s, 3)
        c = add_times(zero, _dot_q6(high_nibbles(n0), high0, 4, codes + 128), s, 4)
        c = add_times(c, _dot_q6(high_nibbles(n1), high1, 4, codes + 160), s, 5)
        e = add_times(zero, _dot_q6(high_nibbles(n2), high0, 6, codes + 192), s, 6)
        e = add_times(e, _dot_q6(high_nibbles(n3), high1, 6, codes + 224), s, 7)
        offset = times_32(dot_i16(s, load_i16x16(sum16)))
        products = subtract_i32(sum_blocks_i32(a, b, c, e), offset)
        factor = mul(splat_f32(load_f16(row + 208)), load_f32x8(scale))
        acc = fma(to_f32(products), factor, acc)
        row, codes, scale, sum16 = row + 210, codes + 256, scale + 32, sum16 + 32
    return total(acc)


@inlined
def _dot_q6(nibbles, high, shift, codes):
    """Products of sixteen weights of two blocks, of which `high` has the two upper bits at `shift`."""
    return dot_u6(zero_sums(), bit_or(nibbles, bits_2(high, shift)), load_i8x32(codes))


#: There are too few registers for the codes of a row and the sums of four tokens.
dot_q6_k_of_tokens = None
