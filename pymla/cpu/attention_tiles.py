"""Tiles of attention on integers: queries against keys, softmax weights against values.

Operands are codes of 8 bits with a scale for 32 of them, in words of `simd.WORD` codes. Panels have words of `LANES`
rows side by side; words of the other operand are broadcast.
"""

import numpy as np

from pymla.cpu.compiling import inline, unrolled
from pymla.cpu.formats import not_finite
from pymla.cpu.simd import (
    LANES,
    WORD,
    absolute,
    add,
    address,
    broadcast_f32x8,
    broadcast_f32xL,
    broadcast_i8xL,
    div,
    dot_words,
    finish8,
    fma,
    larger,
    largest,
    load_f32x8,
    load_f32xL,
    load_i8xL,
    load_i32xL,
    mul,
    round_even,
    splat_f32,
    splat_f32xL,
    store_codes,
    store_f32,
    store_f32x8,
    store_f32xL,
    store_words_x8,
    total,
    where_positive,
    zero_words,
)

#: Bytes of 32 codes.
BLOCK_BYTES = 128 // WORD
#: Bytes of 32 codes of the rows of a panel.
PANEL_BYTES = LANES * BLOCK_BYTES


@inline
def quantise_codes(x, codes, scale, zero):
    """Thirty-two float32 as codes from -127 to 127, plus `zero` (0 or `BIAS`), and their scale; returns their sum
    without it.

    All but `zero` are addresses.
    """
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    most = largest(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(d))))
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(127) / most
    store_f32(scale, (most + not_finite(a, b, c, d)) / np.float32(127))
    factor, zero = splat_f32(inverse), splat_f32(np.float32(zero))
    a, b = round_even(mul(a, factor)), round_even(mul(b, factor))
    c, d = round_even(mul(c, factor)), round_even(mul(d, factor))
    eight = BLOCK_BYTES // 4
    store_codes(codes, add(a, zero))
    store_codes(codes + eight, add(b, zero))
    store_codes(codes + 2 * eight, add(c, zero))
    store_codes(codes + 3 * eight, add(d, zero))
    return total(add(add(a, b), add(c, d)))


@inline
def quantise_weights(weights, token_scales, codes, scale):
    """Thirty-two softmax weights times their tokens' scales as codes from 0 to 255, and their scale; all are
    addresses."""
    a = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    weights, token_scales = weights + 32, token_scales + 32
    b = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    weights, token_scales = weights + 32, token_scales + 32
    c = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    weights, token_scales = weights + 32, token_scales + 32
    d = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    most = largest(larger(larger(a, b), larger(c, d)))
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(255) / most
    factor = splat_f32(inverse)
    eight = BLOCK_BYTES // 4
    store_codes(codes, round_even(mul(a, factor)))
    store_codes(codes + eight, round_even(mul(b, factor)))
    store_codes(codes + 2 * eight, round_even(mul(c, factor)))
    store_codes(codes + 3 * eight, round_even(mul(d, factor)))
    store_f32(scale, (most + not_finite(a, b, c, d)) / np.float32(255))


