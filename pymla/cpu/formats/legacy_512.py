"""Rows of legacy types times the activations of one token, in registers of 64 bytes, for AVX-512 with VNNI.

Bytes are picked from anywhere in two registers by one instruction, so that a core keeps up with memory. Each register
has sixteen codes of four blocks, which is the order of the activations (`orders.FOURS`); the scales of the four blocks
are spread over its lanes. Blocks of Q4_0 go eight at a time, with eight codes of each in a register (`orders.EIGHTS`):
they lie so close that two loads have the bytes for each, and the sums of all four registers meet in one, which takes
scales once.
"""

import numpy as np

from pymla.cpu.formats.fifth_bits import (
    add_fifth_bits_64,
    even_lanes,
    fifth_bits_4,
    halves_4,
    load_pairs_4,
    quarters,
)
from pymla.cpu.machine.simd import (
    add,
    fma,
    high_nibbles,
    load_f32x4,
    load_f32x4_twice,
    load_f32x8,
    load_scales,
    load_scales_4,
    load_scales_and_minima,
    low_nibbles,
    mul,
    splat_f32,
    totals,
)
from pymla.cpu.machine.simd_512 import (
    all_128,
    dot_u8x64,
    eighths_18,
    first_quarters_20,
    flip_sign_bits,
    halve,
    halves_18,
    last_quarters_20,
    load_firsts,
    load_i8x64,
    load_quarters,
    load_seconds,
    load_starts,
    spread,
    spread_pairs,
    subtract_i32x16,
    to_f32x16,
    zero_f32x16,
    zero_i32x16,
)
from pymla.cpu.memory import fetch_ahead
from pymla.cpu.runtime.compiling import inlined


@inlined
def dot_4_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Whole fours of blocks of four rows of Q4_0, whose blocks have 18 bytes and a header of 2, or Q4_1, with 20 and 4.

    Codes stay unsigned. Q4_0's zero point of 8 is taken off by the sums of the activations: of eight blocks, the sums
    of products begin with it; of the last four, it is subtracted like a minimum.
    """
    a, b, c, d = rows
    zero, none = zero_f32x16(), splat_f32(np.float32(0))
    acc_a, acc_b, acc_c, acc_d = zero, zero, zero, zero
    min_a, min_b, min_c, min_d = none, none, none, none
    for _ in range(columns // 256):
        x = load_i8x64(codes), load_i8x64(codes + 64), load_i8x64(codes + 128), load_i8x64(codes + 192)
        s, m, z = load_f32x8(scale), load_f32x8(sums), load_starts(starts)
        acc_a, min_a = _add_eight(size, a, x, s, m, z, acc_a, min_a)
        acc_b, min_b = _add_eight(size, b, x, s, m, z, acc_b, min_b)
        acc_c, min_c = _add_eight(size, c, x, s, m, z, acc_c, min_c)
        acc_d, min_d = _add_eight(size, d, x, s, m, z, acc_d, min_d)
        a, b, c, d = a + 8 * size, b + 8 * size, c + 8 * size, d + 8 * size
        codes, scale, sums, starts = codes + 256, scale + 32, sums + 32, starts + 32
    if columns % 256 >= 128:
        s, m = load_f32x4_twice(scale), load_f32x4(sums)
        acc_a, min_a = _add_four(size, header, a, codes, s, m, acc_a, min_a)
        acc_b, min_b = _add_four(size, header, b, codes, s, m, acc_b, min_b)
        acc_c, min_c = _add_four(size, header, c, codes, s, m, acc_c, min_c)
        acc_d, min_d = _add_four(size, header, d, codes, s, m, acc_d, min_d)
    w = splat_f32(np.float32(-8 if size == 18 else 1))
    return totals(
        fma(min_a, w, halve(acc_a)),
        fma(min_b, w, halve(acc_b)),
        fma(min_c, w, halve(acc_c)),
        fma(min_d, w, halve(acc_d)),
    )


@inlined
def _add_eight(size, row, x, s, m, z, acc, minima):
    """Add products of eight blocks and of their minima."""
    fetch_ahead(row, 8 * size)
    if size == 18:
        return _add_eight_q4_0(row, x, s, z, acc), minima
    first, second, last = load_i8x64(row), load_i8x64(row + 64), load_i8x64(row + 96)
    d, minimum = load_scales_and_minima(row, 20)
    products = _nibbles_times(first_quarters_20(first, second), x[0], x[1])
    others = _nibbles_times(last_quarters_20(second, last), x[2], x[3])
    factor = mul(d, s)
    acc = fma(to_f32x16(products), spread(factor, 0), acc)
    acc = fma(to_f32x16(others), spread(factor, 1), acc)
    return acc, fma(minimum, m, minima)


@inlined
def _add_eight_q4_0(row, x, s, z, acc):
    """The same for Q4_0, with sums that begin with minus eight times those of the activations."""
    head, other = load_i8x64(row), load_i8x64(row + 72)
    first, second = eighths_18(head, other), eighths_18(load_i8x64(row + 8), load_i8x64(row + 80))
    products = dot_u8x64(dot_u8x64(z, low_nibbles(first), x[0]), high_nibbles(first), x[1])
    products = dot_u8x64(dot_u8x64(products, low_nibbles(second), x[2]), high_nibbles(second), x[3])
    return fma(to_f32x16(products), spread_pairs(mul(halves_18(head, other), s)), acc)


@inlined
def _add_four(size, header, row, codes, s, m, acc, minima):
    """Add products of four blocks and of their minima."""
    d = load_scales_4(row, size)
    products = _nibbles_times(load_quarters(row, size, header), load_i8x64(codes), load_i8x64(codes + 64))
    acc = fma(to_f32x16(products), spread(mul(d, s), 0), acc)
    return acc, fma(d if size == 18 else load_scales_4(row + 2, size), m, minima)


@inlined
def _nibbles_times(packed, x, y):
    """Products of four blocks' nibbles with their activations."""
    return dot_u8x64(dot_u8x64(zero_i32x16(), low_nibbles(packed), x), high_nibbles(packed), y)


