"""The expanded form of attention on tensor cores: causal flash attention of each head (Dao, 2023).

A block takes 64 queries of a head, 16 for each of four warps, which stay in registers, and goes over keys and values in
tiles of 32 positions: the next tile is copied to shared memory while one is computed. Tiles behind the last query's
position are not read. Scores become weights in registers, as the layout of a product is that of a left factor.
"""

import functools

import numpy as np
from numba import cuda, types

from pymla.cuda import ptx
from pymla.cuda.attention_decode import (
    I1,
    INFINITY,
    LOG2E,
    NO_SCORES,
    THREADS,
    TILE,
    WARPS,
    ZERO,
    copy_rows,
    folded,
    key_row,
    load_queries,
    online_softmax,
    scores_of,
    store_values,
    unrolled,
    value_row,
    values_of,
)
from pymla.cuda.jit import kernel
from pymla.errors import PymlaError

__all__ = ["expanded"]

I32, I64, F32 = types.int32, types.int64, types.float32

#: Queries of a block.
QUERIES = 16 * WARPS


@functools.cache
def expanded_kernel(size, v):
    """The kernel for keys of `size` and values of `v` float16, and its bytes of shared memory."""
    mma, pack = ptx.mma_f16, ptx.pack_f16x2
    steps, groups = size // 16, v // 16
    key_bytes, value_bytes = 2 * TILE * size, 2 * TILE * v
    fetch_keys, fetch_values, softmax = copy_rows(size), copy_rows(v), online_softmax(pack)
    no_values, indices = ((ZERO,) * 8,) * groups, tuple(range(steps))
    queries_of_warp = unrolled(load_queries(pack, size), steps)
    scores_of_tile = folded(scores_of(mma, size), steps)
    values_of_tile, store_columns = unrolled(values_of(mma, v, v), groups), unrolled(store_values, groups)

    @kernel(
        I64, types.UniTuple(I64, 2), I1, F32, I32, I64,
        variant=f"{size},{v}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def expanded(q, keys_values, positions, scale, heads, out):
        """Blocks of queries of each head; late ones have more to read and come first.

        Grid: blocks of queries, heads.
        """
        begin, head = QUERIES * (cuda.gridDim.x - 1 - cuda.blockIdx.x), cuda.blockIdx.y
        tokens = positions.size
        thread = cuda.threadIdx.x
        warp, lane = thread >> 5, thread & 31
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        keys, values = keys_values[0] + 2 * size * head, keys_values[1] + 2 * v * head
        length = positions[min(begin + QUERIES, tokens) - 1] + 1
        tiles = length + TILE - 1 >> 5
        fetch_keys(base, keys, 2 * size * heads, length, thread)
        fetch_values(base + key_bytes, values, 2 * v * heads, length, thread)
        ptx.cp_async_commit()
        upper, lower = begin + 16 * warp + (lane >> 2), begin + 16 * warp + (lane >> 2) + 8
        there = upper < tokens, lower < tokens
        upper, lower = min(upper, tokens - 1), min(lower, tokens - 1)
        seen0, seen1 = positions[upper] + 1, positions[lower] + 1
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
                next_tile, first = base + stage * (key_bytes + value_bytes), TILE * (tile + 1)
                fetch_keys(next_tile, keys + 2 * size * heads * first, 2 * size * heads, length - first, thread)
                fetch_values(
                    next_tile + key_bytes, values + 2 * v * heads * first, 2 * v * heads, length - first, thread
                )
                ptx.cp_async_commit()
            scores = scores_of_tile(0, a, NO_SCORES, (0, at + 2 * size * key[0], key))
            seen = seen0 - TILE * tile, seen1 - TILE * tile
            weights, shrink, state = softmax(scores, seen, state, lane)
            columns = weights, shrink, 0, at + key_bytes + 2 * v * of_values[0], of_values
            o = values_of_tile(0, o, columns)
        factors = ptx.rcp(ptx.group_sum(state[2], 4)), ptx.rcp(ptx.group_sum(state[3], 4))
        rows = out + 4 * v * (upper * heads + head), out + 4 * v * (lower * heads + head)
        store_columns(0, o, (0, groups, rows[0], rows[1], there, factors, lane))

    return expanded, 2 * (key_bytes + value_bytes)


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence: `q` float32 (T, H, nope + R), `out` float32 (T, H, v), both contiguous;
    positions grow by one."""
    tokens, heads, v = out.shape
    size = q.shape[2]
    if size % 16 or v % 16:
        raise PymlaError(f"attention on tensor cores needs head sizes that 16 divides, not {size} and {v}")
    for array, kind in ((q, np.float32), (out, np.float32), *((each, np.float16) for each in keys_values)):
        if not array.contiguous or array.dtype != kind:
            raise ValueError(f"expected contiguous {np.dtype(kind)}, not {array.dtype} with strides {array.strides}")
    launched, shared_bytes = expanded_kernel(size, v)
    both = keys_values.keys.address, keys_values.values.address
    blocks = -(-tokens // QUERIES), heads
    launched[blocks, THREADS, shared_bytes](q.address, both, positions, scale * LOG2E, heads, out.address)
    return out


expanded_kernel(192, 128)
