"""Queries of the absorbed form as panels, whose lanes are heads."""

from typing import NamedTuple

import numpy as np

from pymla.cpu.attention.codes import BLOCK_BYTES, even, quantise_codes, quantise_i16, store_panel
from pymla.cpu.attention.splits import HEAD_GROUP
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import address, load_f32, store_f32
from pymla.cpu.machine.simd_words import BIAS
from pymla.cpu.memory import allocate, allocate_f32
from pymla.cpu.runtime.jit import helper


class Queries(NamedTuple):
    """Queries of one token and `HEAD_GROUP` heads: a panel of `LANES` heads, then the next one."""

    codes: np.ndarray  # uint8 (HEAD_GROUP, bytes of a row)
    scales: np.ndarray  # float32 (blocks, HEAD_GROUP)
    starts: np.ndarray  # int32 (blocks, HEAD_GROUP): minus `BIAS` times the sum of a block's codes
    rope: np.ndarray  # uint8 (HEAD_GROUP, bytes of a row of int16 codes)
    rope_scales: np.ndarray  # float32 (1, HEAD_GROUP)


@helper
def empty_queries(rank, rotated):
    """Room for queries of `rank` numbers, a multiple of 32, and `rotated` rotated ones."""
    blocks = rank // 32
    return Queries(
        allocate(HEAD_GROUP * blocks * BLOCK_BYTES).reshape(HEAD_GROUP, -1),
        allocate_f32(blocks, HEAD_GROUP),
        allocate(4 * blocks * HEAD_GROUP).view(np.int32).reshape(blocks, HEAD_GROUP),
        allocate(HEAD_GROUP * 2 * even(rotated)).reshape(HEAD_GROUP, -1),
        allocate_f32(1, HEAD_GROUP),
    )


@helper
def take_queries(q, scale, rank, out):
    """Quantise queries of one token, float32 (H, rank + R) of at most `HEAD_GROUP` heads, times a scale. Lanes without a
    head get zeros."""
    heads, size = q.shape
    rotated = size - rank
    row_bytes, rope_bytes = out.codes.shape[1], out.rope.shape[1]
    codes, rope_codes = np.empty((HEAD_GROUP, row_bytes), np.uint8), np.empty((HEAD_GROUP, rope_bytes), np.uint8)
    query = np.zeros(size, np.float32)
    for h in range(HEAD_GROUP):
        for i in range(size):
            query[i] = q[h, i] * np.float32(scale) if h < heads else np.float32(0)
        for i in range(rank // 32):
            at = address(codes[h]) + BLOCK_BYTES * i
            total = quantise_codes(address(query) + 128 * i, 32, at, address(out.scales[i, h:]), 0)
            out.starts[i, h] = np.int32(-BIAS * total)
        out.rope_scales[0, h] = quantise_i16(address(query[rank:]), rotated, address(rope_codes[h]))
    for h in range(0, HEAD_GROUP, LANES):
        store_panel(address(codes[h]), row_bytes, address(out.codes[h]))
        _store_rope_panel(rope_codes[h:], address(out.rope[h]))


@helper
def _store_rope_panel(codes, panel):
    """`LANES` rows of int16 codes as a panel of words of two, at an address."""
    for lane in range(LANES):
        for i in range(0, codes.shape[1], 4):
            store_f32(panel + LANES * i + 4 * lane, load_f32(address(codes[lane]) + i))
