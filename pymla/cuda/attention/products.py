"""Products of attention on tensor cores: scores of 16 queries and the rows of a tile, and values with softmax weights.

Functions here make device functions for `unrolled` and `folded`, which take 16 columns at a time.
"""

from pymla import ggml
from pymla.cuda.attention.softmax import ZERO
from pymla.cuda.attention.tiles import swizzle
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device

#: Sums of 16 rows and the 32 positions of a tile, as four products of a tensor core.
NO_SCORES = ((ZERO,) * 4,) * 4

#: The tensor cores' product and the packing of its factors, by the factors' type.
FACTORS = {ggml.F16: (ptx.mma_f16, ptx.pack_f16x2), ggml.BF16: (ptx.mma_bf16, ptx.pack_bf16x2)}


def load_queries(pack, size):
    """A device function (item, step, fixed): this lane's fragment of 16 queries and the 16 columns of a step, scaled.

    `item` is ignored. `fixed`: the first step (this one is `step` behind it), addresses of the queries of rows g and
    g + 8, of `size` float32, whether these rows are there, the scale, and the lane. Queries that are absent are zeros.
    """
    steps = size // 16

    @device
    def load(item, step, fixed):
        first, upper, lower, (has_upper, has_lower), scale, lane = fixed
        a0, a1, a2, a3 = 0, 0, 0, 0
        at = 64 * (first + step) + 8 * (lane & 3)
        if first + step < steps:
            if has_upper:
                x0, x1 = ptx.load_f32x2(upper + at)
                x2, x3 = ptx.load_f32x2(upper + at + 32)
                a0, a2 = pack(x0 * scale, x1 * scale), pack(x2 * scale, x3 * scale)
            if has_lower:
                x0, x1 = ptx.load_f32x2(lower + at)
                x2, x3 = ptx.load_f32x2(lower + at + 32)
                a1, a3 = pack(x0 * scale, x1 * scale), pack(x2 * scale, x3 * scale)
        return a0, a1, a2, a3

    return load


def scores_of(mma, size, warps=1):
    """A device function (a, i, scores, fixed): `scores` and the product of a fragment of 16 queries and 16 columns with
    a tile's rows of `size` values; a function for `folded`.

    `fixed`: the first group of 16 columns (this one is i behind it), the address of this lane's row, and its `key_row`.
    Where `warps` do not share the columns evenly, groups past the last one repeat the last one.
    """
    mask, half, steps = swizzle(size), 32 * size, size // 16
    uneven = steps % warps > 0

    @device
    def scores_of_columns(a, i, scores, fixed):
        first, address, (row, piece) = fixed
        step = min(first + i, steps - 1) if uneven else first + i
        at = address + 16 * ((2 * step + piece) ^ (row & mask))
        a0, a1, a2, a3 = a
        s0, s1, s2, s3 = scores
        b0, b1, b2, b3 = ptx.ldmatrix_x4(at)
        b4, b5, b6, b7 = ptx.ldmatrix_x4(at + half)
        return (
            mma(a0, a1, a2, a3, b0, b1, s0[0], s0[1], s0[2], s0[3]),
            mma(a0, a1, a2, a3, b2, b3, s1[0], s1[1], s1[2], s1[3]),
            mma(a0, a1, a2, a3, b4, b5, s2[0], s2[1], s2[2], s2[3]),
            mma(a0, a1, a2, a3, b6, b7, s3[0], s3[1], s3[2], s3[3]),
        )

    return scores_of_columns


@device
def key_row(lane):
    """The row of the first 16, and the piece, that a lane names for `scores_of`."""
    return (lane & 7) + (lane >> 4 << 3), lane >> 3 & 1


def values_of(mma, width, size, warps=1):
    """A device function (o, i, fixed): 16 columns of the accumulated values, ``o * shrink + weights @ rows``; values
    are the first `width` of the `size` in a row.

    `o` are eight float32: two products of a tensor core. `fixed`: the weights and the factors that `online_softmax`
    gives, the first group of 16 columns (this one is i behind it), the address of this lane's row, and its
    `value_row`. Where `warps` do not share the columns evenly, groups past the last one repeat the last one.
    """
    mask, half, groups = swizzle(size), 32 * size, width // 16
    uneven = groups % warps > 0

    @device
    def values_of_columns(o, i, fixed):
        (p0, p1, p2, p3, p4, p5, p6, p7), (f0, f1), first, address, (row, piece) = fixed
        group = min(first + i, groups - 1) if uneven else first + i
        at = address + 16 * ((2 * group + piece) ^ (row & mask))
        b0, b1, b2, b3 = ptx.ldmatrix_x4_trans(at)
        b4, b5, b6, b7 = ptx.ldmatrix_x4_trans(at + half)
        x = mma(p0, p1, p2, p3, b0, b1, o[0] * f0, o[1] * f0, o[2] * f1, o[3] * f1)
        y = mma(p0, p1, p2, p3, b2, b3, o[4] * f0, o[5] * f0, o[6] * f1, o[7] * f1)
        return mma(p4, p5, p6, p7, b4, b5, x[0], x[1], x[2], x[3]) + mma(p4, p5, p6, p7, b6, b7, y[0], y[1], y[2], y[3])

    return values_of_columns


@device
def value_row(lane):
    """The row of the first 16, and the piece, that a lane names for `values_of`."""
    return lane & 15, lane >> 4


@device
def store_values(o, i, fixed):
    """Write 16 columns of accumulated values: `fixed` are the first group of columns, the groups there are, addresses
    of rows g and g + 8 and whether to write them, factors, and the lane. A function for `unrolled`."""
    first, groups, upper, lower, (has_upper, has_lower), (f0, f1), lane = fixed
    at = 64 * (first + i) + 8 * (lane & 3)
    if first + i < groups:
        if has_upper:
            ptx.store_f32x2(upper + at, o[0] * f0, o[1] * f0)
            ptx.store_f32x2(upper + at + 32, o[4] * f0, o[5] * f0)
        if has_lower:
            ptx.store_f32x2(lower + at, o[2] * f1, o[3] * f1)
            ptx.store_f32x2(lower + at + 32, o[6] * f1, o[7] * f1)
    return 0
