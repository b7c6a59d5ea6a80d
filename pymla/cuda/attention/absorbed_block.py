"""A block of the absorbed form on tensor cores, for rows that lie in order and for chosen ones: all heads of a token
together against its cache rows.

A block takes one token, 16 heads (rows of a tensor core's product; rows without a head are zeros) and a share of the
positions, in tiles of 32 rows. While one tile is computed the next one is copied into the other half of shared memory.
It may have several teams of four warps, each with 16 heads, for which a tile is copied once.

- Scores: each of four warps multiplies its quarter of the queries, which stays in registers, with its quarter of every
  row; the four parts meet in shared memory, so that a row is read once and queries not at all.
- Softmax, online (Milakov and Gimelshein, 2018), to base 2: all warps compute it, alike, in float32.
- Values: each warp has a quarter of the columns, from the rows that the scores came from.

Factors are bfloat16 for a bf16 cache and float16 for the others, a float32 one too; sums are float32.

Shared memory holds rows of ``c_kv`` and behind it ``k_pe``; rows of types with blocks wait there in their own type.
"""

from typing import NamedTuple

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
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
from pymla.cuda.attention.splits import boundary, shares_of
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS, factor_type, fetch_rows, unpack_rows
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device, folded, unrolled

__all__ = ["HEADS", "block_of_heads"]

#: Heads of a block: the rows of a tensor core's product.
HEADS = 16
#: Bytes of the warps' parts of the scores.
PARTS = WARPS * 4 * ptx.WARP * 16


@device
def _write_part(at, scores):
    """A warp's part of the scores; the address is this lane's."""
    s0, s1, s2, s3 = scores
    ptx.store_shared_f32x4(at, s0[0], s0[1], s0[2], s0[3])
    ptx.store_shared_f32x4(at + 512, s1[0], s1[1], s1[2], s1[3])
    ptx.store_shared_f32x4(at + 1024, s2[0], s2[1], s2[2], s2[3])
    ptx.store_shared_f32x4(at + 1536, s3[0], s3[1], s3[2], s3[3])


@device
def _whole_score(at):
    """Four scores of this lane: the sum of the warps' parts."""
    a0, a1, a2, a3 = ptx.load_shared_f32x4(at)
    b0, b1, b2, b3 = ptx.load_shared_f32x4(at + 2048)
    c0, c1, c2, c3 = ptx.load_shared_f32x4(at + 4096)
    d0, d1, d2, d3 = ptx.load_shared_f32x4(at + 6144)
    return (a0 + b0) + (c0 + d0), (a1 + b1) + (c1 + d1), (a2 + b2) + (c2 + d2), (a3 + b3) + (c3 + d3)


class _Layout(NamedTuple):
    """Shared memory of a block: offsets in bytes, and how far the second one of two is behind the first."""

    next_tile: int
    parts: int  # of the scores, warp by warp
    next_parts: int
    nbytes: int

    @classmethod
    def of(cls, size, waiting, teams):
        """For rows of `size` values and so many teams of warps. Two tiles, and the parts of the scores; or, where rows
        of `waiting` bytes wait in their own type, one tile and two of such rows: once they are unpacked, parts of the
        scores take their place."""
        tile = 2 * TILE * size
        if waiting:
            parts = max(teams * PARTS, TILE * waiting)
            return cls(0, tile, parts, tile + 2 * parts)
        return cls(tile, 2 * tile, 0, 2 * tile + teams * PARTS)


