"""Rows of the cache in memory: into their slots, and back as numbers.

Rows of float types, and keys and values of all heads, lie as ggml blocks. A latent cache of 8 bits or fewer has types
of its own (`pymla.cpu.cache_types`): a page has the codes of its 64 rows first, and then their scales. It takes as many
bytes as ggml's types, and 4 more for the scale of each row's rotated dimensions. Codes of 8 bits are multiplied where
they lie, smaller ones are unpacked before (`pymla.cpu.machine.simd_words.unpack_codes`). An indexer's keys of 8 bits
have a type of their own as well (`pymla.cpu.attention.index_keys`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pymla import ggml
from pymla.cpu.attention.codes import even, quantise_i16
from pymla.cpu.attention.hadamard import mix, mix_read
from pymla.cpu.attention.index_keys import read_key, write_key
from pymla.cpu.cache_types import CODE_BITS, I8_PAGES, I16_PAGES, PAGES_OF, Q8_PAGES, ROW_BYTES
from pymla.cpu.contract import check
from pymla.cpu.formats.legacy import write_q8
from pymla.cpu.formats.rows import dequantise_row_for, write_row_for
from pymla.cpu.machine.simd import (
    address,
    load_f16,
    load_f32,
    load_i16,
    load_u8x8,
    mul,
    splat_f32,
    store_f16,
    store_f32,
    store_f32x8,
    store_i32,
    sub,
)
from pymla.cpu.machine.simd_words import unpack_codes
from pymla.cpu.memory import empty
from pymla.cpu.runtime.array_types import A2, CACHE, F2, I1
from pymla.cpu.runtime.jit import Kernel, helper, kernel, variants
from pymla.pages import MIXED, PAGE, STORED, LatentCache
from pymla.tensor import QTensor


def latent_cache(layout: Sequence[tuple[int, int]], slots: int) -> LatentCache:
    """Memory for the rows ``c_kv`` and ``k_pe`` of one layer, as `pymla.reference.attention.latent_cache`.

    Rows of types with blocks get those of `pymla.cpu.cache_types`.
    """
    (qtype, rank), (rope_type, rope) = layout
    if qtype in PAGES_OF:
        pages = PAGES_OF[qtype]
        rows = (pages, ROW_BYTES[pages](rank)), (I16_PAGES, ROW_BYTES[I16_PAGES](rope))
    else:
        rows = (qtype, ggml.row_bytes(qtype, rank)), (rope_type, ggml.row_bytes(rope_type, rope))
    return LatentCache(*(QTensor(each, empty((slots, nbytes), np.uint8)) for each, nbytes in rows))


def store(rows: np.ndarray, slots: np.ndarray, cache: QTensor) -> None:
    """Write rows, float32 (T, W), into slots of the cache, as `pymla.reference.attention.store`.

    Numbers of a row are contiguous, rows need not be. ggml's types get the reference's bytes.
    """
    check.store(rows, slots, cache)
    store_rows(cache.qtype)[len(rows)](rows, slots, cache)


def load(cache: QTensor, block_table: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The first S rows of a sequence as float32 (S, W), contiguous, as `pymla.reference.attention.load`."""
    check.load(cache, block_table, out)
    load_rows(cache.qtype)[len(out)](cache, block_table, out)
    return out


def store_kernels(*types: int) -> list[Kernel]:
    """The kernels of `store` into a cache of some types."""
    return [store_rows(qtype) for qtype in types]


def load_kernels(*types: int) -> list[Kernel]:
    """The kernels of `load` from a cache of some types."""
    return [load_rows(qtype) for qtype in types]


@variants
def store_rows(qtype):
    """`store` into a cache of a type."""
    write_cache_row = write_cache_row_for(qtype)

    @kernel(A2, I1, CACHE)
    def store_rows(first, last, rows, slots, cache):
        """Over rows."""
        for t in range(first, last):
            write_cache_row(cache, slots[t], address(rows[t]), rows.shape[1])

    return store_rows


