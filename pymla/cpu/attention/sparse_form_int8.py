"""Sparse attention on integers, over a latent cache of 8 bits or fewer.

The rows of 64 chosen positions are copied as a page, with their scales, and the functions of
`pymla.cpu.attention.absorbed_form_int8` run over that. The next rows are prefetched meanwhile.
"""

from numba import types

from pymla.cpu.attention.absorbed_form_int8 import (
    Scratch,
    attend_page,
    clear_padding,
    scratch_at,
    scratch_bytes,
    take_page_for,
)
from pymla.cpu.attention.chosen_rows import count_chosen, gather_rows, prefetch_share, rows_of_cache
from pymla.cpu.attention.codes import even
from pymla.cpu.attention.next_page import NextPage
from pymla.cpu.attention.page_scales import take_scales
from pymla.cpu.attention.query_panels import queries_at, queries_bytes, take_queries
from pymla.cpu.attention.splits import (
    HEAD_GROUP,
    SPLITS,
    groups_of_part,
    head_group,
    leave_sums,
    most_groups,
    pages_of_split,
    start_values,
)
from pymla.cpu.cache_types import CODE_BITS
from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_amx import configure, release
from pymla.cpu.memory import allocate
from pymla.cpu.runtime.array_types import CACHE, F3, I2, STEP
from pymla.cpu.runtime.isa import AMX
from pymla.cpu.runtime.jit import helper, kernel, variants
from pymla.pages import PAGE

#: Bytes of the running maxima and sums of a group of heads.
_STATE_BYTES = 2 * 4 * HEAD_GROUP


@variants
def sparse_pages(latent_type):
    """The kernel over rows of a type of `CODE_BITS`."""
    bits = CODE_BITS[latent_type]
    take_page = take_page_for(bits)

    @kernel(F3, CACHE, CACHE, STEP, I2, types.float64, types.int64, SPLITS)
    def sparse_pages(first, last, q, latent, rope, step, chosen, scale, parts, splits):
        """Over rows of `splits`, a token and a split of the pages that its chosen rows make, and parts of the heads.

        Parameters
        ----------
        q : float32 array (T, H, rank + R)
        latent, rope : QTensor of the type and of `I16_PAGES`
        step : Step
        chosen : int32 array (T, k)
        scale : float
            Of the scores, times `LOG2E`.
        parts : int
            Of the heads, by whole groups.
        splits : Splits
            Out: running maximum and sum, and unnormalised values.
        """
        heads, rank, padded = q.shape[1], splits.rank, splits.values.shape[2]
        rotated, groups = q.shape[2] - rank, most_groups(heads, parts)
        own, of_groups = allocate(scratch_bytes(rank, rotated, padded)), allocate(groups * _group_bytes(rank, rotated))
        gathered = allocate(PAGE * (latent.data.shape[1] + rope.data.shape[1]))
        clear_padding(scratch_at(address(own), rank, rotated, padded), rank, padded)
        rows, rope_rows = rows_of_cache(latent, rank * bits // 8), rows_of_cache(rope, 2 * even(rotated))
        if AMX:
            configure()
        for number in range(first, last):
            scratch, memory = scratch_at(address(own), rank, rotated, padded), address(of_groups)
            # Nothing is prefetched from this page: chosen rows do not follow each other.
            page = NextPage(address(gathered), 0, address(gathered) + PAGE * latent.data.shape[1], 0)
            row, part = number // parts, number % parts
            t, (begin, stop) = row // splits.count, groups_of_part(heads, part, parts)
            table, positions = step.block_tables[step.seq_of[t]], chosen[t, : count_chosen(chosen[t])]
            first_page, stop_page = pages_of_split(len(positions), row % splits.count, splits.count)
            positions = positions[: PAGE * stop_page]
            for i in range(stop - begin):
                some, own_scratch = head_group(row, begin + i, heads), _of_group(memory, i, rank, rotated, scratch)
                take_queries(q[t, some.begin : some.begin + some.heads], scale, bits < 8, own_scratch.queries)
                start_values(some, own_scratch.state, splits)
            for p in range(first_page, stop_page):
                now, then = positions[PAGE * p : PAGE * (p + 1)], positions[PAGE * (p + 1) :]
                gather_rows(now, table, rows, page.latent)
                gather_rows(now, table, rope_rows, page.rope)
                take_scales(page.latent + PAGE * rows.code_bytes, len(now), rank // 32, bits, scratch.scales)
                taken, ahead = take_page(page, len(now), rank, scratch.codes, page)
                for i in range(stop - begin):
                    prefetch_share(then, i, stop - begin, table, rows, rope_rows)
                    own_scratch = _of_group(memory, i, rank, rotated, scratch)
                    values = address(splits.values[row, HEAD_GROUP * (begin + i)])
                    attend_page(taken, len(now), rank, own_scratch, values, padded, ahead)
            for i in range(stop - begin):
                own_scratch = _of_group(memory, i, rank, rotated, scratch)
                leave_sums(head_group(row, begin + i, heads), own_scratch.state, splits)
        if AMX:
            release()

    return sparse_pages


@helper
def _group_bytes(rank, rotated):
    """Bytes of the queries and the state of a group of heads."""
    return queries_bytes(rank, rotated) + _STATE_BYTES


@helper
def _of_group(memory, i, rank, rotated, scratch):
    """`Scratch` with the queries and the state of the i-th group of heads of those in memory at an address."""
    queries = queries_at(memory + _group_bytes(rank, rotated) * i, rank, rotated)
    state = queries.codes + queries_bytes(rank, rotated)
    return Scratch(
        queries,
        scratch.scales,
        scratch.weights,
        scratch.scores,
        state,
        scratch.codes,
        scratch.words,
        scratch.panels,
        scratch.tiles,
    )
