"""Products of a slice of a tile on the tensor cores.

An ``mma`` multiplies the codes of 16 rows and 8 activations over 32 columns; its sums are multiplied with both scales.
"""

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.formats import FORMATS
from pymla.cuda.machine.ptx import (
    as_f32,
    as_word,
    f16_value,
    fma,
    ldmatrix_x4,
    load_shared_f32,
    load_shared_f32x4,
    mma_s8,
    mma_s8_k16,
    prmt,
    store_shared_f32,
    syncwarp,
)
from pymla.cuda.matmul.gemm_layout import SLICE, TILE_ROWS, layout_of, swizzled
from pymla.cuda.runtime.jit import device, unrolled

#: A float32 whose last bits count ones: products on integers begin with its bits, and are floats that far above it.
_ONES, _ONES_BITS = np.float32(1.5 * 2**23), 0x4B400000
#: Added to such a float, it leaves the sum of products.
MINUS_ONES = -_ONES
_ZEROS = (np.float32(0),) * 4


@device
def _times(d, minus, bits):
    """``d`` times the integer that was added to `_ONES_BITS`, rounded once; `minus` is ``d * MINUS_ONES``. The integer
    is below 2 ** 20, and d has at most 22 significant bits, so that its product with `_ONES` is exact."""
    return fma(d, as_f32(bits), minus)


