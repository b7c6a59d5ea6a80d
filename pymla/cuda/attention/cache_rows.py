"""Rows of the cache in memory: a cache type is one set of device functions, `CacheRows`. A row is its address.

Kernels that compute in float32 read one value, or four neighbours; those on tensor cores read eight as float16, into
the tiles of `pymla.cuda.attention.tiles`.
"""

from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cuda.attention.mixed_rows import readers_of, scaled_codes, write_of
from pymla.cuda.formats import FLOATS
from pymla.cuda.formats.codes import code_values, unaligned_word
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device
from pymla.pages import HADAMARD_TYPES

__all__ = ["CACHE_ROWS", "CacheRows"]


#: Two float16: -1152, minus 1024 and the 128 that makes a byte unsigned.
_BIAS_OF_BYTES = 0xE480E480


class CacheRows(NamedTuple):
    """Device functions of a cache type."""

    one: object  # (row, i): value i, as float32
    four: object  # (row, i): values 4 i to 4 i + 3, as float32
    #: (row, i, x): round x to value i. A warp writes a block of q8_0 together, lane by lane.
    write: object
    halves: object  # (row, i): values 8 i to 8 i + 7, as four words of float16
    shared_halves: object = None  # of a type with blocks: the same of a row in shared memory, at an even address
    mixed: bool = False  # whether `write` mixes, and the other functions read what it stored


def _float_rows(qtype, write):
    """The functions of a float type."""
    one, four, nbytes = FLOATS[qtype]

    @device
    def read_one(row, i):
        return one(row + nbytes * i)

    @device
    def read_four(row, i):
        return four(row + 4 * nbytes * i)

    @device
    def read_halves(row, i):
        x0, x1, x2, x3 = four(row + 8 * nbytes * i)
        x4, x5, x6, x7 = four(row + 8 * nbytes * i + 4 * nbytes)
        return ptx.pack_f16x2(x0, x1), ptx.pack_f16x2(x2, x3), ptx.pack_f16x2(x4, x5), ptx.pack_f16x2(x6, x7)

    return CacheRows(read_one, read_four, write, read_halves)


@device
def _write_f32(row, i, x):
    ptx.store_f32(row + 4 * i, x)


@device
def _write_f16(row, i, x):
    ptx.store_f16(row + 2 * i, x)


@device
def _write_bf16(row, i, x):
    ptx.store_bf16(row + 2 * i, x)


@device
def _read_q8_0(row, i):
    block = row + 34 * (i >> 5)
    return ptx.load_f16(block) * ptx.to_f32(ptx.load_i8(block + 2 + (i & 31)))


@device
def _read_four_q8_0(row, i):
    block = row + 34 * (i >> 3)
    d = ptx.load_f16(block)
    x0, x1, x2, x3 = code_values(unaligned_word(block + 2 + 4 * (i & 7)))
    return d * x0, d * x1, d * x2, d * x3


@device
def _write_q8_0(row, i, x):
    block = row + 34 * (i >> 5)
    d = ptx.div(ptx.warp_max(abs(x)), np.float32(127))
    inverse = ptx.div(np.float32(1), d) if d > np.float32(0) else np.float32(0)
    scaled = x * inverse
    # ggml rounds halves away from zero.
    code = int(abs(scaled) + np.float32(0.5))
    ptx.store_u8(block + 2 + (i & 31), code if scaled > np.float32(0) else -code)
    if i & 31 == 0:
        ptx.store_f16(block, d)


@device
def _halves_of_q8_0(row, i):
    block = row + 34 * (i >> 2)
    at, d = block + 2 + 8 * (i & 3), ptx.load_u16(block)
    d = ptx.prmt(d, d, 0x1010)
    h0, h1 = scaled_codes(unaligned_word(at) ^ 0x80808080, d, _BIAS_OF_BYTES)
    h2, h3 = scaled_codes(unaligned_word(at + 4) ^ 0x80808080, d, _BIAS_OF_BYTES)
    return h0, h1, h2, h3


@device
def _shared_halves_of_q8_0(row, i):
    block = row + 34 * (i >> 2)
    d = ptx.load_shared_u16(block)
    # Codes begin at a multiple of 2: two words are cut out of three, or are the first two.
    at = block + 2 + 8 * (i & 3)
    odd = at & 2
    w0, w1 = ptx.load_shared_u32(at - odd), ptx.load_shared_u32(at - odd + 4)
    w2 = ptx.load_shared_u32(at - odd + 4 + 2 * odd)
    d = ptx.prmt(d, d, 0x1010)
    h0, h1 = scaled_codes(ptx.funnel_shift_r(w0, w1, 8 * odd) ^ 0x80808080, d, _BIAS_OF_BYTES)
    h2, h3 = scaled_codes(ptx.funnel_shift_r(w1, w2, 8 * odd) ^ 0x80808080, d, _BIAS_OF_BYTES)
    return h0, h1, h2, h3


def _mixed_rows(qtype):
    """The functions of a type that is mixed."""
    one, four, halves, shared_halves = readers_of(qtype)
    return CacheRows(one, four, write_of(qtype), halves, shared_halves, mixed=True)


#: The cache types.
CACHE_ROWS = {
    ggml.F32: _float_rows(ggml.F32, _write_f32),
    ggml.F16: _float_rows(ggml.F16, _write_f16),
    ggml.BF16: _float_rows(ggml.BF16, _write_bf16),
    ggml.Q8_0: CacheRows(_read_q8_0, _read_four_q8_0, _write_q8_0, _halves_of_q8_0, _shared_halves_of_q8_0),
    **{qtype: _mixed_rows(qtype) for qtype in HADAMARD_TYPES},
}
