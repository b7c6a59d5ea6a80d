"""Sparse attention: the absorbed form over chosen positions.

The rows of 64 chosen positions make a page, which meets all heads of the token before the next 64 rows are fetched: a
row is fetched from anywhere in the cache once for all heads. Here rows are dequantised;
`pymla.cpu.attention.sparse_form_int8` copies those of a latent cache of 8 bits or fewer, which are multiplied on
integers.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from pymla.constants import LOG2E
from pymla.cpu.attention import sparse_form_int8
from pymla.cpu.attention.absorbed_form import TILE_COLUMNS, add_values, compute_scores, store_queries
from pymla.cpu.attention.cache_rows import read_cache_row_for
from pymla.cpu.attention.chosen_rows import count_chosen, prefetch_share, rows_of_cache, slot_of
from pymla.cpu.attention.softmax import heads_softmax
from pymla.cpu.attention.splits import (
    HEAD_GROUP,
    SPLITS,
    Splits,
    combine,
    groups_of_part,
    head_group,
    leave_sums,
    most_groups,
    pages_of_split,
    start_values,
)
from pymla.cpu.cache_types import CODE_BITS
from pymla.cpu.contract import check
from pymla.cpu.machine.simd import address
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import CACHE, F3, I2, STEP
from pymla.cpu.runtime.jit import Kernel, kernel, variants
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

#: Bytes of the values of splits that are in memory at a time, or those of one token.
_VALUE_BYTES = 16 << 20


def sparse(
    q: np.ndarray,
    latent: QTensor,
    rope: QTensor,
    step: Step,
    chosen: np.ndarray,
    scale: float,
    out: np.ndarray,
) -> np.ndarray:
    """`absorbed` over the chosen positions of each token alone; `chosen` int32 (T, k).

    As `pymla.reference.attention.sparse`, with the precision of `absorbed`.
    """
    check.sparse(q, latent, rope, step, chosen, scale, out)
    attend, mixed = _kernel_over(latent.qtype, rope.qtype), CODE_BITS.get(latent.qtype, 8) < 8
    at_once = max(1, _VALUE_BYTES // (4 * out.shape[1] * out.shape[2]))
    for begin in range(0, len(q), at_once):
        some = slice(begin, begin + at_once)
        results, tokens = out[some], step.part(begin, begin + at_once)
        count, parts = _divided(*results.shape[:2])
        splits = Splits.empty(results, count)
        items = len(splits.values) * parts
        attend[items, 1](q[some], latent, rope, tokens, chosen[some], scale * LOG2E, parts, splits)
        splits.combine(results, mixed)
    return out


def kernels(latent: int, rope: int) -> list[Kernel]:
    """The kernels of `sparse` over a cache of two types."""
    return [_kernel_over(latent, rope), combine]


def _kernel_over(latent: int, rope: int) -> Kernel:
    """The kernel over a cache of two types."""
    return sparse_form_int8.sparse_pages(latent) if latent in CODE_BITS else sparse_rows(latent, rope)


def _divided(tokens: int, heads: int) -> tuple[int, int]:
    """Splits of each token's pages, and parts of its heads: together as few as occupy all threads to the end, or
    almost. Each split quantises all queries and has values of its own, each part fetches all rows: about as much."""
    many = threads.thread_count()
    count = next(each for each in range(1, many + 1) if tokens * each % many == 0 or tokens * each > 4 * many)
    most = min(math.isqrt(count), -(-heads // HEAD_GROUP))
    parts = next(each for each in range(most, 0, -1) if count % each == 0)
    return count // parts, parts


@variants
def sparse_rows(latent_type, rope_type):
    """The kernel for a cache of float types, or of the blocks of ggml's types."""
    read_latent, read_rope = read_cache_row_for(latent_type), read_cache_row_for(rope_type)

    @kernel(F3, CACHE, CACHE, STEP, I2, types.float64, types.int64, SPLITS)
    def sparse_rows(first, last, q, latent, rope, step, chosen, scale, parts, splits):
        """Over rows of `splits` and parts of heads; arguments as `sparse_form_int8.sparse_pages` takes them."""
        heads, size, rank, padded = q.shape[1], q.shape[2], splits.rank, splits.values.shape[2]
        groups, stride = most_groups(heads, parts), 4 * (size + TILE_COLUMNS)
        queries = np.empty((HEAD_GROUP, size), np.float32)
        panels, states = np.empty((groups, size, HEAD_GROUP), np.float32), np.empty((groups, 2, HEAD_GROUP), np.float32)
        # Tiles of values may reach past a row.
        rows, scores = np.zeros((PAGE, size + TILE_COLUMNS), np.float32), np.empty((PAGE, HEAD_GROUP), np.float32)
        latent_rows, rope_rows = rows_of_cache(latent, latent.data.shape[1]), rows_of_cache(rope, rope.data.shape[1])
        for number in range(first, last):
            row, part = number // parts, number % parts
            t, (begin, stop) = row // splits.count, groups_of_part(heads, part, parts)
            table, positions = step.block_tables[step.seq_of[t]], chosen[t, : count_chosen(chosen[t])]
            first_page, stop_page = pages_of_split(len(positions), row % splits.count, splits.count)
            positions = positions[: PAGE * stop_page]
            for i in range(stop - begin):
                some = head_group(row, begin + i, heads)
                store_queries(q[t, some.begin : some.begin + some.heads], scale, queries, address(panels[i]))
                start_values(some, address(states[i]), splits)
            for page in range(first_page, stop_page):
                now, then = positions[PAGE * page : PAGE * (page + 1)], positions[PAGE * (page + 1) :]
                seen = len(now)
                for s in range(seen):
                    slot, at = slot_of(now[s], table), address(rows[s])
                    read_latent(latent, slot, at, rank)
                    read_rope(rope, slot, at + 4 * rank, size - rank)
                for i in range(stop - begin):
                    prefetch_share(then, i, stop - begin, table, latent_rows, rope_rows)
                    state, values = address(states[i]), address(splits.values[row, HEAD_GROUP * (begin + i)])
                    compute_scores(address(rows), stride, seen, address(panels[i]), size, address(scores))
                    heads_softmax(address(scores), seen, state, values, padded)
                    add_values(address(scores), address(rows), stride, seen, values, rank, 4 * padded)
            for i in range(stop - begin):
                leave_sums(head_group(row, begin + i, heads), address(states[i]), splits)

    return sparse_rows
