"""The scores of the lightning indexer: ``Σ_h weights[t, h] * max(0, q[t, h] · keys[s])`` for the positions that a token
sees, and their maxima over groups of neighbours.

A block takes a share of the positions, 128 at a time: while they are computed the next ones are copied into the other
half of shared memory. A warp keeps the queries of up to 64 heads of a token in registers, as the rows of the tensor
cores' products, whose columns are positions; ReLU and the weighted sum over heads happen in registers too.
Where no sequence has more than one token, four warps share a token's positions. In prompts each of them has a token of
its own, one of four neighbours, and all read the same keys.

Factors are bfloat16 for bf16 keys and float16 for f16 and q8_0; keys of float32 are multiplied in float32, a thread for
each position. Nothing is computed for a token that sees no more positions than are chosen. The grid depends on the
shapes of arrays alone.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.attention.products import FACTORS, key_row, load_queries
from pymla.cuda.attention.softmax import INFINITY, ZERO
from pymla.cuda.attention.splits import boundary
from pymla.cuda.attention.steps import STEP, first_slot, seen_by, sequence_of, sequence_run
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS, factor_type, fetch_rows, swizzle
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import F2, I64
from pymla.cuda.runtime.driver import multiprocessors
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled, zipped
from pymla.errors import PymlaError
from pymla.pages import PAGE

__all__ = ["GROUP", "index_scores", "index_scores_kernel"]

#: Positions of a group of neighbours, whose largest score is kept beside the scores.
GROUP = 8
#: Positions of which a block has the keys in shared memory at a time, in so many tiles.
POSITIONS = THREADS
TILES = POSITIONS // TILE
#: Neighbouring tokens of a prompt that share keys: one for each warp.
WINDOW = WARPS
#: Heads that a warp takes at a time, and words of a lane's fragments of their queries, at most.
MOST_HEADS, QUERY_WORDS = 64, 128
#: Heads that share a key's numbers in registers, in float32.
HEADS_AT_ONCE = 8
#: Numbers of a key for which two stages of `POSITIONS` keys fit shared memory.
LARGEST_KEY = 256
ONE = np.float32(1)


class Input(NamedTuple):
    """What scores are computed from."""

    q: int  # address of float32 (T, H, D)
    weights: int  # address of float32 (T, H)
    keys: int  # address of the cache's rows
    pages: int  # of the cache
    heads: int  # H
    most: int  # positions that are chosen: a token that sees no more has no scores
    window: int  # neighbouring tokens of a block
    splits: int  # blocks that share the positions


INPUT = types.NamedUniTuple(I64, len(Input._fields), Input)


def index_scores(q, weights, keys, step, most, scores, maxima):
    """Scores of tokens that see more than `most` positions.

    Parameters
    ----------
    q, weights, keys
        As for `pymla.cuda.attention.indexer.choose`.
    step : StepArrays
    most : int
    scores : float32 DeviceArray (T, 64 * pages)
        Out: a score that is not a number is −inf, and so is that of a position which a token does not see, up to the
        next multiple of `TILE`. What is behind is not written.
    maxima : float32 DeviceArray (T, 64 * pages // GROUP)
        Out: the largest score of each group.
    """
    tokens, heads, width = q.shape
    sequences = len(step.tables)
    window = 1 if tokens <= sequences else WINDOW
    windows, runs = -(-tokens // window), min(window, sequences)
    splits = max(1, min(-(-step.longest // POSITIONS), 2 * multiprocessors() // max(1, windows * runs)))
    launched, shared_bytes = index_scores_kernel(keys.qtype, width, heads)
    where = keys.data.address, len(keys.data) // PAGE
    given = Input(q.address, weights.address, *where, heads, most, window, splits)
    launched[(splits, windows, runs), THREADS, shared_bytes](given, step, scores, maxima)


def index_scores_kernel(qtype, width, heads):
    """The kernel for keys of a cache type and `width` numbers and so many heads, and its bytes of shared memory."""
    if qtype == ggml.F32:
        return _kernel_in_float32(width), 0
    if width > LARGEST_KEY:
        raise PymlaError(f"keys of an indexer have at most {LARGEST_KEY} numbers on the CUDA backend, not {width}")
    head_tiles = min(-(-heads // 16), MOST_HEADS // 16, QUERY_WORDS // (width // 4))
    return _kernel_on_tensor_cores(qtype, width, head_tiles), 2 * 2 * width * POSITIONS


@device
def _tokens_of_block(given, step):
    """The first of this block's tokens, neighbours of a sequence, the one behind the last, and how many positions they
    see at most. No token where the block has nothing to do."""
    begin = given.window * cuda.blockIdx.y
    start, stop = sequence_run(step.seq_of, begin, min(begin + given.window, step.positions.size), cuda.blockIdx.z)
    length = 0
    for t in range(start, stop):
        length = max(length, seen_by(step, t))
    return start, stop if length > given.most else start, length


@device
def _share_of_block(given, length):
    """The first of the block's portions of `POSITIONS`, and the one behind the last."""
    portions = (length + POSITIONS - 1) // POSITIONS
    shares, share = min(given.splits, portions), cuda.blockIdx.x
    if share >= shares:
        return 0, 0
    return boundary(portions, shares, share), boundary(portions, shares, share + 1)


@device
def _store(scores, maxima, t, position, seen, x):
    """Write the scores of 32 positions, of this lane's one, and the maxima of their groups; lanes of a group are
    neighbours."""
    x = x if x == x and position < seen else -INFINITY
    scores[t, position] = x
    top = ptx.group_max(x, GROUP)
    if position & GROUP - 1 == 0:
        maxima[t, position // GROUP] = top


@device
def _relu(x):
    """NaN stays NaN."""
    return ZERO if x < ZERO else x


@functools.cache
def _kernel_on_tensor_cores(qtype, width, head_tiles):
    """The kernel that takes 16 * `head_tiles` heads at a time."""
    factor, row_bytes = factor_type(qtype), ggml.row_bytes(qtype, width)
    tile_bytes, heads_at_once = 2 * TILE * width, 16 * head_tiles
    stage_bytes = TILES * tile_bytes
    fetch_tile = fetch_rows(qtype, factor, width)
    load, score = _queries(factor, width, head_tiles), _score_of_tile(factor, width, head_tiles)

    @device
    def fetch(at, given, step, sequence, portion, length, thread):
        for tile in range(TILES):
            position = POSITIONS * portion + TILE * tile
            if position < length:
                slot = first_slot(step, sequence, position >> 6, given) + (position & TILE)
                source = given.keys + slot * row_bytes
                fetch_tile(at + tile_bytes * tile, source, row_bytes, length - position, thread)
        ptx.cp_async_commit()

    @kernel(
        INPUT, STEP, F2, F2,
        variant=f"{ggml.NAME[qtype].lower()},{width},{heads_at_once}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def index_scores(given, step, scores, maxima):
        """Grid: splits, windows of tokens, sequences of a window."""
        start, stop, length = _tokens_of_block(given, step)
        first, last = _share_of_block(given, length)
        if start == stop or first == last:
            return
        thread, sequence = cuda.threadIdx.x, sequence_of(step, start)
        warp, lane = thread >> 5, thread & 31
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        # Warps have a token each, or share one.
        alone = given.window == 1
        own, own_tile, own_tiles = start + (0 if alone else warp), warp if alone else 0, WARPS if alone else 1
        t = min(own, stop - 1)
        seen = seen_by(step, t)
        if own >= stop or seen <= given.most:
            seen = 0
        heads = given.heads
        key, stage = key_row(lane), 0
        for head in range(0, heads, heads_at_once):
            fetch(base + stage_bytes * stage, given, step, sequence, first, length, thread)
            a, w = load(given.q + 4 * width * heads * t, given.weights + 4 * heads * t, head, heads, lane)
            for portion in range(first, last):
                ptx.cp_async_wait(0)
                cuda.syncthreads()
                if portion + 1 < last:
                    fetch(base + stage_bytes * (stage ^ 1), given, step, sequence, portion + 1, length, thread)
                for tile in range(own_tile, TILES, own_tiles):
                    if POSITIONS * portion + TILE * tile < seen:
                        x = score(a, w, base + stage_bytes * stage + tile_bytes * tile, key, lane)
                        # Lanes have columns in the order in which `_sum_over_rows` leaves them.
                        position = POSITIONS * portion + TILE * tile + _column(lane)
                        if head:
                            x += scores[t, position]
                        if head + heads_at_once < heads:
                            scores[t, position] = x
                        else:
                            _store(scores, maxima, t, position, seen, x)
                stage ^= 1

    return index_scores


def _queries(factor, width, head_tiles):
    """A device function (q, weights, head, heads, lane): this lane's fragments of queries of 16 heads each from a head
    on, by 16 columns and then by heads, and the weights of its rows. Heads that there are not are zeros."""
    load_16, row_bytes = load_queries(FACTORS[factor][1], width), 4 * width
    steps, tiles = tuple(range(width // 16)), tuple(range(head_tiles))

    @device
    def load_fragment(item, i, fixed):
        step, q, head, heads, lane = fixed
        upper = head + 16 * i + (lane >> 2)
        there = upper < heads, upper + 8 < heads
        return load_16(item, 0, (step, q + row_bytes * upper, q + row_bytes * (upper + 8), there, ONE, lane))

    fragments = unrolled(load_fragment, head_tiles)

    @device
    def load_step(item, step, fixed):
        q, head, heads, lane = fixed
        return fragments(0, tiles, (step, q, head, heads, lane))

    @device
    def load_weights(item, i, fixed):
        weights, head, heads, lane = fixed
        upper, w0, w1 = head + 16 * i + (lane >> 2), ZERO, ZERO
        if upper < heads:
            w0 = ptx.load_f32(weights + 4 * upper)
        if upper + 8 < heads:
            w1 = ptx.load_f32(weights + 4 * (upper + 8))
        return w0, w1

    all_steps, all_weights = unrolled(load_step, len(steps)), unrolled(load_weights, head_tiles)

    @device
    def load(q, weights, head, heads, lane):
        return all_steps(0, steps, (q, head, heads, lane)), all_weights(0, tiles, (weights, head, heads, lane))

    return load


def _score_of_tile(factor, width, head_tiles):
    """A device function (a, w, at, key, lane): the score of a position of the tile at an address of shared memory, from
    what `_queries` loads and a lane's `key_row`."""
    mma, mask, half = FACTORS[factor][0], swizzle(width), 32 * width
    no_sums, pairs = ((ZERO,) * 8,) * head_tiles, zipped(head_tiles)

    @device
    def multiply_heads(item, i, keys):
        (a0, a1, a2, a3), c = item
        b0, b1, b2, b3 = keys
        left = mma(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3])
        return left + mma(a0, a1, a2, a3, b2, b3, c[4], c[5], c[6], c[7])

    multiply_all_heads = unrolled(multiply_heads, head_tiles)

    @device
    def multiply(a, step, sums, fixed):
        """16 columns of queries and of 16 keys."""
        at, (row, piece) = fixed
        keys = ptx.ldmatrix_x4(at + 16 * ((2 * step + piece) ^ (row & mask)))
        return multiply_all_heads(0, pairs(a, sums), keys)

    multiply_all = folded(multiply, width // 16)

    @device
    def weigh(item, i, sums, fixed):
        c, (w0, w1) = item
        return (
            ptx.fma(_relu(c[0]), w0, ptx.fma(_relu(c[2]), w1, sums[0])),
            ptx.fma(_relu(c[1]), w0, ptx.fma(_relu(c[3]), w1, sums[1])),
            ptx.fma(_relu(c[4]), w0, ptx.fma(_relu(c[6]), w1, sums[2])),
            ptx.fma(_relu(c[5]), w0, ptx.fma(_relu(c[7]), w1, sums[3])),
        )

    weigh_all = folded(weigh, head_tiles)

    @device
    def score(a, w, at, key, lane):
        first = at + 2 * width * key[0]
        left = weigh_all(0, pairs(multiply_all(0, a, no_sums, (first, key)), w), (ZERO,) * 4, 0)
        right = weigh_all(0, pairs(multiply_all(0, a, no_sums, (first + half, key)), w), (ZERO,) * 4, 0)
        return _sum_over_rows(left, right, lane)

    return score


@device
def _sum_over_rows(left, right, lane):
    """The sum over the eight rows ``lane >> 2`` of eight columns of each lane: a lane gets that of one column, in three
    exchanges, each of which halves the columns of a lane."""
    a0, a1, a2, a3 = right if lane & 16 else left
    b0, b1, b2, b3 = left if lane & 16 else right
    a0, a1 = a0 + ptx.shfl_xor(b0, 16), a1 + ptx.shfl_xor(b1, 16)
    a2, a3 = a2 + ptx.shfl_xor(b2, 16), a3 + ptx.shfl_xor(b3, 16)
    c0, c1 = (a2, a3) if lane & 8 else (a0, a1)
    d0, d1 = (a0, a1) if lane & 8 else (a2, a3)
    c0, c1 = c0 + ptx.shfl_xor(d0, 8), c1 + ptx.shfl_xor(d1, 8)
    return (c1 if lane & 4 else c0) + ptx.shfl_xor(c0 if lane & 4 else c1, 4)


@device
def _column(lane):
    """The column of a tile that `_sum_over_rows` leaves with a lane. Eight neighbouring lanes have neighbours."""
    return (lane & 24) + 2 * (lane & 3) + (lane >> 2 & 1)


@functools.cache
def _kernel_in_float32(width):
    """The kernel for keys of float32."""
    pieces, row_bytes = width // 4, 4 * width
    no_sums = (ZERO,) * HEADS_AT_ONCE

    @device
    def add_piece(sum, i, fixed):
        """A head's sum and the products of four numbers of its query and of the key."""
        (x0, x1, x2, x3), q, last = fixed
        y0, y1, y2, y3 = ptx.load_f32x4(q + row_bytes * min(i, last))
        return ptx.fma(x0, y0, ptx.fma(x1, y1, ptx.fma(x2, y2, ptx.fma(x3, y3, sum))))

    @device
    def weigh(sum, i, total, fixed):
        weights, last = fixed
        return ptx.fma(_relu(sum), ptx.load_f32(weights + 4 * i), total) if i <= last else total

    add_to_heads, weigh_heads = unrolled(add_piece, HEADS_AT_ONCE), folded(weigh, HEADS_AT_ONCE)

    @device
    def score(q, weights, heads, key):
        """The score of the key at an address. Heads past the last one repeat the last one, with no weight."""
        total = ZERO
        for head in range(0, heads, HEADS_AT_ONCE):
            sums, last = no_sums, heads - 1 - head
            for piece in range(pieces):
                x = ptx.load_f32x4(key + 16 * piece)
                sums = add_to_heads(0, sums, (x, q + row_bytes * head + 16 * piece, last))
            total = weigh_heads(0, sums, total, (weights + 4 * head, last))
        return total

    @kernel(INPUT, STEP, F2, F2, variant=f"f32,{width}", max_threads=THREADS)
    def index_scores(given, step, scores, maxima):
        """A thread takes a position. Grid: splits, windows of tokens, sequences of a window."""
        start, stop, length = _tokens_of_block(given, step)
        first, last = _share_of_block(given, length)
        if start == stop or first == last:
            return
        sequence, heads = sequence_of(step, start), given.heads
        for portion in range(first, last):
            position = POSITIONS * portion + cuda.threadIdx.x
            page = min(position, length - 1) >> 6
            key = given.keys + row_bytes * (first_slot(step, sequence, page, given) + (position & PAGE - 1))
            for t in range(start, stop):
                seen = seen_by(step, t)
                # Whole warps are inside.
                if seen > given.most and position - ptx.lane() < seen:
                    x = ZERO
                    if position < seen:
                        x = score(given.q + row_bytes * heads * t, given.weights + 4 * heads * t, heads, key)
                    _store(scores, maxima, t, position, seen, x)

    return index_scores