def block_of_heads(types_of_rows, rank, rope, order, look, ahead):
    """The device function of a block, and its bytes of shared memory, for the cache types of latent and rope parts and
    their sizes.

    (q, source, length, scale, heads, splits, partial, out): values of a token, 16 heads for each team of four warps,
    and a share of its `length` rows. ``source[0]`` is the cache, a `CachePair`; the rest is for `look`. ``partial`` are
    addresses of unnormalised values (T, splits, H, rank), and of maxima and sums (T, splits, H, 2). A share that is all
    goes to `out`, a `place`, at once. Grid: splits, groups of heads, tokens.

    Parameters
    ----------
    order : `pymla.cuda.attention.tiles.RowOrder`
    look : device function (source, tile, lane)
        Finds the place of a tile's rows, as `order` has it.
    ahead : bool
        Whether it looks for a tile's place while the tile before is copied: where it waits for memory.
    """
    latent_type, rope_type = types_of_rows
    factor = factor_type(*types_of_rows)
    mma, pack = FACTORS[factor]
    size, steps, groups = rank + rope, (rank + rope) // 16, rank // 16
    own_steps, own_groups = -(-steps // WARPS), -(-groups // WARPS)
    row_bytes = ggml.row_bytes(latent_type, rank), ggml.row_bytes(rope_type, rope)
    in_blocks = CACHE_ROWS[latent_type].shared_halves is not None and rope_type == factor
    in_blocks = in_blocks and not any(nbytes % order.alignment for nbytes in row_bytes)
    teams = order.threads // THREADS
    layout = _Layout.of(size, sum(row_bytes) if in_blocks else 0, teams)
    next_tile, at_parts, next_parts = layout.next_tile, layout.parts, layout.next_parts
    softmax, no_values, indices = online_softmax(pack), ((ZERO,) * 8,) * own_groups, tuple(range(own_steps))
    queries_of_warp = unrolled(load_queries(pack, size), own_steps)
    scores_of_warp = folded(scores_of(mma, size, WARPS), own_steps)
    values_of_warp = unrolled(values_of(mma, rank, size, WARPS), own_groups)
    store_columns = unrolled(store_values, own_groups)
    stages = _stages_in_blocks if in_blocks else _stages_of_tiles
    fetch, prepare = stages(types_of_rows, rank, rope, layout, order)

    @device
    def block(q, source, length, scale, heads, splits, partial, out):
        split, t, thread = cuda.blockIdx.x, cuda.blockIdx.z, cuda.threadIdx.x
        tiles, shares = shares_of(length, splits)
        if split >= shares:
            return
        begin, end = boundary(tiles, shares, split), boundary(tiles, shares, split + 1)
        warp, lane, team, head = thread >> 5, thread & 31, 0, HEADS * cuda.blockIdx.y
        if teams > 1:
            team, warp = warp // WARPS, warp % WARPS
            head = HEADS * (teams * cuda.blockIdx.y + team)
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        place = look(source, begin, lane)
        fetch(base, 0, source[0], place, length - TILE * begin, thread)
        if ahead:
            place = look(source, begin + 1, lane)
        upper, lower = t * heads + head + (lane >> 2), t * heads + head + (lane >> 2) + 8
        there = head + (lane >> 2) < heads, head + (lane >> 2) + 8 < heads
        wanted = own_steps * warp, q + 4 * size * upper, q + 4 * size * lower, there, scale, lane
        a = queries_of_warp(0, indices, wanted)
        o, state = no_values, (-INFINITY, -INFINITY, ZERO, ZERO)
        key, of_values = key_row(lane), value_row(lane)
        stage = 0
        for tile in range(begin, end):
            ptx.cp_async_wait(0)
            cuda.syncthreads()
            if tile + 1 < end:
                if not ahead:
                    place = look(source, tile + 1, lane)
                fetch(base, stage ^ 1, source[0], place, length - TILE * (tile + 1), thread)
                if ahead:
                    place = look(source, tile + 2, lane)
            prepare(base, stage, thread)
            at = base + stage * next_tile
            part = scores_of_warp(0, a, NO_SCORES, (own_steps * warp, at + 2 * size * key[0], key))
            parts = base + at_parts + stage * next_parts + PARTS * team + 16 * lane
            _write_part(parts + 2048 * warp, part)
            cuda.syncthreads()
            scores = (
                _whole_score(parts),
                _whole_score(parts + 512),
                _whole_score(parts + 1024),
                _whole_score(parts + 1536),
            )
            seen = length - TILE * tile
            weights, shrink, state = softmax(scores, (seen, seen), state, lane)
            columns = weights, shrink, own_groups * warp, at + 2 * size * of_values[0], of_values
            o = values_of_warp(0, o, columns)
            stage ^= 1
        m0, m1, l0, l1 = state
        l0, l1 = ptx.group_sum(l0, 4), ptx.group_sum(l1, 4)
        if shares == 1:
            factors = ptx.rcp(l0), ptx.rcp(l1)
            upper = out[0] + t * out[1] + (head + (lane >> 2)) * out[2]
            lower = upper + 8 * out[2]
        else:
            factors = np.float32(1), np.float32(1)
            upper += (t * (splits - 1) + split) * heads
            lower += (t * (splits - 1) + split) * heads
            if warp == 0 and lane & 3 == 0:
                if there[0]:
                    ptx.store_f32x2(partial[1] + 8 * upper, m0, l0)
                if there[1]:
                    ptx.store_f32x2(partial[1] + 8 * lower, m1, l1)
            upper, lower = partial[0] + 4 * rank * upper, partial[0] + 4 * rank * lower
        store_columns(0, o, (own_groups * warp, groups, upper, lower, there, factors, lane))

    return block, layout.nbytes


def _stages_of_tiles(types_of_rows, rank, rope, layout, order):
    """How rows come to shared memory as tiles: device functions (fetch, prepare). ``fetch(base, stage, cache, place,
    seen, thread)`` begins to copy a tile of rows, of which `seen` are there, and ``prepare(base, stage, thread)``
    makes a tile of rows that have come."""
    factor, size, next_tile = factor_type(*types_of_rows), rank + rope, layout.next_tile
    latent_bytes, rope_bytes = ggml.row_bytes(types_of_rows[0], rank), ggml.row_bytes(types_of_rows[1], rope)
    source_of = order.source
    fetch_latent = fetch_rows(types_of_rows[0], factor, rank, size, 0, order)
    fetch_rope = fetch_rows(types_of_rows[1], factor, rope, size, rank, order)

    @device
    def fetch(base, stage, cache, place, seen, thread):
        at = base + stage * next_tile
        fetch_latent(at, source_of(cache.first, latent_bytes, place), latent_bytes, seen, thread)
        fetch_rope(at, source_of(cache.second, rope_bytes, place), rope_bytes, seen, thread)
        ptx.cp_async_commit()

    @device
    def prepare(base, stage, thread):
        pass

    return fetch, prepare


def _stages_in_blocks(types_of_rows, rank, rope, layout, order):
    """`_stages_of_tiles` of latent rows in blocks, which wait in their own type."""
    latent_bytes, rope_bytes = ggml.row_bytes(types_of_rows[0], rank), ggml.row_bytes(types_of_rows[1], rope)
    source_of, fetch_latent, fetch_rope = order.source, order.copy_whole(latent_bytes), order.copy_whole(rope_bytes)
    unpack = unpack_rows(types_of_rows[0], rank, rope, order.threads)
    at_parts, next_parts = layout.parts, layout.next_parts

    @device
    def fetch(base, stage, cache, place, seen, thread):
        at = base + at_parts + stage * next_parts
        fetch_latent(at, source_of(cache.first, latent_bytes, place), seen, thread)
        fetch_rope(at + TILE * latent_bytes, source_of(cache.second, rope_bytes, place), seen, thread)
        ptx.cp_async_commit()

    @device
    def prepare(base, stage, thread):
        unpack(base, base + at_parts + stage * next_parts, thread)
        cuda.syncthreads()

    return fetch, prepare
