"""What the kernels of attention on tensor cores are made of: tiles of rows in shared memory, products, online softmax.

A tile is 32 rows of 16-bit values without gaps. A row's pieces of 16 bytes are permuted by the row's number, so that
eight rows of a matrix, which are read together, lie in different banks. Kernels are built for a cache type and sizes
from device functions that the functions here make.
"""

import math

import numpy as np

from pymla import ggml
from pymla.cuda.formats import unaligned_word
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device
from pymla.errors import PymlaError

#: Positions that a block takes at a time; a page is a multiple.
TILE = 32
WARPS = 4
THREADS = WARPS * ptx.WARP

LOG2E = math.log2(math.e)
ZERO = np.float32(0)
INFINITY = np.float32(np.inf)
#: Sums of 16 rows and the 32 positions of a tile, as four products of a tensor core.
NO_SCORES = ((ZERO,) * 4,) * 4


def need_multiples_of_16(*sizes):
    """Raise where a row's values do not fill the tensor cores' steps."""
    if any(size % 16 for size in sizes):
        raise PymlaError(f"attention on tensor cores needs sizes that 16 divides, not {' and '.join(map(str, sizes))}")


def place(out):
    """Results float32 (T, H, v) as kernels write them: the address, and bytes from token to token and head to head.

    `out` may be part of an array with more tokens and heads: the last axis is contiguous.
    """
    token, head, item = out.strides
    if out.dtype != np.float32 or item != 4 or token % 8 or head % 8 or out.address % 8:
        raise ValueError(
            f"expected float32 results, contiguous and at multiples of 8 bytes along the last axis, not {out.dtype} "
            f"with strides {out.strides}"
        )
    return out.address, token, head


def factors_of(qtype):
    """The tensor cores' product, and the packing of its factors, for a cache type: bfloat16 for bf16, float16 for the
    others."""
    return (ptx.mma_bf16, ptx.pack_bf16x2) if qtype == ggml.BF16 else (ptx.mma_f16, ptx.pack_f16x2)


# Tiles in shared memory.


def swizzle(width):
    """The bits of a row's number that permute the pieces of rows of `width` 16-bit values; a multiple of 16."""
    pieces = width // 8
    return min(8, pieces & -pieces) - 1


