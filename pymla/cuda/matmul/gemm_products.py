"""Products of a slice of a tile on the tensor cores.

An ``mma`` multiplies the codes of 16 rows and 8 activations over 32 columns; its sums are multiplied with both scales.
"""

import numpy as np

from pymla.cuda.formats import FORMATS
from pymla.cuda.machine.ptx import as_f32, fma, ldmatrix_x4, load_shared_f32x4, mma_s8, mma_s8_k16, syncwarp
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


def products_of(qtype, activations):
    """The products of a warp: device functions and the first sums, ``(own_places, add_half, no_sums)``.

    ``own_places(warp, me)`` is where the warp and the lane find their part of a slice. ``add_half(sums, half, (base,
    own, at))`` are the sums and the products of half a slice, whose inputs and scales are `at` in shared memory. The
    sums of a lane are four times two times `strips` fragments, as of `ptx.mma_s8`: 16 activations, 8 of them, 16 rows.
    """
    halves, minimum = FORMATS[qtype].halves, FORMATS[qtype].minimum
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

    @device
    def add_strip(sums, i, fixed):
        """`sums` and 16 rows times 8 activations over 32 columns."""
        fragments, (b0, b1), (x0, x1), (total0, total1) = fixed
        (a0, a1, a2, a3), (d0, other0, d1, other1) = fragments[i]
        s0, s1, s2, s3 = sums
        if halves:
            c0, c1, c2, c3 = mma_s8_k16(a0, a1, b0, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
            e0, e1, e2, e3 = mma_s8_k16(a2, a3, b1, _ONES_BITS, _ONES_BITS, _ONES_BITS, _ONES_BITS)
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
