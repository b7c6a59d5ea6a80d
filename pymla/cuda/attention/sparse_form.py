"""Sparse attention: the absorbed form over the positions that the indexer chose for each token.

A tile has the rows of 32 chosen positions: lane r of every warp looks up the slot of row r, a tile ahead, and the lanes
that copy the row get it by a shuffle. No other row of the cache is read. Where there are many tokens, blocks take more
heads, so that a row is copied less often.
"""

import functools

from numba import cuda

from pymla.constants import LOG2E
from pymla.cuda.attention.absorbed_block import HEADS, block_of_heads
from pymla.cuda.attention.mixed_rows import mixed_queries, unmix
from pymla.cuda.attention.splits import Partial, combine_shares, combining_blocks
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
from pymla.cuda.attention.tiles import THREADS, TILE, chosen_rows, need_multiples_of_16, variant_of
from pymla.cuda.contract import check, need_pages
from pymla.cuda.machine.ptx import valid_index
from pymla.cuda.runtime.array_types import F32, I2, I32, I64, addresses
from pymla.cuda.runtime.driver import multiprocessors
from pymla.cuda.runtime.jit import device, kernel
from pymla.pages import HADAMARD_TYPES, PAGE

__all__ = ["sparse", "sparse_in_splits", "sparse_kernels"]

#: Teams of four warps, each with 16 heads, in the blocks of many tokens: rows are copied once for all.
TEAMS = 2


def sparse(q, latent, rope, step, chosen, scale, out):
    """`pymla.cuda.attention.absorbed_form.absorbed` over the chosen positions of each token, int32 (T, k), contiguous.

    A position that the token does not see counts as the token's own, and so does a list without a position.
    """
    check.sparse(q, latent, rope, step, chosen, scale, out)
    need_pages("sparse", step, latent)
    return sparse_in_splits(q, latent, rope, step, chosen, scale, out)


def sparse_in_splits(q, latent, rope, step, chosen, scale, out, splits=None, teams=None):
    """`sparse`, with the positions of a token shared by at most `splits` blocks; by default by as many as fill the
    device twice. Blocks have so many `teams` of warps; by default several where that leaves a block for each
    multiprocessor."""
    tokens, heads, rank = out.shape
    size = q.shape[2]
    need_multiples_of_16(rank, size - rank)
    groups = -(-heads // HEADS)
    if teams is None:
        teams = TEAMS if tokens * groups >= TEAMS * multiprocessors() else 1
    groups = -(-groups // teams)
    if latent.qtype in HADAMARD_TYPES:
        q = mixed_queries(q, rank)
    arrays, target = StepArrays.of(step), place(out)
    partial = Partial.empty(out, min(arrays.longest, chosen.shape[1]), tokens * groups, splits)
    launched, shared_bytes = sparse_kernel((latent.qtype, rope.qtype), rank, size - rank, teams)
    launched[(partial.splits, groups, tokens), teams * THREADS, shared_bytes](
        q.address, CachePair.of(latent, rope), arrays, chosen, scale * LOG2E, heads, partial.splits, partial.addresses,
        target,
    )  # fmt: skip
    if partial.splits > 1:
        blocks = combining_blocks(out.shape)
        _combine_chosen[blocks, THREADS](arrays, chosen, heads, rank, partial.splits, partial.addresses, target)
    if latent.qtype in HADAMARD_TYPES:
        unmix(out)
    return out


def sparse_kernels(types_of_rows, rank, rope):
    """The kernels for the cache types of latent and rope parts and their sizes."""
    return [*(sparse_kernel(types_of_rows, rank, rope, teams)[0] for teams in (1, TEAMS)), _combine_chosen]


@functools.cache
def sparse_kernel(types_of_rows, rank, rope, teams):
    """The kernel for the cache types of latent and rope parts, their sizes, and blocks of so many teams; and its bytes
    of shared memory."""
    rows = chosen_rows(teams * THREADS)
    attend, nbytes = block_of_heads(types_of_rows, rank, rope, rows, _slot_of_lane, ahead=True)

    @kernel(
        I64, CACHE, STEP, I2, F32, I32, I32, addresses(2), PLACE,
        variant=variant_of(types_of_rows, rank, rope, teams * HEADS),
        max_threads=teams * THREADS, min_blocks=2 // teams,
    )  # fmt: skip
    def sparse(q, cache, step, chosen, scale, heads, splits, partial, out):
        """Values of a token, 16 heads for each team and a share of the chosen positions (`block_of_heads`).

        Grid: splits, groups of heads, tokens.
        """
        t = cuda.blockIdx.z
        seen = seen_by(step, t)
        count = chosen_by(chosen, t, seen)
        source = cache, step, sequence_of(step, t), chosen, t, seen, count
        attend(q, source, count, scale, heads, splits, partial, out)

    return sparse, nbytes


@device
def chosen_by(chosen, t, seen):
    """Positions in the list of token t, one at least: those before the first negative number."""
    most = min(seen, chosen.shape[1])
    # The list of nearly every token is full.
    if chosen[t, most - 1] >= 0:
        return most
    low, high = 1, most - 1
    while low < high:
        middle = low + high >> 1
        if chosen[t, middle] < 0:
            high = middle
        else:
            low = middle + 1
    return low


@device
def _slot_of_lane(source, tile, lane):
    """The slot of a tile's row number `lane`. Rows past the end repeat the last row."""
    cache, step, sequence, chosen, t, seen, count = source
    position = valid_index(chosen[t, min(TILE * tile + lane, count - 1)], seen)
    return first_slot(step, sequence, position >> 6, cache) + (position & PAGE - 1)


@kernel(STEP, I2, I32, I32, I32, addresses(2), PLACE, max_threads=THREADS)
def _combine_chosen(step, chosen, heads, v, splits, partial, out):
    """Combine the results of the shares of a token and head.

    Grid: groups of `COMBINED_COLUMNS` columns, heads, tokens.
    """
    t = cuda.blockIdx.z
    combine_shares(chosen_by(chosen, t, seen_by(step, t)), heads, v, splits, partial, out)
