"""Tiles of attention on integers: queries against keys, softmax weights against values.

Operands are codes of 8 bits with a scale for 32 of them or more, in words of `simd_words.WORD` codes. Panels have words
of `LANES` rows side by side; words of the other operand are broadcast.
"""

import numpy as np

from pymla.cpu.formats.panels import store_columns
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import (
    absolute,
    add,
    address,
    broadcast_f32xL,
    div,
    farther,
    farthest,
    fma,
    load_f32xL,
    load_i8xL,
    load_i32xL,
    mul,
    round_even,
    splat_f32xL,
    store_f32,
    store_f32xL,
    total,
    where_positive,
)
from pymla.cpu.machine.simd_panels import broadcast_i8xL, finish8, load_columns, panel_rows
from pymla.cpu.machine.simd_words import WORD, dot_i16_words, dot_words, store_codes, store_words, zero_words
from pymla.cpu.runtime.compiling import helper, inlined

#: Rows that meet each of two panels in `tile_scores`, and in `tile_values`: as many as there are registers for, so that
#: an instruction that takes five cycles does not wait for itself.
SCORE_ROWS, VALUE_ROWS = (4, 8) if LANES == 16 else (3, 4)
#: Softmax weights with a common scale.
WEIGHTS = 64
#: Bytes of 32 codes.
BLOCK_BYTES = 128 // WORD
#: Bytes of 32 codes of the rows of a panel.
PANEL_BYTES = LANES * BLOCK_BYTES


