"""Tiles of codes of 8 bits, with a scale for 16 weights: two panels times three columns."""

from pymla.cpu.machine.simd import address, load_f32xL, load_i8xL
from pymla.cpu.machine.simd_panels import broadcast_i8xL, dot8, finish8, start8
from pymla.cpu.matmul.tile import begin, end, moved, scaled, three_columns
from pymla.cpu.matmul.unpacked import CODES, NEXT_CODES, NEXT_SCALES, SCALES
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES

#: Columns of a tile.
WIDEST = 3


@helper
def sources(x):
    """What `add_columns` reads of an `activations.Input`: addresses of codes, scales, and words for
    `simd_panels.start8`, one for 16 weights."""
    return address(x.codes), address(x.scale), address(x.sum16)


@helper
def add_columns(x, index, i, last, chunk, scratch, out):
    """Add two panels times up to `WIDEST` columns to the results, as `add_columns` of `tile_32`."""
    columns, results = three_columns(index, i, last, chunk, out)
    _tile(x, columns, chunk.blocks, scratch, chunk.start > 0, results)


@helper
def _tile(x, columns, blocks, scratch, onto, results):
    """Two panels times three columns, as `tile` of `tile_32`."""
    codes, scales, starts = x
    p, q = scratch + CODES, scratch + CODES + NEXT_CODES
    d, e = scratch + SCALES, scratch + SCALES + NEXT_SCALES
    out = begin(onto, results)
    for _ in range(blocks):
        out = _sixteen(p, q, d, e, codes, starts, scales, columns, out)
        p, q, d, e = p + 16 * LANES, q + 16 * LANES, d + 4 * LANES, e + 4 * LANES
        out = _sixteen(p, q, d, e, codes + 16, starts + 2, scales, columns, out)
        p, q, d, e = p + 16 * LANES, q + 16 * LANES, d + 4 * LANES, e + 4 * LANES
        columns = moved(columns, 4)
    end(out, results)


@inlined
def _sixteen(p, q, d, e, codes, starts, scales, columns, out):
    """Add sixteen columns of K to the results."""
    a, b, c = columns
    ia, ib, ic = start8(starts + a), start8(starts + b), start8(starts + c)
    sums = _four((ia, ia, ib, ib, ic, ic), p, q, codes, columns)
    sums = _four(sums, p + 4 * LANES, q + 4 * LANES, codes + 4, columns)
    sums = _four(sums, p + 8 * LANES, q + 8 * LANES, codes + 8, columns)
    sums = _four(sums, p + 12 * LANES, q + 12 * LANES, codes + 12, columns)
    ia, ja, ib, jb, ic, jc = sums
    products = finish8(ia), finish8(ja), finish8(ib), finish8(jb), finish8(ic), finish8(jc)
    return scaled(products, load_f32xL(d), load_f32xL(e), scales, columns, out)


@inlined
def _four(sums, p, q, codes, columns):
    """Add the products of four columns of K."""
    ia, ja, ib, jb, ic, jc = sums
    a, b, c = columns
    u, v = load_i8xL(p), load_i8xL(q)
    y = broadcast_i8xL(codes + 8 * a)
    ia, ja = dot8(ia, u, y), dot8(ja, v, y)
    y = broadcast_i8xL(codes + 8 * b)
    ib, jb = dot8(ib, u, y), dot8(jb, v, y)
    y = broadcast_i8xL(codes + 8 * c)
    return ia, ja, ib, jb, dot8(ic, u, y), dot8(jc, v, y)