@device
def _products_of_halves(fragment, b0, b1, other0, other1):
    """Products of the first 16 columns and of the second, and the second scales of two rows."""
    a0, a1, a2, a3 = fragment
    first = mma_s8_k16(a0, a1, b0, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
    second = mma_s8_k16(a2, a3, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
    return first, second, other0, other1


@device
def _products_and_minima(fragment, b0, b1, minima0, minima1):
    """Products of codes, and of integer minima, which all weights of a half share; the floats that the minima of two
    rows are multiples of."""
    a0, a1, a2, a3 = fragment
    w0, w1 = as_word(minima0), as_word(minima1)
    m0, m1, m2, m3 = prmt(w0, 0, 0x0000), prmt(w1, 0, 0x0000), prmt(w0, 0, 0x1111), prmt(w1, 0, 0x1111)
    codes = mma_s8(a0, a1, a2, a3, b0, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
    minima = mma_s8(m0, m1, m2, m3, b0, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
    return codes, minima, f16_value(w0 >> 16), f16_value(w1 >> 16)


def products_of(qtype, activations):
    """The products of a warp: device functions and the first sums, ``(own_places, add_half, no_sums)``.

    ``own_places(warp, me)`` is where the warp and the lane find their part of a slice. ``add_half(sums, half, (base,
    own, at))`` are the sums and the products of half a slice, whose inputs and scales are `at` in shared memory. The
    sums of a lane are four times two times `strips` fragments, as of `ptx.mma_s8`: 16 activations, 8 of them, 16 rows.
    """
    halves, minimum, minima = FORMATS[qtype].halves, FORMATS[qtype].minimum, FORMATS[qtype].minima
    layout = layout_of(qtype, activations)
    warps_along_rows = layout.warps_along_rows
    strips, totals, factors = layout.strips, layout.totals, layout.factors
    codes, numbers = layout.codes, layout.numbers
    nowhere, no_sums = (0,) * strips, (((_ZEROS,) * strips,) * 2,) * 4

    @device
    def load_strip(address, i, fixed):
        """A strip's fragment, and the numbers of two of its rows."""
        codes_at, numbers_at = fixed
        return ldmatrix_x4(codes_at + 16 * SLICE * i), load_shared_f32x4(numbers_at + 128 * i)

    multiply = _products_of_halves if halves else _products_and_minima

    @device
    def add_strip(sums, i, fixed):
        """`sums` and 16 rows times 8 activations over 32 columns."""
        fragments, (b0, b1), (x0, x1), (total0, total1) = fixed
        fragment, (d0, other0, d1, other1) = fragments[i]
        s0, s1, s2, s3 = sums
        if halves or minima:
            (c0, c1, c2, c3), (e0, e1, e2, e3), other0, other1 = multiply(fragment, b0, b1, other0, other1)
            m0, m1, n0, n1 = d0 * MINUS_ONES, d1 * MINUS_ONES, other0 * MINUS_ONES, other1 * MINUS_ONES
            return (
                fma(x0, _times(d0, m0, c0) + _times(other0, n0, e0), s0),
                fma(x1, _times(d0, m0, c1) + _times(other0, n0, e1), s1),
                fma(x0, _times(d1, m1, c2) + _times(other1, n1, e2), s2),
                fma(x1, _times(d1, m1, c3) + _times(other1, n1, e3), s3),
            )
        m0, m1 = other0, other1
        if minimum:
            m0, m1 = d0 * MINUS_ONES, d1 * MINUS_ONES
            s0, s1 = fma(other0, total0, s0), fma(other0, total1, s1)
            s2, s3 = fma(other1, total0, s2), fma(other1, total1, s3)
        a0, a1, a2, a3 = fragment
        c0, c1, c2, c3 = mma_s8(a0, a1, a2, a3, b0, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
        return (
            fma(x0, _times(d0, m0, c0), s0),
            fma(x1, _times(d0, m0, c1), s1),
            fma(x0, _times(d1, m1, c2), s2),
            fma(x1, _times(d1, m1, c3), s3),
        )

    load_strips, add_strips = unrolled(load_strip, strips), unrolled(add_strip, strips)

    @device
    def add_activations(sums, i, fixed):
        """`sums` and all strips times 16 activations."""
        fragments, inputs_at, pairs_at = fixed
        # Without such fences the compiler begins more products than there are registers for.
        syncwarp()
        b0, b1, b2, b3 = ldmatrix_x4(inputs_at + 16 * SLICE * i)
        x0, x1, x2, x3 = load_shared_f32x4(pairs_at + factors + 64 * i)
        t0 = t1 = t2 = t3 = np.float32(0)
        if minimum:
            t0, t1, t2, t3 = load_shared_f32x4(pairs_at + totals + 64 * i)
        left, right = (fragments, (b0, b1), (x0, x1), (t0, t1)), (fragments, (b2, b3), (x2, x3), (t2, t3))
        first = add_strips(0, sums[0], left)
        syncwarp()
        return first, add_strips(0, sums[1], right)

    add_all_activations = unrolled(add_activations, 4)

    @device
    def add_half(sums, half, fixed):
        """`sums` and the products of half a slice, which is two chunks of codes."""
        base, (own_codes, own_numbers, own_inputs, own_pairs), (inputs_at, pairs_at) = fixed
        codes_at = base + codes + (own_codes ^ 32 * half)
        fragments = load_strips(0, nowhere, (codes_at, base + numbers + own_numbers + 8 * TILE_ROWS * half))
        inputs_at += base + (own_inputs ^ 32 * half)
        return add_all_activations(
            0, sums, (fragments, inputs_at, base + pairs_at + own_pairs + 4 * activations * half)
        )

    @device
    def own_places(warp, me):
        """Codes and numbers of the first strip, and codes and scales of activations, as `ldmatrix_x4` reads them for
        the first 32 columns."""
        first, activation = 16 * strips * (warp % warps_along_rows), 64 * (warp // warps_along_rows)
        return (
            swizzled(first + (me & 15), me >> 4),
            8 * first + 16 * (me >> 2),
            swizzled(activation + (me & 7) + 8 * (me >> 4), me >> 3 & 1),
            4 * activation + 16 * (me & 3),
        )

    return own_places, add_half, no_sums


def row_scaling_of(qtype, activations):
    """A device function (sums, base, warp, me, row): a lane's sums, as `products_of` describes them, times the scales
    in the headers of rows, where rows of the type have one. `row` is the address behind the header of the thread's
    row."""
    row_scale, header, layout = FORMATS[qtype].row_scale, ggml.ROW_HEADER[qtype], layout_of(qtype, activations)
    strips, warps_along_rows, numbers = layout.strips, layout.warps_along_rows, layout.numbers
    if row_scale is None:

        @device
        def as_they_are(sums, base, warp, me, row):
            return sums

        return as_they_are

    @device
    def load_scales(_, i, at):
        return load_shared_f32(at + 64 * i), load_shared_f32(at + 64 * i + 32)

    @device
    def scale_strip(sums, i, scales):
        upper, lower = scales[i]
        return upper * sums[0], upper * sums[1], lower * sums[2], lower * sums[3]

    load_all, scale_strips, nowhere = unrolled(load_scales, strips), unrolled(scale_strip, strips), (0,) * strips

    @device
    def scale_activations(sums, i, scales):
        return scale_strips(0, sums[0], scales), scale_strips(0, sums[1], scales)

    scale_all_activations = unrolled(scale_activations, 4)

    @device
    def scale_rows(sums, base, warp, me, row):
        # The numbers of the last slice have been read when all threads are here.
        cuda.syncthreads()
        store_shared_f32(base + numbers + 4 * cuda.threadIdx.x, row_scale(row - header))
        cuda.syncthreads()
        first = 16 * strips * (warp % warps_along_rows) + (me >> 2)
        return scale_all_activations(0, sums, load_all(0, nowhere, base + numbers + 4 * first))

    return scale_rows
