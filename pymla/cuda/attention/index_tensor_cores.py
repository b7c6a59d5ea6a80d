"""The indexer's scores on tensor cores.

A block takes a share of the positions, 128 at a time: while they are computed the next ones are copied into the other
half of shared memory. A warp keeps the queries of 32 heads of a token in registers, as the rows of the tensor cores'
products, whose columns are positions. ReLU and the weighted sum over its heads happen in registers too, and sums of
warps that share a token's heads meet in shared memory.

Where no sequence has more than one token, the warps of a block share the token's positions. In prompts they have
neighbouring tokens, which read the same keys.

Factors are bfloat16 for bf16 keys and float16 for f16 and q8_0.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.attention.index_input import (
    INPUT,
    POSITIONS,
    relu,
    scored_by,
    share_of_block,
    store_score,
    tokens_of_block,
)
from pymla.cuda.attention.products import FACTORS, key_row, load_queries
from pymla.cuda.attention.softmax import ZERO
from pymla.cuda.attention.steps import STEP, first_slot, sequence_of
from pymla.cuda.attention.tiles import IN_ORDER, THREADS, TILE, WARPS, factor_type, fetch_rows, swizzle, unpack_rows
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled, zipped

__all__ = ["tensor_core_kernel"]

#: Positions that a warp takes at a time: the columns of two products of a tensor core.
COLUMNS = 16
#: Sums over heads of a lane's four columns of 16.
NO_TOTALS = (ZERO,) * 4
ONE = np.float32(1)


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


@functools.cache
def tensor_core_kernel(qtype, width, head_tiles, parts):
    """The kernel in which `parts` warps share the heads of a token, 16 * `head_tiles` for each, and its bytes of shared
    memory."""
    factor, at_once, own_positions = factor_type(qtype), 16 * head_tiles * parts, POSITIONS * parts // WARPS
    load, score = _queries(factor, width, head_tiles), _scores_of_columns(factor, width, head_tiles)
    layout = _Layout.of(qtype, width)
    stages = _stages_in_blocks if layout.waiting else _stages_of_tiles
    (fetch, prepare), next_keys, at_sums = stages(qtype, width, layout), layout.next_keys, layout.sums

    @device
    def store_sums(given, step, start, stop, begin, sums, thread):
        """Write the scores of tokens, a thread for each position, as sums of the parts."""
        for t in range(start, stop):
            seen = scored_by(given, step, t)
            # Whole warps are inside.
            if begin + (thread & ~31) < seen:
                x = ZERO
                for part in range(parts):
                    x += ptx.load_shared_f32(sums + 4 * POSITIONS * (parts * (t - start) + part) + 4 * thread)
                store_score(given, t, begin + thread, seen, x)

    @kernel(
        INPUT, STEP,
        variant=f"{ggml.NAME[qtype].lower()},{width},{at_once}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def index_scores(given, step):
        """Grid: splits, windows of tokens, sequences of a window."""
        start, stop, length = tokens_of_block(given, step)
        first, last = share_of_block(given, length)
        if start == stop or first == last:
            return
        thread, sequence = cuda.threadIdx.x, sequence_of(step, start)
        warp, lane = thread >> 5, thread & 31
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        # Warps that do not share heads have tokens of their own, or positions of the only one.
        place, part, alone = warp // parts, warp % parts, given.window == 1
        t = start if alone else min(start + place, stop - 1)
        seen = scored_by(given, step, t) if alone or start + place < stop else 0
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

    return index_scores, layout.nbytes


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
            ptx.fma(relu(c[0]), w0, ptx.fma(relu(c[2]), w1, sums[0])),
            ptx.fma(relu(c[1]), w0, ptx.fma(relu(c[3]), w1, sums[1])),
            ptx.fma(relu(c[4]), w0, ptx.fma(relu(c[6]), w1, sums[2])),
            ptx.fma(relu(c[5]), w0, ptx.fma(relu(c[7]), w1, sums[3])),
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
