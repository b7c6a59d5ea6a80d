"""Tiles of the indexer's scores on integers: four heads of a query meet `PANELS` panels of keys at a time.

The keys of a panel are lanes. So a head's products are cut off at 0 and weighted where they are, in registers, and the
sum over heads needs no sum of lanes. Sums are named one by one: in a tuple that a loop goes through, LLVM would keep
them in memory.
"""

from typing import NamedTuple

import numpy as np

from pymla.cpu.attention.next_page import LINE
from pymla.cpu.machine.simd import (
    broadcast_f32xL,
    fma,
    larger,
    load_f32xL,
    load_i8xL,
    load_i32,
    mul,
    prefetch_l2,
    splat_f32xL,
)
from pymla.cpu.machine.simd_ordered import splat_i32xL, store_ordered
from pymla.cpu.machine.simd_panels import broadcast_i8xL, dot8, finish8
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES
from pymla.pages import PAGE

#: Heads and panels of a tile: as many as there are registers for.
HEADS, PANELS = 4, 4 if LANES == 16 else 2
#: Keys of a tile.
_KEYS = PANELS * LANES


class Query(NamedTuple):
    """A token's query, of heads that `HEADS` divides: addresses and sizes."""

    codes: int  # int8 (heads, columns), mixed
    starts: int  # int32 (heads,): the sums to begin with, which take off the keys' bias
    weights: int  # float32 (heads,): of the products of codes
    heads: int
    columns: int  # a multiple of 32


@helper
def score_page(page, query, ahead, out):
    """Scores of all keys of a page, in the order of float32, while the next page is prefetched.

    Parameters
    ----------
    page, ahead : int
        Addresses of pages (`pymla.cpu.attention.index_keys`).
    query : Query
    out : int
        Address of int32 (PAGE,).
    """
    # A page has as many lines as a row has bytes, and a tile prefetches its share of them.
    lines = (query.columns + 4) * _KEYS // PAGE
    for key in range(0, PAGE, _KEYS):
        scores = _score_tile(page + key * query.columns, query, ahead, lines)
        _store_scores(scores, page + PAGE * query.columns + 4 * key, out + 4 * key)
        ahead += LINE * lines


@inlined
def _score_tile(panels, query, ahead, lines):
    """Scores of the keys of `PANELS` panels, but for the keys' scales: four registers, of which `PANELS` count."""
    columns = query.columns
    panel_bytes = LANES * columns
    lines_each = (lines * HEADS + query.heads - 1) // query.heads
    zero = splat_f32xL(np.float32(0))
    scores = zero, zero, zero, zero
    for h in range(0, query.heads, HEADS):
        starts, weights = query.starts + 4 * h, query.weights + 4 * h
        a, b, c, d = _start(starts), _start(starts + 4), _start(starts + 8), _start(starts + 12)
        sums, x, p = (a, b, c, d), query.codes + columns * h, panels
        for _ in range(columns // 16):
            sums = _add_word(sums, p, panel_bytes, x, columns)
            sums = _add_word(sums, p + 4 * LANES, panel_bytes, x + 4, columns)
            sums = _add_word(sums, p + 8 * LANES, panel_bytes, x + 8, columns)
            sums = _add_word(sums, p + 12 * LANES, panel_bytes, x + 12, columns)
            x, p = x + 16, p + 16 * LANES
        a, b, c, d = sums
        scores = _add_weighted(scores, a, broadcast_f32xL(weights))
        scores = _add_weighted(scores, b, broadcast_f32xL(weights + 4))
        scores = _add_weighted(scores, c, broadcast_f32xL(weights + 8))
        scores = _add_weighted(scores, d, broadcast_f32xL(weights + 12))
        for line in range(lines_each):
            prefetch_l2(ahead + LINE * line)
        ahead += LINE * lines_each
    return scores


@inlined
def _start(at):
    """A head's sums to begin with."""
    sums = splat_i32xL(load_i32(at))
    return sums, sums, sums, sums


@inlined
def _add_word(sums, p, panel_bytes, x, row_bytes):
    """Add the products of a word of each of four heads, `row_bytes` apart, and the words of the keys."""
    a, b, c, d = sums
    third = 2 * panel_bytes if PANELS == 4 else 0
    keys = load_i8xL(p), load_i8xL(p + panel_bytes), load_i8xL(p + third), load_i8xL(p + panel_bytes + third)
    a, b = _add_products(a, keys, x), _add_products(b, keys, x + row_bytes)
    return a, b, _add_products(c, keys, x + 2 * row_bytes), _add_products(d, keys, x + 3 * row_bytes)


@inlined
def _add_products(sums, keys, x):
    """Add the products of a head's word, at the address `x`, and the words of the keys."""
    i, j, k, m = sums
    u, v, w, z = keys
    word = broadcast_i8xL(x)
    i, j = dot8(i, u, word), dot8(j, v, word)
    if PANELS == 4:
        k, m = dot8(k, w, word), dot8(m, z, word)
    return i, j, k, m


@inlined
def _add_weighted(scores, sums, weight):
    """Add a head's products, as far as they are above 0, times its weight."""
    i, j, k, m = sums
    e, f, g, h = scores
    e, f = fma(_above_0(i), weight, e), fma(_above_0(j), weight, f)
    if PANELS == 4:
        g, h = fma(_above_0(k), weight, g), fma(_above_0(m), weight, h)
    return e, f, g, h


@inlined
def _above_0(sums):
    return larger(finish8(sums), splat_f32xL(np.float32(0)))


@inlined
def _store_scores(scores, scales, out):
    """Store scores times the keys' scales, which are at an address."""
    e, f, g, h = scores
    step = 4 * LANES
    store_ordered(out, mul(e, load_f32xL(scales)))
    store_ordered(out + step, mul(f, load_f32xL(scales + step)))
    if PANELS == 4:
        store_ordered(out + 2 * step, mul(g, load_f32xL(scales + 2 * step)))
        store_ordered(out + 3 * step, mul(h, load_f32xL(scales + 3 * step)))
