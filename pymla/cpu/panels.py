"""Products of weights with many columns of activations, by panels: rows of weights side by side in vector lanes.

A panel is `LANES` rows, unpacked to ``[K / 4][LANES][4]`` codes, so that four activations, broadcast, meet four weights
of every row in one instruction. `product` unpacks two panels, a slice of K at a time that stays in the innermost cache,
and runs a tile of 2 panels × 3 columns over all columns. Unpacking is amortised over the columns.

Float types go the same way, in float32: panels ``[K][16]`` and a tile of 4 columns × 16 rows (`tile_f32`), which
attention uses as well.
"""

import numpy as np

from pymla.cpu.compiling import inline, unrolled
from pymla.cpu.formats import bytes_256, dequantise_row, float_bytes, has_minimum, panel_bits, unpack_rows
from pymla.cpu.isa import AMX, LANES
from pymla.cpu.panels_amx import COLUMNS, add_columns
from pymla.cpu.simd import (
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
from pymla.cpu.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.simd_amx import configure, release
from pymla.cpu.simd_panels import broadcast_i8xL, dot4, dot8, finish4, finish8, panel_rows, start4, start8

#: Rows of a product.
ROWS = 2 * LANES
#: Columns of K that are unpacked at a time: two panels and their scales stay in the first-level cache, with what else
#: tiles of AMX need.
CHUNK = 256 if AMX else 512
#: Bytes of scratch of `product`: codes, scales and minima of two panels, and sums of tiles.
SCRATCH = ROWS * (CHUNK + 4 * CHUNK // 16 + 4 * CHUNK // 32) + TILE_SCRATCH
#: Rows of a product of float types, columns of K that are unpacked at a time, and bytes of scratch.
FLOAT_ROWS = 16
FLOAT_CHUNK = 256
FLOAT_SCRATCH = 4 * (FLOAT_CHUNK * FLOAT_ROWS + 16 * FLOAT_CHUNK + 4 * FLOAT_ROWS)

_ROW = 4 * ROWS  # bytes of a row of results
_CODES, _SCALES, _MINIMA = 0, ROWS * CHUNK, ROWS * (CHUNK + CHUNK // 4)
_SUMS = ROWS * (CHUNK + CHUNK // 4 + CHUNK // 8)


@inline
def two_groups(row, stride, count):
    """Up to `ROWS` rows that follow each other as the two groups of a product: address of the second, rows of each.
    Without a second group, the first one's last row stands in for it."""
    if count > LANES:
        return row + LANES * stride, LANES, count - LANES
    return row + (count - 1) * stride, count, 1


def product_for(take):
    """Make `product` for a function that takes the results: ``take(results, first, last, where)`` has the address of
    those of columns `first` to `last`, `ROWS` float32 each, as soon as they are complete, while a cache has them."""

    @inline
    def product(qtype, row_a, row_b, count_a, count_b, stride, k, following, x, index, columns, scratch, out, where):
        """Two groups of up to `LANES` rows of weights times columns of activations.

        Parameters
        ----------
        qtype : int
            A quantised type.
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
        bits, minimum = panel_bits(qtype), has_minimum(qtype)
        codes, scale, sums = address(x.codes), address(x.scale), address(x.sums)
        # Where the blocks have a minimum, the codes have no zero point to take off: sums begin with 0.
        starts, step = (address(x.zeros), 0) if minimum else (address(x.starts), 4)
        sum16 = address(x.sum16)
        chunk_bytes = CHUNK // 256 * bytes_256(qtype)
        tiles = AMX and bits == 4
        width = COLUMNS if tiles else 3
        rows_a_tile = -(-ROWS * width // (end - begin))
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
                unpack_rows(qtype, panel_rows(row, stride, count), start // 32, blocks, panel, scales, minima)
            # Memory works on the rows that are unpacked next while tiles are computed.
            ahead = start // CHUNK * chunk_bytes + chunk_bytes if start + CHUNK < k else following
            asked = 0
            for i in range(begin, end, width):
                # A tile at the edge repeats the last column: in `out` as well, the same numbers.
                second, third = min(i + 1, end - 1), min(i + 2, end - 1)
                for _ in range(rows_a_tile):
                    if asked < count_a + count_b:
                        row = row_a + asked * stride if asked < count_a else row_b + (asked - count_a) * stride
                        for at in range(0, chunk_bytes, 64):
                            prefetch_l2(row + ahead + at)
                        asked += 1
                a, b, c = np.int64(index[i]), np.int64(index[second]), np.int64(index[third])
                at, bt, ct = out + _ROW * (i - begin), out + _ROW * (second - begin), out + _ROW * (third - begin)
                xa, xb, xc = codes + a * k + start, codes + b * k + start, codes + c * k + start
                wa, wb, wc = a * (k // 32) + start // 32, b * (k // 32) + start // 32, c * (k // 32) + start // 32
                sa, sb, sc = scale + 4 * wa, scale + 4 * wb, scale + 4 * wc
                if tiles:
                    step = x.codes.shape[1]
                    add_tiles(codes + start // 32 * step + 32 * a, step, sa, k // 8, blocks, scratch, at)
                    if minimum:
                        stop = min(i + COLUMNS, end)
                        for j in range(i, stop, 3):
                            _add_minima(sums, index, j, stop, begin, k, start, blocks, scratch, out)
                elif bits == 4:
                    za, zb, zc = starts + step * wa, starts + step * wb, starts + step * wc
                    tile4(xa, xb, xc, sa, sb, sc, za, zb, zc, step, blocks, scratch, start > 0, at, bt, ct)
                    if minimum:
                        _add_minima(sums, index, i, end, begin, k, start, blocks, scratch, out)
                else:
                    za, zb, zc = sum16 + 4 * wa, sum16 + 4 * wb, sum16 + 4 * wc
                    tile8(xa, xb, xc, sa, sb, sc, za, zb, zc, blocks, scratch, start > 0, at, bt, ct)
                if start == last_chunk:
                    take(at, i, min(i + width, end), where)
        if tiles:
            release()

    return product


@inline
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


@inline
def tile4(xa, xb, xc, sa, sb, sc, za, zb, zc, step, blocks, scratch, onto, at, bt, ct):
    """Two panels of 4-bit codes times three columns a, b and c.

    Parameters
    ----------
    xa, xb, xc, sa, sb, sc, za, zb, zc : int
        Addresses of each column's codes, scales, and words for `simd_panels.start4`; `step` bytes from one such word to
        the next.
    blocks : int
        Of 32 codes.
    scratch : int
        The panels, as `product` lays them out.
    onto : bool
        Add to the results.
    at, bt, ct : int
        Addresses of each column's `ROWS` results.
    """
    p, q = scratch + _CODES, scratch + _CODES + LANES * CHUNK
    d, e = scratch + _SCALES, scratch + _SCALES + LANES * (CHUNK // 4)
    fa, ga, fb, gb, fc, gc = _begin(onto, at, bt, ct)
    for _ in range(blocks):
        ia, ib, ic = start4(za), start4(zb), start4(zc)
        sums = _sixteen4((ia, ia, ib, ib, ic, ic), p, q, xa, xb, xc)
        sums = _sixteen4(sums, p + 16 * LANES, q + 16 * LANES, xa + 16, xb + 16, xc + 16)
        ia, ja, ib, jb, ic, jc = sums
        du, dv = load_f32xL(d), load_f32xL(e)
        s = broadcast_f32xL(sa)
        fa, ga = fma(finish4(ia), mul(du, s), fa), fma(finish4(ja), mul(dv, s), ga)
        s = broadcast_f32xL(sb)
        fb, gb = fma(finish4(ib), mul(du, s), fb), fma(finish4(jb), mul(dv, s), gb)
        s = broadcast_f32xL(sc)
        fc, gc = fma(finish4(ic), mul(du, s), fc), fma(finish4(jc), mul(dv, s), gc)
        p, q = p + 32 * LANES, q + 32 * LANES
        d, e = d + 4 * LANES, e + 4 * LANES
        xa, xb, xc = xa + 32, xb + 32, xc + 32
        sa, sb, sc = sa + 4, sb + 4, sc + 4
        za, zb, zc = za + step, zb + step, zc + step
    _end(fa, ga, fb, gb, fc, gc, at, bt, ct)


@inline
def tile8(xa, xb, xc, sa, sb, sc, za, zb, zc, blocks, scratch, onto, at, bt, ct):
    """`tile4` for codes of 8 bits, with a scale and a word for `simd_panels.start8` for 16 weights."""
    p, q = scratch + _CODES, scratch + _CODES + LANES * CHUNK
    d, e = scratch + _SCALES, scratch + _SCALES + LANES * (CHUNK // 4)
    fa, ga, fb, gb, fc, gc = _begin(onto, at, bt, ct)
    for block in range(2 * blocks):
        ia, ib, ic = start8(za), start8(zb), start8(zc)
        ia, ja, ib, jb, ic, jc = _sixteen8((ia, ia, ib, ib, ic, ic), p, q, xa, xb, xc)
        du, dv = load_f32xL(d), load_f32xL(e)
        s = broadcast_f32xL(sa + 4 * (block // 2))
        fa, ga = fma(finish8(ia), mul(du, s), fa), fma(finish8(ja), mul(dv, s), ga)
        s = broadcast_f32xL(sb + 4 * (block // 2))
        fb, gb = fma(finish8(ib), mul(du, s), fb), fma(finish8(jb), mul(dv, s), gb)
        s = broadcast_f32xL(sc + 4 * (block // 2))
        fc, gc = fma(finish8(ic), mul(du, s), fc), fma(finish8(jc), mul(dv, s), gc)
        p, q = p + 16 * LANES, q + 16 * LANES
        d, e = d + 4 * LANES, e + 4 * LANES
        xa, xb, xc = xa + 16, xb + 16, xc + 16
        za, zb, zc = za + 2, zb + 2, zc + 2
    _end(fa, ga, fb, gb, fc, gc, at, bt, ct)


@unrolled
def _sixteen4(sums, p, q, xa, xb, xc):
    """Add the products of sixteen columns of two panels with three activations; the steps are written out, as LLVM
    leaves a loop over them."""
    sums = _four4(sums, p, q, xa, xb, xc)
    sums = _four4(sums, p + 4 * LANES, q + 4 * LANES, xa + 4, xb + 4, xc + 4)
    sums = _four4(sums, p + 8 * LANES, q + 8 * LANES, xa + 8, xb + 8, xc + 8)
    return _four4(sums, p + 12 * LANES, q + 12 * LANES, xa + 12, xb + 12, xc + 12)


@unrolled
def _four4(sums, p, q, xa, xb, xc):
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(q)
    y = broadcast_i8xL(xa)
    ia, ja = dot4(ia, u, y), dot4(ja, v, y)
    y = broadcast_i8xL(xb)
    ib, jb = dot4(ib, u, y), dot4(jb, v, y)
    y = broadcast_i8xL(xc)
    return ia, ja, ib, jb, dot4(ic, u, y), dot4(jc, v, y)


@unrolled
def _sixteen8(sums, p, q, xa, xb, xc):
    """Add the products of sixteen columns of two panels with three activations; the steps are written out, as LLVM
    leaves a loop over them."""
    sums = _four8(sums, p, q, xa, xb, xc)
    sums = _four8(sums, p + 4 * LANES, q + 4 * LANES, xa + 4, xb + 4, xc + 4)
    sums = _four8(sums, p + 8 * LANES, q + 8 * LANES, xa + 8, xb + 8, xc + 8)
    return _four8(sums, p + 12 * LANES, q + 12 * LANES, xa + 12, xb + 12, xc + 12)


@unrolled
def _four8(sums, p, q, xa, xb, xc):
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(q)
    y = broadcast_i8xL(xa)
    ia, ja = dot8(ia, u, y), dot8(ja, v, y)
    y = broadcast_i8xL(xb)
    ib, jb = dot8(ib, u, y), dot8(jb, v, y)
    y = broadcast_i8xL(xc)
    return ia, ja, ib, jb, dot8(ic, u, y), dot8(jc, v, y)


@inline
def _begin(onto, at, bt, ct):
    """Results to begin with: what is there, or zero."""
    zero = splat_f32xL(np.float32(0))
    fa, ga, fb, gb, fc, gc = zero, zero, zero, zero, zero, zero
    if onto:
        fa, ga = load_f32xL(at), load_f32xL(at + 4 * LANES)
        fb, gb = load_f32xL(bt), load_f32xL(bt + 4 * LANES)
        fc, gc = load_f32xL(ct), load_f32xL(ct + 4 * LANES)
    return fa, ga, fb, gb, fc, gc


@inline
def _end(fa, ga, fb, gb, fc, gc, at, bt, ct):
    """Store the results."""
    store_f32xL(at, fa)
    store_f32xL(at + 4 * LANES, ga)
    store_f32xL(bt, fb)
    store_f32xL(bt + 4 * LANES, gb)
    store_f32xL(ct, fc)
    store_f32xL(ct + 4 * LANES, gc)


@inline
def _add_minima(sums, index, i, end, begin, k, start, blocks, scratch, out):
    """Add minimum times sum of activations, over blocks from column `start` of K on, to the results of the i-th column
    and two more; where there are fewer, the last one again. The others are as in `product`."""
    second, third = min(i + 1, end - 1), min(i + 2, end - 1)
    at, bt, ct = out + _ROW * (i - begin), out + _ROW * (second - begin), out + _ROW * (third - begin)
    a, b, c = np.int64(index[i]), np.int64(index[second]), np.int64(index[third])
    first, step = sums + 4 * (start // 32), 4 * (k // 32)
    sa, sb, sc = first + a * step, first + b * step, first + c * step
    m, n = scratch + _MINIMA, scratch + _MINIMA + LANES * (CHUNK // 8)
    fa, ga, fb, gb, fc, gc = _begin(True, at, bt, ct)
    for block in range(blocks):
        u, v = load_f32xL(m + 4 * LANES * block), load_f32xL(n + 4 * LANES * block)
        s = broadcast_f32xL(sa + 4 * block)
        fa, ga = fma(u, s, fa), fma(v, s, ga)
        s = broadcast_f32xL(sb + 4 * block)
        fb, gb = fma(u, s, fb), fma(v, s, gb)
        s = broadcast_f32xL(sc + 4 * block)
        fc, gc = fma(u, s, fc), fma(v, s, gc)
    _end(fa, ga, fb, gb, fc, gc, at, bt, ct)


@inline
def product_float(qtype, row, count, stride, k, x, out, scratch):
    """Up to 16 rows of a float type times all activations.

    Parameters
    ----------
    qtype, row, count, stride, k : as in `product`
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
            source = row + min(i, count - 1) * stride + start * float_bytes(qtype)
            dequantise_row(qtype, source, rows + 4 * FLOAT_CHUNK * i, depth)
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


@inline
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


@inline
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
