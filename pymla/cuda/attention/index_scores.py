"""The scores of the lightning indexer: ``Σ_h weights[t, h] * max(0, q[t, h] · keys[s])`` for the positions that a token
sees, and their maxima over groups of neighbours.

A block takes a share of the positions, 128 at a time: while they are computed the next ones are copied into the other
half of shared memory. A warp keeps the queries of 32 heads of a token in registers, as the rows of the tensor cores'
products, whose columns are positions. ReLU and the weighted sum over its heads happen in registers too, and sums of
warps that share a token's heads meet in shared memory.

Where no sequence has more than one token, the warps of a block share the token's positions. In prompts they have
neighbouring tokens, which read the same keys.

Factors are bfloat16 for bf16 keys and float16 for f16 and q8_0; keys of float32 are multiplied in float32, a thread for
each position. Nothing is computed for a token that sees no more positions than are chosen. The grid depends on the
shapes of arrays alone.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.attention.products import FACTORS, key_row, load_queries
from pymla.cuda.attention.softmax import INFINITY, ZERO
from pymla.cuda.attention.splits import boundary
from pymla.cuda.attention.steps import STEP, first_slot, seen_by, sequence_of, sequence_run
from pymla.cuda.attention.tiles import IN_ORDER, THREADS, TILE, WARPS, factor_type, fetch_rows, swizzle, unpack_rows
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import I64
from pymla.cuda.runtime.driver import multiprocessors
from pymla.cuda.runtime.jit import Kernel, device, folded, kernel, unrolled, zipped
from pymla.errors import PymlaError
from pymla.pages import PAGE

__all__ = ["GROUP", "index_scores", "plan_of"]

#: Positions of a group of neighbours, whose largest score is kept beside the scores.
GROUP_BITS = 3
GROUP = 1 << GROUP_BITS
#: Positions of which a block has the keys in shared memory at a time: one for each thread.
POSITIONS = THREADS
#: Positions that a warp takes at a time: the columns of two products of a tensor core.
COLUMNS = 16
#: Heads of a warp, and words of a lane's fragments of their queries, at most.
WARP_HEADS, QUERY_WORDS = 32, 64
#: Heads that share a key's numbers in registers, in float32.
HEADS_AT_ONCE = 8
#: Numbers of a key for which two stages of `POSITIONS` keys fit shared memory.
LARGEST_KEY = 256
#: Sums over heads of a lane's four columns of 16.
NO_TOTALS = (ZERO,) * 4
ONE = np.float32(1)


class Input(NamedTuple):
    """What scores are computed from."""

    q: int  # address of float32 (T, H, D)
    weights: int  # address of float32 (T, H)
    keys: int  # address of the cache's rows
    pages: int  # of the cache
    heads: int  # H
    head: int  # the first one that is computed; scores of those before are there
    most: int  # positions that are chosen: a token that sees no more has no scores
    window: int  # neighbouring tokens of a block
    splits: int  # blocks that share the positions
    scores: int  # address of float32 (T, longest)
    maxima: int  # address of float32 (T, longest // GROUP)
    longest: int  # positions that the tables have room for


INPUT = types.NamedUniTuple(I64, len(Input._fields), Input)


class _Layout(NamedTuple):
    """Shared memory of a block: offsets in bytes, and how far the second one of two is behind the first."""

    next_keys: int
    waiting: int  # of keys in blocks, in their own type; 0: there are none
    next_waiting: int
    sums: int  # of the warps, float32 (WARPS, POSITIONS)
    nbytes: int

    @classmethod
    def of(cls, qtype, width):
        """Two portions of keys; or, of keys in blocks, one portion and two that wait."""
        keys, waiting = 2 * width * POSITIONS, ggml.row_bytes(qtype, width) * POSITIONS
        sums_bytes = 4 * WARPS * POSITIONS
        if CACHE_ROWS[qtype].shared_halves is None:
            return cls(keys, 0, 0, 2 * keys, 2 * keys + sums_bytes)
        return cls(0, keys, waiting, keys + 2 * waiting, keys + 2 * waiting + sums_bytes)


class Plan(NamedTuple):
    """A kernel and how it is launched."""

    kernel: Kernel
    heads: int  # that it takes at a time
    window: int  # tokens of a prompt that a block takes
    shared_bytes: int


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
        next multiple of `GROUP`. What is behind is not written.
    maxima : float32 DeviceArray (T, 64 * pages // GROUP)
        Out: the largest score of each group.
    """
    tokens, heads, width = q.shape
    sequences, plan = len(step.tables), plan_of(keys.qtype, width, heads)
    window = 1 if tokens <= sequences else plan.window
    windows, runs = -(-tokens // window), min(window, sequences)
    splits = max(1, min(-(-step.longest // POSITIONS), 2 * multiprocessors() // max(1, windows * runs)))
    inputs = q.address, weights.address, keys.data.address, len(keys.data) // PAGE
    outputs = scores.address, maxima.address, step.longest
    for head in range(0, heads, plan.heads):
        given = Input(*inputs, heads, head, most, window, splits, *outputs)
        plan.kernel[(splits, windows, runs), THREADS, plan.shared_bytes](given, step)


def plan_of(qtype, width, heads):
    """The `Plan` for keys of a cache type and `width` numbers, and so many heads."""
    if qtype == ggml.F32:
        return Plan(_kernel_in_float32(width), heads, WARPS, 0)
    if width > LARGEST_KEY:
        raise PymlaError(f"keys of an indexer have at most {LARGEST_KEY} numbers on the CUDA backend, not {width}")
    tiles = min(-(-heads // 16), WARP_HEADS // 16, QUERY_WORDS // (width // 4))
    parts = next((parts for parts in (1, 2) if heads <= 16 * tiles * parts), WARPS)
    launched, nbytes = _kernel_on_tensor_cores(qtype, width, tiles, parts), _Layout.of(qtype, width).nbytes
    return Plan(launched, 16 * tiles * parts, WARPS // parts, nbytes)


@device
def _tokens_of_block(given, step):
    """The first of this block's tokens, neighbours of a sequence, the one behind the last, and how many positions they
    see at most. No token where the block has nothing to do."""
    begin = given.window * cuda.blockIdx.y
    start, stop = sequence_run(step.seq_of, begin, min(begin + given.window, step.positions.size), cuda.blockIdx.z)
    length = 0
    for t in range(start, stop):
        length = max(length, _scored_by(given, step, t))
    return start, stop if length else start, length


@device
def _scored_by(given, step, t):
    """Positions of which token t has scores: all that it sees, or none."""
    seen = seen_by(step, t)
    return seen if seen > given.most else 0


@device
def _share_of_block(given, length):
    """The first of the block's portions of `POSITIONS`, and the one behind the last."""
    portions = (length + POSITIONS - 1) // POSITIONS
    shares, share = min(given.splits, portions), cuda.blockIdx.x
    if share >= shares:
        return 0, 0
    return boundary(portions, shares, share), boundary(portions, shares, share + 1)


@device
def _store(given, t, position, seen, x):
    """Write the score of a lane's position, and the maximum of its group; lanes have neighbours."""
    i = t * given.longest + position
    if given.head:
        x += ptx.fresh_f32(given.scores + 4 * i)
    x = x if x == x and position < seen else -INFINITY
    ptx.store_f32(given.scores + 4 * i, x)
    top = ptx.group_max(x, GROUP)
    if position & GROUP - 1 == 0:
        ptx.store_f32(given.maxima + 4 * (i >> GROUP_BITS), top)


@device
def _relu(x):
    """NaN stays NaN."""
    return ZERO if x < ZERO else x


@functools.cache
def _kernel_on_tensor_cores(qtype, width, head_tiles, parts):
    """The kernel in which `parts` warps share the heads of a token, 16 * `head_tiles` for each."""
    factor, at_once, own_positions = factor_type(qtype), 16 * head_tiles * parts, POSITIONS * parts // WARPS
    load, score = _queries(factor, width, head_tiles), _scores_of_columns(factor, width, head_tiles)
    layout = _Layout.of(qtype, width)
    stages = _stages_in_blocks if layout.waiting else _stages_of_tiles
    (fetch, prepare), next_keys, at_sums = stages(qtype, width, layout), layout.next_keys, layout.sums

    @device
    def store_sums(given, step, start, stop, begin, sums, thread):
        """Write the scores of tokens, a thread for each position, as sums of the parts."""
        for t in range(start, stop):
            seen = _scored_by(given, step, t)
            # Whole warps are inside.
            if begin + (thread & ~31) < seen:
                x = ZERO
                for part in range(parts):
                    x += ptx.load_shared_f32(sums + 4 * POSITIONS * (parts * (t - start) + part) + 4 * thread)
                _store(given, t, begin + thread, seen, x)

    @kernel(
        INPUT, STEP,
        variant=f"{ggml.NAME[qtype].lower()},{width},{at_once}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def index_scores(given, step):
        """Grid: splits, windows of tokens, sequences of a window."""
        start, stop, length = _tokens_of_block(given, step)
        first, last = _share_of_block(given, length)
        if start == stop or first == last:
            return
        thread, sequence = cuda.threadIdx.x, sequence_of(step, start)
        warp, lane = thread >> 5, thread & 31
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        # Warps that do not share heads have tokens of their own, or positions of the only one.
        place, part, alone = warp // parts, warp % parts, given.window == 1
        t = start if alone else min(start + place, stop - 1)
        seen = _scored_by(given, step, t) if alone or start + place < stop else 0
        own_first, own_count = own_positions * place if alone else 0, own_positions if alone else POSITIONS
        sums = base + at_sums
        own_sums = sums + 4 * POSITIONS * (part if alone else warp) + 4 * _column(lane)
        key, stage = key_row(lane), 0
        fetch(base, 0, given, step, sequence, first, length, thread)
        a, w = load(given, t, given.head + 16 * head_tiles * part, lane)
        for portion in range(first, last):
            ptx.cp_async_wait(0)
            cuda.syncthreads()
            if portion + 1 < last:
                fetch(base, stage ^ 1, given, step, sequence, portion + 1, length, thread)
            prepare(base, stage, thread)
            at, begin = base + next_keys * stage, POSITIONS * portion
            for position in range(own_first, min(own_first + own_count, seen - begin), COLUMNS):
                x = score(a, w, at + 2 * width * position, key, lane)
                if lane & 4 == 0:
                    ptx.store_shared_f32(own_sums + 4 * position, x)
            cuda.syncthreads()
            store_sums(given, step, start, stop, begin, sums, thread)
            stage ^= 1

    return index_scores


def _stages_of_tiles(qtype, width, layout):
    """How keys come to shared memory as tiles: device functions (fetch, prepare). ``fetch(base, stage, given, step,
    sequence, portion, length, thread)`` begins to copy a portion of the positions, of which `length` are there, and
    ``prepare(base, stage, thread)`` makes tiles of keys that have come."""
    row_bytes, next_keys = ggml.row_bytes(qtype, width), layout.next_keys
    fetch_tile = fetch_rows(qtype, factor_type(qtype), width)

    @device
    def fetch(base, stage, given, step, sequence, portion, length, thread):
        first, at = POSITIONS * portion, base + next_keys * stage
        for position in range(first, min(first + POSITIONS, length), TILE):
            slot = first_slot(step, sequence, position >> 6, given) + (position & TILE)
            source = given.keys + slot * row_bytes
            fetch_tile(at + 2 * width * (position - first), source, row_bytes, length - position, thread)
        ptx.cp_async_commit()

    @device
    def prepare(base, stage, thread):
        pass

    return fetch, prepare


def _stages_in_blocks(qtype, width, layout):
    """`_stages_of_tiles` of keys in blocks, which wait in their own type."""
    row_bytes, waiting, next_waiting = ggml.row_bytes(qtype, width), layout.waiting, layout.next_waiting
    copy, unpack = IN_ORDER.copy_whole(row_bytes), unpack_rows(qtype, width, 0, THREADS)

    @device
    def fetch(base, stage, given, step, sequence, portion, length, thread):
        first, at = POSITIONS * portion, base + waiting + next_waiting * stage
        for position in range(first, min(first + POSITIONS, length), TILE):
            slot = first_slot(step, sequence, position >> 6, given) + (position & TILE)
            copy(at + row_bytes * (position - first), given.keys + slot * row_bytes, length - position, thread)
        ptx.cp_async_commit()

    @device
    def prepare(base, stage, thread):
        at = base + waiting + next_waiting * stage
        for first in range(0, POSITIONS, TILE):
            unpack(base + 2 * width * first, at + row_bytes * first, thread)
        cuda.syncthreads()

    return fetch, prepare


def _queries(factor, width, head_tiles):
    """A device function (given, t, head, lane): this lane's fragments of token t's queries of 16 heads each from a head
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
    def load(given, t, head, lane):
        heads = given.heads
        q, weights = given.q + row_bytes * heads * t, given.weights + 4 * heads * t
        return all_steps(0, steps, (q, head, heads, lane)), all_weights(0, tiles, (weights, head, heads, lane))

    return load


def _scores_of_columns(factor, width, head_tiles):
    """A device function (a, w, at, key, lane): the scores of 16 positions whose keys are at an address of shared
    memory, of which a lane gets that of its `_column`; from what `_queries` loads and the lane's `key_row`."""
    mma, mask = FACTORS[factor][0], swizzle(width)
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
        products = multiply_all(0, a, no_sums, (at + 2 * width * key[0], key))
        return _sum_over_rows(weigh_all(0, pairs(products, w), NO_TOTALS, 0), lane)

    return score


@device
def _sum_over_rows(sums, lane):
    """The sum over the eight rows ``lane >> 2`` of a lane's four columns, of which it gets one: the first two exchanges
    halve the columns of a lane."""
    s0, s1, s2, s3 = sums
    upper, right = lane & 16, lane & 8
    a0, a1 = (s2 if upper else s0), (s3 if upper else s1)
    a0 += ptx.shfl_xor(s0 if upper else s2, 16)
    a1 += ptx.shfl_xor(s1 if upper else s3, 16)
    b = (a1 if right else a0) + ptx.shfl_xor(a0 if right else a1, 8)
    return b + ptx.shfl_xor(b, 4)


@device
def _column(lane):
    """Which of 16 columns `_sum_over_rows` leaves with a lane, and with lane ``lane ^ 4``."""
    return (lane >> 4 << 3) + 2 * (lane & 3) + (lane >> 3 & 1)


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

    @kernel(INPUT, STEP, variant=f"f32,{width}", max_threads=THREADS)
    def index_scores(given, step):
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
                seen = _scored_by(given, step, t)
                # Whole warps are inside.
                if position - ptx.lane() < seen:
                    x = ZERO
                    if position < seen:
                        x = score(given.q + row_bytes * heads * t, given.weights + 4 * heads * t, heads, key)
                    _store(given, t, position, seen, x)

    return index_scores
