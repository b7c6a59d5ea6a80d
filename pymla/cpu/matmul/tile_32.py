"""Tiles of unsigned codes with a scale for 32 weights: two panels times three columns, or times six where there are 32
registers. Codes have up to 5 bits, with VNNI up to 8."""

import functools

from pymla.cpu.machine.simd import address, load_f32xL, load_i8xL
from pymla.cpu.machine.simd_panels import broadcast_i8xL, dot4, finish4, start4, times_eighths, zero4
from pymla.cpu.matmul.tile import begin, end, moved, scaled, three_columns
from pymla.cpu.matmul.unpacked import CODES, NEXT_CODES, NEXT_SCALES, SCALES
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES, VNNI

#: Columns of the widest tile: its sums, and as many results, take up the registers.
WIDEST = 6 if LANES == 16 else 3


@helper
def sources(x):
    """What `add_columns` reads of an `activations.Input`."""
    return address(x.codes), address(x.scale), address(x.starts)


@functools.cache
def add_columns_for(code_bits, zero_point):
    """Make `add_columns` for codes of some bits, from which the zero point, 0 to 128, is taken off."""
    start = _start_for(zero_point)
    # Without VNNI, sums of products are int16, which hold those of 32 codes of 4 bits, or of 16 codes of 5 bits.
    in_halves = code_bits > 4 and not VNNI

    tile, tile_six = _tile_for(start, in_halves), _tile_six_for(start)

    @helper
    def add_columns(x, index, i, last, chunk, scratch, out):
        """Add two panels times up to `WIDEST` columns from the i-th on, but none from the one at `last` on, to the
        results. The first chunk's products are stored, whatever the results were.

        Parameters
        ----------
        x : tuple of 3 int
            From `sources`.
        index : int32 array
            The activations of each column.
        chunk : Chunk
            The panels' columns of K.
        scratch : int
            The panels, as `unpacked` lays them out.
        out : int
            Address of the results of column 0.
        """
        three, results = three_columns(index, i, last, chunk, out)
        if WIDEST == 6 and last - i > 3:
            more, further = three_columns(index, i + 3, last, chunk, out)
            tile_six(x, three, more, chunk.blocks, scratch, chunk.start > 0, results, further)
        else:
            tile(x, three, chunk.blocks, scratch, chunk.start > 0, results)

    return add_columns


def _tile_for(start, in_halves):
    """Make `tile`; `start` is from `_start_for`. With `in_halves`, sums of products go into results every 16 codes."""

    @helper
    def tile(x, columns, blocks, scratch, onto, results):
        """Two panels times three columns.

        Parameters
        ----------
        x : tuple of 3 int
            From `sources`: addresses of codes, scales, and words for `simd_panels.start4`.
        columns : tuple of 3 int
            Bytes to each column's scales, from `tile.three_columns`; its words are as far from the first word.
        blocks : int
            Of 32 codes.
        scratch : int
            The panels, as `unpacked` lays them out.
        onto : bool
            Whether to add to the results in memory.
        results : tuple of 3 int
            Addresses of each column's results.
        """
        codes, scales, starts = x
        p, q = scratch + CODES, scratch + CODES + NEXT_CODES
        d, e = scratch + SCALES, scratch + SCALES + NEXT_SCALES
        out = begin(onto, results)
        for _ in range(blocks):
            sums = _sixteen(start(starts, columns), p, q, codes, columns)
            if in_halves:
                out = scaled(_finish(sums), load_f32xL(d), load_f32xL(e), scales, columns, out)
                sums = _zeros()
            sums = _sixteen(sums, p + 16 * LANES, q + 16 * LANES, codes + 16, columns)
            out = scaled(_finish(sums), load_f32xL(d), load_f32xL(e), scales, columns, out)
            p, q = p + 32 * LANES, q + 32 * LANES
            d, e = d + 4 * LANES, e + 4 * LANES
            columns = moved(columns, 4)
        end(out, results)

    return tile


