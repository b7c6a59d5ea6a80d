"""The absorbed form of attention on tensor cores: all heads of a token together against its cache rows.

A block takes one token, 16 heads (rows of a tensor core's product; rows without a head are zeros) and a share of the
positions, in tiles of 32 rows. While one tile is computed the next one is copied into the other half of shared memory.

- Scores: each of four warps multiplies its quarter of the queries, which stays in registers, with its quarter of every
  row; the four parts meet in shared memory, so that a row is read once and queries not at all.
- Softmax, online (Milakov and Gimelshein, 2018), to base 2: all warps compute it, alike, in float32.
- Values: each warp has a quarter of the columns, from the rows that the scores came from.

Factors are bfloat16 for a bf16 cache and float16 for the others, a float32 one too; sums are float32. Positions and
tables are read by the kernels only, so that a recorded step can be replayed; the grid depends on the table's width.

Shared memory holds rows of 16-bit values without gaps, ``c_kv`` and behind it ``k_pe``. A row's pieces of 16 bytes are
permuted by the row's number, so that eight rows of a matrix, which are read together, lie in different banks. Rows of
q8_0 wait in their own type.
"""

import functools
import math

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cache import PAGE
from pymla.cuda import ptx
from pymla.cuda.driver import multiprocessors
from pymla.cuda.jit import device, kernel
from pymla.cuda.memory import empty
from pymla.errors import PymlaError

__all__ = ["absorbed"]

I32, I64, F32 = types.int32, types.int64, types.float32
I1 = types.Array(I32, 1, "C")
I2 = types.Array(I32, 2, "C")

#: Heads of a block: the rows of a tensor core's product.
HEADS = 16
#: Positions that a block takes at a time; a page is a multiple.
TILE = 32
WARPS = 4
THREADS = WARPS * ptx.WARP
#: Tiles that are worth a block of their own, whose result is to be merged.
LEAST_TILES = 4
#: Columns that a block of the merging kernel takes.
COLUMNS = 128

LOG2E = math.log2(math.e)
ZERO = np.float32(0)
INFINITY = np.float32(np.inf)
#: Sums of 16 rows and the 32 positions of a tile, as four products of a tensor core.
NO_SCORES = ((ZERO,) * 4,) * 4
#: Bytes of the warps' parts of the scores.
PARTS = WARPS * 4 * ptx.WARP * 16


# Loops over registers: a tuple's elements stay in registers where the index is a constant, so these are unrolled.


@functools.cache
def unrolled(function, count):
    """A device function (first, items, fixed): the tuple of ``function(items[i], first + i, fixed)``, i < `count`."""
    if count == 1:

        @device
        def one(first, items, fixed):
            return (function(items[0], first, fixed),)

        return one
    half = count // 2
    left, right = unrolled(function, half), unrolled(function, count - half)

    @device
    def both(first, items, fixed):
        return left(first, items[:half], fixed) + right(first + half, items[half:], fixed)

    return both


@functools.cache
def folded(function, count):
    """A device function (first, items, state, fixed): the last ``state = function(items[i], first + i, state, fixed)``,
    i < `count`."""
    if count == 1:

        @device
        def one(first, items, state, fixed):
            return function(items[0], first, state, fixed)

        return one
    half = count // 2
    left, right = folded(function, half), folded(function, count - half)

    @device
    def both(first, items, state, fixed):
        return right(first + half, items[half:], left(first, items[:half], state, fixed), fixed)

    return both


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


