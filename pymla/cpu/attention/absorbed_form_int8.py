"""The absorbed form on integers, over a latent cache of 8 bits or fewer.

The codes of the cache are multiplied a page at a time with queries of 16 heads (`pymla.cpu.attention.query_panels`):
those of 8 bits where they lie (`pymla.cpu.attention.cache_rows`), smaller ones after they were unpacked. Where the
cache's rows are mixed (`pymla.pages.HADAMARD_TYPES`), so are the queries, and the results are mixed once more. Softmax
weights become codes of 8 bits as well, with one scale for a page; the rotated dimensions are multiplied as int16. The
products are those of `pymla.cpu.attention.page_products`, or with AMX of `pymla.cpu.attention.page_products_amx`.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.attention import page_products, page_products_amx
from pymla.cpu.attention.codes import BLOCK_BYTES, quantise_weights_of_heads
from pymla.cpu.attention.next_page import NextPage, next_page, prefetch_lines
from pymla.cpu.attention.page_products import Weights, add_rope_scores
from pymla.cpu.attention.page_scales import PageScales, page_scales_at, page_scales_bytes, take_scales
from pymla.cpu.attention.query_panels import Queries, queries_at, queries_bytes, take_queries
from pymla.cpu.attention.softmax import heads_softmax
from pymla.cpu.attention.splits import HEAD_GROUP, SPLITS, leave_sums, start_values, take_item
from pymla.cpu.cache_types import CODE_BITS
from pymla.cpu.machine.simd import address, splat_f32xL, store_f32, store_f32xL
from pymla.cpu.machine.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.machine.simd_amx import configure, release
from pymla.cpu.machine.simd_words import WORD, unpack_codes, widen
from pymla.cpu.memory import allocate
from pymla.cpu.runtime.array_types import CACHE, F3, STEP
from pymla.cpu.runtime.isa import AMX, LANES
from pymla.cpu.runtime.jit import helper, kernel, variants
from pymla.pages import PAGE

#: Bytes of the parts of `Scratch`: scores; running maxima and sums, with the scales of the weights; words of weights.
_SCORE_BYTES = 4 * PAGE * HEAD_GROUP
STATE_BYTES = 3 * 4 * HEAD_GROUP
_WORD_BYTES = 4 * PAGE // WORD * HEAD_GROUP


class Scratch(NamedTuple):
    """Addresses of the memory of a thread. All of it is small: between two layers, weights drive it from the caches."""

    queries: Queries
    scales: PageScales
    weights: Weights
    scores: int  # float32 (PAGE, HEAD_GROUP); in the end softmax weights
    state: int  # float32 (2, HEAD_GROUP): running maxima, and sums
    codes: int  # the codes of a page as bytes, where the cache has smaller ones
    words: int  # and as words, where words are not bytes
    panels: int  # panels of the values of a page
    tiles: int  # sums of AMX


@helper
def scratch_bytes(rank, rotated, padded):
    """Bytes of `Scratch` for rows of `rank` and `rotated` numbers, and values padded to `padded` numbers."""
    of_page = PAGE * rank + PAGE // 32 * BLOCK_BYTES * (rank + padded)
    own = _SCORE_BYTES + STATE_BYTES + _WORD_BYTES + of_page + TILE_SCRATCH
    return queries_bytes(rank, rotated) + page_scales_bytes(rank // 32) + own


@helper
def scratch_at(memory, rank, rotated, padded):
    """`Scratch` in memory at an address. Every part begins with a cache line."""
    queries, scores = queries_at(memory, rank, rotated), memory + queries_bytes(rank, rotated)
    state = scores + _SCORE_BYTES
    weights = Weights(state + STATE_BYTES, state + 2 * 4 * HEAD_GROUP)
    codes = weights.words + _WORD_BYTES
    words = codes + PAGE * rank
    panels = words + PAGE // 32 * BLOCK_BYTES * rank
    tiles = panels + PAGE // 32 * BLOCK_BYTES * padded
    scales = page_scales_at(tiles + TILE_SCRATCH, rank // 32)
    return Scratch(queries, scales, weights, scores, state, codes, words, panels, tiles)


@variants
def absorbed_pages(latent_type):
    """The kernel over pages of a type of `CODE_BITS`."""
    bits = CODE_BITS[latent_type]
    take_page = take_page_for(bits)

    @kernel(F3, CACHE, CACHE, STEP, types.float64, SPLITS)
    def absorbed_pages(first, last, q, latent, rope, step, scale, splits):
        """Over items of `splits`: a token, a group of heads and a split of the token's pages.

        Parameters
        ----------
        q : float32 array (T, H, rank + R)
        latent, rope : QTensor of the type and of `I16_PAGES`
        step : Step
        scale : float
            Of the scores, times `LOG2E`.
        splits : Splits
            Out: running maximum and sum, and unnormalised values.
        """
        heads, rank, padded = q.shape[1], splits.rank, splits.values.shape[2]
        memory = allocate(scratch_bytes(rank, q.shape[2] - rank, padded))
        clear_padding(scratch_at(address(memory), rank, q.shape[2] - rank, padded), rank, padded)
        if AMX:
            configure()
        for number in range(first, last):
            item = take_item(number, heads, splits, step)
            if item.first_page == item.stop_page:
                continue
            table = step.block_tables[step.seq_of[item.token]]
            ahead = next_page(latent, rope, table[item.first_page])
            prefetch_lines(ahead, 0, ahead.latent_lines + ahead.rope_lines)
            scratch = scratch_at(address(memory), rank, q.shape[2] - rank, padded)
            take_queries(q[item.token, item.begin : item.begin + item.heads], scale, bits < 8, scratch.queries)
            values = start_values(item, scratch.state, splits)
            for p in range(item.first_page, item.stop_page):
                page, seen = next_page(latent, rope, table[p]), min(PAGE, item.length - p * PAGE)
                ahead = next_page(latent, rope, table[min(p + 1, item.stop_page - 1)])
                take_scales(page.latent + PAGE * rank // 8 * bits, seen, rank // 32, bits, scratch.scales)
                page, ahead = take_page(page, seen, rank, scratch.codes, ahead)
                attend_page(page, seen, rank, scratch, values, padded, ahead)
            leave_sums(item, scratch.state, splits)
        if AMX:
            release()

    return absorbed_pages


@functools.cache
def take_page_for(bits):
    """A function ``(page, seen, rank, codes, ahead)``: a page whose codes are bytes, and what is still to be prefetched
    of the next page. Codes of fewer than 8 bits are unpacked to the address `codes`, while the latent rows of `ahead`
    are prefetched."""
    if bits == 8:

        @helper
        def take_page(page, seen, rank, codes, ahead):
            return page, ahead

        return take_page

    @helper
    def take_page(page, seen, rank, codes, ahead):
        blocks = rank // 32
        for s in range(seen):
            prefetch_lines(ahead, ahead.latent_lines * s // seen, ahead.latent_lines * (s + 1) // seen)
            for i in range(blocks * s, blocks * (s + 1)):
                unpack_codes(codes + 32 * i, page.latent + 4 * bits * i, bits)
        # With AMX, lines of `latent` are prefetched by the sizes of codes of 8 bits: those of the scratch are no harm.
        return NextPage(codes, 0, page.rope, 0), NextPage(codes, 0, ahead.rope, ahead.rope_lines)

    return take_page


@helper
def clear_padding(scratch, rank, padded):
    """Zero the memory whose padding products read: scales, and panels of values."""
    for i in range(PAGE * scratch.scales.padded):
        store_f32(scratch.scales.scales + 4 * i, np.float32(0))
    for i in range(PAGE // 32 * BLOCK_BYTES * padded // 4 if padded > rank else 0):
        store_f32(scratch.panels + 4 * i, np.float32(0))


@helper
def attend_page(page, seen, rank, scratch, values, padded, ahead):
    """Take the first `seen` rows of a page of bytes, whose scales are in the scratch, into the online softmax of 16
    heads, with values (16, padded) at an address, while `ahead` is prefetched."""
    queries, scales, weights, scores = scratch.queries, scratch.scales, scratch.weights, scratch.scores
    codes = page.latent
    if WORD != 4:
        codes = scratch.words
        for i in range(seen * (rank // 32)):
            widen(codes + BLOCK_BYTES * i, page.latent + 32 * i)
    if AMX:
        page_products_amx.page_scores(codes, seen, queries, scales, scratch.tiles, scores, ahead.latent)
    else:
        page_products.page_scores(codes, seen, queries, scales, scores, ahead)
    add_rope_scores(page.rope, seen, queries, scores, ahead)
    heads_softmax(scores, seen, scratch.state, values, padded)
    # Rows behind the last one seen count for nothing.
    for i in range(seen * HEAD_GROUP, PAGE * HEAD_GROUP, LANES):
        store_f32xL(scores + 4 * i, splat_f32xL(np.float32(0)))
    quantise_weights_of_heads(scores, scales.largest, weights.words, weights.scales, HEAD_GROUP)
    if AMX:
        page_products_amx.add_page_values(
            page.latent, rank, scales, weights, scratch.tiles, values, padded, ahead.latent
        )
    else:
        page_products.add_page_values(page.latent, rank, seen, scales, weights, scratch.panels, values, padded, ahead)
