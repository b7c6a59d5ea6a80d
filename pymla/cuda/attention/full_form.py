"""Attention over a cache of whole keys and values of all heads (``--mla 0``).

Sequences with several new tokens are prompts: blocks of up to 64 queries of a head on tensor cores (`flash`), a block
for each sequence in them. Where no sequence has more than one token, each head of a token has keys of its own and
nothing to share: the rows are streamed and multiplied in float32, the positions split over blocks.
"""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.attention.expanded_form import QUERIES, flash, tile_bytes
from pymla.cuda.attention.softmax import INFINITY, LOG2E, ZERO
from pymla.cuda.attention.splits import Partial, boundary, combine, shares_of
from pymla.cuda.attention.steps import (
    CACHE,
    PLACE,
    STEP,
    CachePair,
    StepArrays,
    first_slot,
    place,
    seen_by,
    sequence_of,
)
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS, factor_type, fetch_rows, need_multiples_of_16, variant_of
from pymla.cuda.contract import check, need_pages
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled
from pymla.cuda.runtime.kinds import F32, I32, I64, addresses

__all__ = ["full", "full_in_splits", "full_kernel", "full_token_kernel"]

NO_SUMS = (ZERO,) * 4


def full(q, keys, values, step, scale, out):
    """Attention over whole keys and values: `q` float32 (T, H, nope + R), contiguous, `out` float32 (T, H, v), any
    `place`.

    An index of the step that is out of range counts as the last one in range.
    """
    check.full(q, keys, values, step, scale, out)
    need_pages("full", step, keys)
    return full_in_splits(q, keys, values, step, scale, out)


