"""Rows of legacy types times the activations of one token, in registers of 32 bytes.

Blocks of 32 weights go eight at a time: the halves of a register have sixteen codes of two blocks, four blocks apart
(`orders.FOURS`). The four rows follow each other: there are too few registers for more than one.
"""

import numpy as np

from pymla.cpu.formats.fifth_bits import add_fifth_bits_32, load_fifth_bits_2, sums_as_i32
from pymla.cpu.machine.simd import (
    fma,
    high_nibbles,
    load_f16,
    load_f32,
    load_f32x4,
    load_f32x4_twice,
    load_f32x8,
    load_i8x32,
    load_i32,
    load_nibbles,
    load_pair,
    load_scales,
    load_scales_4,
    low_nibbles,
    mul,
    splat_f32,
    total,
)
from pymla.cpu.machine.simd_bytes import dot_i8, dot_u6, sum_blocks, sum_blocks_i32, to_f32, zero_i32x8, zero_sums
from pymla.cpu.runtime.compiling import helper, inlined


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
    """Codes stay unsigned, which saves instructions: Q4_0's zero point of 8 is taken off by the sums of activations,
    like a minimum."""
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
def dot_5_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Whole fours of blocks of four rows of Q5_0, with blocks of 22 bytes and a header of 6, or Q5_1, with 24 and 8.
    The last four bytes of the header are the fifth bits."""
    a, b, c, d = rows
    return (
        _row_5_bits(size, header, a, codes, scale, sums, columns),
        _row_5_bits(size, header, b, codes, scale, sums, columns),
        _row_5_bits(size, header, c, codes, scale, sums, columns),
        _row_5_bits(size, header, d, codes, scale, sums, columns),
    )


@helper
def _row_5_bits(size, header, row, codes, scale, sums, columns):
    """As `_row_4_bits`; but without VNNI, sums of two products are all that int16 hold."""
    acc = splat_f32(np.float32(0))
    shift = splat_f32(np.float32(-16))
    for _ in range(columns // 256):
        d, at = load_scales(row, size), row + header - 4
        a = _dot_pair_5_bits(at, at + 4 * size, codes)
        b = _dot_pair_5_bits(at + size, at + 5 * size, codes + 64)
        c = _dot_pair_5_bits(at + 2 * size, at + 6 * size, codes + 128)
        e = _dot_pair_5_bits(at + 3 * size, at + 7 * size, codes + 192)
        m = mul(d, shift) if size == 22 else load_scales(row + 2, size)
        acc = fma(m, load_f32x8(sums), acc)
        acc = fma(to_f32(sum_blocks_i32(a, b, c, e)), mul(d, load_f32x8(scale)), acc)
        row, codes, scale, sums = row + 8 * size, codes + 256, scale + 32, sums + 32
    if columns % 256 >= 128:
        d, at = load_scales_4(row, size), row + header - 4
        a = _dot_block_5_bits(at, codes)
        b = _dot_block_5_bits(at + size, codes + 32)
        c = _dot_block_5_bits(at + 2 * size, codes + 64)
        e = _dot_block_5_bits(at + 3 * size, codes + 96)
        m = mul(d, shift) if size == 22 else load_scales_4(row + 2, size)
        acc = fma(m, load_f32x4(sums), acc)
        acc = fma(to_f32(sum_blocks_i32(a, b, c, e)), mul(d, load_f32x4_twice(scale)), acc)
    return total(acc)


@inlined
def _dot_pair_5_bits(first, second, codes):
    """Products of two blocks, whose words of fifth bits are at two addresses, with their 64 activations."""
    low_bits, high_bits = load_fifth_bits_2(first, second)
    packed = load_pair(first + 4, second + 4)
    low = dot_u6(zero_sums(), add_fifth_bits_32(low_nibbles(packed), low_bits), load_i8x32(codes))
    both = dot_u6(low, add_fifth_bits_32(high_nibbles(packed), high_bits), load_i8x32(codes + 32))
    return sums_as_i32(both)


@inlined
def _dot_block_5_bits(word, codes):
    """Products of a block, whose word of fifth bits is at an address, with its 32 activations."""
    weights = add_fifth_bits_32(load_nibbles(word + 4), load_i32(word))
    return sums_as_i32(dot_u6(zero_sums(), weights, load_i8x32(codes)))


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


#: There are too few registers for the codes of a row and the sums of four tokens.
dot_4_bits_of_tokens = dot_5_bits_of_tokens = dot_q8_0_of_tokens = None
