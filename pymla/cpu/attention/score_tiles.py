"""Tiles of scores: products of queries and keys on integers, a few rows with two panels at a time.

Each of the rows' words is broadcast and meets the words of `LANES` rows of a panel in one instruction (`dot_words`).
Two panels, because an instruction that takes five cycles needs as many independent sums to work on. Sums are named one
by one: in a tuple that a loop goes through, LLVM would keep them in memory.
"""

from typing import NamedTuple

import numpy as np

from pymla.cpu.attention.codes import BLOCK_BYTES
from pymla.cpu.attention.row_addresses import moved
from pymla.cpu.machine.simd import (
    broadcast_f32xL,
    fma,
    load_f32xL,
    load_i8xL,
    load_i32xL,
    mul,
    splat_f32xL,
    store_f32xL,
)
from pymla.cpu.machine.simd_panels import broadcast_i8xL, finish8
from pymla.cpu.machine.simd_words import dot_i16_words, dot_words, zero_words
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.isa import LANES

#: Rows that meet each of the two panels: as many as there are registers for. Where they are three, the fourth address
#: is not used.
SCORE_ROWS = 4 if LANES == 16 else 3
#: Rows of two panels: the scores of a row that a tile computes.
SCORE_COLUMNS = 2 * LANES


class Panel(NamedTuple):
    """A panel of codes without bias: addresses."""

    codes: int
    scales: int  # float32, `LANES` for each block
    starts: int  # int32, likewise: the sums to begin with, which take the rows' bias off


class KeyPanel(NamedTuple):
    """A panel of keys: of their numbers that are not rotated, and of the rotated ones, whose words are two int16."""

    plain: Panel
    rope: Panel  # with one scale for each lane; `starts` is not used


