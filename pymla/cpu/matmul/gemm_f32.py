"""Products of float types with many columns of activations: panels ``[K][16]`` of float32, and a tile of 4 columns of
activations × 16 rows of weights, which attention uses as well."""

import functools

import numpy as np

from pymla.cpu.formats import FORMATS
from pymla.cpu.formats.rows import dequantise_row_for
from pymla.cpu.machine.simd import (
    address,
    broadcast_f32x8,
    fma,
    load_f32,
    load_f32x8,
    splat_f32,
    store_f32,
    store_f32x8,
    store_transposed,
)
from pymla.cpu.matmul.matrices import row_at
from pymla.cpu.runtime.compiling import helper

#: Rows of weights of a product.
F32_ROWS = 16
#: Columns of activations of a tile.
F32_COLUMNS = 4
#: Columns of K that are unpacked at a time.
F32_CHUNK = 256
#: Where the parts of scratch begin: rows of float32, the panel, and results of a tile; and bytes of scratch.
_PANEL, _RESULTS = 4 * F32_CHUNK * F32_ROWS, 8 * F32_CHUNK * F32_ROWS
F32_SCRATCH = _RESULTS + 4 * F32_COLUMNS * F32_ROWS


@functools.cache
def product_f32_for(qtype):
    """Make `product` for a float type."""
    dequantise_row, size = dequantise_row_for(qtype), FORMATS[qtype].number_bytes

    @helper
    def product(row, count, stride, k, x, out, scratch):
        """Up to `F32_ROWS` rows of a float type times all activations.

        Parameters
        ----------
        row, count, stride : int
            Address of the first row, number of rows, and bytes from row to row.
        k : int
        x : float32 array (T, K)
        out : float32 array (T, n)
            The first `count` columns are written.
        scratch : int
            Address of `F32_SCRATCH` bytes.
        """
        rows, panel, result = scratch, scratch + _PANEL, scratch + _RESULTS
        for start in range(0, k, F32_CHUNK):
            depth = min(F32_CHUNK, k - start)
            for i in range(F32_ROWS):
                source = row + min(i, count - 1) * stride + start * size
                dequantise_row(source, rows + 4 * F32_CHUNK * i, depth)
            transpose_panel(rows, 4 * F32_CHUNK, F32_ROWS, depth, panel)
            for t in range(0, len(x), F32_COLUMNS):
                last = len(x) - 1 - t
                at = address(x[t:]) + 4 * start
                second, third, fourth = 4 * k * min(1, last), 4 * k * min(2, last), 4 * k * min(3, last)
                tile_f32(at, second, third, fourth, 4, panel, 64, depth, result, 64, False)
                for i in range(min(F32_COLUMNS, len(x) - t)):
                    for j in range(count):
                        value = load_f32(result + 64 * i + 4 * j)
                        out[t + i, j] = value if start == 0 else out[t + i, j] + value

    return product


@functools.cache
def multiply_rows_f32_for(qtype):
    """Make a function ``(w, matrix, begin, x, out, scratch)``: up to `F32_ROWS` rows of one of the `Matrices`, from row
    `begin` on, times all activations; the arguments are as in `product`."""
    product = product_f32_for(qtype)

    @helper
    def multiply_rows(w, matrix, begin, x, out, scratch):
        count = min(F32_ROWS, w.rows - begin)
        product(row_at(w, matrix, begin), count, w.row_stride, x.shape[1], x, out, scratch)

    return multiply_rows


@helper
def transpose_panel(rows, stride, count, columns, panel):
    """Up to 16 rows of float32 as a panel (columns, 16); lanes past the end repeat the last row.

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
        Whether to add to the float32 at `out`.
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
