"""Split-kv and combine: the pages of a token's sequence are split over threads, and the parts combined.

Few tokens leave threads idle, as each is one item of work for a group of heads. So the pages of a token are split, and
an item is one token, one group of `HEAD_GROUP` heads and one split. It leaves unnormalised values with the running
maximum and sum of its softmax (`pymla.cpu.attention.softmax`), which `combine` brings together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.attention.hadamard import mix_read
from pymla.cpu.attention.softmax import shrink
from pymla.cpu.attention.value_tiles import VALUE_COLUMNS
from pymla.cpu.machine.simd import address, load_f32, store_f32
from pymla.cpu.matmul.matrices import add_scaled
from pymla.cpu.memory import empty
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import A3, F3
from pymla.cpu.runtime.jit import helper, kernel
from pymla.pages import PAGE

#: Heads that share the reading of a page.
HEAD_GROUP = 16


class Splits(NamedTuple):
    """Partial results of T tokens and H heads, whose pages are split."""

    count: int  # splits of each token
    rank: int  # numbers of a value
    values: np.ndarray  # float32 (T * count, H, rank), padded to whole groups of heads and whole tiles of values
    sums: np.ndarray  # float32 (T * count, H, 2): running maximum and sum

    @classmethod
    def empty(cls, out: np.ndarray, count: int | None = None) -> Splits:
        """For results `out` (T, H, rank); with `count` splits, or as many as give every thread two items."""
        tokens, heads, rank = out.shape
        groups = -(-heads // HEAD_GROUP)
        count = count or max(1, 2 * threads.thread_count() // max(1, tokens * groups))
        padded = groups * HEAD_GROUP, -(-rank // VALUE_COLUMNS) * VALUE_COLUMNS
        values = empty((tokens * count, *padded), np.float32)
        return cls(count, rank, values, np.empty((tokens * count, heads, 2), np.float32))

    @property
    def items(self) -> int:
        """Items of work: tokens, groups of heads and splits."""
        rows, heads, _ = self.values.shape
        return rows * heads // HEAD_GROUP

    def combine(self, out: np.ndarray, mixed: bool = False) -> np.ndarray:
        """Bring the splits of each token and head together in `out`; `mixed` as the rows of the cache are."""
        tokens, heads, _ = out.shape
        combine[tokens * heads](self.values, self.sums, self.count, mixed, out)
        return out


SPLITS = types.NamedTuple((types.int64, types.int64, F3, F3), Splits)


class Item(NamedTuple):
    """One item of work."""

    row: int  # of the partial results
    token: int
    begin: int  # its first head
    heads: int
    length: int  # positions that the token sees
    first_page: int
    stop_page: int  # the page behind the last one


@helper
def take_item(number, heads, splits, step):
    """The item with a number, of `heads` heads in all. Its running maximum and sum become those of no pages."""
    groups = (heads + HEAD_GROUP - 1) // HEAD_GROUP
    row, begin = number // groups, number % groups * HEAD_GROUP
    t, split = row // splits.count, row % splits.count
    count = min(HEAD_GROUP, heads - begin)
    length = step.positions[t] + 1
    for h in range(begin, begin + count):
        splits.sums[row, h, 0], splits.sums[row, h, 1] = -np.inf, 0
    first_page, stop_page = pages_of_split(length, split, splits.count)
    return Item(row, t, begin, count, length, first_page, stop_page)


@helper
def pages_of_split(length, split, count):
    """The first page of one of `count` splits of so many positions, and the page behind its last one."""
    pages = (length + PAGE - 1) // PAGE
    return pages * split // count, pages * (split + 1) // count


class HeadGroup(NamedTuple):
    """A group of heads of a row of partial results, as an `Item` has it."""

    row: int
    begin: int  # its first head
    heads: int


@helper
def head_group(row, group, heads):
    """The group with a number, of `heads` heads in all."""
    begin = HEAD_GROUP * group
    return HeadGroup(row, begin, min(HEAD_GROUP, heads - begin))


@helper
def groups_of_part(heads, part, parts):
    """The first group of one of `parts` parts of the heads, and the group behind its last one."""
    groups = (heads + HEAD_GROUP - 1) // HEAD_GROUP
    return groups * part // parts, groups * (part + 1) // parts


@helper
def most_groups(heads, parts):
    """Groups of heads that a part has at most."""
    groups = (heads + HEAD_GROUP - 1) // HEAD_GROUP
    return (groups + parts - 1) // parts


@helper
def start_values(item, state, splits):
    """Begin with the softmax of an `Item` or a `HeadGroup`: running maxima and sums, float32 (2, HEAD_GROUP) at the
    address `state`, and values of 0. Returns the address of the values, float32 (HEAD_GROUP, padded rank)."""
    for h in range(HEAD_GROUP):
        store_f32(state + 4 * h, np.float32(-np.inf))
        store_f32(state + 4 * (HEAD_GROUP + h), np.float32(0))
    values = splits.values[item.row, item.begin : item.begin + HEAD_GROUP]
    values[:] = 0
    return address(values)


@helper
def leave_sums(item, state, splits):
    """Keep the running maxima and sums of the heads of an `Item` or a `HeadGroup`."""
    for h in range(item.heads):
        splits.sums[item.row, item.begin + h, 0] = load_f32(state + 4 * h)
        splits.sums[item.row, item.begin + h, 1] = load_f32(state + 4 * (HEAD_GROUP + h))


@kernel(F3, F3, types.int64, types.int64, A3)
def combine(first, last, values, sums, count, mixed, out):
    """Over tokens and heads: values weighted by 2 ** (their split's maximum - the largest), over the sum of weights.
    `mixed` is 1 where the values are those of mixed rows."""
    _, heads, rank = out.shape
    for item in range(first, last):
        t, h = item // heads, item % heads
        largest = np.float32(-np.inf)
        for split in range(count):
            largest = max(largest, sums[t * count + split, h, 0])
        total = np.float32(0)
        out[t, h, :] = 0
        for split in range(count):
            row = t * count + split
            if sums[row, h, 1] == 0:
                continue
            weight = np.float32(np.exp2(sums[row, h, 0] - largest))
            total += weight * sums[row, h, 1]
            add_scaled(weight, address(values[row, h]), address(out[t, h]), rank)
        shrink(np.float32(1) / total, address(out[t, h]), rank)
        if mixed:
            mix_read(address(out[t, h]), rank)
