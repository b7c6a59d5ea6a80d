"""Attention over a cache of whole keys and values of all heads (``--mla 0``).

Sequences with several new tokens are prompts: blocks of up to 64 queries of a head on tensor cores (`flash`), a block
for each sequence in them. Where no sequence has more than one token, each head of a token has keys of its own and
nothing to share: the rows are streamed and multiplied in float32, the positions split over blocks.
"""

import functools

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.attention.cache_rows import read_four
from pymla.cuda.attention.expanded_form import QUERIES, flash, tile_bytes
from pymla.cuda.attention.splits import STEP, Shares, boundary, merge, shares_of
from pymla.cuda.attention.tiles import (
    INFINITY,
    LOG2E,
    THREADS,
    TILE,
    WARPS,
    ZERO,
    convert_rows,
    copy_rows,
    decode_rows,
    need_multiples_of_16,
    place,
)
from pymla.cuda.contract import check
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled
from pymla.pages import CACHE_TYPES, PAGE

__all__ = ["full"]

I32, I64, F32 = types.int32, types.int64, types.float32
NO_SUMS = (ZERO,) * 4


def full(q, keys, values, step, scale, out, splits=None):
    """Attention over whole keys and values: `q` float32 (T, H, nope + R), contiguous, `out` float32 (T, H, v), any
    `place`.

    Parameters
    ----------
    splits : int, optional
        Blocks that share the positions of a single token at most. By default as many as fill the device twice.
    """
    check.full(q, keys, values, step, scale, out)
    tokens, heads, v = out.shape
    size = q.shape[2]
    need_multiples_of_16(size, v)
    cache, of_step = (keys.data.address, values.data.address), (step.positions, step.seq_of, step.block_tables)
    if tokens <= len(step.block_tables):
        shares, target = Shares.empty(out, step, tokens * heads, splits), place(out)
        full_token_kernel(keys.qtype, size, v)[(shares.splits, heads, tokens), THREADS](
            q.address, cache, of_step, scale * LOG2E, heads, shares.splits, shares.addresses, target
        )
        merge(shares, step.positions, out.shape, target)
        return out
    launched, shared_bytes = full_kernel(keys.qtype, size, v)
    blocks = -(-tokens // QUERIES), heads, min(QUERIES, len(step.block_tables))
    launched[blocks, THREADS, shared_bytes](q.address, cache, of_step, scale * LOG2E, heads, place(out))
    return out


@functools.cache
def full_kernel(qtype, size, v):
    """The kernel for prompts, for a cache type and sizes, and its bytes of shared memory."""
    key_bytes, value_bytes = tile_bytes(size, v)
    key_row, value_row = ggml.row_bytes(qtype, size), ggml.row_bytes(qtype, v)
    rows = {ggml.F32: convert_rows, ggml.Q8_0: decode_rows}.get(qtype, copy_rows)
    fetch_keys, fetch_values = rows(size), rows(v)

    @device
    def fetch(at, source, heads, head, tile, seen, thread):
        keys, values, tables, sequence = source
        row = (tables[sequence, tile >> 1] * PAGE + (tile & 1) * TILE) * heads + head
        fetch_keys(at, keys + key_row * row, key_row * heads, seen, thread)
        fetch_values(at + key_bytes, values + value_row * row, value_row * heads, seen, thread)

    attend = flash(qtype, size, v, fetch)

    @kernel(
        I64, types.UniTuple(I64, 2), STEP, F32, I32, types.UniTuple(I64, 3),
        variant=f"{ggml.NAME[qtype].lower()},{size},{v}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def full(q, cache, step, scale, heads, out):
        """Windows of queries of each head; late ones have more to read and come first. A block takes the queries of one
        sequence, of the first, second, … in the window, so that a fault stays in its sequence.

        Grid: windows, heads, sequences.
        """
        positions, seq_of, tables = step
        begin = QUERIES * (cuda.gridDim.x - 1 - cuda.blockIdx.x)
        run = sequence_run(seq_of, begin, min(begin + QUERIES, positions.size), cuda.blockIdx.z)
        if run[0] < run[1]:
            source = cache[0], cache[1], tables, seq_of[run[0]]
            attend(q, source, positions, run, cuda.blockIdx.y, heads, scale, out)

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
def full_token_kernel(qtype, size, v):
    """The kernel for single tokens, for a cache type and sizes."""
    four = read_four(qtype)
    key_row, value_row = ggml.row_bytes(qtype, size), ggml.row_bytes(qtype, v)
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
            dot(q, four(r0, piece), s0), dot(q, four(r1, piece), s1),
            dot(q, four(r2, piece), s2), dot(q, four(r3, piece), s3),
        )  # fmt: skip

    @device
    def add_rows(o, i, fixed):
        """A piece of the values and those of four rows, weighted."""
        (r0, r1, r2, r3), (w0, w1, w2, w3), lane = fixed
        piece = min(lane + 32 * i, value_pieces - 1)
        o = add_scaled(add_scaled(o, four(r0, piece), w0), four(r1, piece), w1)
        return add_scaled(add_scaled(o, four(r2, piece), w2), four(r3, piece), w3)

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
        I64, types.UniTuple(I64, 2), STEP, F32, I32, I32, types.UniTuple(I64, 2), types.UniTuple(I64, 3),
        variant=f"{ggml.NAME[qtype].lower()},{size},{v}", max_threads=THREADS,
    )  # fmt: skip
    def full_token(q, cache, step, scale, heads, splits, partial, out):
        """Values of a token, a head and a share of the positions, as `pymla.cuda.attention.splits` merges them. Warps
        take tiles in turn; in the softmax a lane has one of a tile's 32 positions.

        Grid: splits, heads, tokens.
        """
        maxima = cuda.shared.array(WARPS, np.float32)
        sums = cuda.shared.array(WARPS, np.float32)
        results = cuda.shared.array((WARPS, v), np.float32, alignment=16)
        split, head, t = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        positions, seq_of, tables = step
        length, sequence = positions[t] + 1, seq_of[t]
        tiles, shares = shares_of(length, splits)
        if split >= shares:
            return
        begin, end = boundary(tiles, shares, split), boundary(tiles, shares, split + 1)
        thread = cuda.threadIdx.x
        warp, lane = thread >> 5, thread & 31
        a = query(0, key_indices, (q + 4 * size * (t * heads + head), scale, lane))
        m, l, o = -INFINITY, ZERO, no_values  # noqa: E741
        for tile in range(begin + warp, end, WARPS):
            row = (tables[sequence, tile >> 1] * PAGE + (tile & 1) * TILE) * heads + head
            keys, values = cache[0] + key_row * row, cache[1] + value_row * row
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


for _qtype in CACHE_TYPES.values():
    full_kernel(_qtype, 192, 128)
    full_token_kernel(_qtype, 192, 128)
