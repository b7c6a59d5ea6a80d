"""The absorbed form of attention with all scores in memory (``--mla 2``), to be compared with the online softmax.

Three launches: scores of every position, their exponentials, and the weighted sum of rows, whose positions are split
over blocks as in the other forms. All of it is computed in float32.
"""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.constants import LOG2E
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.attention.mixed_rows import mixed_queries, unmix
from pymla.cuda.attention.softmax import INFINITY, ZERO
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
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS, need_multiples_of_16, variant_of
from pymla.cuda.contract import check, need_pages
from pymla.cuda.machine import ptx
from pymla.cuda.memory import empty
from pymla.cuda.runtime.array_types import F3, F32, I32, I64, addresses
from pymla.cuda.runtime.jit import device, kernel, unrolled
from pymla.pages import HADAMARD_TYPES

__all__ = ["absorbed_materialised", "exponential_kernels", "materialised_in_splits", "materialised_kernels"]

#: Heads of a block that sums rows.
HEADS = 8
#: Scores of as many tokens at a time as fit here.
SCORES_BYTES = 256 << 20


def absorbed_materialised(q, latent, rope, step, scale, out):
    """`pymla.cuda.attention.absorbed_form.absorbed`, with scores in memory for as many tokens at a time as fit
    `SCORES_BYTES`; `q` float32 (T, H, rank + R), contiguous, `out` float32 (T, H, rank), any `place`."""
    check.absorbed(q, latent, rope, step, scale, out, "absorbed_materialised")
    need_pages("absorbed_materialised", step, latent)
    return materialised_in_splits(q, latent, rope, step, scale, out)


