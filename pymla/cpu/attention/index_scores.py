"""Scores of the lightning indexer, and how they are split over threads.

``I[t, s] = Σ_h weights[t, h] * max(0, q[t, h] · keys[s])`` is computed by `pymla.cpu.attention.index_scores_int8` over
keys of `I8_PAGES`, and by `pymla.cpu.attention.index_scores_f32` over those of any other type.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.attention.splits import pages_of_split
from pymla.cpu.machine.simd_ordered import LOWEST
from pymla.cpu.memory import empty
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import I2
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE

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
    """The item with a number."""
    t, split = number // scores.splits, number % scores.splits
    seen = step.positions[t] + 1
    first, stop = pages_of_split(seen if seen > scores.k else 0, split, scores.splits)
    return Item(t, first, stop)


@helper
def hide_unseen(item, step, scores):
    """The positions behind the token's own, in the last of an item's pages, get the lowest score."""
    for s in range(step.positions[item.token] + 1, item.stop_page * PAGE):
        scores.ordered[item.token, s] = LOWEST
