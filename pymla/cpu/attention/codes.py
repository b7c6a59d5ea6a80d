"""Numbers become codes: operands of attention's products on integers.

A *block* is 32 codes of 8 bits with a common scale. Codes lie in words of `simd_words.WORD` codes: bytes where the
processor multiplies bytes, otherwise 16 bits each. A *panel* has the words of `LANES` rows side by side, one in each
lane of a register.

Codes with 16 bits are those of the rotated dimensions, which 8 bits would make too coarse.
"""

import numpy as np

from pymla.cpu.formats.panels import store_columns
from pymla.cpu.machine.simd import (
    absolute,
    add,
    broadcast_f32xL,
    div,
    farther,
    farthest,
    load_f32,
    load_f32x8,
    load_f32xL,
    load_i32,
    mul,
    round_even,
    splat_f32,
    splat_f32xL,
    store_as_i8,
    store_as_i16,
    store_f32,
    store_f32xL,
    store_i16,
    store_i32,
    total,
    where_positive,
)
from pymla.cpu.machine.simd_panels import load_columns, panel_rows
from pymla.cpu.machine.simd_words import WORD, store_codes, store_words
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES

#: Bytes of a block of a row.
BLOCK_BYTES = 128 // WORD
#: Bytes of a block of all rows of a panel.
PANEL_BLOCK_BYTES = LANES * BLOCK_BYTES
#: Softmax weights, of neighbouring positions, with a common scale.
WEIGHT_GROUP = 64
#: The largest int16 code, which has more bits than an IEEE half.
LARGEST_I16 = 4095