@inlined
def tile_scores(first, second, first_panel, second_panel, blocks, block_codes, step, first_out, second_out):
    """Products of `SCORE_ROWS` rows with a panel, and of as many with another panel.

    Parameters
    ----------
    first, second : Rows
        Rows that meet the first panel, and those that meet the second, as codes with bias. Where the panels are
        neighbours, they are the same rows, and must be the same value in the caller's code: words are loaded once then.
    first_panel, second_panel : Panel
    blocks, block_codes : int
        Number of blocks with a common scale, and codes of each, a multiple of 32.
    step : int
        Bytes from a block's scales of a panel, and from its starts, to those of the next block.
    first_out, second_out : tuples of 4 int
        Addresses of the scores of each row, `LANES` float32. They are overwritten.
    """
    x, sx = first
    y, sy = second
    p, d, z = first_panel
    q, e, w = second_panel
    zero = splat_f32xL(np.float32(0))
    out = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(blocks):
        i, j = load_i32xL(z), load_i32xL(w)
        sums = i, j, i, j, i, j, i, j
        for _ in range(block_codes // 32 * BLOCK_BYTES // 16):
            sums = _add_four_words(sums, p, q, x, y)
            p, q = p + 16 * LANES, q + 16 * LANES
            x, y = moved(x, 16), moved(y, 16)
        out = _add_scaled(sums, load_f32xL(d), load_f32xL(e), sx, sy, out)
        d, e, z, w = d + step, e + step, z + step, w + step
        sx, sy = moved(sx, 4), moved(sy, 4)
    _store_scores(first_out, second_out, out)


@inlined
def tile_rope_scores(first, second, first_panel, second_panel, words, first_out, second_out):
    """Add products of the rotated dimensions, int16 codes with one scale for a row, to results of `tile_scores`.

    Parameters
    ----------
    first, second : Rows
    first_panel, second_panel : Panel
        With one scale for each lane; `starts` is not used.
    words : int
        Words of a row, two int16 each.
    first_out, second_out : tuples of 4 int
        As in `tile_scores`.
    """
    x, sx = first
    y, sy = second
    p, d, _ = first_panel
    q, e, _ = second_panel
    zero = zero_words()
    sums = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(words):
        sums = _add_i16_word(sums, p, q, x, y)
        p, q, x, y = p + 4 * LANES, q + 4 * LANES, moved(x, 4), moved(y, 4)
    # All scores are loaded before one is stored: rows past the end repeat the last row and must not be added twice.
    out = _load_scores(first_out, second_out)
    _store_scores(first_out, second_out, _add_scaled(sums, load_f32xL(d), load_f32xL(e), sx, sy, out))


@inlined
def tile_key_scores(rows, rope_rows, first, second, sizes, step, first_out, second_out):
    """Products of `SCORE_ROWS` queries with two neighbouring panels of keys.

    Parameters
    ----------
    rows, rope_rows : Rows
        The queries' numbers that are not rotated, and the rotated ones, as `tile_scores` and `tile_rope_scores` take
        them.
    first, second : KeyPanel
    sizes : (int, int, int)
        Blocks with a common scale, codes of each, and words of the rotated numbers.
    step, first_out, second_out
        As in `tile_scores`.
    """
    blocks, block_codes, words = sizes
    x, sx = rows
    p, d, z = first.plain
    q, e, w = second.plain
    zero = splat_f32xL(np.float32(0))
    out = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(blocks):
        i, j = load_i32xL(z), load_i32xL(w)
        sums = i, j, i, j, i, j, i, j
        for _ in range(block_codes // 32 * BLOCK_BYTES // 16):
            sums = _add_four_words(sums, p, q, x, x)
            p, q, x = p + 16 * LANES, q + 16 * LANES, moved(x, 16)
        out = _add_scaled(sums, load_f32xL(d), load_f32xL(e), sx, sx, out)
        d, e, z, w, sx = d + step, e + step, z + step, w + step, moved(sx, 4)
    x, sx = rope_rows
    p, q, zero_sums = first.rope.codes, second.rope.codes, zero_words()
    sums = zero_sums, zero_sums, zero_sums, zero_sums, zero_sums, zero_sums, zero_sums, zero_sums
    for _ in range(words):
        sums = _add_i16_word(sums, p, q, x, x)
        p, q, x = p + 4 * LANES, q + 4 * LANES, moved(x, 4)
    d, e = load_f32xL(first.rope.scales), load_f32xL(second.rope.scales)
    _store_scores(first_out, second_out, _add_scaled(sums, d, e, sx, sx, out))


@inlined
def _add_four_words(sums, p, q, x, y):
    sums = _add_word(sums, p, q, x, y)
    sums = _add_word(sums, p + 4 * LANES, q + 4 * LANES, moved(x, 4), moved(y, 4))
    sums = _add_word(sums, p + 8 * LANES, q + 8 * LANES, moved(x, 8), moved(y, 8))
    return _add_word(sums, p + 12 * LANES, q + 12 * LANES, moved(x, 12), moved(y, 12))


@inlined
def _add_word(sums, p, q, x, y):
    """Add the products of one word of each row. Sums of both panels alternate."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    u, v = load_i8xL(p), load_i8xL(q)
    # The words of a row side by side, so that LLVM loads them once where both panels meet the same rows.
    m, n = broadcast_i8xL(x[0]), broadcast_i8xL(y[0])
    ia, ja = dot_words(ia, m, u), dot_words(ja, n, v)
    m, n = broadcast_i8xL(x[1]), broadcast_i8xL(y[1])
    ib, jb = dot_words(ib, m, u), dot_words(jb, n, v)
    m, n = broadcast_i8xL(x[2]), broadcast_i8xL(y[2])
    ic, jc = dot_words(ic, m, u), dot_words(jc, n, v)
    if SCORE_ROWS == 4:
        m, n = broadcast_i8xL(x[3]), broadcast_i8xL(y[3])
        ie, je = dot_words(ie, m, u), dot_words(je, n, v)
    return ia, ja, ib, jb, ic, jc, ie, je


@inlined
def _add_i16_word(sums, p, q, x, y):
    """`_add_word` for words of two int16."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    u, v = load_i8xL(p), load_i8xL(q)
    ia, ja = dot_i16_words(ia, broadcast_i8xL(x[0]), u), dot_i16_words(ja, broadcast_i8xL(y[0]), v)
    ib, jb = dot_i16_words(ib, broadcast_i8xL(x[1]), u), dot_i16_words(jb, broadcast_i8xL(y[1]), v)
    ic, jc = dot_i16_words(ic, broadcast_i8xL(x[2]), u), dot_i16_words(jc, broadcast_i8xL(y[2]), v)
    if SCORE_ROWS == 4:
        ie, je = dot_i16_words(ie, broadcast_i8xL(x[3]), u), dot_i16_words(je, broadcast_i8xL(y[3]), v)
    return ia, ja, ib, jb, ic, jc, ie, je


@inlined
def _add_scaled(sums, u, v, sx, sy, out):
    """``out + sums * scales``: the panels' scales are registers, those of the rows lie at addresses."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    fa, ga, fb, gb, fc, gc, fe, ge = out
    fa, ga = _add_times(ia, u, sx[0], fa), _add_times(ja, v, sy[0], ga)
    fb, gb = _add_times(ib, u, sx[1], fb), _add_times(jb, v, sy[1], gb)
    fc, gc = _add_times(ic, u, sx[2], fc), _add_times(jc, v, sy[2], gc)
    if SCORE_ROWS == 4:
        fe, ge = _add_times(ie, u, sx[3], fe), _add_times(je, v, sy[3], ge)
    return fa, ga, fb, gb, fc, gc, fe, ge


@inlined
def _add_times(products, panel_scale, scale, acc):
    return fma(finish8(products), mul(panel_scale, broadcast_f32xL(scale)), acc)


@inlined
def _load_scores(at, bt):
    fa, ga, fb, gb = load_f32xL(at[0]), load_f32xL(bt[0]), load_f32xL(at[1]), load_f32xL(bt[1])
    return fa, ga, fb, gb, load_f32xL(at[2]), load_f32xL(bt[2]), load_f32xL(at[3]), load_f32xL(bt[3])


@inlined
def _store_scores(at, bt, out):
    fa, ga, fb, gb, fc, gc, fe, ge = out
    store_f32xL(at[0], fa)
    store_f32xL(bt[0], ga)
    store_f32xL(at[1], fb)
    store_f32xL(bt[1], gb)
    store_f32xL(at[2], fc)
    store_f32xL(bt[2], gc)
    if SCORE_ROWS == 4:
        store_f32xL(at[3], fe)
        store_f32xL(bt[3], ge)
