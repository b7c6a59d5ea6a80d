"""Attention of single tokens over a cache of whole keys and values: rows are streamed and multiplied in float32.

A lane has pieces of four columns of a row: the piece of its number and every 32nd after it. Past the end of
the row it reads the last piece again, and multiplies it by zeros or throws the result away.
"""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.attention.softmax import INFINITY, ZERO
from pymla.cuda.attention.splits import boundary, shares_of
from pymla.cuda.attention.steps import CACHE, PLACE, STEP, first_slot, seen_by, sequence_of
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS, variant_of
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import F32, I32, I64, addresses
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled

#: Sums of four rows.
NO_SUMS = (ZERO,) * 4


@functools.cache
def full_token_kernel(types_of_rows, size, v):
    """The kernel for single tokens, for the cache types of keys and values and their sizes."""
    key_row, value_row = ggml.row_bytes(types_of_rows[0], size), ggml.row_bytes(types_of_rows[1], v)
    load_query, dots_of_rows = _scores(types_of_rows[0], size)
    add_all, shrink_all, store_all = _values(types_of_rows[1], v)
    key_indices = tuple(range(-(-size // 4 // ptx.WARP)))
    no_values = ((ZERO,) * 4,) * -(-v // 4 // ptx.WARP)

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
        a = load_query(0, key_indices, (q + 4 * size * (t * heads + head), scale, lane))
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


def _scores(qtype, size):
    """A lane's part of the scores of four keys: device functions (load_query, dots_of_rows)."""
    key_four, key_pieces = CACHE_ROWS[qtype].four, size // 4
    count = -(-key_pieces // ptx.WARP)

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

    return unrolled(load_piece, count), folded(dots, count)


def _values(qtype, v):
    """A lane's part of the weighted values: device functions (add_all, shrink_all, store_all)."""
    value_four, value_pieces = CACHE_ROWS[qtype].four, v // 4
    count = -(-value_pieces // ptx.WARP)

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

    add_all, shrink_all, store_all = (unrolled(each, count) for each in (add_rows, shrink, store_piece))
    return add_all, shrink_all, store_all


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