def full_in_splits(q, keys, values, step, scale, out, splits=None):
    """`full`, with the positions of a single token shared by at most `splits` blocks; by default by as many as fill the
    device twice."""
    tokens, heads, v = out.shape
    size, sequences = q.shape[2], len(step.block_tables)
    need_multiples_of_16(size, v)
    cache, arrays, target = CachePair.of(keys, values), StepArrays.of(step), place(out)
    types_of_rows = keys.qtype, values.qtype
    if tokens <= sequences:
        partial = Partial.empty(out, arrays, tokens * heads, splits)
        full_token_kernel(types_of_rows, size, v)[(partial.splits, heads, tokens), THREADS](
            q.address, cache, arrays, scale * LOG2E, heads, partial.splits, partial.addresses, target
        )
        combine(partial, arrays, out.shape, target)
        return out
    launched, shared_bytes = full_kernel(types_of_rows, size, v)
    blocks = -(-tokens // QUERIES), heads, min(QUERIES, sequences)
    launched[blocks, THREADS, shared_bytes](q.address, cache, arrays, scale * LOG2E, heads, target)
    return out


@functools.cache
def full_kernel(types_of_rows, size, v):
    """The kernel for prompts, for the cache types of keys and values and their sizes, and its bytes of shared
    memory."""
    key_type, value_type = types_of_rows
    factor = factor_type(*types_of_rows)
    key_bytes, value_bytes = tile_bytes(size, v)
    key_row, value_row = ggml.row_bytes(key_type, size), ggml.row_bytes(value_type, v)
    fetch_keys, fetch_values = fetch_rows(key_type, factor, size), fetch_rows(value_type, factor, v)

    @device
    def fetch(at, source, heads, head, tile, seen, thread):
        cache, step, sequence = source
        row = (first_slot(step, sequence, tile >> 1, cache) + (tile & 1) * TILE) * heads + head
        fetch_keys(at, cache.first + key_row * row, key_row * heads, seen, thread)
        fetch_values(at + key_bytes, cache.second + value_row * row, value_row * heads, seen, thread)

    attend = flash(factor, size, v, fetch)

    @kernel(
        I64, CACHE, STEP, F32, I32, PLACE,
        variant=variant_of(types_of_rows, size, v), max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def full(q, cache, step, scale, heads, out):
        """Windows of queries of each head; late ones have more to read and come first. A block takes the queries of one
        sequence, of the first, second, … in the window, so that a fault stays in its sequence.

        Grid: windows, heads, sequences.
        """
        begin = QUERIES * (cuda.gridDim.x - 1 - cuda.blockIdx.x)
        run = sequence_run(step.seq_of, begin, min(begin + QUERIES, step.positions.size), cuda.blockIdx.z)
        if run[0] < run[1]:
            source = cache, step, sequence_of(step, run[0])
            length = seen_by(step, run[1] - 1)
            attend(q, source, step.positions, run, length, cuda.blockIdx.y, heads, scale, out)

    return full, 2 * (key_bytes + value_bytes)


@device
def sequence_run(seq_of, begin, end, number):
    """The tokens of a sequence, the one with a number among those of tokens `begin` to `end`: the first, and the one
    behind the last; none where there are fewer sequences."""
    start = stop = begin
    for _ in range(number + 1):
        start = stop
        while stop < end and seq_of[stop] == seq_of[start]:
            stop += 1
    return start, stop


@functools.cache
def full_token_kernel(types_of_rows, size, v):
    """The kernel for single tokens, for the cache types of keys and values and their sizes."""
    key_four, value_four = (CACHE_ROWS[qtype].four for qtype in types_of_rows)
    key_row, value_row = ggml.row_bytes(types_of_rows[0], size), ggml.row_bytes(types_of_rows[1], v)
    key_pieces, value_pieces = size // 4, v // 4
    own_keys, own_values = -(-key_pieces // ptx.WARP), -(-value_pieces // ptx.WARP)
    key_indices, no_values = tuple(range(own_keys)), ((ZERO,) * 4,) * own_values

    # A lane has pieces of four columns: its number, and those 32 behind. Where there is none it reads the last one, and
    # multiplies it by zeros or throws away what comes of it.

    @device
    def load_piece(item, i, fixed):
        address, scale, lane = fixed
        piece = lane + 32 * i
        factor = scale if piece < key_pieces else ZERO
        x0, x1, x2, x3 = ptx.load_f32x4(address + 16 * min(piece, key_pieces - 1))
        return x0 * factor, x1 * factor, x2 * factor, x3 * factor

    @device
    def dots(q, i, sums, fixed):
        """`sums` of four rows and the products with a piece of a query."""
        (r0, r1, r2, r3), lane = fixed
        piece = min(lane + 32 * i, key_pieces - 1)
        s0, s1, s2, s3 = sums
        return (
            dot(q, key_four(r0, piece), s0), dot(q, key_four(r1, piece), s1),
            dot(q, key_four(r2, piece), s2), dot(q, key_four(r3, piece), s3),
        )  # fmt: skip

    @device
    def add_rows(o, i, fixed):
        """A piece of the values and those of four rows, weighted."""
        (r0, r1, r2, r3), (w0, w1, w2, w3), lane = fixed
        piece = min(lane + 32 * i, value_pieces - 1)
        o = add_scaled(add_scaled(o, value_four(r0, piece), w0), value_four(r1, piece), w1)
        return add_scaled(add_scaled(o, value_four(r2, piece), w2), value_four(r3, piece), w3)

    @device
    def shrink(o, i, factor):
        return o[0] * factor, o[1] * factor, o[2] * factor, o[3] * factor

    @device
    def store_piece(o, i, fixed):
        address, lane = fixed
        piece = lane + 32 * i
        if piece < value_pieces:
            ptx.store_shared_f32x4(address + 16 * piece, o[0], o[1], o[2], o[3])
        return 0

    query, dots_of_rows = unrolled(load_piece, own_keys), folded(dots, own_keys)
    add_all, shrink_all, store_all = (unrolled(each, own_values) for each in (add_rows, shrink, store_piece))

    @kernel(
        I64, CACHE, STEP, F32, I32, I32, addresses(2), PLACE,
        variant=variant_of(types_of_rows, size, v), max_threads=THREADS,
    )  # fmt: skip
    def full_token(q, cache, step, scale, heads, splits, partial, out):
        """Values of a token, a head and a share of the positions, as `pymla.cuda.attention.splits` combines them. Warps
        take tiles in turn; in the softmax a lane has one of a tile's 32 positions.

        Grid: splits, heads, tokens.
        """
        maxima = cuda.shared.array(WARPS, np.float32)
        sums = cuda.shared.array(WARPS, np.float32)
        results = cuda.shared.array((WARPS, v), np.float32, alignment=16)
        split, head, t = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        length, sequence = seen_by(step, t), sequence_of(step, t)
        tiles, shares = shares_of(length, splits)
        if split >= shares:
            return
        begin, end = boundary(tiles, shares, split), boundary(tiles, shares, split + 1)
        thread = cuda.threadIdx.x
        warp, lane = thread >> 5, thread & 31
        a = query(0, key_indices, (q + 4 * size * (t * heads + head), scale, lane))
        m, l, o = -INFINITY, ZERO, no_values  # noqa: E741
        for tile in range(begin + warp, end, WARPS):
            row = (first_slot(step, sequence, tile >> 1, cache) + (tile & 1) * TILE) * heads + head
            keys, values = cache.first + key_row * row, cache.second + value_row * row
            seen, score = min(length - TILE * tile, TILE), -INFINITY
            for i in range(0, seen, 4):
                s0, s1, s2, s3 = dots_of_rows(0, a, NO_SUMS, (four_rows(keys, key_row * heads, i, seen), lane))
                s0, s1, s2, s3 = ptx.warp_sum(s0), ptx.warp_sum(s1), ptx.warp_sum(s2), ptx.warp_sum(s3)
                if lane >> 2 == i >> 2 and lane < seen:
                    score = s0 if lane & 3 == 0 else s1 if lane & 3 == 1 else s2 if lane & 3 == 2 else s3
            new = ptx.fmax(m, ptx.warp_max(score))
            weight, factor = ptx.exp2(score - new), ptx.exp2(m - new)
            m, l, o = new, l * factor + weight, shrink_all(0, o, factor)  # noqa: E741
            for i in range(0, seen, 4):
                weights = (
                    ptx.shfl_idx(weight, i), ptx.shfl_idx(weight, i + 1),
                    ptx.shfl_idx(weight, i + 2), ptx.shfl_idx(weight, i + 3),
                )  # fmt: skip
                o = add_all(0, o, (four_rows(values, value_row * heads, i, seen), weights, lane))
        l = ptx.warp_sum(l)  # noqa: E741
        if lane == 0:
            maxima[warp], sums[warp] = m, l
        store_all(0, o, (ptx.shared_address(results) + 4 * v * warp, lane))
        cuda.syncthreads()
        largest, total = maxima[0], ZERO
        for other in range(1, WARPS):
            largest = ptx.fmax(largest, maxima[other])
        for other in range(WARPS):
            total = ptx.fma(sums[other], ptx.exp2(maxima[other] - largest), total)
        row = (t * splits + split) * heads + head
        to, factor = out[0] + t * out[1] + head * out[2], ptx.rcp(total)
        if shares > 1:
            to, factor = partial[0] + 4 * v * row, np.float32(1)
            if thread == 0:
                ptx.store_f32x2(partial[1] + 8 * row, largest, total)
        for column in range(thread, v, THREADS):
            value = ZERO
            for other in range(WARPS):
                value = ptx.fma(results[other, column], ptx.exp2(maxima[other] - largest), value)
            ptx.store_f32(to + 4 * column, value * factor)

    return full_token


@device
def four_rows(address, stride, i, seen):
    """Addresses of rows i to i + 3; of the last of the `seen` ones where there are fewer. Its weight is 0 there."""
    last = seen - 1
    return (
        address + stride * i,
        address + stride * min(i + 1, last),
        address + stride * min(i + 2, last),
        address + stride * min(i + 3, last),
    )


@device
def dot(x, y, sum):
    return ptx.fma(x[0], y[0], ptx.fma(x[1], y[1], ptx.fma(x[2], y[2], ptx.fma(x[3], y[3], sum))))


@device
def add_scaled(o, x, weight):
    """``o + weight * x`` of four values."""
    return (
        ptx.fma(x[0], weight, o[0]),
        ptx.fma(x[1], weight, o[1]),
        ptx.fma(x[2], weight, o[2]),
        ptx.fma(x[3], weight, o[3]),
    )