@helper
def quantise_codes(x, count, codes, scale, zero):
    """`count` float32, a multiple of 32, as codes from -127 to 127, plus `zero` (0 or `BIAS`), and their scale; returns
    their sum without it.

    `x`, `codes` and `scale` are addresses.
    """
    most_lanes = splat_f32xL(np.float32(0))
    for i in range(0, count, LANES):
        most_lanes = farther(absolute(load_f32xL(x + 4 * i)), most_lanes)
    most = farthest(most_lanes)
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(127) / most
    # A value that is infinite or NaN stays in sight here; codes would turn it into a number.
    store_f32(scale, most / np.float32(127))
    factor, zero, sums = splat_f32xL(inverse), splat_f32xL(np.float32(zero)), splat_f32xL(np.float32(0))
    for i in range(0, count, LANES):
        whole = round_even(mul(load_f32xL(x + 4 * i), factor))
        store_codes(codes + 4 // WORD * i, add(whole, zero))
        sums = add(sums, whole)
    return total(sums)


@helper
def quantise_weights(weights, codes, scale):
    """`WEIGHTS` float32 that are not negative as codes from 0 to 255, and their scale; all are addresses."""
    most_lanes = splat_f32xL(np.float32(0))
    for i in range(0, WEIGHTS, LANES):
        most_lanes = farther(load_f32xL(weights + 4 * i), most_lanes)
    most = farthest(most_lanes)
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(255) / most
    factor = splat_f32xL(inverse)
    for i in range(0, WEIGHTS, LANES):
        store_codes(codes + 4 // WORD * i, round_even(mul(load_f32xL(weights + 4 * i), factor)))
    store_f32(scale, most / np.float32(255))


@helper
def quantise_heads(weights, token_scales, codes, scales, heads):
    """`quantise_weights` for heads side by side, which `LANES` divides: weights (WEIGHTS, heads), words of codes
    (WEIGHTS // WORD, heads), scales (heads,)."""
    row = 4 * heads
    for at in range(0, row, 4 * LANES):
        most = splat_f32xL(np.float32(0))
        for s in range(WEIGHTS):
            x = mul(load_f32xL(weights + row * s + at), broadcast_f32xL(token_scales + 4 * s))
            store_f32xL(weights + row * s + at, x)
            most = farther(absolute(x), most)
        store_f32xL(scales + at, mul(most, splat_f32xL(np.float32(1 / 255))))
        factor = where_positive(most, div(splat_f32xL(np.float32(255)), most))
        for s in range(0, WEIGHTS, 4):
            source = weights + row * s + at
            a, b = mul(load_f32xL(source), factor), mul(load_f32xL(source + row), factor)
            c, d = mul(load_f32xL(source + 2 * row), factor), mul(load_f32xL(source + 3 * row), factor)
            target = codes + row * (s // WORD) + at
            store_words(target, row, round_even(a), round_even(b), round_even(c), round_even(d))


@helper
def store_keys(rows, row_bytes, out):
    """Rows of codes to the lanes of a panel; addresses."""
    for i in range(0, row_bytes, 16):
        store_columns(out + i * LANES, load_columns(panel_rows(rows, row_bytes, LANES), i))


@helper
def four_from(i, count):
    """Four of `count` numbers from `i` on; at the edge, the last one again."""
    last = count - 1
    return min(i, last), min(i + 1, last), min(i + 2, last), min(i + 3, last)


@helper
def four(rows, a, b, c, d):
    """Addresses of four rows of an array."""
    return address(rows[a]), address(rows[b]), address(rows[c]), address(rows[d])


@inlined
def tile_scores(x, y, sx, sy, blocks, count, p, q, d, e, z, w, step, at, bt):
    """Rows of two panels with `SCORE_ROWS` others each; where those are three, the last of four addresses is not used.

    Parameters
    ----------
    x, y : tuples of 4 int
        Addresses of codes, which have the bias, of what meets the first panel, and the second; the same ones where the
        panels are neighbours, which the caller's code must show to LLVM: words are then loaded once.
    sx, sy : tuples of 4 int
        Addresses of their scales.
    blocks, count : int
        Of `count` codes, a multiple of 32.
    p, q : int
        Addresses of the panels.
    d, e, z, w, step : int
        Addresses of their scales and of their sums to begin with, int32, which take the others' bias off; and bytes
        from block to block.
    at, bt : tuples of 4 int
        Addresses of the results, `LANES` float32.
    """
    zero = splat_f32xL(np.float32(0))
    out = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(blocks):
        i, j = load_i32xL(z), load_i32xL(w)
        sums = i, j, i, j, i, j, i, j
        for _ in range(count // 32 * BLOCK_BYTES // 16):
            sums = _four_scores(sums, p, q, x, y)
            p, q = p + 16 * LANES, q + 16 * LANES
            x, y = moved(x, 16), moved(y, 16)
        out = _scaled(sums, load_f32xL(d), load_f32xL(e), sx, sy, out)
        d, e, z, w = d + step, e + step, z + step, w + step
        sx, sy = moved(sx, 4), moved(sy, 4)
    _store_scores(at, bt, out)


@inlined
def moved(addresses, step):
    """Four addresses, moved by so many bytes."""
    a, b, c, d = addresses
    return a + step, b + step, c + step, d + step


@inlined
def _scaled(sums, u, v, sx, sy, out):
    """``out + sums * scales``: those of the panels, and those at addresses."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    fa, ga, fb, gb, fc, gc, fe, ge = out
    fa, ga = _times(ia, u, sx[0], fa), _times(ja, v, sy[0], ga)
    fb, gb = _times(ib, u, sx[1], fb), _times(jb, v, sy[1], gb)
    fc, gc = _times(ic, u, sx[2], fc), _times(jc, v, sy[2], gc)
    if SCORE_ROWS == 4:
        fe, ge = _times(ie, u, sx[3], fe), _times(je, v, sy[3], ge)
    return fa, ga, fb, gb, fc, gc, fe, ge


@inlined
def _times(products, panel_scale, scale, acc):
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


@inlined
def _four_scores(sums, p, q, x, y):
    sums = _one_score(sums, p, q, x, y)
    sums = _one_score(sums, p + 4 * LANES, q + 4 * LANES, moved(x, 4), moved(y, 4))
    sums = _one_score(sums, p + 8 * LANES, q + 8 * LANES, moved(x, 8), moved(y, 8))
    return _one_score(sums, p + 12 * LANES, q + 12 * LANES, moved(x, 12), moved(y, 12))


@inlined
def _one_score(sums, p, q, x, y):
    """The products of a word; a panel's codes have no bias."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    u, v = load_i8xL(p), load_i8xL(q)
    # Side by side, so that LLVM loads a word once where both panels meet the same codes.
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
def tile_rope(x, y, sx, sy, words, p, q, d, e, at, bt):
    """Add products of int16 to the results of `tile_scores`: `words` words of two, each with a common scale.

    All but `words` are as there; `d` and `e` are addresses of one scale for each lane.
    """
    zero = zero_words()
    sums = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(words):
        sums = _one_rope(sums, p, q, x, y)
        p, q, x, y = p + 4 * LANES, q + 4 * LANES, moved(x, 4), moved(y, 4)
    # All are read before one is written: at the edge some are the same.
    _store_scores(at, bt, _scaled(sums, load_f32xL(d), load_f32xL(e), sx, sy, _load_scores(at, bt)))


@inlined
def _one_rope(sums, p, q, x, y):
    ia, ja, ib, jb, ic, jc, ie, je = sums
    u, v = load_i8xL(p), load_i8xL(q)
    ia, ja = dot_i16_words(ia, broadcast_i8xL(x[0]), u), dot_i16_words(ja, broadcast_i8xL(y[0]), v)
    ib, jb = dot_i16_words(ib, broadcast_i8xL(x[1]), u), dot_i16_words(jb, broadcast_i8xL(y[1]), v)
    ic, jc = dot_i16_words(ic, broadcast_i8xL(x[2]), u), dot_i16_words(jc, broadcast_i8xL(y[2]), v)
    if SCORE_ROWS == 4:
        ie, je = dot_i16_words(ie, broadcast_i8xL(x[3]), u), dot_i16_words(je, broadcast_i8xL(y[3]), v)
    return ia, ja, ib, jb, ic, jc, ie, je


@inlined
def tile_values(x, y, x_step, sx, sy, blocks, p, panel_step, at, bt):
    """Add two panels' lanes of the values, weighted, to the results of `VALUE_ROWS` queries: four, and four more if
    there are eight.

    Parameters
    ----------
    x, y, sx, sy : tuples of 4 int
        Addresses of each query's words of weights, and of their scale.
    x_step : int
        Bytes from word to word.
    blocks : int
        Of 32 tokens, `WEIGHTS` // 32 at most.
    p, panel_step : int
        Address of two panels behind each other, and bytes from block to block.
    at, bt : tuples of 4 int
        Addresses of each query's results, 2 * `LANES` float32.
    """
    zero = zero_words()
    sums = zero, zero, zero, zero, zero, zero, zero, zero
    more = sums
    for _ in range(blocks):
        word = p
        for _ in range(BLOCK_BYTES // 16):
            sums, more = _one_value(sums, more, word, x, y)
            x, y = moved(x, x_step), moved(y, x_step)
            sums, more = _one_value(sums, more, word + 4 * LANES, x, y)
            x, y = moved(x, x_step), moved(y, x_step)
            sums, more = _one_value(sums, more, word + 8 * LANES, x, y)
            x, y = moved(x, x_step), moved(y, x_step)
            sums, more = _one_value(sums, more, word + 12 * LANES, x, y)
            x, y = moved(x, x_step), moved(y, x_step)
            word += 16 * LANES
        p += panel_step
    # All are read before one is written: at the edge some are the same.
    out = _weighted(sums, sx, at)
    if VALUE_ROWS == 8:
        _store_values(bt, _weighted(more, sy, bt))
    _store_values(at, out)


@inlined
def _one_value(sums, more, p, x, y):
    """The products of a word."""
    u, v = load_i8xL(p), load_i8xL(p + PANEL_BYTES)
    sums = _four_values(sums, u, v, x)
    if VALUE_ROWS == 8:
        more = _four_values(more, u, v, y)
    return sums, more


@inlined
def _four_values(sums, u, v, x):
    """Those of four queries; weights, which have no sign, take the part of the codes with the bias."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    y = broadcast_i8xL(x[0])
    ia, ja = dot_words(ia, y, u), dot_words(ja, y, v)
    y = broadcast_i8xL(x[1])
    ib, jb = dot_words(ib, y, u), dot_words(jb, y, v)
    y = broadcast_i8xL(x[2])
    ic, jc = dot_words(ic, y, u), dot_words(jc, y, v)
    y = broadcast_i8xL(x[3])
    return ia, ja, ib, jb, ic, jc, dot_words(ie, y, u), dot_words(je, y, v)


@inlined
def _weighted(sums, scales, at):
    """What is at four addresses plus products times scales."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    fa, ga = _added(ia, scales[0], at[0]), _added(ja, scales[0], at[0] + 4 * LANES)
    fb, gb = _added(ib, scales[1], at[1]), _added(jb, scales[1], at[1] + 4 * LANES)
    fc, gc = _added(ic, scales[2], at[2]), _added(jc, scales[2], at[2] + 4 * LANES)
    return fa, ga, fb, gb, fc, gc, _added(ie, scales[3], at[3]), _added(je, scales[3], at[3] + 4 * LANES)


@inlined
def _added(products, scale, at):
    """What is at an address plus products times a scale, at another one."""
    return fma(finish8(products), broadcast_f32xL(scale), load_f32xL(at))


@inlined
def _store_values(at, out):
    fa, ga, fb, gb, fc, gc, fe, ge = out
    store_f32xL(at[0], fa)
    store_f32xL(at[0] + 4 * LANES, ga)
    store_f32xL(at[1], fb)
    store_f32xL(at[1] + 4 * LANES, gb)
    store_f32xL(at[2], fc)
    store_f32xL(at[2] + 4 * LANES, gc)
    store_f32xL(at[3], fe)
    store_f32xL(at[3] + 4 * LANES, ge)
