"""The absorbed form of attention on tensor cores: all heads of a token together against its cache rows
(`pymla.cuda.attention.absorbed_block`).

The grid depends on the table's width alone. Where rows are mixed, so are the queries before, and the results afterwards
(`pymla.cuda.attention.mixed_rows`).
"""

import functools

from numba import cuda

from pymla.constants import LOG2E
from pymla.cuda.attention.absorbed_block import HEADS, block_of_heads
from pymla.cuda.attention.mixed_rows import mixed_queries, unmix
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
)
from pymla.cuda.attention.tiles import IN_ORDER, THREADS, TILE, need_multiples_of_16, variant_of
from pymla.cuda.contract import check, need_pages
from pymla.cuda.runtime.array_types import F32, I32, I64, addresses
from pymla.cuda.runtime.jit import device, kernel
from pymla.pages import HADAMARD_TYPES

__all__ = ["absorbed", "absorbed_in_splits", "absorbed_kernel"]


@functools.cache
def absorbed_kernel(types_of_rows, rank, rope):
    """The kernel for the cache types of latent and rope parts and their sizes, and its bytes of shared memory."""
    attend, nbytes = block_of_heads(types_of_rows, rank, rope, IN_ORDER, _first_of_tile, ahead=False)

    @kernel(
        I64, CACHE, STEP, F32, I32, I32, addresses(2), PLACE,
        variant=variant_of(types_of_rows, rank, rope), max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def absorbed(q, cache, step, scale, heads, splits, partial, out):
        """Values of a token, 16 heads and a share of the positions (`block_of_heads`).

        Grid: splits, groups of heads, tokens.
        """
        t = cuda.blockIdx.z
        attend(q, (cache, step, sequence_of(step, t)), seen_by(step, t), scale, heads, splits, partial, out)

    return absorbed, nbytes


@device
def _first_of_tile(source, tile, lane):
    """The slot of a tile's first row."""
    cache, step, sequence = source
    return first_slot(step, sequence, tile >> 1, cache) + (tile & 1) * TILE


def absorbed(q, latent, rope, step, scale, out):
    """Attention in the latent space: `q` float32 (T, H, rank + R), contiguous, `out` float32 (T, H, rank), any `place`.

    An index of the step that is out of range counts as the last one in range.
    """
    check.absorbed(q, latent, rope, step, scale, out)
    need_pages("absorbed", step, latent)
    return absorbed_in_splits(q, latent, rope, step, scale, out)


def absorbed_in_splits(q, latent, rope, step, scale, out, splits=None):
    """`absorbed`, with the positions of a token shared by at most `splits` blocks; by default by as many as fill the
    device twice."""
    tokens, heads, rank = out.shape
    size = q.shape[2]
    need_multiples_of_16(rank, size - rank)
    groups = -(-heads // HEADS)
    if latent.qtype in HADAMARD_TYPES:
        q = mixed_queries(q, rank)
    arrays, target = StepArrays.of(step), place(out)
    partial = Partial.empty(out, arrays.longest, tokens * groups, splits)
    launched, shared_bytes = absorbed_kernel((latent.qtype, rope.qtype), rank, size - rank)
    launched[(partial.splits, groups, tokens), THREADS, shared_bytes](
        q.address, CachePair.of(latent, rope), arrays, scale * LOG2E, heads, partial.splits, partial.addresses, target
    )
    combine(partial, arrays, out.shape, target)
    if latent.qtype in HADAMARD_TYPES:
        unmix(out)
    return out
