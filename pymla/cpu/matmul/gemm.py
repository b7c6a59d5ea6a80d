"""Products of weights with many columns of activations, by panels: rows of weights side by side in vector lanes.

A panel is `LANES` rows, unpacked to ``[K / 4][LANES][4]`` codes, so that four activations, broadcast, meet four weights
of every row in one instruction. `product` unpacks two panels, a slice of K at a time that stays in the innermost cache,
and runs a tile of 2 panels × 3 columns over all columns, or × 6 where there are 32 registers. Unpacking is amortised
over the columns.

Float types go the same way, in float32: panels ``[K][16]`` and a tile of 4 columns × 16 rows (`tile_f32`), which
attention uses as well.
"""

import functools

import numpy as np

from pymla.cpu.formats import FORMATS, dequantise_row_for
from pymla.cpu.machine.isa import AMX, LANES
from pymla.cpu.machine.simd import (
    address,
    broadcast_f32x8,
    broadcast_f32xL,
    fma,
    load_f32,
    load_f32x8,
    load_f32xL,
    load_i8xL,
    mul,
    prefetch_l2,
    splat_f32,
    splat_f32xL,
    store_f32,
    store_f32x8,
    store_f32xL,
    store_transposed,
)
from pymla.cpu.machine.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.machine.simd_amx import configure, release
from pymla.cpu.machine.simd_panels import broadcast_i8xL, dot4, dot8, finish4, finish8, panel_rows, start4, start8
from pymla.cpu.matmul.gemm_amx import COLUMNS, add_columns
from pymla.cpu.runtime.compiling import helper, inlined

