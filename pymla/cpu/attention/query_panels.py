"""Queries of the absorbed form as panels, whose lanes are heads."""

from typing import NamedTuple

import numpy as np

from pymla.cpu.attention.codes import BLOCK_BYTES, even, quantise_codes, quantise_i16, store_i16_panel, store_panel
from pymla.cpu.attention.hadamard import mix_read
from pymla.cpu.attention.splits import HEAD_GROUP
from pymla.cpu.machine.simd import address, store_f32, store_i32
from pymla.cpu.machine.simd_words import BIAS
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import helper


class Queries(NamedTuple):
    """Addresses of the queries of one token and `HEAD_GROUP` heads, and sizes. Panels of `LANES` heads follow each
    other."""

    codes: int  # HEAD_GROUP * row_bytes: without bias
    scales: int  # float32 (blocks, HEAD_GROUP)
    starts: int  # int32 (blocks, HEAD_GROUP): minus `BIAS` times the sum of a block's codes
    rope: int  # HEAD_GROUP * rope_bytes: int16 codes
    rope_scales: int  # float32 (HEAD_GROUP,)
    blocks: int  # of a query's numbers that are not rotated
    row_bytes: int  # of a query's codes
    rope_bytes: int  # of its int16 codes


@helper
def queries_bytes(rank, rotated):
    """Bytes of `Queries` of `rank` numbers, a multiple of 32, and `rotated` rotated ones."""
    blocks = rank // 32
    return HEAD_GROUP * (blocks * (BLOCK_BYTES + 4 + 4) + 2 * even(rotated) + 4)


@helper
def queries_at(memory, rank, rotated):
    """`Queries` in memory at an address."""
    blocks, rope_bytes = rank // 32, 2 * even(rotated)
    scales = memory + HEAD_GROUP * blocks * BLOCK_BYTES
    starts = scales + HEAD_GROUP * 4 * blocks
    rope_scales = starts + HEAD_GROUP * 4 * blocks
    rope = rope_scales + 4 * HEAD_GROUP
    return Queries(memory, scales, starts, rope, rope_scales, blocks, blocks * BLOCK_BYTES, rope_bytes)


@helper
def take_queries(q, scale, mixed, out):
    """Quantise queries of one token, float32 (H, rank + R) of at most `HEAD_GROUP` heads, times a scale. Lanes without
    a head get zeros. Where the rows of the cache are mixed, so are the queries' numbers that are not rotated."""
    heads, size = q.shape
    rank = 32 * out.blocks
    codes = np.empty((HEAD_GROUP, out.row_bytes), np.uint8)
    rope_codes = np.empty((HEAD_GROUP, out.rope_bytes), np.uint8)
    query = np.zeros(size, np.float32)
    for h in range(HEAD_GROUP):
        for i in range(size):
            query[i] = q[h, i] * np.float32(scale) if h < heads else np.float32(0)
        if mixed:
            mix_read(address(query), rank)
        for i in range(out.blocks):
            at, scale_at = address(codes[h]) + BLOCK_BYTES * i, out.scales + 4 * (HEAD_GROUP * i + h)
            total = quantise_codes(address(query) + 128 * i, 32, at, scale_at, 0)
            store_i32(out.starts + 4 * (HEAD_GROUP * i + h), np.int32(-BIAS * total))
        rope_scale = quantise_i16(address(query) + 4 * rank, size - rank, address(rope_codes[h]))
        store_f32(out.rope_scales + 4 * h, rope_scale)
    for h in range(0, HEAD_GROUP, LANES):
        store_panel(address(codes[h]), out.row_bytes, out.codes + out.row_bytes * h)
        store_i16_panel(address(rope_codes[h]), out.rope_bytes, out.rope + out.rope_bytes * h)
