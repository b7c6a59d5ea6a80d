"""Tiles of cache rows in shared memory, for attention on tensor cores.

A tile is 32 rows of 16-bit values without gaps. A row's pieces of 16 bytes are permuted by the row's number, so that
eight rows of a matrix, which are read together, lie in different banks. Functions here make device functions for
sizes and types.
"""

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device
from pymla.errors import PymlaError

#: Positions that a block takes at a time; a page is a multiple.
TILE = 32
#: Warps and threads of a block of every form of attention.
WARPS = 4
THREADS = WARPS * ptx.WARP


def need_multiples_of_16(*sizes):
    """Raise where a row's values do not fill the tensor cores' steps."""
    if any(size % 16 for size in sizes):
        raise PymlaError(f"attention on tensor cores needs sizes that 16 divides, not {' and '.join(map(str, sizes))}")


def factor_type(*qtypes):
    """The type of the tensor cores' factors for rows of some cache types: bfloat16 where all are, else float16."""
    return ggml.BF16 if set(qtypes) == {ggml.BF16} else ggml.F16


def variant_of(qtypes, *sizes):
    """The variant of a kernel for some cache types, each named once, and sizes."""
    return ",".join([*dict.fromkeys(ggml.NAME[qtype].lower() for qtype in qtypes), *map(str, sizes)])


def swizzle(width):
    """The bits of a row's number that permute the pieces of rows of `width` 16-bit values; a multiple of 16."""
    pieces = width // 8
    return min(8, pieces & -pieces) - 1


def lanes_of_row(width):
    """Neighbouring threads that copy a row of `width` values, 8 at a time: a power of two."""
    return min(ptx.WARP, 1 << (width // 8).bit_length() - 1)


def fetch_rows(qtype, factor, width, wide=None, first=0):
    """A device function that begins to copy rows of `width` values of a cache type into a tile of type `factor`.

    (target, source, stride, rows, thread): rows at `source`, `stride` bytes apart; past `rows` of them come zeros.
    The tile's rows have `wide` values, as many by default, and these begin at value `first`. Rows that are converted
    are there when it returns.
    """
    wide = wide or width
    if qtype == factor:
        return _copy_rows(width, wide, first)
    return _convert_rows(CACHE_ROWS[qtype].halves, width, wide, first)


def _copy_rows(width, wide, first):
    """`fetch_rows` of 16-bit values as they are (``cp.async``)."""
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


def _convert_rows(halves, width, wide, first):
    """`fetch_rows` with eight values at a time through registers."""
    pieces, lanes, mask, skip = width // 8, lanes_of_row(width), swizzle(wide), first // 8
    together = THREADS // lanes

    @device
    def convert(target, source, stride, rows, thread):
        for row in range(thread // lanes, TILE, together):
            to = target + 2 * wide * row
            for piece in range(thread % lanes, pieces, lanes):
                w0, w1, w2, w3 = 0, 0, 0, 0
                if row < rows:
                    w0, w1, w2, w3 = halves(source + row * stride, piece)
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


def unpack_rows(qtype, rank, rope):
    """A device function (target, source, thread) that makes a tile of rows in shared memory, as `copy_whole` left them:
    rows of `rank` values of a cache type with blocks, and behind them rows of `rope` float16."""
    halves, row_bytes, size = CACHE_ROWS[qtype].shared_halves, ggml.row_bytes(qtype, rank), rank + rope
    pieces, lanes, mask = rank // 8, lanes_of_row(rank), swizzle(size)
    rope_pieces, rope_lanes = rope // 8, lanes_of_row(rope)

    @device
    def unpack(target, source, thread):
        for row in range(thread // lanes, TILE, THREADS // lanes):
            to = target + 2 * size * row
            for piece in range(thread % lanes, pieces, lanes):
                h0, h1, h2, h3 = halves(source + row_bytes * row, piece)
                ptx.store_shared_u32x4(to + 16 * (piece ^ (row & mask)), h0, h1, h2, h3)
        for row in range(thread // rope_lanes, TILE, THREADS // rope_lanes):
            to, at = target + 2 * size * row, source + TILE * row_bytes + 2 * rope * row
            for piece in range(thread % rope_lanes, rope_pieces, rope_lanes):
                w0, w1, w2, w3 = ptx.load_shared_u32x4(at + 16 * piece)
                ptx.store_shared_u32x4(to + 16 * ((pieces + piece) ^ (row & mask)), w0, w1, w2, w3)

    return unpack