def lanes_of_row(width):
    """Neighbouring threads that copy a row of `width` values, 8 at a time: a power of two."""
    return min(ptx.WARP, 1 << (width // 8).bit_length() - 1)


def copy_rows(width, wide=None, first=0):
    """A device function that begins to copy rows of `width` 16-bit values into a tile.

    (target, source, stride, rows, thread): rows at `source`, `stride` bytes apart; behind the first `rows` come zeros.
    The tile's rows have `wide` values, as many by default, and these begin at value `first`.
    """
    wide = wide or width
    pieces, lanes, mask, skip = width // 8, lanes_of_row(width), swizzle(wide), first // 8
    together = THREADS // lanes

    @device
    def copy(target, source, stride, rows, thread):
        for row in range(thread // lanes, TILE, together):
            at, nbytes = (source + row * stride, 16) if row < rows else (source, 0)
            to = target + 2 * wide * row
            for piece in range(thread % lanes, pieces, lanes):
                ptx.cp_async_16(to + 16 * ((skip + piece) ^ (row & mask)), at + 16 * piece, nbytes)

    return copy


def convert_rows(width, wide=None, first=0):
    """`copy_rows` of float32 values, which become float16. It has ended when it returns."""

    @device
    def eight(row, piece):
        x0, x1, x2, x3 = ptx.load_f32x4(row + 32 * piece)
        x4, x5, x6, x7 = ptx.load_f32x4(row + 32 * piece + 16)
        return ptx.pack_f16x2(x0, x1), ptx.pack_f16x2(x2, x3), ptx.pack_f16x2(x4, x5), ptx.pack_f16x2(x6, x7)

    return _converted(eight, width, wide, first)


def decode_rows(width):
    """`copy_rows` of q8_0 blocks, which become float16. It has ended when it returns."""

    @device
    def eight(row, piece):
        block = row + 34 * (piece >> 2)
        at, d = block + 2 + 8 * (piece & 3), ptx.load_u16(block)
        d = ptx.prmt(d, d, 0x1010)
        h0, h1 = half_codes(unaligned_word(at), d)
        h2, h3 = half_codes(unaligned_word(at + 4), d)
        return h0, h1, h2, h3

    return _converted(eight, width, None, 0)


def _converted(eight, width, wide, first):
    """`copy_rows` with eight values at a time through registers: ``eight(row, piece)`` gives them as four words."""
    wide = wide or width
    pieces, lanes, mask, skip = width // 8, lanes_of_row(width), swizzle(wide), first // 8
    together = THREADS // lanes

    @device
    def convert(target, source, stride, rows, thread):
        for row in range(thread // lanes, TILE, together):
            to = target + 2 * wide * row
            for piece in range(thread % lanes, pieces, lanes):
                w0, w1, w2, w3 = 0, 0, 0, 0
                if row < rows:
                    w0, w1, w2, w3 = eight(source + row * stride, piece)
                ptx.store_shared_u32x4(to + 16 * ((skip + piece) ^ (row & mask)), w0, w1, w2, w3)

    return convert


def copy_whole(row_bytes):
    """A device function (target, source, rows, thread) that begins to copy the rows of a tile as they are, one behind
    the other."""

    @device
    def copy(target, source, rows, thread):
        for at in range(16 * thread, TILE * row_bytes, 16 * THREADS):
            left = min(max(rows * row_bytes - at, 0), 16)
            ptx.cp_async_16(target + at, source + (at if left else 0), left)

    return copy


@device
def half_codes(word, scale):
    """Four signed bytes times two equal float16, as two words. 1024 + n is the float16 whose low byte is n."""
    word ^= 0x80808080
    low, high = ptx.prmt(word, 0x64646464, 0x4140), ptx.prmt(word, 0x64646464, 0x4342)
    one, bias = 0x3C003C00, 0xE480E480  # 1, and -1152: 1024 and the 128 that made the byte unsigned
    return (
        ptx.fma_f16x2(ptx.fma_f16x2(low, one, bias), scale, 0),
        ptx.fma_f16x2(ptx.fma_f16x2(high, one, bias), scale, 0),
    )


def unpack_blocks(rank, rope):
    """A device function (target, source, thread) that makes a tile of what `copy_whole` brought to shared memory: rows
    of `rank` values in q8_0 blocks, and behind them rows of `rope` float16."""
    size, row_bytes = rank + rope, ggml.row_bytes(ggml.Q8_0, rank)
    pieces, lanes, mask = rank // 8, lanes_of_row(rank), swizzle(size)
    rope_pieces, rope_lanes = rope // 8, lanes_of_row(rope)

    @device
    def unpack(target, source, thread):
        for row in range(thread // lanes, TILE, THREADS // lanes):
            to = target + 2 * size * row
            for piece in range(thread % lanes, pieces, lanes):
                block = source + row_bytes * row + 34 * (piece >> 2)
                d = ptx.load_shared_u16(block)
                # Codes begin at a multiple of 2: two words are cut out of three, or are the first two.
                at = block + 2 + 8 * (piece & 3)
                odd = at & 2
                w0, w1 = ptx.load_shared_u32(at - odd), ptx.load_shared_u32(at - odd + 4)
                w2 = ptx.load_shared_u32(at - odd + 4 + 2 * odd)
                d = ptx.prmt(d, d, 0x1010)
                h0, h1 = half_codes(ptx.funnel_shift_r(w0, w1, 8 * odd), d)
                h2, h3 = half_codes(ptx.funnel_shift_r(w1, w2, 8 * odd), d)
                ptx.store_shared_u32x4(to + 16 * (piece ^ (row & mask)), h0, h1, h2, h3)
        for row in range(thread // rope_lanes, TILE, THREADS // rope_lanes):
            to, at = target + 2 * size * row, source + TILE * row_bytes + 2 * rope * row
            for piece in range(thread % rope_lanes, rope_pieces, rope_lanes):
                w0, w1, w2, w3 = ptx.load_shared_u32x4(at + 16 * piece)
                ptx.store_shared_u32x4(to + 16 * ((pieces + piece) ^ (row & mask)), w0, w1, w2, w3)

    return unpack


# Products.


def scores_of(mma, size, warps=1):
    """A device function (a, i, scores, fixed): `scores` and the product of a fragment of 16 queries and 16 columns with
    a tile's rows of `size` values; a function for `folded`.

    `fixed`: the first group of 16 columns (this one is i behind it), the address of this lane's row, and its `key_row`.
    Where `warps` do not share the columns evenly, what is behind the last group is the last group.
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


@device
def value_row(lane):
    """The row of the first 16, and the piece, that a lane names for `values_of`."""
    return lane & 15, lane >> 4


def values_of(mma, width, size, warps=1):
    """A device function (o, i, fixed): 16 columns of the accumulated values, ``o * shrink + weights @ rows``; values
    are the first `width` of the `size` in a row.

    `o` are eight float32: two products of a tensor core. `fixed`: the weights and the factors that `online_softmax`
    gives, the first group of 16 columns (this one is i behind it), the address of this lane's row, and its
    `value_row`. Where `warps` do not share the columns evenly, what is behind the last group is the last group.
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


def online_softmax(pack):
    """A device function (scores, seen, state, lane): what a tile adds to an online softmax of 16 rows.

    With ``g = lane >> 2``: `seen` are the numbers of positions of the tile that rows g and g + 8 see, `state` their
    maxima and this lane's shares of their sums. Returns the weights of 32 positions as two left factors of a tensor
    core, the factors that shrink what was accumulated, and the new state. Scores are to base 2.
    """

    @device
    def row_maximum(scores, first, column, seen, largest):
        """Scores of a row, −inf behind the first `seen`, and the maximum over the tile and `largest`."""
        a, b, c, d = scores
        a0, a1 = _masked(a[first], column, seen), _masked(a[first + 1], column + 1, seen)
        b0, b1 = _masked(b[first], column + 8, seen), _masked(b[first + 1], column + 9, seen)
        c0, c1 = _masked(c[first], column + 16, seen), _masked(c[first + 1], column + 17, seen)
        d0, d1 = _masked(d[first], column + 24, seen), _masked(d[first + 1], column + 25, seen)
        tile = ptx.fmax(ptx.fmax(ptx.fmax(a0, a1), ptx.fmax(b0, b1)), ptx.fmax(ptx.fmax(c0, c1), ptx.fmax(d0, d1)))
        return (a0, a1, b0, b1, c0, c1, d0, d1), ptx.group_max(ptx.fmax(tile, largest), 4)

    @device
    def row_weights(scores, largest):
        """The weights, packed by twos, and their sum."""
        a0, a1, b0, b1, c0, c1, d0, d1 = scores
        a0, a1, b0, b1 = _power(a0, largest), _power(a1, largest), _power(b0, largest), _power(b1, largest)
        c0, c1, d0, d1 = _power(c0, largest), _power(c1, largest), _power(d0, largest), _power(d1, largest)
        total = ((a0 + a1) + (b0 + b1)) + ((c0 + c1) + (d0 + d1))
        return (pack(a0, a1), pack(b0, b1), pack(c0, c1), pack(d0, d1)), total

    @device
    def softmax(scores, seen, state, lane):
        m0, m1, l0, l1 = state
        column = 2 * (lane & 3)
        upper, n0 = row_maximum(scores, 0, column, seen[0], m0)
        lower, n1 = row_maximum(scores, 2, column, seen[1], m1)
        (p0, p2, p4, p6), t0 = row_weights(upper, n0)
        (p1, p3, p5, p7), t1 = row_weights(lower, n1)
        f0, f1 = ptx.exp2(m0 - n0), ptx.exp2(m1 - n1)
        return (p0, p1, p2, p3, p4, p5, p6, p7), (f0, f1), (n0, n1, l0 * f0 + t0, l1 * f1 + t1)

    return softmax


@device
def _masked(score, column, seen):
    return score if column < seen else -INFINITY


@device
def _power(score, largest):
    return ptx.exp2(score - largest)


def load_queries(pack, size):
    """A device function (item, step, fixed): this lane's fragment of 16 queries and the 16 columns of a step, scaled.

    `item` is ignored. `fixed`: the first step (this one is `step` behind it), addresses of the queries of rows g and
    g + 8, of `size` float32, whether these rows are there, the scale, and the lane. What is not there is zero.
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
