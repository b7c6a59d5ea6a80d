"""Scores of the lightning indexer: ``I[t, s] = Σ_h weights[t, h] * max(0, q[t, h] · keys[s])``.

Here are the scores that both forms fill, and how they are split over threads; and the form over keys of any type, in
float32: a page's keys are dequantised, four keys at a time meet 16 heads, the lanes of two registers.
`pymla.cpu.attention.index_scores_int8` multiplies keys of `I8_PAGES` on integers.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.attention.cache_rows import read_cache_row_for
from pymla.cpu.attention.splits import HEAD_GROUP
from pymla.cpu.machine.simd import (
    address,
    fma,
    larger,
    load_f32x8,
    load_f32xL,
    splat_f32,
    store_f32,
    total,
)
from pymla.cpu.machine.simd_ordered import LOWEST, store_ordered
from pymla.cpu.matmul.gemm_f32 import tile_f32, transpose_panel
from pymla.cpu.memory import empty
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import CACHE, F2, F3, I2, STEP
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import Kernel, helper, kernel, variants
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

#: Items of work for each thread: so many that all threads end at about the same time.
_ITEMS = 16


class Scores(NamedTuple):
    """Scores of T tokens for the positions of their pages."""

    splits: int  # of each token's pages
    k: int  # a token that sees no more positions gets no scores
    ordered: np.ndarray  # int32 (T, S): in the order of float32 (`simd_ordered`)

    @classmethod
    def empty(cls, tokens: int, pages: int, k: int) -> "Scores":
        """For tokens whose block tables have so many pages."""
        splits = -(-_ITEMS * threads.thread_count() // tokens)
        return cls(splits, k, empty((tokens, pages * PAGE), np.int32))


SCORES = types.NamedTuple((types.int64, types.int64, I2), Scores)


class Item(NamedTuple):
    """One item of work: some pages of a token."""

    token: int
    first_page: int
    stop_page: int  # the page behind the last one


@helper
def take_item(number, step, scores):
    """The item with a number. Positions in its pages behind the token's own get the lowest score."""
    t, split = number // scores.splits, number % scores.splits
    seen = step.positions[t] + 1
    pages = (seen + PAGE - 1) // PAGE if seen > scores.k else 0
    first, stop = pages * split // scores.splits, pages * (split + 1) // scores.splits
    return Item(t, first, stop)


@helper
def hide_unseen(item, step, scores):
    """The positions behind the token's own, in the last of an item's pages, get the lowest score."""
    for s in range(step.positions[item.token] + 1, item.stop_page * PAGE):
        scores.ordered[item.token, s] = LOWEST


class Panels(NamedTuple):
    """Queries of T tokens as panels, whose lanes are heads."""

    queries: np.ndarray  # float32 (T * groups, D, HEAD_GROUP)
    weights: np.ndarray  # float32 (T, groups * HEAD_GROUP): 0 where there is no head


PANELS = types.NamedTuple((F3, F2), Panels)


def score(q: np.ndarray, weights: np.ndarray, keys: QTensor, step: Step, scores: Scores) -> None:
    """Fill the scores; arguments as for `choose`."""
    tokens, heads, columns = q.shape
    groups = -(-heads // HEAD_GROUP)
    panels = Panels(
        empty((tokens * groups, columns, HEAD_GROUP), np.float32), empty((tokens, groups * HEAD_GROUP), np.float32)
    )
    store_panels[tokens * groups](q, weights, panels)
    score_rows(keys.qtype)[tokens * scores.splits, 1](panels, keys, step, scores)


def kernels(qtype: int) -> list[Kernel]:
    """The kernels of `score` over keys of a type."""
    return [store_panels, score_rows(qtype)]


@kernel(F3, F2, PANELS)
def store_panels(first, last, q, weights, out):
    """Over tokens and groups of heads: queries (T, H, D) and their weights (T, H) as panels. Lanes past the last head
    repeat it, with a weight of 0."""
    heads, columns = q.shape[1], q.shape[2]
    groups = out.weights.shape[1] // HEAD_GROUP
    for number in range(first, last):
        t, begin = number // groups, number % groups * HEAD_GROUP
        count = min(HEAD_GROUP, heads - begin)
        transpose_panel(address(q[t, begin]), 4 * columns, count, columns, address(out.queries[number]))
        for h in range(begin, begin + HEAD_GROUP):
            out.weights[t, h] = weights[t, h] if h < heads else np.float32(0)


@variants
def score_rows(qtype):
    """The kernel over keys of a type."""
    read_row = read_cache_row_for(qtype)

    @kernel(PANELS, CACHE, STEP, SCORES)
    def score_rows(first, last, panels, keys, step, scores):
        """Over items of `scores`."""
        columns, groups = panels.queries.shape[1], panels.weights.shape[1] // HEAD_GROUP
        rows, page_scores = np.empty((PAGE, columns), np.float32), np.zeros(PAGE, np.float32)
        for number in range(first, last):
            item = take_item(number, step, scores)
            t = item.token
            query, weights = address(panels.queries[t * groups]), address(panels.weights[t])
            table = step.block_tables[step.seq_of[t]]
            for page in range(item.first_page, item.stop_page):
                seen = min(PAGE, step.positions[t] + 1 - page * PAGE)
                for s in range(seen):
                    read_row(keys, table[page] * PAGE + s, address(rows[s]), columns)
                _score_keys(address(rows), seen, columns, query, weights, groups, address(page_scores))
                for s in range(0, PAGE, LANES):
                    at = address(scores.ordered[t]) + 4 * (page * PAGE + s)
                    store_ordered(at, load_f32xL(address(page_scores) + 4 * s))
            hide_unseen(item, step, scores)

    return score_rows


@helper
def _score_keys(rows, seen, columns, query, weights, groups, out):
    """Scores of `seen` keys, float32 rows of `columns` numbers, with the panels of a query and the heads' weights. All
    but the numbers are addresses."""
    products = np.empty((4, HEAD_GROUP), np.float32)
    at, row, zero = address(products), 4 * columns, splat_f32(np.float32(0))
    for s in range(0, seen, 4):
        # A tile has four rows: those past the end repeat the last row.
        second, third, fourth = row * min(1, seen - 1 - s), row * min(2, seen - 1 - s), row * min(3, seen - 1 - s)
        e, f, g, h = zero, zero, zero, zero
        for group in range(groups):
            panel, weight = query + group * columns * 4 * HEAD_GROUP, weights + group * 4 * HEAD_GROUP
            tile_f32(
                rows + s * row, second, third, fourth, 4,
                panel, 4 * HEAD_GROUP, columns, at, 4 * HEAD_GROUP, False,
            )  # fmt: skip
            e, f = _add_weighted(e, at, weight), _add_weighted(f, at + 4 * HEAD_GROUP, weight)
            g, h = _add_weighted(g, at + 8 * HEAD_GROUP, weight), _add_weighted(h, at + 12 * HEAD_GROUP, weight)
        for i, sums in enumerate((e, f, g, h)):
            store_f32(out + 4 * (s + i), total(sums))


@helper
def _add_weighted(sums, products, weights):
    """Add sixteen products, as far as they are above 0, times their weights; both are at addresses."""
    zero = splat_f32(np.float32(0))
    # Of 0 and NaN, `larger` gives NaN.
    sums = fma(larger(zero, load_f32x8(products)), load_f32x8(weights), sums)
    return fma(larger(zero, load_f32x8(products + 32)), load_f32x8(weights + 32), sums)