def convert_rows(width, wide, first):
    """`copy_rows` of float32 values, which become float16. It has ended when it returns."""
    pieces, lanes, mask, skip = width // 8, lanes_of_row(width), swizzle(wide), first // 8
    together = THREADS // lanes

    @device
    def convert(target, source, stride, rows, thread):
        for row in range(thread // lanes, TILE, together):
            to = target + 2 * wide * row
            for piece in range(thread % lanes, pieces, lanes):
                w0, w1, w2, w3 = 0, 0, 0, 0
                if row < rows:
                    at = source + row * stride + 32 * piece
                    x0, x1, x2, x3 = ptx.load_f32x4(at)
                    x4, x5, x6, x7 = ptx.load_f32x4(at + 16)
                    w0, w1 = ptx.pack_f16x2(x0, x1), ptx.pack_f16x2(x2, x3)
                    w2, w3 = ptx.pack_f16x2(x4, x5), ptx.pack_f16x2(x6, x7)
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


# The kernels.


@device
def _shares(length, splits):
    """Tiles of a token that sees `length` positions, and the blocks that share them: all that are worth it."""
    tiles = length + TILE - 1 >> 5
    return tiles, max(1, min(splits, tiles >> 2))


@device
def _boundary(tiles, shares, share):
    """The first tile of a share; all blocks compute it alike. Shares differ by one tile at most."""
    return ptx.nearest_int(ptx.to_f32(tiles * share) * ptx.rcp(ptx.to_f32(shares)))


@device
def _write_part(at, scores):
    """A warp's part of the scores; the address is this lane's."""
    s0, s1, s2, s3 = scores
    ptx.store_shared_f32x4(at, s0[0], s0[1], s0[2], s0[3])
    ptx.store_shared_f32x4(at + 512, s1[0], s1[1], s1[2], s1[3])
    ptx.store_shared_f32x4(at + 1024, s2[0], s2[1], s2[2], s2[3])
    ptx.store_shared_f32x4(at + 1536, s3[0], s3[1], s3[2], s3[3])


@device
def _whole_score(at):
    """Four scores of this lane: the sum of the warps' parts."""
    a0, a1, a2, a3 = ptx.load_shared_f32x4(at)
    b0, b1, b2, b3 = ptx.load_shared_f32x4(at + 2048)
    c0, c1, c2, c3 = ptx.load_shared_f32x4(at + 4096)
    d0, d1, d2, d3 = ptx.load_shared_f32x4(at + 6144)
    return (a0 + b0) + (c0 + d0), (a1 + b1) + (c1 + d1), (a2 + b2) + (c2 + d2), (a3 + b3) + (c3 + d3)


class _Layout:
    """Shared memory of a block: offsets in bytes, and how far the second one of two is behind the first.

    Two tiles, and the parts of the scores. For q8_0 one tile, and two of rows in their own type; once they are
    unpacked, parts of the scores take their place.
    """

    def __init__(self, qtype, rank, rope):
        tile = 2 * TILE * (rank + rope)
        if qtype == ggml.Q8_0:
            self.next_tile, self.parts = 0, tile
            self.next_parts = max(PARTS, TILE * (ggml.row_bytes(qtype, rank) + 2 * rope))
            self.nbytes = tile + 2 * self.next_parts
        else:
            self.next_tile, self.parts, self.next_parts = tile, 2 * tile, 0
            self.nbytes = 2 * tile + PARTS


@functools.cache
def absorbed_kernel(qtype, rank, rope):
    """The kernel for a cache type and sizes, and its bytes of shared memory."""
    layout = _Layout(qtype, rank, rope)
    mma, pack = (ptx.mma_bf16, ptx.pack_bf16x2) if qtype == ggml.BF16 else (ptx.mma_f16, ptx.pack_f16x2)
    size, steps, groups = rank + rope, (rank + rope) // 16, rank // 16
    own_steps, own_groups = -(-steps // WARPS), -(-groups // WARPS)
    latent_bytes = ggml.row_bytes(qtype, rank)
    rope_bytes = ggml.row_bytes(ggml.F16 if qtype == ggml.Q8_0 else qtype, rope)
    next_tile, at_parts, next_parts = layout.next_tile, layout.parts, layout.next_parts
    softmax, no_values, indices = online_softmax(pack), ((ZERO,) * 8,) * own_groups, tuple(range(own_steps))
    queries_of_warp = unrolled(load_queries(pack, size), own_steps)
    scores_of_warp = folded(scores_of(mma, size, WARPS), own_steps)
    values_of_warp = unrolled(values_of(mma, rank, size, WARPS), own_groups)
    store_columns = unrolled(store_values, own_groups)

    if qtype == ggml.Q8_0:
        fetch_latent, fetch_rope, unpack = copy_whole(latent_bytes), copy_whole(rope_bytes), unpack_blocks(rank, rope)

        @device
        def fetch(base, stage, cache, slot, seen, thread):
            at = base + at_parts + stage * next_parts
            fetch_latent(at, cache[0] + slot * latent_bytes, seen, thread)
            fetch_rope(at + TILE * latent_bytes, cache[1] + slot * rope_bytes, seen, thread)
            ptx.cp_async_commit()

        @device
        def prepare(base, stage, thread):
            unpack(base, base + at_parts + stage * next_parts, thread)
            cuda.syncthreads()

    else:
        rows = convert_rows if qtype == ggml.F32 else copy_rows
        fetch_latent, fetch_rope = rows(rank, size, 0), rows(rope, size, rank)

        @device
        def fetch(base, stage, cache, slot, seen, thread):
            at = base + stage * next_tile
            fetch_latent(at, cache[0] + slot * latent_bytes, latent_bytes, seen, thread)
            fetch_rope(at, cache[1] + slot * rope_bytes, rope_bytes, seen, thread)
            ptx.cp_async_commit()

        @device
        def prepare(base, stage, thread):
            pass

    @kernel(
        I64, types.UniTuple(I64, 2), types.Tuple((I1, I1, I2)), F32, I32, I32, types.UniTuple(I64, 2), I64,
        variant=f"{ggml.NAME[qtype].lower()},{rank},{rope}", max_threads=THREADS, min_blocks=2,
    )  # fmt: skip
    def absorbed(q, cache, step, scale, heads, splits, partial, out):
        """Values of a token, 16 heads and a share of the positions; ``partial`` are addresses of unnormalised values
        (T, splits, H, rank), and of maxima and sums (T, splits, H, 2). A share that is all goes to `out` at once.

        Grid: splits, groups of heads, tokens.
        """
        split, head, t = cuda.blockIdx.x, HEADS * cuda.blockIdx.y, cuda.blockIdx.z
        positions, seq_of, tables = step
        length, sequence = positions[t] + 1, seq_of[t]
        tiles, shares = _shares(length, splits)
        if split >= shares:
            return
        begin, end = _boundary(tiles, shares, split), _boundary(tiles, shares, split + 1)
        thread = cuda.threadIdx.x
        warp, lane = thread >> 5, thread & 31
        base = ptx.shared_address(cuda.shared.array(0, np.int32, alignment=16))
        slot = tables[sequence, begin >> 1] * PAGE + (begin & 1) * TILE
        fetch(base, 0, cache, slot, length - TILE * begin, thread)
        upper, lower = t * heads + head + (lane >> 2), t * heads + head + (lane >> 2) + 8
        there = head + (lane >> 2) < heads, head + (lane >> 2) + 8 < heads
        wanted = own_steps * warp, q + 4 * size * upper, q + 4 * size * lower, there, scale, lane
        a = queries_of_warp(0, indices, wanted)
        o, state = no_values, (-INFINITY, -INFINITY, ZERO, ZERO)
        key, of_values = key_row(lane), value_row(lane)
        stage = 0
        for tile in range(begin, end):
            ptx.cp_async_wait(0)
            cuda.syncthreads()
            if tile + 1 < end:
                slot = tables[sequence, tile + 1 >> 1] * PAGE + (tile + 1 & 1) * TILE
                fetch(base, stage ^ 1, cache, slot, length - TILE * (tile + 1), thread)
            prepare(base, stage, thread)
            at = base + stage * next_tile
            part = scores_of_warp(0, a, NO_SCORES, (own_steps * warp, at + 2 * size * key[0], key))
            parts = base + at_parts + stage * next_parts + 16 * lane
            _write_part(parts + 2048 * warp, part)
            cuda.syncthreads()
            scores = (
                _whole_score(parts),
                _whole_score(parts + 512),
                _whole_score(parts + 1024),
                _whole_score(parts + 1536),
            )
            seen = length - TILE * tile
            weights, shrink, state = softmax(scores, (seen, seen), state, lane)
            columns = weights, shrink, own_groups * warp, at + 2 * size * of_values[0], of_values
            o = values_of_warp(0, o, columns)
            stage ^= 1
        m0, m1, l0, l1 = state
        l0, l1 = ptx.group_sum(l0, 4), ptx.group_sum(l1, 4)
        if shares == 1:
            factors, to = (ptx.rcp(l0), ptx.rcp(l1)), out
        else:
            factors, to = (np.float32(1), np.float32(1)), partial[0]
            upper += (t * (splits - 1) + split) * heads
            lower += (t * (splits - 1) + split) * heads
            if warp == 0 and lane & 3 == 0:
                if there[0]:
                    ptx.store_f32x2(partial[1] + 8 * upper, m0, l0)
                if there[1]:
                    ptx.store_f32x2(partial[1] + 8 * lower, m1, l1)
        upper, lower = to + 4 * rank * upper, to + 4 * rank * lower
        store_columns(0, o, (own_groups * warp, groups, upper, lower, there, factors, lane))

    return absorbed, layout.nbytes


@kernel(I1, I32, I32, I32, types.UniTuple(I64, 2), I64, max_threads=THREADS)
def _merge(positions, heads, rank, splits, partial, out):
    """Bring the shares of a token and head together: values weighted by ``2 ** (their maximum - the largest)``. Each
    warp takes some of the shares, a lane four columns.

    Grid: groups of `COLUMNS` columns, heads, tokens.
    """
    maxima = cuda.shared.array(WARPS, np.float32)
    sums = cuda.shared.array(WARPS, np.float32)
    values = cuda.shared.array((WARPS, COLUMNS), np.float32, alignment=16)
    head, t = cuda.blockIdx.y, cuda.blockIdx.z
    _, shares = _shares(positions[t] + 1, splits)
    if shares == 1:
        return
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    column = COLUMNS * cuda.blockIdx.x + 4 * lane
    largest, total = -INFINITY, ZERO
    v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
    for share in range(warp, shares, WARPS):
        row = (t * splits + share) * heads + head
        m, l = ptx.load_f32x2(partial[1] + 8 * row)  # noqa: E741
        x0, x1, x2, x3 = ZERO, ZERO, ZERO, ZERO
        if column < rank:
            x0, x1, x2, x3 = ptx.load_f32x4(partial[0] + 4 * (row * rank + column))
        new = ptx.fmax(m, largest)
        old, weight = ptx.exp2(largest - new), ptx.exp2(m - new)
        largest, total = new, ptx.fma(total, old, l * weight)
        v0, v1 = ptx.fma(v0, old, x0 * weight), ptx.fma(v1, old, x1 * weight)
        v2, v3 = ptx.fma(v2, old, x2 * weight), ptx.fma(v3, old, x3 * weight)
    if lane == 0:
        maxima[warp], sums[warp] = largest, total
    ptx.store_shared_f32x4(ptx.shared_address(values) + 4 * (COLUMNS * warp + 4 * lane), v0, v1, v2, v3)
    cuda.syncthreads()
    column = COLUMNS * cuda.blockIdx.x + cuda.threadIdx.x
    largest = maxima[0]
    for other in range(1, WARPS):
        largest = ptx.fmax(largest, maxima[other])
    total, value = ZERO, ZERO
    for other in range(WARPS):
        weight = ptx.exp2(maxima[other] - largest)
        total = ptx.fma(sums[other], weight, total)
        value = ptx.fma(values[other, cuda.threadIdx.x], weight, value)
    if column < rank:
        ptx.store_f32(out + 4 * ((t * heads + head) * rank + column), value * ptx.rcp(total))


def absorbed(q, latent, rope, step, scale, out, splits=None):
    """Attention in the latent space: `q` float32 (T, H, rank + R), `out` float32 (T, H, rank), both contiguous.

    Parameters
    ----------
    splits : int, optional
        Blocks that share the positions of a token at most. By default as many as fill the device twice.
    """
    tokens, heads, rank = out.shape
    size = q.shape[2]
    if rank % 16 or (size - rank) % 16:
        raise PymlaError(f"attention on tensor cores needs sizes that 16 divides, not {rank} and {size - rank}")
    for array in (q, out):
        if not array.contiguous or array.dtype != np.float32:
            raise ValueError(f"expected contiguous float32, not {array.dtype} with strides {array.strides}")
    groups = -(-heads // HEADS)
    if splits is None:
        most = step.block_tables.shape[1] * (PAGE // TILE) // LEAST_TILES
        splits = max(1, min(most, 2 * multiprocessors() // max(1, tokens * groups)))
    values = empty((tokens, splits, heads, rank) if splits > 1 else 0, np.float32)
    sums = empty((tokens, splits, heads, 2) if splits > 1 else 0, np.float32)
    launched, shared_bytes = absorbed_kernel(latent.qtype, rank, size - rank)
    partial = values.address, sums.address
    cache, of_step = (latent.data.address, rope.data.address), (step.positions, step.seq_of, step.block_tables)
    launched[(splits, groups, tokens), THREADS, shared_bytes](
        q.address, cache, of_step, scale * LOG2E, heads, splits, partial, out.address
    )
    if splits > 1:
        blocks = -(-rank // COLUMNS), heads, tokens
        _merge[blocks, THREADS](step.positions, heads, rank, splits, partial, out.address)
    return out


for _qtype in (ggml.F32, ggml.F16, ggml.BF16, ggml.Q8_0):
    absorbed_kernel(_qtype, 512, 64)
