"""Tiles of values: products of softmax weights and values on integers, a few queries with two panels at a time.

The lanes of a panel are dimensions of the values, and positions run along its words; each word of a query's weights is
broadcast. Weights have no sign, so that they take the part of the codes with bias in `dot_words`.
"""

from pymla.cpu.attention.codes import BLOCK_BYTES, PANEL_BLOCK_BYTES
from pymla.cpu.attention.row_addresses import moved
from pymla.cpu.machine.simd import broadcast_f32xL, fma, load_f32xL, load_i8xL, store_f32xL
from pymla.cpu.machine.simd_panels import broadcast_i8xL, finish8
from pymla.cpu.machine.simd_words import dot_words, zero_words
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.isa import LANES

#: Queries of a tile: as many as there are registers for.
VALUE_ROWS = 8 if LANES == 16 else 4
#: Dimensions of a tile: the lanes of two panels.
VALUE_COLUMNS = 2 * LANES


@inlined
def tile_values(first, second, word_step, blocks, panel, panel_step, first_out, second_out):
    """Add weighted values, `VALUE_COLUMNS` dimensions, to the results of `VALUE_ROWS` queries.

    Parameters
    ----------
    first, second : Rows
        Weights of four queries, and of four more. The second ones are used where `VALUE_ROWS` is 8.
    word_step : int
        Bytes from word to word of a query's weights.
    blocks : int
        Blocks of 32 positions, `WEIGHT_GROUP` // 32 at most.
    panel, panel_step : int
        Address of two panels behind each other, and bytes to those of the next block.
    first_out, second_out : tuples of 4 int
        Addresses of each query's results, `VALUE_COLUMNS` float32.
    """
    x, sx = first
    y, sy = second
    zero = zero_words()
    sums = zero, zero, zero, zero, zero, zero, zero, zero
    more = sums
    for _ in range(blocks):
        word = panel
        for _ in range(BLOCK_BYTES // 16):
            sums, more = _add_word(sums, more, word, x, y)
            x, y = moved(x, word_step), moved(y, word_step)
            sums, more = _add_word(sums, more, word + 4 * LANES, x, y)
            x, y = moved(x, word_step), moved(y, word_step)
            sums, more = _add_word(sums, more, word + 8 * LANES, x, y)
            x, y = moved(x, word_step), moved(y, word_step)
            sums, more = _add_word(sums, more, word + 12 * LANES, x, y)
            x, y = moved(x, word_step), moved(y, word_step)
            word += 16 * LANES
        panel += panel_step
    # All results are loaded before one is stored: rows past the end repeat the last row and must not be added twice.
    out = _add_scaled(sums, sx, first_out)
    if VALUE_ROWS == 8:
        _store_values(second_out, _add_scaled(more, sy, second_out))
    _store_values(first_out, out)


@inlined
def _add_word(sums, more, panel, x, y):
    """Add the products of one word of each query's weights."""
    u, v = load_i8xL(panel), load_i8xL(panel + PANEL_BLOCK_BYTES)
    sums = _add_four_queries(sums, u, v, x)
    if VALUE_ROWS == 8:
        more = _add_four_queries(more, u, v, y)
    return sums, more


@inlined
def _add_four_queries(sums, u, v, x):
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
def _add_scaled(sums, scales, at):
    """The results at four addresses plus sums times scales, which lie at addresses as well."""
    ia, ja, ib, jb, ic, jc, ie, je = sums
    fa, ga = _add_times(ia, scales[0], at[0]), _add_times(ja, scales[0], at[0] + 4 * LANES)
    fb, gb = _add_times(ib, scales[1], at[1]), _add_times(jb, scales[1], at[1] + 4 * LANES)
    fc, gc = _add_times(ic, scales[2], at[2]), _add_times(jc, scales[2], at[2] + 4 * LANES)
    return fa, ga, fb, gb, fc, gc, _add_times(ie, scales[3], at[3]), _add_times(je, scales[3], at[3] + 4 * LANES)


@inlined
def _add_times(products, scale, at):
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