def materialised_in_splits(q, latent, rope, step, scale, out, splits=None):
    """`absorbed_materialised`, with the positions of a token shared by at most `splits` blocks; by default by as many
    as fill the device twice."""
    tokens, heads, rank = out.shape
    longest = StepArrays.of(step).longest
    need_multiples_of_16(rank, q.shape[2] - rank)
    if latent.qtype in HADAMARD_TYPES:
        q = mixed_queries(q, rank)
    at_once = max(1, SCORES_BYTES // (4 * heads * longest))
    for start in range(0, tokens, at_once):
        stop = min(start + at_once, tokens)
        scores = empty((stop - start, heads, longest), np.float32)
        arrays = StepArrays.of(step.part(start, stop))
        _attend(q[start:stop], (latent, rope), arrays, scale, scores, splits, out[start:stop])
    if latent.qtype in HADAMARD_TYPES:
        unmix(out)
    return out


def _attend(q, cache, step, scale, scores, splits, out):
    """Attention of tokens whose scores fit the memory."""
    tokens, heads, rank = out.shape
    size, (latent, rope) = q.shape[2], cache
    write_scores, add_rows = materialised_kernels((latent.qtype, rope.qtype), rank, size - rank)
    blocks, pair = (-(-scores.shape[2] // TILE), tokens), CachePair.of(latent, rope)
    write_scores[blocks, THREADS, 4 * WARPS * size](q.address, pair, step, scale * LOG2E, scores)
    _exponentials[(heads, tokens), THREADS](step, scores)
    groups = -(-heads // HEADS)
    partial, target = Partial.empty(out, step.longest, tokens * groups, splits), place(out)
    add_rows[(partial.splits, groups, tokens), THREADS](pair, step, scores, partial.splits, partial.addresses, target)
    combine(partial, step, out.shape, target)


def exponential_kernels():
    """The kernels that do not depend on types and sizes."""
    return [_exponentials]


@kernel(STEP, F3, max_threads=THREADS)
def _exponentials(step, scores):
    """``2 ** (score - the largest)`` of the positions that a token sees, in place.

    Grid: heads, tokens.
    """
    maxima = cuda.shared.array(WARPS, np.float32)
    head, t, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    length, largest = seen_by(step, t), -INFINITY
    for p in range(thread, length, THREADS):
        largest = ptx.fmax(largest, scores[t, head, p])
    largest = ptx.warp_max(largest)
    if thread & 31 == 0:
        maxima[thread >> 5] = largest
    cuda.syncthreads()
    for warp in range(WARPS):
        largest = ptx.fmax(largest, maxima[warp])
    for p in range(thread, length, THREADS):
        scores[t, head, p] = ptx.exp2(scores[t, head, p] - largest)


def materialised_kernels(types_of_rows, rank, rope):
    """The kernels for the cache types of latent and rope parts and their sizes: one for the scores, one for the sums of
    rows."""
    return scores_kernel(types_of_rows, rank, rope), row_sums_kernel(types_of_rows[0], rank)


@functools.cache
def scores_kernel(types_of_rows, rank, rope):
    """The kernel of the scores, for the cache types of latent and rope parts and their sizes."""
    latent_four, rope_four = (CACHE_ROWS[qtype].four for qtype in types_of_rows)
    latent_bytes, rope_bytes = ggml.row_bytes(types_of_rows[0], rank), ggml.row_bytes(types_of_rows[1], rope)
    latent_pieces, pieces, size = rank // 4, (rank + rope) // 4, rank + rope

    @kernel(I64, CACHE, STEP, F32, F3, variant=variant_of(types_of_rows, rank, rope), max_threads=THREADS)
    def write_scores(q, cache, step, scale, scores):
        """Scores to base 2, of all heads: a warp takes a position, whose row it keeps in shared memory.

        Grid: tiles, tokens.
        """
        tile, t = cuda.blockIdx.x, cuda.blockIdx.y
        sequence = sequence_of(step, t)
        length, warp, lane = seen_by(step, t), cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
        mine = ptx.shared_address(cuda.shared.array(0, np.float32, alignment=16)) + 4 * size * warp
        heads = scores.shape[1]
        for p in range(TILE * tile + warp, min(TILE * tile + TILE, length), WARPS):
            slot = first_slot(step, sequence, p >> 6, cache) + (p & 63)
            latent, k_pe = cache.first + latent_bytes * slot, cache.second + rope_bytes * slot
            for piece in range(lane, pieces, 32):
                if piece < latent_pieces:
                    x0, x1, x2, x3 = latent_four(latent, piece)
                else:
                    x0, x1, x2, x3 = rope_four(k_pe, piece - latent_pieces)
                ptx.store_shared_f32x4(mine + 16 * piece, x0, x1, x2, x3)
            ptx.syncwarp()
            for head in range(heads):
                query, sum = q + 4 * size * (t * heads + head), ZERO
                for piece in range(lane, pieces, 32):
                    x0, x1, x2, x3 = ptx.load_shared_f32x4(mine + 16 * piece)
                    y0, y1, y2, y3 = ptx.load_f32x4(query + 16 * piece)
                    sum = ptx.fma(x0, y0, ptx.fma(x1, y1, ptx.fma(x2, y2, ptx.fma(x3, y3, sum))))
                sum = ptx.warp_sum(sum)
                if lane == 0:
                    scores[t, head, p] = sum * scale
            ptx.syncwarp()

    return write_scores


@functools.cache
def row_sums_kernel(latent_type, rank):
    """The kernel of the weighted sums of rows, for the cache type of latent parts and their size."""
    latent_four, latent_bytes = CACHE_ROWS[latent_type].four, ggml.row_bytes(latent_type, rank)
    latent_pieces = rank // 4

    @device
    def add_to_head(o, i, fixed):
        """A head's sum of four columns and of weights, and a row with its weight."""
        scores, t, first, p, (x0, x1, x2, x3) = fixed
        weight = scores[t, min(first + i, scores.shape[1] - 1), p]
        return (
            ptx.fma(x0, weight, o[0]), ptx.fma(x1, weight, o[1]),
            ptx.fma(x2, weight, o[2]), ptx.fma(x3, weight, o[3]), o[4] + weight,
        )  # fmt: skip

    @device
    def store_head(o, i, fixed):
        first, heads, address, stride, whole = fixed
        if first + i < heads:
            factor, to = ptx.rcp(o[4]) if whole else np.float32(1), address + stride * (first + i)
            ptx.store_f32x2(to, o[0] * factor, o[1] * factor)
            ptx.store_f32x2(to + 8, o[2] * factor, o[3] * factor)
        return 0

    @device
    def store_sum(o, i, fixed):
        first, heads, address = fixed
        if first + i < heads:
            ptx.store_f32x2(address + 8 * (first + i), ZERO, o[4])
        return 0

    add_to_heads, store_heads, store_sums = (unrolled(each, HEADS) for each in (add_to_head, store_head, store_sum))
    nothing = ((ZERO,) * 5,) * HEADS

    @kernel(
        CACHE, STEP, F3, I32, addresses(2), PLACE, variant=variant_of((latent_type,), rank), max_threads=THREADS,
    )  # fmt: skip
    def add_rows(cache, step, scores, splits, partial, out):
        """Rows of a share of the positions, weighted by the exponentials of `HEADS` heads, as
        `pymla.cuda.attention.splits` combines them. A thread takes four columns. The maximum is 0: it is divided out.

        Grid: splits, groups of heads, tokens.
        """
        split, first, t = cuda.blockIdx.x, HEADS * cuda.blockIdx.y, cuda.blockIdx.z
        length, heads, sequence = seen_by(step, t), scores.shape[1], sequence_of(step, t)
        tiles, shares = shares_of(length, splits)
        if split >= shares:
            return
        begin, end = TILE * boundary(tiles, shares, split), min(TILE * boundary(tiles, shares, split + 1), length)
        row = (t * splits + split) * heads
        for piece in range(cuda.threadIdx.x, latent_pieces, THREADS):
            o = nothing
            for p in range(begin, end):
                slot = first_slot(step, sequence, p >> 6, cache) + (p & 63)
                o = add_to_heads(0, o, (scores, t, first, p, latent_four(cache.first + latent_bytes * slot, piece)))
            if shares == 1:
                store_heads(0, o, (first, heads, out[0] + t * out[1] + 16 * piece, out[2], True))
            else:
                store_heads(0, o, (first, heads, partial[0] + 4 * rank * row + 16 * piece, 4 * rank, False))
                if piece == 0:
                    store_sums(0, o, (first, heads, partial[1] + 8 * row))

    return add_rows