@variants
def load_rows(qtype):
    """`load` from a cache of a type."""
    read_cache_row = read_cache_row_for(qtype)

    @kernel(CACHE, I1, F2)
    def load_rows(first, last, cache, block_table, out):
        """Over positions."""
        for p in range(first, last):
            read_cache_row(cache, block_table[p // PAGE] * PAGE + p % PAGE, address(out[p]), out.shape[1])

    return load_rows


@functools.cache
def write_cache_row_for(qtype):
    """A function ``(cache, slot, x, columns)``: float32 at the address `x` become the row of a slot."""
    if qtype == Q8_PAGES:

        @helper
        def write_cache_row(cache, slot, x, columns):
            page, row = address(cache.data[slot // PAGE * PAGE]), slot % PAGE
            codes, scales = page + row * columns, page + PAGE * columns + row * (columns // 16)
            for block in range(columns // 32):
                write_q8(x + 128 * block, scales + 2 * block, codes + 32 * block, 128)

    elif qtype in CODE_BITS:
        bits = CODE_BITS[qtype]

        @helper
        def write_cache_row(cache, slot, x, columns):
            page, row = address(cache.data[slot // PAGE * PAGE]), slot % PAGE
            codes, scales = page + row * columns // 8 * bits, page + PAGE * columns // 8 * bits + row * (columns // 16)
            mixed = np.empty(MIXED, np.float32)
            for block in range(columns // MIXED):
                for i in range(MIXED):
                    mixed[i] = load_f32(x + 4 * (MIXED * block + i)) * np.float32(STORED)
                mix(address(mixed), MIXED)
                _write_codes(mixed, bits, codes + 4 * bits * block, scales + 2 * block)

    elif qtype == I8_PAGES:

        @helper
        def write_cache_row(cache, slot, x, columns):
            write_key(address(cache.data[slot // PAGE * PAGE]), slot % PAGE, x, columns)

    elif qtype == I16_PAGES:

        @helper
        def write_cache_row(cache, slot, x, columns):
            page, row, row_bytes = address(cache.data[slot // PAGE * PAGE]), slot % PAGE, 2 * even(columns)
            scale = quantise_i16(x, columns, page + row * row_bytes)
            store_f32(page + PAGE * row_bytes + 4 * row, scale)

    else:
        write_row = write_row_for(qtype)

        @helper
        def write_cache_row(cache, slot, x, columns):
            write_row(x, address(cache.data[slot]), columns)

    return write_cache_row


@helper
def _write_codes(x, bits, codes, scale):
    """Thirty-two float32 as codes of some bits and their scale, an IEEE half, at two addresses: rounded as ggml's Q4_0
    and Q5_0, where the number of largest magnitude becomes code 0. An infinite value or NaN makes the scale so."""
    largest, extreme = np.float32(0), np.float32(0)
    for value in x:
        if abs(value) > largest or value != value:
            largest, extreme = abs(value), value
    d = extreme / np.float32(-(1 << bits - 1))
    inverse = np.float32(0)
    if d != 0:
        inverse = np.float32(1) / d
    store_f16(scale, d)
    rounded, most = np.float32((1 << bits - 1) + 0.5), (1 << bits) - 1
    quantised = np.empty(MIXED, np.int64)
    for i in range(MIXED):
        quantised[i] = min(np.int64(x[i] * inverse + rounded), most)
    for i in range(0, 16, 4):
        word = np.int64(0)
        for j in range(4):
            word |= (quantised[i + j] & 15 | (quantised[i + j + 16] & 15) << 4) << 8 * j
        store_i32(codes + i, word)
    for plane in range(bits - 4):
        word = np.int64(0)
        for i in range(MIXED):
            word |= (quantised[i] >> 4 + plane & 1) << i
        store_i32(codes + 16 + 4 * plane, word)


@functools.cache
def read_cache_row_for(qtype):
    """A function ``(cache, slot, out, columns)``: the row of a slot as float32 at the address `out`."""
    if qtype == Q8_PAGES:

        @helper
        def read_cache_row(cache, slot, out, columns):
            page, row, bias = address(cache.data[slot // PAGE * PAGE]), slot % PAGE, splat_f32(np.float32(128))
            codes, scales = page + row * columns, page + PAGE * columns + row * (columns // 16)
            for i in range(0, columns, 8):
                scale = splat_f32(load_f16(scales + i // 32 * 2))
                store_f32x8(out + 4 * i, mul(scale, sub(load_u8x8(codes + i), bias)))

    elif qtype in CODE_BITS:
        bits = CODE_BITS[qtype]

        @helper
        def read_cache_row(cache, slot, out, columns):
            page, row = address(cache.data[slot // PAGE * PAGE]), slot % PAGE
            codes, scales = page + row * columns // 8 * bits, page + PAGE * columns // 8 * bits + row * (columns // 16)
            unpacked = np.empty(MIXED, np.uint8)
            for block in range(columns // MIXED):
                unpack_codes(address(unpacked), codes + 4 * bits * block, bits)
                scale = load_f16(scales + 2 * block) * np.float32(1 / (1 << 8 - bits))
                for i in range(MIXED):
                    store_f32(out + 4 * (MIXED * block + i), scale * np.float32(np.int64(unpacked[i]) - 128))
            mix_read(out, columns)

    elif qtype == I8_PAGES:

        @helper
        def read_cache_row(cache, slot, out, columns):
            read_key(address(cache.data[slot // PAGE * PAGE]), slot % PAGE, out, columns)

    elif qtype == I16_PAGES:

        @helper
        def read_cache_row(cache, slot, out, columns):
            page, row, row_bytes = address(cache.data[slot // PAGE * PAGE]), slot % PAGE, 2 * even(columns)
            scale = load_f32(page + PAGE * row_bytes + 4 * row)
            for i in range(columns):
                store_f32(out + 4 * i, scale * np.float32(load_i16(page + row * row_bytes + 2 * i)))

    else:
        dequantise_row = dequantise_row_for(qtype)

        @helper
        def read_cache_row(cache, slot, out, columns):
            dequantise_row(address(cache.data[slot]), out, columns)

    return read_cache_row
