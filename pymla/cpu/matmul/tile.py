"""Registers of a tile: two panels of weights times three columns of activations, as results and sums of products.

Six registers belong to a tile, one for each panel and column: those of the first column, first panel then second, of
the second column, and of the third. Columns are given by the bytes from the first column's scales to theirs; codes
take eight times as many bytes.
"""

import numpy as np

from pymla.cpu.machine.simd import (
    broadcast_f32xL,
    fma,
    load_f32xL,
    mul,
    splat_f32xL,
    store_f32xL,
)
from pymla.cpu.matmul.unpacked import MINIMA, NEXT_MINIMA, RESULT_BYTES
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES


@helper
def three_columns(index, i, end, chunk, results):
    """The columns of activations from the i-th on that a tile takes; columns past the end repeat the last one.

    Parameters
    ----------
    index : int32 array
        The activations of each column.
    i, end : int
        The first column, and the one behind the last.
    chunk : Chunk
    results : int
        Address of the results of column 0.

    Returns
    -------
    columns : tuple of 3 int
        Bytes from the scales of the activations 0 to those of each column, from the chunk's first block on.
    results : tuple of 3 int
        Addresses of each column's results.
    """
    first, second, third = i, min(i + 1, end - 1), min(i + 2, end - 1)
    a, b, c = np.int64(index[first]), np.int64(index[second]), np.int64(index[third])
    row, ahead = chunk.k // 32 * 4, chunk.start // 32 * 4
    columns = a * row + ahead, b * row + ahead, c * row + ahead
    return columns, (results + RESULT_BYTES * first, results + RESULT_BYTES * second, results + RESULT_BYTES * third)


@inlined
def moved(columns, nbytes):
    """The columns some bytes further on."""
    a, b, c = columns
    return a + nbytes, b + nbytes, c + nbytes


@inlined
def begin(onto, results):
    """Results to begin with: where they are added `onto`, those in memory, else zero."""
    zero = splat_f32xL(np.float32(0))
    fa, ga, fb, gb, fc, gc = zero, zero, zero, zero, zero, zero
    if onto:
        at, bt, ct = results
        fa, ga = load_f32xL(at), load_f32xL(at + 4 * LANES)
        fb, gb = load_f32xL(bt), load_f32xL(bt + 4 * LANES)
        fc, gc = load_f32xL(ct), load_f32xL(ct + 4 * LANES)
    return fa, ga, fb, gb, fc, gc


@inlined
def end(out, results):
    """Store the results."""
    fa, ga, fb, gb, fc, gc = out
    at, bt, ct = results
    store_f32xL(at, fa)
    store_f32xL(at + 4 * LANES, ga)
    store_f32xL(bt, fb)
    store_f32xL(bt + 4 * LANES, gb)
    store_f32xL(ct, fc)
    store_f32xL(ct + 4 * LANES, gc)


@inlined
def scaled(products, u, v, scales, columns, out):
    """Results plus products times the panels' scales `u` and `v` and the columns' scales."""
    ia, ja, ib, jb, ic, jc = products
    fa, ga, fb, gb, fc, gc = out
    a, b, c = columns
    s = broadcast_f32xL(scales + a)
    fa, ga = fma(ia, mul(u, s), fa), fma(ja, mul(v, s), ga)
    s = broadcast_f32xL(scales + b)
    fb, gb = fma(ib, mul(u, s), fb), fma(jb, mul(v, s), gb)
    s = broadcast_f32xL(scales + c)
    return fa, ga, fb, gb, fma(ic, mul(u, s), fc), fma(jc, mul(v, s), gc)


@helper
def add_minima(sums, each, columns, blocks, scratch, results):
    """Add minimum times sum of activations to the results of three columns, for minima of 32 or 16 weights. `sums` is
    the address of those sums, the others are as in `tile_32`."""
    m, n = scratch + MINIMA, scratch + MINIMA + NEXT_MINIMA
    many = 32 // each
    a, b, c = columns
    a, b, c = sums + many * a, sums + many * b, sums + many * c
    fa, ga, fb, gb, fc, gc = begin(True, results)
    for _ in range(many * blocks):
        u, v = load_f32xL(m), load_f32xL(n)
        s = broadcast_f32xL(a)
        fa, ga = fma(u, s, fa), fma(v, s, ga)
        s = broadcast_f32xL(b)
        fb, gb = fma(u, s, fb), fma(v, s, gb)
        s = broadcast_f32xL(c)
        fc, gc = fma(u, s, fc), fma(v, s, gc)
        m, n, a, b, c = m + 4 * LANES, n + 4 * LANES, a + 4, b + 4, c + 4
    end((fa, ga, fb, gb, fc, gc), results)
