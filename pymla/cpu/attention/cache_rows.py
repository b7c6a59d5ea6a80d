"""Rows of the cache in memory. Twin of `pymla.cuda.attention.cache_rows`.

Float types, and keys and values of all heads, lie as ggml blocks. A latent cache of 8 bits has two types of its own, so
that `pymla.cpu.attention.absorbed_form` multiplies the codes where they lie: a page begins with the codes of its 64
rows, and their scales follow. It takes the bytes that ggml's types take, but for the scale of the rotated dimensions.
"""

import functools

import numpy as np

from pymla import ggml
from pymla.cpu.cache_types import I16_PAGES, Q8_PAGES, ROW_BYTES
from pymla.cpu.formats.legacy import write_q8
from pymla.cpu.formats.rows import dequantise_row_for, write_row_for
from pymla.cpu.machine.simd import (
    absolute,
    address,
    farther,
    farthest,
    load_f16,
    load_f32,
    load_f32x8,
    load_i16,
    load_u8x8,
    mul,
    round_even,
    splat_f32,
    store_as_i16,
    store_f32,
    store_f32x8,
    store_i16,
    sub,
)
from pymla.cpu.memory import empty
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE, LatentCache
from pymla.tensor import QTensor

#: The largest int16 code, which has more bits than an IEEE half.
LARGEST_CODE = 4095


def latent_cache(layout, slots):
    """Memory for ``c_kv`` and ``k_pe`` of so many slots; `layout` from `pymla.engine.cache.row_layout`."""
    (qtype, rank), (rope_type, rope) = layout
    if qtype == ggml.Q8_0:
        rows = (Q8_PAGES, ROW_BYTES[Q8_PAGES](rank)), (I16_PAGES, ROW_BYTES[I16_PAGES](rope))
    else:
        rows = (qtype, ggml.row_bytes(qtype, rank)), (rope_type, ggml.row_bytes(rope_type, rope))
    return LatentCache(*(QTensor(each, empty((slots, nbytes), np.uint8)) for each, nbytes in rows))


@helper
def even(count):
    """The even number from `count` on: int16 are multiplied by twos."""
    return count + count % 2


@functools.cache
def write_cache_row_for(qtype):
    """A function ``(cache, slot, x, columns)``: float32 values at the address `x` become the row of a slot."""
    if qtype == Q8_PAGES:

        @helper
        def write_cache_row(cache, slot, x, columns):
            page, row = address(cache.data[slot // PAGE * PAGE]), slot % PAGE
            codes, scales = page + row * columns, page + PAGE * columns + row * (columns // 16)
            for block in range(columns // 32):
                write_q8(x + 128 * block, scales + 2 * block, codes + 32 * block, 128)

    elif qtype == I16_PAGES:

        @helper
        def write_cache_row(cache, slot, x, columns):
            page, row, wide = address(cache.data[slot // PAGE * PAGE]), slot % PAGE, 2 * even(columns)
            scale = quantise_i16(x, columns, page + row * wide)
            store_f32(page + PAGE * wide + 4 * row, scale)

    else:
        write_row = write_row_for(qtype)

        @helper
        def write_cache_row(cache, slot, x, columns):
            write_row(x, address(cache.data[slot]), columns)

    return write_cache_row


@functools.cache
def read_cache_row_for(qtype):
    """A function ``(cache, slot, out, columns)``: the row of a slot as float32 at the address `out`."""
    if qtype == Q8_PAGES:

        @helper
        def read_cache_row(cache, slot, out, columns):
            page, row, zero = address(cache.data[slot // PAGE * PAGE]), slot % PAGE, splat_f32(np.float32(128))
            codes, scales = page + row * columns, page + PAGE * columns + row * (columns // 16)
            for i in range(0, columns, 8):
                scale = splat_f32(load_f16(scales + i // 32 * 2))
                store_f32x8(out + 4 * i, mul(scale, sub(load_u8x8(codes + i), zero)))

    elif qtype == I16_PAGES:

        @helper
        def read_cache_row(cache, slot, out, columns):
            page, row, wide = address(cache.data[slot // PAGE * PAGE]), slot % PAGE, 2 * even(columns)
            scale = load_f32(page + PAGE * wide + 4 * row)
            for i in range(columns):
                store_f32(out + 4 * i, scale * np.float32(load_i16(page + row * wide + 2 * i)))

    else:
        dequantise_row = dequantise_row_for(qtype)

        @helper
        def read_cache_row(cache, slot, out, columns):
            dequantise_row(address(cache.data[slot]), out, columns)

    return read_cache_row


@helper
def largest_code(count):
    """The largest code of `count` int16 such that sums of their products stay within int32."""
    return min(LARGEST_CODE, np.int64(np.sqrt((1 << 31) / even(count))) - 1)


@helper
def quantise_i16(row, count, codes):
    """`count` float32 as int16; returns their scale. `row` and `codes` are addresses; there is room for
    an even number of codes. A number that is infinite or NaN shows in the scale."""
    whole, largest = count // 8 * 8, np.float32(largest_code(count))
    eight = splat_f32(np.float32(0))
    for i in range(0, whole, 8):
        eight = farther(absolute(load_f32x8(row + 4 * i)), eight)
    for i in range(whole, count):
        eight = farther(absolute(splat_f32(load_f32(row + 4 * i))), eight)
    most = farthest(eight)
    inverse = np.float32(0)
    if most > 0:
        inverse = largest / most
    factor = splat_f32(inverse)
    for i in range(0, whole, 8):
        store_as_i16(codes + 2 * i, round_even(mul(load_f32x8(row + 4 * i), factor)))
    for i in range(whole, count):
        store_i16(codes + 2 * i, np.int16(np.rint(load_f32(row + 4 * i) * inverse)))
    if count % 2:
        store_i16(codes + 2 * count, np.int16(0))
    return most / largest
