"""The indexer's scores of float32 keys, in float32: a thread takes a position."""

import functools

from numba import cuda

from pymla.cuda.attention.index_input import (
    INPUT,
    POSITIONS,
    relu,
    scored_by,
    share_of_block,
    store_score,
    tokens_of_block,
)
from pymla.cuda.attention.softmax import ZERO
from pymla.cuda.attention.steps import STEP, first_slot, sequence_of
from pymla.cuda.attention.tiles import THREADS
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device, folded, kernel, unrolled
from pymla.pages import PAGE

__all__ = ["float32_kernel"]

#: Heads that share a key's numbers in registers.
HEADS_AT_ONCE = 8


@functools.cache
def float32_kernel(width):
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
        return ptx.fma(relu(sum), ptx.load_f32(weights + 4 * i), total) if i <= last else total

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
        """Grid: splits, windows of tokens, sequences of a window."""
        start, stop, length = tokens_of_block(given, step)
        first, last = share_of_block(given, length)
        if start == stop or first == last:
            return
        sequence, heads = sequence_of(step, start), given.heads
        for portion in range(first, last):
            position = POSITIONS * portion + cuda.threadIdx.x
            page = min(position, length - 1) >> 6
            key = given.keys + row_bytes * (first_slot(step, sequence, page, given) + (position & PAGE - 1))
            for t in range(start, stop):
                seen = scored_by(given, step, t)
                # Whole warps are inside.
                if position - ptx.lane() < seen:
                    x = ZERO
                    if position < seen:
                        x = score(given.q + row_bytes * heads * t, given.weights + 4 * heads * t, heads, key)
                    store_score(given, t, position, seen, x)

    return index_scores