@inlined
def dot_5_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Whole fours of blocks of four rows of Q5_0, whose blocks have 22 bytes and a header of 6, or Q5_1, with 24 and 8.
    The last four bytes of the header are the fifth bits.

    Codes stay unsigned. Q5_0's zero point of 16 is taken off by the sums of the activations, with which the sums of
    products begin; Q5_1's minima are multiplied by these sums, in lanes of their own.
    """
    a, b, c, d = rows
    zero = zero_f32x16()
    acc_a, acc_b, acc_c, acc_d = zero, zero, zero, zero
    min_a, min_b, min_c, min_d = zero, zero, zero, zero
    for _ in range(columns // 128):
        x, s, m = (load_i8x64(codes), load_i8x64(codes + 64)), load_f32x4_twice(scale), load_seconds(sums)
        z = load_firsts(starts, 2) if size == 22 else zero_i32x16()
        acc_a, min_a = _add_four_5_bits(size, header, a, x, s, m, z, acc_a, min_a)
        acc_b, min_b = _add_four_5_bits(size, header, b, x, s, m, z, acc_b, min_b)
        acc_c, min_c = _add_four_5_bits(size, header, c, x, s, m, z, acc_c, min_c)
        acc_d, min_d = _add_four_5_bits(size, header, d, x, s, m, z, acc_d, min_d)
        a, b, c, d = a + 4 * size, b + 4 * size, c + 4 * size, d + 4 * size
        codes, scale, sums, starts = codes + 128, scale + 16, sums + 16, starts + 16
    return totals(
        halve(add(acc_a, min_a)), halve(add(acc_b, min_b)), halve(add(acc_c, min_c)), halve(add(acc_d, min_d))
    )


@inlined
def _add_four_5_bits(size, header, row, x, s, m, z, acc, minima):
    """Add products of four blocks and of their minima. Two loads have all of their bytes."""
    fetch_ahead(row, 4 * size)
    first, last = load_i8x64(row), load_i8x64(row + 4 * size - 64)
    packed, fifth = quarters(first, last, size, header), fifth_bits_4(first, last, size, header)
    products = dot_u8x64(z, add_fifth_bits_64(low_nibbles(packed), fifth, 0), x[0])
    products = dot_u8x64(products, add_fifth_bits_64(high_nibbles(packed), fifth, 1), x[1])
    if size == 22:
        return fma(to_f32x16(products), spread(mul(halves_4(first, last, size), s), 0), acc), minima
    pairs = load_pairs_4(row, size)
    return fma(to_f32x16(products), mul(even_lanes(pairs), spread(s, 0)), acc), fma(pairs, m, minima)


@inlined
def dot_q8_0(rows, codes, scale, columns):
    """Whole fours of blocks of four rows of Q8_0. Codes become unsigned, 128 more, and the products with 128 are taken
    off."""
    a, b, c, d = rows
    zero = zero_f32x16()
    acc_a, acc_b, acc_c, acc_d = zero, zero, zero, zero
    for _ in range(columns // 256):
        s = load_f32x8(scale)
        first, second = _offset(codes), _offset(codes + 128)
        acc_a = _add_eight_q8_0(a, codes, first, second, s, acc_a)
        acc_b = _add_eight_q8_0(b, codes, first, second, s, acc_b)
        acc_c = _add_eight_q8_0(c, codes, first, second, s, acc_c)
        acc_d = _add_eight_q8_0(d, codes, first, second, s, acc_d)
        a, b, c, d, codes, scale = a + 272, b + 272, c + 272, d + 272, codes + 256, scale + 32
    if columns % 256 >= 128:
        s, offset = load_f32x4_twice(scale), _offset(codes)
        acc_a = fma(to_f32x16(_bytes_times(a, codes, offset)), spread(mul(load_scales_4(a, 34), s), 0), acc_a)
        acc_b = fma(to_f32x16(_bytes_times(b, codes, offset)), spread(mul(load_scales_4(b, 34), s), 0), acc_b)
        acc_c = fma(to_f32x16(_bytes_times(c, codes, offset)), spread(mul(load_scales_4(c, 34), s), 0), acc_c)
        acc_d = fma(to_f32x16(_bytes_times(d, codes, offset)), spread(mul(load_scales_4(d, 34), s), 0), acc_d)
    return totals(halve(acc_a), halve(acc_b), halve(acc_c), halve(acc_d))


@inlined
def _offset(codes):
    """Minus the products of 128 with the activations of four blocks."""
    products = dot_u8x64(zero_i32x16(), all_128(), load_i8x64(codes))
    return subtract_i32x16(zero_i32x16(), dot_u8x64(products, all_128(), load_i8x64(codes + 64)))


@inlined
def _add_eight_q8_0(row, codes, first, second, s, acc):
    fetch_ahead(row, 272)
    factor = mul(load_scales(row, 34), s)
    acc = fma(to_f32x16(_bytes_times(row, codes, first)), spread(factor, 0), acc)
    return fma(to_f32x16(_bytes_times(row + 136, codes + 128, second)), spread(factor, 1), acc)


@inlined
def _bytes_times(row, codes, offset):
    """Products of four blocks of Q8_0 with their activations."""
    low, high = flip_sign_bits(load_quarters(row, 34, 2)), flip_sign_bits(load_quarters(row, 34, 18))
    return dot_u8x64(dot_u8x64(offset, low, load_i8x64(codes)), high, load_i8x64(codes + 64))