@inline
def quantise_heads(weights, token_scales, codes, scales, heads):
    """`quantise_weights` for heads side by side, a multiple of eight: weights (32, heads), words of codes (32 // WORD,
    heads), scales (heads,)."""
    row = 4 * heads
    for at in range(0, row, 32):
        zero = splat_f32(np.float32(0))
        most, fault = zero, zero
        for s in range(32):
            x = mul(load_f32x8(weights + row * s + at), broadcast_f32x8(token_scales + 4 * s))
            store_f32x8(weights + row * s + at, x)
            most, fault = larger(x, most), fma(x, zero, fault)
        store_f32x8(scales + at, mul(add(most, fault), splat_f32(np.float32(1 / 255))))
        factor = where_positive(most, div(splat_f32(np.float32(255)), most))
        for s in range(0, 32, 4):
            source = weights + row * s + at
            a, b = mul(load_f32x8(source), factor), mul(load_f32x8(source + row), factor)
            c, d = mul(load_f32x8(source + 2 * row), factor), mul(load_f32x8(source + 3 * row), factor)
            target = codes + row * (s // WORD) + at
            store_words_x8(target, row, round_even(a), round_even(b), round_even(c), round_even(d))


@inline
def three(rows, a, b, c):
    """Addresses of three rows of an array."""
    return address(rows[a]), address(rows[b]), address(rows[c])


@unrolled
def tile_scores(x, y, sx, sy, blocks, p, q, d, e, z, w, step, at, bt):
    """Rows of two panels with three others each.

    Parameters
    ----------
    x, y : tuples of 3 int
        Addresses of codes, which have the bias, of what meets the first panel, and the second; the same ones where the
        panels are neighbours, which the caller's code must show to LLVM: words are then loaded once.
    sx, sy : tuples of 3 int
        Addresses of their scales.
    blocks : int
        Of 32 codes.
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
        for _ in range(BLOCK_BYTES // 16):
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


@inline
def tile_values(x, x_step, scales, scale_step, blocks, p, panel_step, at):
    """Add two panels' lanes of the values, weighted, to the results of three queries.

    Parameters
    ----------
    x, scales : tuples of 3 int
        Addresses of each query's words of weights, and of their scales.
    x_step, scale_step : int
        Bytes from word to word, and from scale to scale.
    blocks : int
        Of 32 tokens.
    p, panel_step : int
        Address of two panels behind each other, and bytes from block to block.
    at : tuple of 3 int
        Addresses of each query's results, 2 * `LANES` float32.
    """
    xa, xb, xc = x
    sa, sb, sc = scales
    at, bt, ct = at
    fa, ga = load_f32xL(at), load_f32xL(at + 4 * LANES)
    fb, gb = load_f32xL(bt), load_f32xL(bt + 4 * LANES)
    fc, gc = load_f32xL(ct), load_f32xL(ct + 4 * LANES)
    zero = zero_words()
    for _ in range(blocks):
        sums, word = (zero, zero, zero, zero, zero, zero), p
        for _ in range(BLOCK_BYTES // 16):
            sums = _four_values(sums, word, xa, xb, xc, x_step)
            word += 16 * LANES
            xa, xb, xc = xa + 4 * x_step, xb + 4 * x_step, xc + 4 * x_step
        ia, ja, ib, jb, ic, jc = sums
        p += panel_step
        s = broadcast_f32xL(sa)
        fa, ga = fma(finish8(ia), s, fa), fma(finish8(ja), s, ga)
        s = broadcast_f32xL(sb)
        fb, gb = fma(finish8(ib), s, fb), fma(finish8(jb), s, gb)
        s = broadcast_f32xL(sc)
        fc, gc = fma(finish8(ic), s, fc), fma(finish8(jc), s, gc)
        sa, sb, sc = sa + scale_step, sb + scale_step, sc + scale_step
    store_f32xL(at, fa)
    store_f32xL(at + 4 * LANES, ga)
    store_f32xL(bt, fb)
    store_f32xL(bt + 4 * LANES, gb)
    store_f32xL(ct, fc)
    store_f32xL(ct + 4 * LANES, gc)


@unrolled
def _four_values(sums, p, xa, xb, xc, step):
    sums = _one_value(sums, p, xa, xb, xc)
    xa, xb, xc = xa + step, xb + step, xc + step
    sums = _one_value(sums, p + 4 * LANES, xa, xb, xc)
    xa, xb, xc = xa + step, xb + step, xc + step
    sums = _one_value(sums, p + 8 * LANES, xa, xb, xc)
    return _one_value(sums, p + 12 * LANES, xa + step, xb + step, xc + step)


@unrolled
def _one_value(sums, p, xa, xb, xc):
    """The products of a word; weights, which have no sign, take the part of the codes with the bias."""
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(p + PANEL_BYTES)
    y = broadcast_i8xL(xa)
    ia, ja = dot_words(ia, y, u), dot_words(ja, y, v)
    y = broadcast_i8xL(xb)
    ib, jb = dot_words(ib, y, u), dot_words(jb, y, v)
    y = broadcast_i8xL(xc)
    return ia, ja, ib, jb, dot_words(ic, y, u), dot_words(jc, y, v)
