"""Scores of the lightning indexer on integers, over keys of `I8_PAGES`.

Queries become int8 with one scale for a head, which goes into the head's weight; so rounding changes a score by less
than 1 % of the spread of all scores. A position costs 128 dot instructions where there are 64 heads and keys of 128
numbers, so that a page, 8 KB, is read far more slowly than memory could.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.attention.codes import quantise_i8
from pymla.cpu.attention.index_keys import mix_key, mixed_together
from pymla.cpu.attention.index_scores import SCORES, Scores, hide_unseen, take_item
from pymla.cpu.attention.index_tiles import HEADS, Query, score_page
from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_words import BIAS
from pymla.cpu.matmul.matrices import copy
from pymla.cpu.memory import empty
from pymla.cpu.runtime.array_types import CACHE, F2, F3, I2, INT8_3, STEP
from pymla.cpu.runtime.jit import Kernel, kernel
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor


class Queries(NamedTuple):
    """Queries of T tokens, of heads that `HEADS` divides, as in `Query`. Those past the last head have weights of 0."""

    codes: np.ndarray  # int8 (T, heads, D)
    starts: np.ndarray  # int32 (T, heads)
    weights: np.ndarray  # float32 (T, heads)


QUERIES = types.NamedTuple((INT8_3, I2, F2), Queries)


def score(q: np.ndarray, weights: np.ndarray, keys: QTensor, step: Step, scores: Scores) -> None:
    """Fill the scores; arguments as for `choose`."""
    tokens, heads, columns = q.shape
    padded = -(-heads // HEADS) * HEADS
    queries = Queries(
        empty((tokens, padded, columns), np.int8),
        empty((tokens, padded), np.int32),
        empty((tokens, padded), np.float32),
    )
    store_queries[tokens * padded](q, weights, queries)
    score_pages[tokens * scores.splits, 1](queries, keys, step, scores)


def kernels() -> list[Kernel]:
    """The kernels of `score`."""
    return [store_queries, score_pages]


@kernel(F3, F2, QUERIES)
def store_queries(first, last, q, weights, out):
    """Over tokens and heads, with those past the last head: quantise queries (T, H, D) with their weights (T, H)."""
    heads, columns, padded = q.shape[1], q.shape[2], out.weights.shape[1]
    mixed = np.empty(columns, np.float32)
    for number in range(first, last):
        t, h = number // padded, number % padded
        if h >= heads:
            out.codes[t, h, :] = 0
            out.starts[t, h], out.weights[t, h] = 0, 0
            continue
        copy(address(q[t, h]), address(mixed), columns)
        mix_key(address(mixed), columns)
        scale, sums = quantise_i8(address(mixed), columns, address(out.codes[t, h]), 0)
        out.starts[t, h] = np.int32(-BIAS * sums)
        out.weights[t, h] = weights[t, h] * (scale / np.float32(mixed_together(columns)))


@kernel(QUERIES, CACHE, STEP, SCORES)
def score_pages(first, last, queries, keys, step, scores):
    """Over items of `scores`."""
    heads, columns = queries.codes.shape[1], queries.codes.shape[2]
    for number in range(first, last):
        item = take_item(number, step, scores)
        t = item.token
        codes, starts, weights = address(queries.codes[t]), address(queries.starts[t]), address(queries.weights[t])
        query = Query(codes, starts, weights, heads, columns)
        table = step.block_tables[step.seq_of[t]]
        for p in range(item.first_page, item.stop_page):
            page = address(keys.data[table[p] * PAGE])
            ahead = address(keys.data[table[min(p + 1, item.stop_page - 1)] * PAGE])
            score_page(page, query, ahead, address(scores.ordered[t]) + 4 * PAGE * p)
        hide_unseen(item, step, scores)