#: Rows of a product.
ROWS = 2 * LANES
#: Columns of K that are unpacked at a time: two panels and their scales stay in the first-level cache, with what else
#: tiles of AMX need.
CHUNK = 256 if AMX else 512
#: Bytes of scratch of `product`: codes, scales and minima of two panels, and sums of tiles.
SCRATCH = ROWS * (CHUNK + 4 * CHUNK // 16 + 4 * CHUNK // 32) + TILE_SCRATCH
#: Columns of the widest tile of codes of 4 bits: its sums, and as many results, take up the registers.
WIDEST4 = 6 if LANES == 16 else 3
#: Rows of a product of float types, columns of K that are unpacked at a time, and bytes of scratch.
FLOAT_ROWS = 16
FLOAT_CHUNK = 256
FLOAT_SCRATCH = 4 * (FLOAT_CHUNK * FLOAT_ROWS + 16 * FLOAT_CHUNK + 4 * FLOAT_ROWS)

_ROW = 4 * ROWS  # bytes of a row of results
_CODES, _SCALES, _MINIMA = 0, ROWS * CHUNK, ROWS * (CHUNK + CHUNK // 4)
_SUMS = ROWS * (CHUNK + CHUNK // 4 + CHUNK // 8)


@helper
def two_groups(row, stride, count):
    """Up to `ROWS` rows that follow each other as the two groups of a product: address of the second, rows of each.
    Without a second group, the first one's last row stands in for it."""
    if count > LANES:
        return row + LANES * stride, LANES, count - LANES
    return row + (count - 1) * stride, count, 1


@functools.cache
def product_for(take, qtype):
    """Make `product` for a quantised type and a function that takes the results: ``take(results, first, last, where)``
    has the address of those of columns `first` to `last`, `ROWS` float32 each, as soon as they are complete, while a
    cache has them."""
    bits, _, bytes_256, unpack, minimum, *_ = FORMATS[qtype]
    tiles, chunk_bytes = AMX and bits == 4, CHUNK // 256 * bytes_256
    widest = COLUMNS if tiles else WIDEST4 if bits == 4 else 3

    @helper
    def product(row_a, row_b, count_a, count_b, stride, k, following, x, index, columns, scratch, out, where):
        """Two groups of up to `LANES` rows of weights times columns of activations.

        Parameters
        ----------
        row_a, row_b : int
            Addresses of the first row of each group.
        count_a, count_b : int
            Rows of each; further lanes repeat the last one.
        stride : int
            Bytes from row to row.
        k : int
        following : int
            Bytes from each row to the one that the caller takes next, which is asked for in advance.
        x : Input
            Quantised activations (T, K).
        index : int32 array
            The activations of each column; with AMX, and weights of 4 bits, they follow each other
            (`quant.consecutive`).
        columns : range of int, as (first, behind the last)
            Of `index`.
        scratch : int
            Address of `SCRATCH` bytes.
        out : int
            Address of float32 (columns + `MARGIN`, ROWS), for results: lanes of the first group, then of the second.
        where : tuple
            The last argument of `take`.
        """
        begin, end = columns
        last_chunk = (k - 1) // CHUNK * CHUNK
        codes, scale, sums = address(x.codes), address(x.scale), address(x.sums)
        x4, x8, mask = (codes, scale, address(x.starts)), (codes, scale, address(x.sum16)), -1
        if minimum:
            # The codes have no zero point to take off: all sums begin with 0.
            x4, mask = (codes, scale, address(x.zeros)), 0
        rows_a_tile = -(-ROWS * widest // (end - begin))
        if tiles:
            configure()
            nothing = splat_f32xL(np.float32(0))
            for at in range(0, (end - begin + COLUMNS - 1) // COLUMNS * COLUMNS * _ROW, 4 * LANES):
                store_f32xL(out + at, nothing)
        for start in range(0, k, CHUNK):
            blocks = min(CHUNK, k - start) // 32
            for half in range(2):
                row, count = (row_a, count_a) if half == 0 else (row_b, count_b)
                panel = scratch + _CODES + half * LANES * CHUNK
                scales = scratch + _SCALES + half * LANES * (CHUNK // 4)
                minima = scratch + _MINIMA + half * LANES * (CHUNK // 8)
                unpack(panel_rows(row, stride, count), start // 32, blocks, panel, scales, minima)
            # Memory works on the rows that are unpacked next while tiles are computed.
            ahead = start // CHUNK * chunk_bytes + chunk_bytes if start + CHUNK < k else following
            asked = 0
            i = begin
            while i < end:
                for _ in range(rows_a_tile):
                    if asked < count_a + count_b:
                        row = row_a + asked * stride if asked < count_a else row_b + (asked - count_a) * stride
                        for at in range(0, chunk_bytes, 64):
                            prefetch_l2(row + ahead + at)
                        asked += 1
                stop = min(i + widest, end)
                three, results = _three(index, i, end, k, start, out - _ROW * begin)
                if tiles:
                    step = x.codes.shape[1]
                    xa, sa = codes + start // 32 * step + 32 * np.int64(index[i]), scale + three[0]
                    add_tiles(xa, step, sa, k // 8, blocks, scratch, results[0])
                elif bits == 4:
                    add_columns4(x4, index, i, end, mask, k, start, blocks, scratch, out - _ROW * begin)
                else:
                    tile8(x8, three, blocks, scratch, start > 0, results)
                if minimum:
                    for j in range(i, stop, 3):
                        three, results = _three(index, j, stop, k, start, out - _ROW * begin)
                        _add_minima(sums, three, blocks, scratch, results)
                if start == last_chunk:
                    take(out + _ROW * (i - begin), i, stop, where)
                i = stop
        if tiles:
            release()

    return product


@helper
def _three(index, i, end, k, start, out):
    """What a tile needs of three columns from the i-th on, at the edge the last one again: bytes from the first
    column's scales to those from `start` of K on, and addresses of their results."""
    first, second, third = i, min(i + 1, end - 1), min(i + 2, end - 1)
    a, b, c = np.int64(index[first]), np.int64(index[second]), np.int64(index[third])
    row, ahead = k // 32 * 4, start // 32 * 4
    columns = a * row + ahead, b * row + ahead, c * row + ahead
    return columns, (out + _ROW * first, out + _ROW * second, out + _ROW * third)


@helper
def add_tiles(x, x_bytes, scales, scale_bytes, blocks, scratch, out):
    """Add two panels of 4-bit codes times sixteen columns to the results, by AMX.

    Parameters
    ----------
    x, x_bytes, scales, scale_bytes : int
        As `panels_amx.add_columns` has them.
    blocks : int
        Of 32 codes.
    scratch : int
        The panels, as `product` lays them out.
    out : int
        Address of the first column's `ROWS` results.
    """
    for half in range(2):
        panel = scratch + _CODES + half * LANES * CHUNK
        d = scratch + _SCALES + half * LANES * (CHUNK // 4)
        at = out + half * 4 * LANES
        add_columns(x, x_bytes, scales, scale_bytes, blocks, panel, d, scratch + _SUMS, at, _ROW)


@helper
def add_columns4(x, index, i, end, mask, k, start, blocks, scratch, out):
    """Two panels of 4-bit codes times up to `WIDEST4` columns from the i-th on, but none from the one at `end` on.

    Parameters
    ----------
    x, mask, blocks, scratch
        As in `tile4`.
    index, k : as in `product`
    start : int
        The first of the panels' columns of K; what is before has been added.
    out : int
        Address of the results of column 0.
    """
    three, results = _three(index, i, end, k, start, out)
    if WIDEST4 == 6 and end - i > 3:
        more, further = _three(index, i + 3, end, k, start, out)
        tile4_six(x, three, more, mask, blocks, scratch, start > 0, results, further)
    else:
        tile4(x, three, mask, blocks, scratch, start > 0, results)


@helper
def tile4(x, columns, mask, blocks, scratch, onto, results):
    """Two panels of 4-bit codes times three columns.

    Parameters
    ----------
    x : tuple of 3 int
        Addresses of the activations' codes, scales, and words for `simd_panels.start4`.
    columns : tuple of 3 int
        Bytes to each column's scales, which are those to its words; those to its codes are eight times as many.
    mask : int
        -1, or 0 if there is one word for all.
    blocks : int
        Of 32 codes.
    scratch : int
        The panels, as `product` lays them out.
    onto : bool
        Add to the results.
    results : tuple of 3 int
        Addresses of each column's `ROWS` results.
    """
    codes, scales, starts = x
    p, q = scratch + _CODES, scratch + _CODES + LANES * CHUNK
    d, e = scratch + _SCALES, scratch + _SCALES + LANES * (CHUNK // 4)
    out = _begin(onto, results)
    for _ in range(blocks):
        sums = _start4(starts, columns, mask)
        sums = _sixteen4(sums, p, q, codes, columns)
        sums = _sixteen4(sums, p + 16 * LANES, q + 16 * LANES, codes + 16, columns)
        out = _scaled(_finish4(sums), load_f32xL(d), load_f32xL(e), scales, columns, out)
        p, q = p + 32 * LANES, q + 32 * LANES
        d, e = d + 4 * LANES, e + 4 * LANES
        columns = _moved(columns, 4)
    _end(out, results)


@helper
def tile4_six(x, first, second, mask, blocks, scratch, onto, first_results, second_results):
    """`tile4` for six columns, twice three, for 32 registers: twelve sums, so that an instruction that takes five
    cycles does not wait for itself."""
    codes, scales, starts = x
    p, q = scratch + _CODES, scratch + _CODES + LANES * CHUNK
    d, e = scratch + _SCALES, scratch + _SCALES + LANES * (CHUNK // 4)
    out, further = _begin(onto, first_results), _begin(onto, second_results)
    for _ in range(blocks):
        sums, more = _start4(starts, first, mask), _start4(starts, second, mask)
        sums, more = _sixteen4_six(sums, more, p, q, codes, first, second)
        sums, more = _sixteen4_six(sums, more, p + 16 * LANES, q + 16 * LANES, codes + 16, first, second)
        u, v = load_f32xL(d), load_f32xL(e)
        out = _scaled(_finish4(sums), u, v, scales, first, out)
        further = _scaled(_finish4(more), u, v, scales, second, further)
        p, q = p + 32 * LANES, q + 32 * LANES
        d, e = d + 4 * LANES, e + 4 * LANES
        first, second = _moved(first, 4), _moved(second, 4)
    _end(out, first_results)
    _end(further, second_results)


@inlined
def _moved(three, step):
    a, b, c = three
    return a + step, b + step, c + step


@inlined
def _start4(starts, columns, mask):
    """Sums to begin with, of both panels with each column."""
    a, b, c = columns
    ia, ib, ic = start4(starts + (a & mask)), start4(starts + (b & mask)), start4(starts + (c & mask))
    return ia, ia, ib, ib, ic, ic


@inlined
def _sixteen4(sums, p, q, codes, columns):
    """Add the products of sixteen columns of two panels with three activations; the steps are written out, as LLVM
    leaves a loop over them."""
    sums = _four4(sums, load_i8xL(p), load_i8xL(q), codes, columns)
    sums = _four4(sums, load_i8xL(p + 4 * LANES), load_i8xL(q + 4 * LANES), codes + 4, columns)
    sums = _four4(sums, load_i8xL(p + 8 * LANES), load_i8xL(q + 8 * LANES), codes + 8, columns)
    return _four4(sums, load_i8xL(p + 12 * LANES), load_i8xL(q + 12 * LANES), codes + 12, columns)


@inlined
def _sixteen4_six(sums, more, p, q, codes, first, second):
    """The same for six."""
    sums, more = _four4_six(sums, more, p, q, codes, first, second)
    sums, more = _four4_six(sums, more, p + 4 * LANES, q + 4 * LANES, codes + 4, first, second)
    sums, more = _four4_six(sums, more, p + 8 * LANES, q + 8 * LANES, codes + 8, first, second)
    return _four4_six(sums, more, p + 12 * LANES, q + 12 * LANES, codes + 12, first, second)


@inlined
def _four4_six(sums, more, p, q, codes, first, second):
    u, v = load_i8xL(p), load_i8xL(q)
    return _four4(sums, u, v, codes, first), _four4(more, u, v, codes, second)


@inlined
def _four4(sums, u, v, codes, columns):
    ia, ja, ib, jb, ic, jc = sums
    a, b, c = columns
    y = broadcast_i8xL(codes + 8 * a)
    ia, ja = dot4(ia, u, y), dot4(ja, v, y)
    y = broadcast_i8xL(codes + 8 * b)
    ib, jb = dot4(ib, u, y), dot4(jb, v, y)
    y = broadcast_i8xL(codes + 8 * c)
    return ia, ja, ib, jb, dot4(ic, u, y), dot4(jc, v, y)


@inlined
def _finish4(sums):
    ia, ja, ib, jb, ic, jc = sums
    return finish4(ia), finish4(ja), finish4(ib), finish4(jb), finish4(ic), finish4(jc)


@helper
def tile8(x, columns, blocks, scratch, onto, results):
    """`tile4` for codes of 8 bits, with a scale and a word for `simd_panels.start8` for 16 weights, two in a word's
    place."""
    codes, scales, starts = x
    p, q = scratch + _CODES, scratch + _CODES + LANES * CHUNK
    d, e = scratch + _SCALES, scratch + _SCALES + LANES * (CHUNK // 4)
    out = _begin(onto, results)
    for _ in range(blocks):
        out = _block8(p, q, d, e, codes, starts, scales, columns, out)
        p, q, d, e = p + 16 * LANES, q + 16 * LANES, d + 4 * LANES, e + 4 * LANES
        out = _block8(p, q, d, e, codes + 16, starts + 2, scales, columns, out)
        p, q, d, e = p + 16 * LANES, q + 16 * LANES, d + 4 * LANES, e + 4 * LANES
        columns = _moved(columns, 4)
    _end(out, results)


@inlined
def _block8(p, q, d, e, codes, starts, scales, columns, out):
    """Add sixteen columns of K to the results."""
    a, b, c = columns
    ia, ib, ic = start8(starts + a), start8(starts + b), start8(starts + c)
    sums = _four8((ia, ia, ib, ib, ic, ic), p, q, codes, columns)
    sums = _four8(sums, p + 4 * LANES, q + 4 * LANES, codes + 4, columns)
    sums = _four8(sums, p + 8 * LANES, q + 8 * LANES, codes + 8, columns)
    sums = _four8(sums, p + 12 * LANES, q + 12 * LANES, codes + 12, columns)
    ia, ja, ib, jb, ic, jc = sums
    products = finish8(ia), finish8(ja), finish8(ib), finish8(jb), finish8(ic), finish8(jc)
    return _scaled(products, load_f32xL(d), load_f32xL(e), scales, columns, out)


@inlined
def _four8(sums, p, q, codes, columns):
    ia, ja, ib, jb, ic, jc = sums
    a, b, c = columns
    u, v = load_i8xL(p), load_i8xL(q)
    y = broadcast_i8xL(codes + 8 * a)
    ia, ja = dot8(ia, u, y), dot8(ja, v, y)
    y = broadcast_i8xL(codes + 8 * b)
    ib, jb = dot8(ib, u, y), dot8(jb, v, y)
    y = broadcast_i8xL(codes + 8 * c)
    return ia, ja, ib, jb, dot8(ic, u, y), dot8(jc, v, y)


@inlined
def _scaled(products, u, v, scales, columns, out):
    """Results plus products times the panels' scales `u` and `v` and the columns'."""
    ia, ja, ib, jb, ic, jc = products
    fa, ga, fb, gb, fc, gc = out
    a, b, c = columns
    s = broadcast_f32xL(scales + a)
    fa, ga = fma(ia, mul(u, s), fa), fma(ja, mul(v, s), ga)
    s = broadcast_f32xL(scales + b)
    fb, gb = fma(ib, mul(u, s), fb), fma(jb, mul(v, s), gb)
    s = broadcast_f32xL(scales + c)
    return fa, ga, fb, gb, fma(ic, mul(u, s), fc), fma(jc, mul(v, s), gc)


@inlined
def _begin(onto, results):
    """Results to begin with: what is there, or zero."""
    zero = splat_f32xL(np.float32(0))
    fa, ga, fb, gb, fc, gc = zero, zero, zero, zero, zero, zero
    if onto:
        at, bt, ct = results
        fa, ga = load_f32xL(at), load_f32xL(at + 4 * LANES)
        fb, gb = load_f32xL(bt), load_f32xL(bt + 4 * LANES)
        fc, gc = load_f32xL(ct), load_f32xL(ct + 4 * LANES)
    return fa, ga, fb, gb, fc, gc


@inlined
def _end(out, results):
    """Store the results."""
    fa, ga, fb, gb, fc, gc = out
    at, bt, ct = results
    store_f32xL(at, fa)
    store_f32xL(at + 4 * LANES, ga)
    store_f32xL(bt, fb)
    store_f32xL(bt + 4 * LANES, gb)
    store_f32xL(ct, fc)
    store_f32xL(ct + 4 * LANES, gc)


@helper
def _add_minima(sums, columns, blocks, scratch, results):
    """Add minimum times sum of activations to the results of three columns; `sums` is the address of those sums, the
    others are as in `tile4`."""
    m, n = scratch + _MINIMA, scratch + _MINIMA + LANES * (CHUNK // 8)
    out = _begin(True, results)
    for block in range(blocks):
        u, v = load_f32xL(m + 4 * LANES * block), load_f32xL(n + 4 * LANES * block)
        fa, ga, fb, gb, fc, gc = out
        a, b, c = columns
        s = broadcast_f32xL(sums + a)
        fa, ga = fma(u, s, fa), fma(v, s, ga)
        s = broadcast_f32xL(sums + b)
        fb, gb = fma(u, s, fb), fma(v, s, gb)
        s = broadcast_f32xL(sums + c)
        out = fa, ga, fb, gb, fma(u, s, fc), fma(v, s, gc)
        columns = _moved(columns, 4)
    _end(out, results)


@functools.cache
def product_float_for(qtype):
    """Make `product_float` for a float type."""
    dequantise_row, size = dequantise_row_for(qtype), FORMATS[qtype].size

    @helper
    def product_float(row, count, stride, k, x, out, scratch):
        """Up to 16 rows of a float type times all activations.

        Parameters
        ----------
        row, count, stride, k : as in `product`
        x : float32 array (T, K)
        out : float32 array (T, n)
            The first `count` columns are written.
        scratch : int
            Address of `FLOAT_SCRATCH` bytes.
        """
        tokens = len(x)
        rows, panel, result = scratch, scratch + 64 * FLOAT_CHUNK, scratch + 128 * FLOAT_CHUNK
        for start in range(0, k, FLOAT_CHUNK):
            depth = min(FLOAT_CHUNK, k - start)
            for i in range(16):
                source = row + min(i, count - 1) * stride + start * size
                dequantise_row(source, rows + 4 * FLOAT_CHUNK * i, depth)
            transpose_panel(rows, 4 * FLOAT_CHUNK, 16, depth, panel)
            for t in range(0, tokens, 4):
                last = tokens - 1 - t
                at = address(x[t:]) + 4 * start
                tile_f32(
                    at,
                    4 * k * min(1, last),
                    4 * k * min(2, last),
                    4 * k * min(3, last),
                    4,
                    panel,
                    64,
                    depth,
                    result,
                    64,
                    False,
                )
                for i in range(min(4, tokens - t)):
                    for j in range(count):
                        value = load_f32(result + 64 * i + 4 * j)
                        out[t + i, j] = value if start == 0 else out[t + i, j] + value

    return product_float


@helper
def transpose_panel(rows, stride, count, columns, panel):
    """Up to 16 rows of float32 as a panel (columns, 16); the lanes of missing rows repeat the last one.

    `rows` and `panel` are addresses, `stride` the bytes from row to row.
    """
    for eight in range(0, 16, 8):
        last = count - 1
        r0, r1 = rows + min(eight, last) * stride, rows + min(eight + 1, last) * stride
        r2, r3 = rows + min(eight + 2, last) * stride, rows + min(eight + 3, last) * stride
        r4, r5 = rows + min(eight + 4, last) * stride, rows + min(eight + 5, last) * stride
        r6, r7 = rows + min(eight + 6, last) * stride, rows + min(eight + 7, last) * stride
        whole = columns // 8 * 8
        for i in range(0, whole, 8):
            at = 4 * i
            store_transposed(
                panel + 64 * i + 4 * eight,
                load_f32x8(r0 + at),
                load_f32x8(r1 + at),
                load_f32x8(r2 + at),
                load_f32x8(r3 + at),
                load_f32x8(r4 + at),
                load_f32x8(r5 + at),
                load_f32x8(r6 + at),
                load_f32x8(r7 + at),
            )
        for i in range(whole, columns):
            for lane, r in enumerate((r0, r1, r2, r3, r4, r5, r6, r7)):
                store_f32(panel + 64 * i + 4 * (eight + lane), load_f32(r + 4 * i))


@helper
def tile_f32(a, row_1, row_2, row_3, a_step, b, b_step, depth, out, out_row, onto):
    """Four rows times a panel: ``out[i, :16] = Σ_k a[i, k] b[k, :16]`` in float32.

    Parameters
    ----------
    a : int
        Address of the first row of `a`.
    row_1, row_2, row_3 : int
        Bytes from it to the other rows.
    a_step, b_step : int
        Bytes from one k to the next.
    b : int
        Address of 16 float32 for the first k.
    depth : int
        Number of k.
    out, out_row : int
        Address of 16 float32, and bytes to the next row.
    onto : bool
        Add to what is there.
    """
    if onto:
        f0, g0 = load_f32x8(out), load_f32x8(out + 32)
        f1, g1 = load_f32x8(out + out_row), load_f32x8(out + out_row + 32)
        f2, g2 = load_f32x8(out + 2 * out_row), load_f32x8(out + 2 * out_row + 32)
        f3, g3 = load_f32x8(out + 3 * out_row), load_f32x8(out + 3 * out_row + 32)
    else:
        zero = splat_f32(np.float32(0))
        f0, g0, f1, g1, f2, g2, f3, g3 = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(depth):
        u, v = load_f32x8(b), load_f32x8(b + 32)
        y = broadcast_f32x8(a)
        f0, g0 = fma(y, u, f0), fma(y, v, g0)
        y = broadcast_f32x8(a + row_1)
        f1, g1 = fma(y, u, f1), fma(y, v, g1)
        y = broadcast_f32x8(a + row_2)
        f2, g2 = fma(y, u, f2), fma(y, v, g2)
        y = broadcast_f32x8(a + row_3)
        f3, g3 = fma(y, u, f3), fma(y, v, g3)
        a, b = a + a_step, b + b_step
    store_f32x8(out, f0)
    store_f32x8(out + 32, g0)
    store_f32x8(out + out_row, f1)
    store_f32x8(out + out_row + 32, g1)
    store_f32x8(out + 2 * out_row, f2)
    store_f32x8(out + 2 * out_row + 32, g2)
    store_f32x8(out + 3 * out_row, f3)
    store_f32x8(out + 3 * out_row + 32, g3)
