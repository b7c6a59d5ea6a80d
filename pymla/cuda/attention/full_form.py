"""Attention over a cache of whole keys and values of all heads (``--mla 0``).

Sequences with several new tokens are prompts: blocks of up to 64 queries of a head on tensor cores (`flash`), a block
for each sequence in them. Where no sequence has more than one token, each head of a token has keys of its own and
nothing to share: the rows are streamed and multiplied in float32, the positions split over blocks.
"""

import functools

from numba import cuda

from pymla import ggml
from pymla.constants import LOG2E
from pymla.cuda.attention.expanded_form import QUERIES, flash, tile_bytes
from pymla.cuda.attention.full_token import full_token_kernel
from pymla.cuda.attention.splits import Partial, combine
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
    sequence_run,
)
from pymla.cuda.attention.tiles import THREADS, TILE, factor_type, fetch_rows, need_multiples_of_16, variant_of
from pymla.cuda.contract import check, need_pages
from pymla.cuda.runtime.array_types import F32, I32, I64
from pymla.cuda.runtime.jit import device, kernel

__all__ = ["full", "full_in_splits", "full_kernel"]


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
        partial = Partial.empty(out, arrays.longest, tokens * heads, splits)
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