@helper
def quantise_codes(x, count, codes, scale, bias):
    """`count` float32, a multiple of 32, as codes from -127 to 127, plus `bias` (0 or `simd_words.BIAS`), and their
    scale. Returns the sum of the codes without the bias.

    `x`, `codes` and `scale` are addresses. A number that is infinite or NaN makes the scale so.
    """
    most = splat_f32xL(np.float32(0))
    for i in range(0, count, LANES):
        most = farther(absolute(load_f32xL(x + 4 * i)), most)
    abs_max = farthest(most)
    inverse = np.float32(0)
    if abs_max > 0:
        inverse = np.float32(127) / abs_max
    store_f32(scale, abs_max / np.float32(127))
    factor, bias, sums = splat_f32xL(inverse), splat_f32xL(np.float32(bias)), splat_f32xL(np.float32(0))
    for i in range(0, count, LANES):
        whole = round_even(mul(load_f32xL(x + 4 * i), factor))
        store_codes(codes + 4 // WORD * i, add(whole, bias))
        sums = add(sums, whole)
    return total(sums)


@helper
def quantise_i8(x, count, codes, bias):
    """`count` float32, a multiple of 8, as bytes: codes from -127 to 127, plus `bias`, 0 or 128. Returns their scale,
    and the sum of the codes without the bias.

    `x` and `codes` are addresses. A number that is infinite or NaN makes the scale so.
    """
    most = splat_f32(np.float32(0))
    for i in range(0, count, 8):
        most = farther(absolute(load_f32x8(x + 4 * i)), most)
    abs_max = farthest(most)
    inverse = np.float32(0)
    if abs_max > 0:
        inverse = np.float32(127) / abs_max
    factor, bias, sums = splat_f32(inverse), splat_f32(np.float32(bias)), splat_f32(np.float32(0))
    for i in range(0, count, 8):
        whole = round_even(mul(load_f32x8(x + 4 * i), factor))
        store_as_i8(codes + i, add(whole, bias))
        sums = add(sums, whole)
    return abs_max / np.float32(127), total(sums)


@helper
def quantise_weights(weights, codes, scale):
    """`WEIGHT_GROUP` softmax weights, float32 that are not negative, as codes from 0 to 255, and their scale; all are
    addresses."""
    most = splat_f32xL(np.float32(0))
    for i in range(0, WEIGHT_GROUP, LANES):
        most = farther(load_f32xL(weights + 4 * i), most)
    largest = farthest(most)
    inverse = np.float32(0)
    if largest > 0:
        inverse = np.float32(255) / largest
    factor = splat_f32xL(inverse)
    for i in range(0, WEIGHT_GROUP, LANES):
        store_codes(codes + 4 // WORD * i, round_even(mul(load_f32xL(weights + 4 * i), factor)))
    store_f32(scale, largest / np.float32(255))


@helper
def quantise_weights_of_heads(weights, row_scales, codes, scales, heads):
    """`quantise_weights` for heads side by side, which `LANES` divides, times the scales of the cache's rows.

    Addresses of weights, float32 (WEIGHT_GROUP, heads), which are multiplied in place; row_scales, float32
    (WEIGHT_GROUP,); codes, words of WORD positions (WEIGHT_GROUP // WORD, heads); scales, float32 (heads,).
    """
    row = 4 * heads
    for at in range(0, row, 4 * LANES):
        most = splat_f32xL(np.float32(0))
        for s in range(WEIGHT_GROUP):
            x = mul(load_f32xL(weights + row * s + at), broadcast_f32xL(row_scales + 4 * s))
            store_f32xL(weights + row * s + at, x)
            most = farther(absolute(x), most)
        store_f32xL(scales + at, mul(most, splat_f32xL(np.float32(1 / 255))))
        factor = where_positive(most, div(splat_f32xL(np.float32(255)), most))
        for s in range(0, WEIGHT_GROUP, 4):
            source = weights + row * s + at
            a, b = mul(load_f32xL(source), factor), mul(load_f32xL(source + row), factor)
            c, d = mul(load_f32xL(source + 2 * row), factor), mul(load_f32xL(source + 3 * row), factor)
            target = codes + row * (s // WORD) + at
            store_words(target, row, round_even(a), round_even(b), round_even(c), round_even(d))


@helper
def store_panel(rows, row_bytes, panel):
    """`LANES` rows of codes, `row_bytes` each, a multiple of 16, as a panel; `rows` and `panel` are addresses."""
    for i in range(0, row_bytes, 16):
        store_columns(panel + i * LANES, load_columns(panel_rows(rows, row_bytes, LANES), i))


@helper
def store_i16_panel(rows, row_bytes, panel):
    """`LANES` rows of int16 codes, `row_bytes` each, a multiple of 4, as a panel of words of two codes; `rows` and
    `panel` are addresses."""
    for lane in range(LANES):
        for i in range(0, row_bytes, 4):
            store_i32(panel + LANES * i + 4 * lane, load_i32(rows + row_bytes * lane + i))


@helper
def even(count):
    """The even number from `count` on: int16 codes are multiplied by twos."""
    return count + count % 2


@helper
def largest_i16(count):
    """The largest code of `count` int16 such that sums of their products stay within int32."""
    return min(LARGEST_I16, np.int64(np.sqrt((1 << 31) / even(count))) - 1)


@helper
def quantise_i16(x, count, codes):
    """`count` float32 as int16 codes; returns their scale. `x` and `codes` are addresses; an odd number of codes is
    followed by a 0. A number that is infinite or NaN makes the scale so."""
    whole, largest = count // 8 * 8, np.float32(largest_i16(count))
    most = splat_f32(np.float32(0))
    for i in range(0, whole, 8):
        most = farther(absolute(load_f32x8(x + 4 * i)), most)
    for i in range(whole, count):
        most = farther(absolute(splat_f32(load_f32(x + 4 * i))), most)
    abs_max = farthest(most)
    inverse = np.float32(0)
    if abs_max > 0:
        inverse = largest / abs_max
    factor = splat_f32(inverse)
    for i in range(0, whole, 8):
        store_as_i16(codes + 2 * i, round_even(mul(load_f32x8(x + 4 * i), factor)))
    for i in range(whole, count):
        store_i16(codes + 2 * i, np.int16(np.rint(load_f32(x + 4 * i) * inverse)))
    if count % 2:
        store_i16(codes + 2 * count, np.int16(0))
    return abs_max / largest
