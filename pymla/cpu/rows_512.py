"""Products of rows of weights with one activation vector in registers of 64 bytes, for AVX-512 with VNNI.

Twice as wide as the registers of `pymla.cpu.formats`, and with bytes picked from anywhere in two registers by one
instruction, so that a core keeps up with memory. Each register has sixteen codes of four blocks, which is the order of
the activations (`place`); the scales of the four blocks are spread over its lanes.
"""

import numpy as np

from pymla.cpu.compiling import inline, unrolled
from pymla.cpu.simd import (
    all_128,
    bit_or,
    dot_i16,
    dot_u8x64,
    even_quarters,
    flip_sign_bits,
    fma,
    halve,
    halves_18,
    high_nibbles,
    load_bits_2,
    load_f16,
    load_f32x4,
    load_f32x4_twice,
    load_f32x8,
    load_i8_as_i16,
    load_i8x64,
    load_i16x16,
    load_quarters,
    load_scales,
    load_scales_4,
    low_nibbles,
    mul,
    odd_quarters,
    prefetch_bytes,
    quarters,
    splat_f32,
    spread,
    sub,
    subtract_i32x16,
    times_32,
    times_scales_8,
    to_f32,
    to_f32x16,
    total,
    zero_f32x16,
    zero_i32x16,
)


@inline
def place(block, blocks):
    """Where the activations of a block stand, of whole fours of blocks: its first sixteen codes, and bytes from there
    to the others."""
    return block // 4 * 128 + block % 4 * 16, 64


@unrolled
def dot_4_bits(size, header, row, ahead, codes, scale, sums, columns):
    """Whole fours of blocks of Q4_0, whose blocks have 18 bytes and a header of 2, or Q4_1, with 20 and 4.

    Codes stay unsigned: Q4_0's zero point of 8 comes off by the sums of the activations, like a minimum.
    """
    acc, minima = zero_f32x16(), splat_f32(np.float32(0))
    for _ in range(columns // 256):
        prefetch_bytes(ahead, 144)
        x, y, z = load_i8x64(row), load_i8x64(row + 64), load_i8x64(row + 8 * size - 64)
        d = halves_18(x, y) if size == 18 else load_scales(row, size)
        products = _nibbles_times(quarters(x, y, size, header, 0), codes)
        others = _nibbles_times(quarters(y, z, size, header, 1), codes + 128)
        minima = fma(d if size == 18 else load_scales(row + 2, size), load_f32x8(sums), minima)
        factor = mul(d, load_f32x8(scale))
        acc = fma(to_f32x16(products), spread(factor, 0), acc)
        acc = fma(to_f32x16(others), spread(factor, 1), acc)
        row, ahead, codes, scale, sums = row + 8 * size, ahead + 8 * size, codes + 256, scale + 32, sums + 32
    if columns % 256 >= 128:
        prefetch_bytes(ahead, 72)
        d = load_scales_4(row, size)
        products = _nibbles_times(load_quarters(row, size, header), codes)
        minima = fma(d if size == 18 else load_scales_4(row + 2, size), load_f32x4(sums), minima)
        acc = fma(to_f32x16(products), spread(mul(d, load_f32x4_twice(scale)), 0), acc)
    return total(fma(minima, splat_f32(np.float32(-8 if size == 18 else 1)), halve(acc)))


@unrolled
def _nibbles_times(packed, codes):
    """Products of four blocks' nibbles with their activations."""
    low = dot_u8x64(zero_i32x16(), low_nibbles(packed), load_i8x64(codes))
    return dot_u8x64(low, high_nibbles(packed), load_i8x64(codes + 64))


@unrolled
def dot_q8_0(row, ahead, codes, scale, columns):
    """Whole fours of blocks of Q8_0."""
    acc = zero_f32x16()
    for _ in range(columns // 256):
        prefetch_bytes(ahead, 272)
        factor = mul(load_scales(row, 34), load_f32x8(scale))
        acc = fma(to_f32x16(_bytes_times(row, codes)), spread(factor, 0), acc)
        acc = fma(to_f32x16(_bytes_times(row + 136, codes + 128)), spread(factor, 1), acc)
        row, ahead, codes, scale = row + 272, ahead + 272, codes + 256, scale + 32
    if columns % 256 >= 128:
        prefetch_bytes(ahead, 136)
        factor = mul(load_scales_4(row, 34), load_f32x4_twice(scale))
        acc = fma(to_f32x16(_bytes_times(row, codes)), spread(factor, 0), acc)
    return total(halve(acc))


@unrolled
def _bytes_times(row, codes):
    """Products of four blocks of Q8_0 with their activations. Codes become unsigned, 128 more, and the products with
    128 are taken off."""
    low, high = load_quarters(row, 34, 2), load_quarters(row, 34, 18)
    x, y = load_i8x64(codes), load_i8x64(codes + 64)
    products = dot_u8x64(dot_u8x64(zero_i32x16(), flip_sign_bits(low), x), flip_sign_bits(high), y)
    return subtract_i32x16(products, dot_u8x64(dot_u8x64(zero_i32x16(), all_128(), x), all_128(), y))


@unrolled
def dot_q6_k(row, ahead, codes, scale, sum16, columns):
    """Q6_K. Codes stay unsigned, from 0 to 63; the zero point of 32 comes off by the sums of sixteen activations."""
    acc, offsets = zero_f32x16(), splat_f32(np.float32(0))
    for _ in range(columns // 256):
        prefetch_bytes(ahead, 210)
        factor = mul(splat_f32(load_f16(row + 208)), load_f32x8(scale))
        products = _q6_times(row, row + 128, row + 192, codes)
        acc = fma(to_f32x16(products), spread(factor, 0), acc)
        products = _q6_times(row + 64, row + 160, row + 200, codes + 128)
        acc = fma(to_f32x16(products), spread(factor, 1), acc)
        offset = times_32(dot_i16(load_i8_as_i16(row + 192), load_i16x16(sum16)))
        offsets = fma(to_f32(offset), factor, offsets)
        row, ahead, codes, scale, sum16 = row + 210, ahead + 210, codes + 256, scale + 32, sum16 + 32
    return total(sub(halve(acc), offsets))


@unrolled
def _q6_times(nibbles, high, scales, codes):
    """Products of four blocks, times their two scales; addresses of their 64 bytes of nibbles, 32 bytes of high bits,
    scales and activations."""
    packed = load_i8x64(nibbles)
    low_of_two, high_of_two = low_nibbles(packed), high_nibbles(packed)
    first = bit_or(even_quarters(low_of_two, high_of_two), load_bits_2(high))
    second = bit_or(odd_quarters(low_of_two, high_of_two), load_bits_2(high + 16))
    products = dot_u8x64(zero_i32x16(), first, load_i8x64(codes))
    return times_scales_8(products, dot_u8x64(zero_i32x16(), second, load_i8x64(codes + 64)), scales)