def _tile_six_for(start):
    """Make `tile_six`; `start` is from `_start_for`."""

    @helper
    def tile_six(x, first, second, blocks, scratch, onto, first_results, second_results):
        """`tile` for six columns, twice three, for 32 registers: twelve sums, so that an instruction that takes five
        cycles does not wait for itself."""
        codes, scales, starts = x
        p, q = scratch + CODES, scratch + CODES + NEXT_CODES
        d, e = scratch + SCALES, scratch + SCALES + NEXT_SCALES
        out, further = begin(onto, first_results), begin(onto, second_results)
        for _ in range(blocks):
            sums, more = start(starts, first), start(starts, second)
            sums, more = _sixteen_six(sums, more, p, q, codes, first, second)
            sums, more = _sixteen_six(sums, more, p + 16 * LANES, q + 16 * LANES, codes + 16, first, second)
            u, v = load_f32xL(d), load_f32xL(e)
            out = scaled(_finish(sums), u, v, scales, first, out)
            further = scaled(_finish(more), u, v, scales, second, further)
            p, q = p + 32 * LANES, q + 32 * LANES
            d, e = d + 4 * LANES, e + 4 * LANES
            first, second = moved(first, 4), moved(second, 4)
        end(out, first_results)
        end(further, second_results)

    return tile_six


def _start_for(zero_point):
    """Make a function ``(starts, columns)``: sums to begin with, of both panels with each column."""

    @inlined
    def start(starts, columns):
        if zero_point == 0:
            return _zeros()
        a, b, c = columns
        ia, ib, ic = start4(starts + a), start4(starts + b), start4(starts + c)
        if zero_point != 8:  # the words are made for 8
            ia, ib, ic = (
                times_eighths(ia, zero_point),
                times_eighths(ib, zero_point),
                times_eighths(ic, zero_point),
            )
        return ia, ia, ib, ib, ic, ic

    return start


@inlined
def _zeros():
    zero = zero4()
    return zero, zero, zero, zero, zero, zero


@inlined
def _sixteen(sums, p, q, codes, columns):
    """Add the products of sixteen columns of K of two panels with three columns of activations. The steps are written
    out, because LLVM leaves a loop over them a loop."""
    sums = _four(sums, load_i8xL(p), load_i8xL(q), codes, columns)
    sums = _four(sums, load_i8xL(p + 4 * LANES), load_i8xL(q + 4 * LANES), codes + 4, columns)
    sums = _four(sums, load_i8xL(p + 8 * LANES), load_i8xL(q + 8 * LANES), codes + 8, columns)
    return _four(sums, load_i8xL(p + 12 * LANES), load_i8xL(q + 12 * LANES), codes + 12, columns)


@inlined
def _sixteen_six(sums, more, p, q, codes, first, second):
    """The same with six columns of activations."""
    sums, more = _four_six(sums, more, p, q, codes, first, second)
    sums, more = _four_six(sums, more, p + 4 * LANES, q + 4 * LANES, codes + 4, first, second)
    sums, more = _four_six(sums, more, p + 8 * LANES, q + 8 * LANES, codes + 8, first, second)
    return _four_six(sums, more, p + 12 * LANES, q + 12 * LANES, codes + 12, first, second)


@inlined
def _four_six(sums, more, p, q, codes, first, second):
    u, v = load_i8xL(p), load_i8xL(q)
    return _four(sums, u, v, codes, first), _four(more, u, v, codes, second)


@inlined
def _four(sums, u, v, codes, columns):
    """Add the products of four columns of K."""
    ia, ja, ib, jb, ic, jc = sums
    a, b, c = columns
    y = broadcast_i8xL(codes + 8 * a)
    ia, ja = dot4(ia, u, y), dot4(ja, v, y)
    y = broadcast_i8xL(codes + 8 * b)
    ib, jb = dot4(ib, u, y), dot4(jb, v, y)
    y = broadcast_i8xL(codes + 8 * c)
    return ia, ja, ib, jb, dot4(ic, u, y), dot4(jc, v, y)


@inlined
def _finish(sums):
    ia, ja, ib, jb, ic, jc = sums
    return finish4(ia), finish4(ja), finish4(ib), finish4(jb), finish4(ic), finish4(jc)
