"""Products of rows of weights with one activation vector in registers of 32 bytes.

Blocks of 32 weights go eight at a time: the halves of a register have sixteen codes of two blocks, four blocks apart.
The four rows follow each other: there are too few registers for more than one.
"""

import numpy as np

from pymla.cpu.machine.simd import (
    bit_or,
    bits_2,
    fma,
    high_nibbles,
    load_f16,
    load_f32,
    load_f32x4,
    load_f32x4_twice,
    load_f32x8,
    load_i8x32,
    load_nibbles,
    load_pair,
    load_scales,
    load_scales_4,
    low_nibbles,
    mul,
    splat_f32,
    total,
)
from pymla.cpu.machine.simd_bytes import (
    add_times,
    dot_i8,
    dot_i16,
    dot_u6,
    load_i8_as_i16,
    load_i16x16,
    subtract_i32,
    sum_blocks,
    sum_blocks_i32,
    times_32,
    to_f32,
    zero_i32x8,
    zero_sums,
)
from pymla.cpu.runtime.compiling import helper, inlined


@helper
def place(block, blocks):
    """Where the activations of a block stand, of whole fours of blocks: its first sixteen codes, and bytes from there
    to the others. An odd four at the end keeps the order of its columns."""
    if block >= blocks // 8 * 8:
        return 32 * block, 16
    return block // 8 * 256 + block % 4 * 64 + block // 4 % 2 * 16, 32


@inlined
def dot_4_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Whole fours of blocks of four rows of Q4_0, with blocks of 18 bytes and a header of 2, or Q4_1, with 20 and 4."""
    a, b, c, d = rows
    return (
        _row_4_bits(size, header, a, codes, scale, sums, columns),
        _row_4_bits(size, header, b, codes, scale, sums, columns),
        _row_4_bits(size, header, c, codes, scale, sums, columns),
        _row_4_bits(size, header, d, codes, scale, sums, columns),
    )


@helper
def _row_4_bits(size, header, row, codes, scale, sums, columns):
    """Codes stay unsigned, which saves instructions: Q4_0's zero point of 8 comes off by the sums, like a
    minimum."""
    zero = zero_sums()
    acc = splat_f32(np.float32(0))
    shift = splat_f32(np.float32(-8))
    for _ in range(columns // 256):
        d, at = load_scales(row, size), row + header
        a = _dot_pair(zero, load_pair(at, at + 4 * size), codes)
        b = _dot_pair(zero, load_pair(at + size, at + 5 * size), codes + 64)
        c = _dot_pair(zero, load_pair(at + 2 * size, at + 6 * size), codes + 128)
        e = _dot_pair(zero, load_pair(at + 3 * size, at + 7 * size), codes + 192)
        m = mul(d, shift) if size == 18 else load_scales(row + 2, size)
        acc = fma(m, load_f32x8(sums), acc)
        acc = fma(to_f32(sum_blocks(a, b, c, e)), mul(d, load_f32x8(scale)), acc)
        row, codes, scale, sums = row + 8 * size, codes + 256, scale + 32, sums + 32
    if columns % 256 >= 128:
        d, at = load_scales_4(row, size), row + header
        a = dot_u6(zero, load_nibbles(at), load_i8x32(codes))
        b = dot_u6(zero, load_nibbles(at + size), load_i8x32(codes + 32))
        c = dot_u6(zero, load_nibbles(at + 2 * size), load_i8x32(codes + 64))
        e = dot_u6(zero, load_nibbles(at + 3 * size), load_i8x32(codes + 96))
        m = mul(d, shift) if size == 18 else load_scales_4(row + 2, size)
        acc = fma(m, load_f32x4(sums), acc)
        acc = fma(to_f32(sum_blocks(a, b, c, e)), mul(d, load_f32x4_twice(scale)), acc)
    return total(acc)


@inlined
def _dot_pair(zero, packed, codes):
    """Products of two blocks' nibbles with their 64 activations."""
    low = dot_u6(zero, low_nibbles(packed), load_i8x32(codes))
    return dot_u6(low, high_nibbles(packed), load_i8x32(codes + 32))


@inlined
def dot_q8_0(rows, codes, scale, columns):
    """Whole fours of blocks of four rows of Q8_0."""
    a, b, c, d = rows
    return (
        _row_q8_0(a, codes, scale, columns),
        _row_q8_0(b, codes, scale, columns),
        _row_q8_0(c, codes, scale, columns),
        _row_q8_0(d, codes, scale, columns),
    )


@helper
def _row_q8_0(row, codes, scale, columns):
    acc = splat_f32(np.float32(0))
    for _ in range(columns // 256):
        a = _dot_pair_q8_0(row + 2, codes)
        b = _dot_pair_q8_0(row + 36, codes + 64)
        c = _dot_pair_q8_0(row + 70, codes + 128)
        e = _dot_pair_q8_0(row + 104, codes + 192)
        factor = mul(load_scales(row, 34), load_f32x8(scale))
        acc = fma(to_f32(sum_blocks_i32(a, b, c, e)), factor, acc)
        row, codes, scale = row + 272, codes + 256, scale + 32
    for _ in range(columns % 256 // 128 * 4):
        products = dot_i8(zero_i32x8(), load_i8x32(row + 2), load_i8x32(codes))
        acc = fma(to_f32(products), splat_f32(load_f16(row) * load_f32(scale)), acc)
        row, codes, scale = row + 34, codes + 32, scale + 4
    return total(acc)


@inlined
def _dot_pair_q8_0(weights, codes):
    """Products of two blocks of Q8_0, four blocks apart, with their 64 activations."""
    low = dot_i8(zero_i32x8(), load_pair(weights, weights + 136), load_i8x32(codes))
    return dot_i8(low, load_pair(weights + 16, weights + 152), load_i8x32(codes + 32))


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
