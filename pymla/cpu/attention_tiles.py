"""Tiles of attention on integers: queries against keys, softmax weights against values.

Operands are codes of 8 bits with a scale for 32 of them or more, in words of `simd_words.WORD` codes. Panels have words
of `LANES` rows side by side; words of the other operand are broadcast.
"""

import numpy as np

from pymla.cpu.compiling import inline, unrolled
from pymla.cpu.formats import store_columns
from pymla.cpu.isa import LANES
from pymla.cpu.simd import (
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
from pymla.cpu.simd_panels import broadcast_i8xL, finish8, load_columns, panel_rows
from pymla.cpu.simd_words import WORD, dot_i16_words, dot_words, store_codes, store_words, zero_words

#: Softmax weights with a common scale.
WEIGHTS = 64
#: Bytes of 32 codes.
BLOCK_BYTES = 128 // WORD
#: Bytes of 32 codes of the rows of a panel.
PANEL_BYTES = LANES * BLOCK_BYTES


@inline
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


@inline
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


@inline
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


@inline
def store_keys(rows, row_bytes, out):
    """Rows of codes to the lanes of a panel; addresses."""
    for i in range(0, row_bytes, 16):
        store_columns(out + i * LANES, load_columns(panel_rows(rows, row_bytes, LANES), i))


@inline
def four(rows, a, b, c, d):
    """Addresses of four rows of an array."""
    return address(rows[a]), address(rows[b]), address(rows[c]), address(rows[d])


@inline
def three(rows, a, b, c):
    """Addresses of three rows of an array."""
    return address(rows[a]), address(rows[b]), address(rows[c])


@unrolled
def tile_scores(x, y, sx, sy, blocks, count, p, q, d, e, z, w, step, at, bt):
    """Rows of two panels with three others each.

    Parameters
    ----------
    x, y : tuples of 3 int
        Addresses of codes, which have the bias, of what meets the first panel, and the second; the same ones where the
        panels are neighbours, which the caller's code must show to LLVM: words are then loaded once.
    sx, sy : tuples of 3 int
        Addresses of their scales.
    blocks, count : int
        Of `count` codes, a multiple of 32.
    p, q : int
        Addresses of the panels.
    d, e, z, w, step : int
        Addresses of their scales and of their sums to begin with, int32, which take the others' bias off; and bytes
        from block to block.
    at, bt : tuples of 3 int
        Addresses of the results, `LANES` float32.
    """
    xa, xb, xc = x
    ya, yb, yc = y
    sa, sb, sc = sx
    sf, sg, sh = sy
    fa = splat_f32xL(np.float32(0))
    ga, fb, gb, fc, gc = fa, fa, fa, fa, fa
    for _ in range(blocks):
        i, j = load_i32xL(z), load_i32xL(w)
        sums = i, j, i, j, i, j
        for _ in range(count // 32 * BLOCK_BYTES // 16):
            sums = _four_scores(sums, p, q, xa, xb, xc, ya, yb, yc)
            p, q = p + 16 * LANES, q + 16 * LANES
            xa, xb, xc, ya, yb, yc = xa + 16, xb + 16, xc + 16, ya + 16, yb + 16, yc + 16
        ia, ja, ib, jb, ic, jc = sums
        du, dv = load_f32xL(d), load_f32xL(e)
        fa, ga = _scaled(ia, du, sa, fa), _scaled(ja, dv, sf, ga)
        fb, gb = _scaled(ib, du, sb, fb), _scaled(jb, dv, sg, gb)
        fc, gc = _scaled(ic, du, sc, fc), _scaled(jc, dv, sh, gc)
        d, e, z, w = d + step, e + step, z + step, w + step
        sa, sb, sc, sf, sg, sh = sa + 4, sb + 4, sc + 4, sf + 4, sg + 4, sh + 4
    _store_scores(at, bt, fa, ga, fb, gb, fc, gc)


@unrolled
def _store_scores(at, bt, fa, ga, fb, gb, fc, gc):
    store_f32xL(at[0], fa)
    store_f32xL(bt[0], ga)
    store_f32xL(at[1], fb)
    store_f32xL(bt[1], gb)
    store_f32xL(at[2], fc)
    store_f32xL(bt[2], gc)


@unrolled
def _scaled(products, panel_scale, scale, acc):
    """``acc + products * panel_scale * scale``, the last one at an address."""
    return fma(finish8(products), mul(panel_scale, broadcast_f32xL(scale)), acc)


@unrolled
def _four_scores(sums, p, q, xa, xb, xc, ya, yb, yc):
    sums = _one_score(sums, p, q, xa, xb, xc, ya, yb, yc)
    p, q = p + 4 * LANES, q + 4 * LANES
    sums = _one_score(sums, p, q, xa + 4, xb + 4, xc + 4, ya + 4, yb + 4, yc + 4)
    p, q = p + 4 * LANES, q + 4 * LANES
    sums = _one_score(sums, p, q, xa + 8, xb + 8, xc + 8, ya + 8, yb + 8, yc + 8)
    p, q = p + 4 * LANES, q + 4 * LANES
    return _one_score(sums, p, q, xa + 12, xb + 12, xc + 12, ya + 12, yb + 12, yc + 12)


@unrolled
def _one_score(sums, p, q, xa, xb, xc, ya, yb, yc):
    """The products of a word; a panel's codes have no bias."""
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(q)
    # Side by side, so that LLVM loads a word once where both panels meet the same codes.
    x, y = broadcast_i8xL(xa), broadcast_i8xL(ya)
    ia, ja = dot_words(ia, x, u), dot_words(ja, y, v)
    x, y = broadcast_i8xL(xb), broadcast_i8xL(yb)
    ib, jb = dot_words(ib, x, u), dot_words(jb, y, v)
    x, y = broadcast_i8xL(xc), broadcast_i8xL(yc)
    return ia, ja, ib, jb, dot_words(ic, x, u), dot_words(jc, y, v)


@unrolled
def tile_rope(x, y, sx, sy, words, p, q, d, e, at, bt):
    """Add products of int16 to the results of `tile_scores`: `words` words of two, each with a common scale.

    All but `words` are as there; `d` and `e` are addresses of one scale for each lane.
    """
    xa, xb, xc = x
    ya, yb, yc = y
    zero = zero_words()
    ia, ja, ib, jb, ic, jc = zero, zero, zero, zero, zero, zero
    for i in range(0, 4 * words, 4):
        u, v = load_i8xL(p + LANES * i), load_i8xL(q + LANES * i)
        ia, ja = dot_i16_words(ia, broadcast_i8xL(xa + i), u), dot_i16_words(ja, broadcast_i8xL(ya + i), v)
        ib, jb = dot_i16_words(ib, broadcast_i8xL(xb + i), u), dot_i16_words(jb, broadcast_i8xL(yb + i), v)
        ic, jc = dot_i16_words(ic, broadcast_i8xL(xc + i), u), dot_i16_words(jc, broadcast_i8xL(yc + i), v)
    u, v = load_f32xL(d), load_f32xL(e)
    # All are read before one is written: at the edge some are the same.
    fa, ga = _scaled(ia, u, sx[0], load_f32xL(at[0])), _scaled(ja, v, sy[0], load_f32xL(bt[0]))
    fb, gb = _scaled(ib, u, sx[1], load_f32xL(at[1])), _scaled(jb, v, sy[1], load_f32xL(bt[1]))
    fc, gc = _scaled(ic, u, sx[2], load_f32xL(at[2])), _scaled(jc, v, sy[2], load_f32xL(bt[2]))
    _store_scores(at, bt, fa, ga, fb, gb, fc, gc)


@unrolled
def tile_values(x, x_step, scales, blocks, p, panel_step, at):
    """Add two panels' lanes of the values, weighted, to the results of four queries.

    Parameters
    ----------
    x, scales : tuples of 4 int
        Addresses of each query's words of weights, and of their scale.
    x_step : int
        Bytes from word to word.
    blocks : int
        Of 32 tokens, `WEIGHTS` // 32 at most.
    p, panel_step : int
        Address of two panels behind each other, and bytes from block to block.
    at : tuple of 4 int
        Addresses of each query's results, 2 * `LANES` float32.
    """
    xa, xb, xc, xd = x
    zero = zero_words()
    sums = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(blocks):
        word = p
        for _ in range(BLOCK_BYTES // 16):
            sums = _four_values(sums, word, xa, xb, xc, xd, x_step)
            word += 16 * LANES
            xa, xb, xc, xd = xa + 4 * x_step, xb + 4 * x_step, xc + 4 * x_step, xd + 4 * x_step
        p += panel_step
    ia, ja, ib, jb, ic, jc, ie, je = sums
    # All are read before one is written: at the edge some are the same.
    fa, ga = _added(ia, scales[0], at[0]), _added(ja, scales[0], at[0] + 4 * LANES)
    fb, gb = _added(ib, scales[1], at[1]), _added(jb, scales[1], at[1] + 4 * LANES)
    fc, gc = _added(ic, scales[2], at[2]), _added(jc, scales[2], at[2] + 4 * LANES)
    fe, ge = _added(ie, scales[3], at[3]), _added(je, scales[3], at[3] + 4 * LANES)
    store_f32xL(at[0], fa)
    store_f32xL(at[0] + 4 * LANES, ga)
    store_f32xL(at[1], fb)
    store_f32xL(at[1] + 4 * LANES, gb)
    store_f32xL(at[2], fc)
    store_f32xL(at[2] + 4 * LANES, gc)
    store_f32xL(at[3], fe)
    store_f32xL(at[3] + 4 * LANES, ge)


@unrolled
def _added(products, scale, at):
    """What is at an address plus products times a scale, at another one."""
    return fma(finish8(products), broadcast_f32xL(scale), load_f32xL(at))


@unrolled
def _four_values(sums, p, xa, xb, xc, xd, step):
    sums = _one_value(sums, p, xa, xb, xc, xd)
    xa, xb, xc, xd = xa + step, xb + step, xc + step, xd + step
    sums = _one_value(sums, p + 4 * LANES, xa, xb, xc, xd)
    xa, xb, xc, xd = xa + step, xb + step, xc + step, xd + step
    sums = _one_value(sums, p + 8 * LANES, xa, xb, xc, xd)
    return _one_value(sums, p + 12 * LANES, xa + step, xb + step, xc + step, xd + step)


@unrolled
def _one_value(sums, p, xa, xb, xc, xd):
    """The products of a word; weights, which have no sign, take the part of the codes with the bias."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    u, v = load_i8xL(p), load_i8xL(p + PANEL_BYTES)
    y = broadcast_i8xL(xa)
    ia, ja = dot_words(ia, y, u), dot_words(ja, y, v)
    y = broadcast_i8xL(xb)
    ib, jb = dot_words(ib, y, u), dot_words(jb, y, v)
    y = broadcast_i8xL(xc)
    ic, jc = dot_words(ic, y, u), dot_words(jc, y, v)
    y = broadcast_i8xL(xd)
    return ia, ja, ib, jb, ic, jc, dot_words(ie, y, u), dot_words(je, y, v)
