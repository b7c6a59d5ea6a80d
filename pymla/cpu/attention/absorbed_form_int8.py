"""The absorbed form on integers, over a latent cache of 8 bits.

The codes of the cache are multiplied where they lie (`pymla.cpu.attention.cache_rows`), a page at a time, with queries
of 16 heads (`pymla.cpu.attention.query_panels`). Softmax weights become codes of 8 bits as well, with one scale for a
page; the rotated dimensions are multiplied as int16. The products are those of `pymla.cpu.attention.page_products`, or
with AMX of `pymla.cpu.attention.page_products_amx`.
"""

import numpy as np
from numba import types

from pymla.cpu.attention import page_products, page_products_amx
from pymla.cpu.attention.codes import BLOCK_BYTES, quantise_weights_of_heads
from pymla.cpu.attention.next_page import next_page, prefetch_lines
from pymla.cpu.attention.page_products import add_rope_scores, empty_weights
from pymla.cpu.attention.page_scales import empty_page_scales, take_scales
from pymla.cpu.attention.query_panels import empty_queries, take_queries
from pymla.cpu.attention.softmax import heads_softmax
from pymla.cpu.attention.splits import HEAD_GROUP, SPLITS, leave_sums, take_item
from pymla.cpu.machine.isa import AMX
from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.machine.simd_amx import configure, release
from pymla.cpu.machine.simd_words import WORD, widen
from pymla.cpu.memory import allocate, allocate_f32
from pymla.cpu.quant import CACHE, F3, STEP
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.jit import helper, kernel
from pymla.pages import PAGE


@helper
def _scratch(rank, rotated, padded):
    """Memory of a thread for rows of `rank` and `rotated` numbers, and values padded to `padded` numbers. All of it is
    small: between two layers, weights drive it from the caches."""
    blocks = rank // 32
    words = allocate(PAGE * blocks * BLOCK_BYTES)  # uint8: the codes of a page as words, where words are not bytes
    scores = allocate_f32(PAGE, HEAD_GROUP)
    panels = allocate(PAGE // 32 * padded * BLOCK_BYTES).reshape(PAGE // 32, -1)  # uint8: values of 32 rows each
    if padded > rank:
        panels[:] = 0
    tiles = allocate(TILE_SCRATCH)  # uint8: sums of AMX
    state = np.empty((2, HEAD_GROUP), np.float32)  # running maxima and sums
    queries, scales, weights = empty_queries(rank, rotated), empty_page_scales(blocks), empty_weights()
    return queries, scales, words, scores, weights, panels, tiles, state


@kernel(F3, CACHE, CACHE, STEP, types.float64, SPLITS)
def absorbed_pages(first, last, q, latent, rope, step, scale, splits):
    """Over items of `splits`: a token, a group of heads and a split of the token's pages.

    Parameters
    ----------
    q : float32 array (T, H, rank + R)
    latent, rope : QTensor of types `Q8_PAGES` and `I16_PAGES`
    step : Step
    scale : float
        Of the scores, times `LOG2E`.
    splits : Splits
        Out: running maximum and sum, and unnormalised values.
    """
    heads, rank, padded = q.shape[1], splits.rank, splits.values.shape[2]
    queries, scales, words, scores, weights, panels, tiles, state = _scratch(rank, q.shape[2] - rank, padded)
    if AMX:
        configure()
    for number in range(first, last):
        item = take_item(number, heads, splits, step)
        if item.first_page == item.stop_page:
            continue
        table = step.block_tables[step.seq_of[item.token]]
        ahead = next_page(latent, rope, table[item.first_page])
        prefetch_lines(ahead, 0, ahead.latent_lines + ahead.rope_lines)
        take_queries(q[item.token, item.begin : item.begin + item.heads], scale, rank, queries)
        values = splits.values[item.row, item.begin : item.begin + HEAD_GROUP]
        values[:] = 0
        state[0], state[1] = -np.inf, 0
        for p in range(item.first_page, item.stop_page):
            seen, page = min(PAGE, item.length - p * PAGE), table[p] * PAGE
            rows, rope_rows = address(latent.data[page]), address(rope.data[page])
            ahead = next_page(latent, rope, table[min(p + 1, item.stop_page - 1)])
            take_scales(rows + PAGE * rank, seen, rank // 32, scales)
            codes = _as_words(rows, seen * rank // 32, address(words))
            if AMX:
                page_products_amx.page_scores(codes, seen, queries, scales, tiles, scores, ahead.latent)
            else:
                page_products.page_scores(codes, seen, queries, scales, scores, ahead)
            add_rope_scores(rope_rows, seen, queries, scores, ahead)
            heads_softmax(address(scores), seen, address(state), address(values), padded)
            scores[seen:] = 0
            quantise_weights_of_heads(
                address(scores), address(scales.largest), address(weights.words), address(weights.scales), HEAD_GROUP
            )
            if AMX:
                page_products_amx.add_page_values(rows, rank, scales, weights, tiles, values, ahead.latent)
            else:
                page_products.add_page_values(rows, rank, seen, scales, weights, panels, values, ahead)
        leave_sums(item, state, splits)
    if AMX:
        release()


@inlined
def _as_words(codes, blocks, words):
    """The address of codes as words: where they lie, if words are bytes, or else in scratch."""
    if WORD == 4:
        return codes
    for i in range(blocks):
        widen(words + BLOCK_BYTES * i, codes + 32 * i)
    return words
