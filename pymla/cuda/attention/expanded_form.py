"""Attention of prompts on tensor cores: causal flash attention of each head (Dao, 2023).

A block takes 64 queries of a head, 16 for each of four warps, which stay in registers, and goes over keys and values in
tiles of 32 positions: the next tile is copied to shared memory while one is computed. Tiles behind the last query's
position are not read. Scores become weights in registers, as the layout of a product is that of a left factor.

`flash` does this for keys and values that lie anywhere: in arrays in the expanded form, in pages in a cache of whole
keys and values (`pymla.cuda.attention.full_form`).
"""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.constants import LOG2E
from pymla.cuda.attention.products import (
    FACTORS,
    NO_SCORES,
    key_row,
    load_queries,
    scores_of,
    store_values,
    value_row,
    values_of,
)
from pymla.cuda.attention.softmax import INFINITY, ZERO, online_softmax
from pymla.cuda.attention.steps import PLACE, place
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS, fetch_rows, need_multiples_of_16
from pymla.cuda.contract import check, need_any
from pymla.cuda.machine import ptx
from pymla.cuda.machine.ptx import valid_index
from pymla.cuda.runtime.array_types import F32, I1, I32, I64, addresses
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled

__all__ = ["QUERIES", "expanded", "expanded_kernel", "flash", "tile_bytes"]

#: Queries of a block.
QUERIES = 16 * WARPS


def tile_bytes(size, v):
    """Bytes of a tile of keys and of one of values; shared memory holds two of both."""
    return 2 * TILE * size, 2 * TILE * v


def flash(factor, size, v, fetch):
    """A device function (q, source, positions, run, length, head, heads, scale, out): the values of up to `QUERIES`
    queries.

    `run` are the numbers of the first query and of the one behind the last; all are of one sequence, and the last one
    sees `length` positions. `fetch` is a device function (at, source, heads, head, tile, seen, thread) that begins to
    copy a tile of keys to shared memory at an address, and one of values behind it; of the tile `seen` positions are
    there. Factors are of the type `factor`.
    """
    (mma, pack), (steps, groups) = FACTORS[factor], (size // 16, v // 16)
    key_bytes, value_bytes = tile_bytes(size, v)
    softmax, no_values, indices = online_softmax(pack), ((ZERO,) * 8,) * groups, tuple(range(steps))
    queries_of_warp = unrolled(load_queries(pack, size), steps)
    scores_of_tile = folded(scores_of(mma, size), steps)
    values_of_tile, store_columns = unrolled(values_of(mma, v, v), groups), unrolled(store_values, groups)

    @device
    def attend(q, source, positions, run, length, head, heads, scale, out):
        start, stop = run
        thread = cuda.threadIdx.x
        warp, lane = thread >> 5, thread & 31
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        tiles = length + TILE - 1 >> 5
        fetch(base, source, heads, head, 0, length, thread)
        ptx.cp_async_commit()
        upper, lower = start + 16 * warp + (lane >> 2), start + 16 * warp + (lane >> 2) + 8
        there = upper < stop, lower < stop
        upper, lower = min(upper, stop - 1), min(lower, stop - 1)
        seen0, seen1 = valid_index(positions[upper], length) + 1, valid_index(positions[lower], length) + 1
        rows = q + 4 * size * (upper * heads + head), q + 4 * size * (lower * heads + head)
        a = queries_of_warp(0, indices, (0, rows[0], rows[1], there, scale, lane))
        o, state = no_values, (-INFINITY, -INFINITY, ZERO, ZERO)
        key, of_values = key_row(lane), value_row(lane)
        stage = 0
        for tile in range(tiles):
            ptx.cp_async_wait(0)
            cuda.syncthreads()
            at = base + stage * (key_bytes + value_bytes)
            stage ^= 1
            if tile + 1 < tiles:
                next_tile = base + stage * (key_bytes + value_bytes)
                fetch(next_tile, source, heads, head, tile + 1, length - TILE * (tile + 1), thread)
                ptx.cp_async_commit()
            scores = scores_of_tile(0, a, NO_SCORES, (0, at + 2 * size * key[0], key))
            seen = seen0 - TILE * tile, seen1 - TILE * tile
            weights, shrink, state = softmax(scores, seen, state, lane)
            columns = weights, shrink, 0, at + key_bytes + 2 * v * of_values[0], of_values
            o = values_of_tile(0, o, columns)
        factors = ptx.rcp(ptx.group_sum(state[2], 4)), ptx.rcp(ptx.group_sum(state[3], 4))
        rows = out[0] + upper * out[1] + head * out[2], out[0] + lower * out[1] + head * out[2]
        store_columns(0, o, (0, groups, rows[0], rows[1], there, factors, lane))

    return attend


@functools.cache
def expanded_kernel(size, v):
    """The kernel for keys of `size` and values of `v` float16, and its bytes of shared memory."""
    key_bytes, value_bytes = tile_bytes(size, v)
    fetch_keys, fetch_values = fetch_rows(ggml.F16, ggml.F16, size), fetch_rows(ggml.F16, ggml.F16, v)

    @device
    def fetch(at, keys_values, heads, head, tile, seen, thread):
        row = TILE * tile * heads + head
        fetch_keys(at, keys_values[0] + 2 * size * row, 2 * size * heads, seen, thread)
        fetch_values(at + key_bytes, keys_values[1] + 2 * v * row, 2 * v * heads, seen, thread)

    attend = flash(ggml.F16, size, v, fetch)

    @kernel(
        I64, addresses(2), I64, I1, F32, I32, PLACE, variant=f"{size},{v}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def expanded(q, keys_values, tokens, positions, scale, heads, out):
        """Blocks of queries of each head; late ones have more to read and come first.

        Grid: blocks of queries, heads.
        """
        begin = QUERIES * (cuda.gridDim.x - 1 - cuda.blockIdx.x)
        run = begin, min(begin + QUERIES, positions.size)
        length = valid_index(positions[run[1] - 1], tokens) + 1
        attend(q, keys_values, positions, run, length, cuda.blockIdx.y, heads, scale, out)

    return expanded, 2 * (key_bytes + value_bytes)


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence: `q` float32 (T, H, nope + R), contiguous, `out` float32 (T, H, v), any `place`;
    positions grow by one. A position that has no key counts as that of the last key."""
    check.expanded(q, check.sizes("expanded", keys_values), positions, out)
    need_any("expanded", "positions", positions, len(keys_values.keys), "keys")
    tokens, heads, v = out.shape
    size = q.shape[2]
    need_multiples_of_16(size, v)
    launched, shared_bytes = expanded_kernel(size, v)
    both = keys_values.keys.address, keys_values.values.address
    blocks = -(-tokens // QUERIES), heads
    launched[blocks, THREADS, shared_bytes](
        q.address, both, len(keys_values.keys), positions, scale * LOG2E, heads, place(out)
    )
    return out
