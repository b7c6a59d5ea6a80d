"""Rows of K-quants times the activations of one token, in registers of 64 bytes, for AVX-512 with VNNI.

Each register has sixteen codes of four blocks of 32 weights, which is the order of the activations (`orders.FOURS`).
"""

import numpy as np

from pymla.cpu.machine.simd import (
    bit_or,
    fma,
    high_nibbles,
    load_f16,
    load_f32x8,
    low_nibbles,
    mul,
    splat_f32,
    sub,
    totals,
)
from pymla.cpu.machine.simd_512 import (
    dot_u8x64,
    even_quarters,
    halve,
    load_bits_2,
    load_i8x64,
    odd_quarters,
    spread,
    times_scales_8,
    to_f32x16,
    zero_f32x16,
    zero_i32x16,
)
from pymla.cpu.machine.simd_bytes import dot_i16, load_i8_as_i16, load_i16x16, times_32, to_f32
from pymla.cpu.memory import fetch_ahead
from pymla.cpu.runtime.compiling import inlined


@inlined
def dot_q6_k(rows, codes, scale, sum16, columns):
    """Four rows of Q6_K. Codes stay unsigned, from 0 to 63; the zero point of 32 comes off by the sums of sixteen
    activations."""
    a, b, c, d = rows
    zero, none = zero_f32x16(), splat_f32(np.float32(0))
    acc_a, acc_b, acc_c, acc_d = zero, zero, zero, zero
    off_a, off_b, off_c, off_d = none, none, none, none
    for _ in range(columns // 256):
        s, sums = load_f32x8(scale), load_i16x16(sum16)
        acc_a, off_a = _add_q6_k(a, codes, s, sums, acc_a, off_a)
        acc_b, off_b = _add_q6_k(b, codes, s, sums, acc_b, off_b)
        acc_c, off_c = _add_q6_k(c, codes, s, sums, acc_c, off_c)
        acc_d, off_d = _add_q6_k(d, codes, s, sums, acc_d, off_d)
        a, b, c, d = a + 210, b + 210, c + 210, d + 210
        codes, scale, sum16 = codes + 256, scale + 32, sum16 + 32
    return totals(
        sub(halve(acc_a), off_a), sub(halve(acc_b), off_b), sub(halve(acc_c), off_c), sub(halve(acc_d), off_d)
    )


@inlined
def dot_q6_k_of_tokens(row, tokens, columns):
    """The same for a row and four tokens. What is said of the row for each token is done once: the compiler sees that
    it is the same."""
    a, b, c, d = tokens
    zero, none = zero_f32x16(), splat_f32(np.float32(0))
    acc_a, acc_b, acc_c, acc_d = zero, zero, zero, zero
    off_a, off_b, off_c, off_d = none, none, none, none
    for i in range(columns // 256):
        acc_a, off_a = _add_q6_k_of_token(row, a, i, acc_a, off_a)
        acc_b, off_b = _add_q6_k_of_token(row, b, i, acc_b, off_b)
        acc_c, off_c = _add_q6_k_of_token(row, c, i, acc_c, off_c)
        acc_d, off_d = _add_q6_k_of_token(row, d, i, acc_d, off_d)
        row += 210
    return totals(
        sub(halve(acc_a), off_a), sub(halve(acc_b), off_b), sub(halve(acc_c), off_c), sub(halve(acc_d), off_d)
    )


@inlined
def _add_q6_k_of_token(row, token, i, acc, offsets):
    """`_add_q6_k` with the i-th 256 activations of a token."""
    _, codes, scale, _, _, sum16 = token
    s, sums = load_f32x8(scale + 32 * i), load_i16x16(sum16 + 32 * i)
    return _add_q6_k(row, codes + 256 * i, s, sums, acc, offsets)


@inlined
def _add_q6_k(row, codes, s, sums, acc, offsets):
    """Add products of a block of 256, and what comes off."""
    fetch_ahead(row, 210)
    factor = mul(splat_f32(load_f16(row + 208)), s)
    products = _q6_times(row, row + 128, row + 192, codes)
    others = _q6_times(row + 64, row + 160, row + 200, codes + 128)
    offset = times_32(dot_i16(load_i8_as_i16(row + 192), sums))
    acc = fma(to_f32x16(products), spread(factor, 0), acc)
    acc = fma(to_f32x16(others), spread(factor, 1), acc)
    return acc, fma(to_f32(offset), factor, offsets)


@inlined
def _q6_times(nibbles, high, scales, codes):
    """Products of four blocks, times their two scales; addresses of their 64 bytes of nibbles, 32 bytes of high bits,
    scales and activations."""
    packed = load_i8x64(nibbles)
    low_of_two, high_of_two = low_nibbles(packed), high_nibbles(packed)
    first = bit_or(even_quarters(low_of_two, high_of_two), load_bits_2(high))
    second = bit_or(odd_quarters(low_of_two, high_of_two), load_bits_2(high + 16))
    products = dot_u8x64(zero_i32x16(), first, load_i8x64(codes))
    return times_scales_8(products, dot_u8x64(zero_i32x16(), second, load_i8x64(codes + 64)), scales)
