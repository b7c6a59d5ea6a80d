"""Tiles of cache rows in shared memory, for attention on tensor cores.

A tile is 32 rows of 16-bit values without gaps. A row's pieces of 16 bytes are permuted by the row's number, so that
eight rows of a matrix, which are read together, lie in different banks. Functions here make device functions for
sizes and types.

The rows of a tile are neighbours in the cache (`IN_ORDER`), or lie in slots of their own (`chosen_rows`), of which lane
r of every warp knows that of row r.
"""

from functools import partial
from typing import NamedTuple

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


@device
def _in_order(address, stride, slot):
    return address + stride * slot


def _copy_rows_in_order(width, wide, first):
    """`RowOrder.copy_rows` of neighbours."""
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


def _convert_rows_in_order(halves, width, wide, first):
    """`RowOrder.convert_rows` of neighbours."""
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


def _copy_whole_in_order(row_bytes):
    """`RowOrder.copy_whole` of neighbours, which are one piece of memory."""

    @device
    def copy(target, source, rows, thread):
        for at in range(16 * thread, TILE * row_bytes, 16 * THREADS):
            left = min(max(rows * row_bytes - at, 0), 16)
            ptx.cp_async_16(target + at, source + (at if left else 0), left)

    return copy


# Of chosen rows a thread copies a part of one, because the addresses of several take too many registers.


@device
def _chosen(address, stride, slots):
    return address, slots


@device
def _chosen_row(source, stride, row):
    """The address of a row; all lanes of a warp come here together."""
    return source[0] + stride * ptx.shfl_idx(source[1], row)


def _copy_chosen_rows(lanes, width, wide, first):
    """`RowOrder.copy_rows` of chosen rows, with so many threads for each."""
    pieces, mask, skip = width // 8, swizzle(wide), first // 8

    @device
    def copy(target, source, stride, rows, thread):
        row = thread // lanes
        to, at, nbytes = target + 2 * wide * row, _chosen_row(source, stride, row), 16 if row < rows else 0
        for piece in range(thread % lanes, pieces, lanes):
            ptx.cp_async_16(to + 16 * ((skip + piece) ^ (row & mask)), at + 16 * piece, nbytes)

    return copy


def _convert_chosen_rows(lanes, halves, width, wide, first):
    """`RowOrder.convert_rows` of chosen rows."""
    pieces, mask, skip = width // 8, swizzle(wide), first // 8

    @device
    def convert(target, source, stride, rows, thread):
        row = thread // lanes
        to, at = target + 2 * wide * row, _chosen_row(source, stride, row)
        for piece in range(thread % lanes, pieces, lanes):
            w0, w1, w2, w3 = 0, 0, 0, 0
            if row < rows:
                w0, w1, w2, w3 = halves(at, piece)
            ptx.store_shared_u32x4(to + 16 * ((skip + piece) ^ (row & mask)), w0, w1, w2, w3)

    return convert


def _copy_chosen_whole(lanes, row_bytes):
    """`RowOrder.copy_whole` of chosen rows."""

    @device
    def copy(target, source, rows, thread):
        row = thread // lanes
        at, nbytes = _chosen_row(source, row_bytes, row), 16 if row < rows else 0
        for byte in range(16 * (thread % lanes), row_bytes, 16 * lanes):
            ptx.cp_async_16(target + row_bytes * row + byte, at + byte, nbytes)

    return copy


class RowOrder(NamedTuple):
    """How the rows of a tile lie in the cache: functions that make device functions, for rows of several types."""

    #: Device function (address, stride, place): a `source` of rows. `address` is that of slot 0, `stride` the bytes
    #: from slot to slot; `place` says which slots.
    source: object
    #: (width, wide, first): what `fetch_rows` gives, for rows of the factors' type.
    copy_rows: object
    #: (halves, width, wide, first): the same for rows that ``CacheRows.halves`` reads.
    convert_rows: object
    #: (row_bytes): a device function (target, source, rows, thread) that begins to copy the rows of a tile as they are,
    #: one behind the other.
    copy_whole: object
    #: `copy_whole` takes rows of a multiple of so many bytes.
    alignment: int
    #: Threads that copy a tile together.
    threads: int


#: A tile's rows are in neighbouring slots; `place` is the first of them.
IN_ORDER = RowOrder(_in_order, _copy_rows_in_order, _convert_rows_in_order, _copy_whole_in_order, 1, THREADS)


def chosen_rows(threads):
    """The `RowOrder` of rows in any slots, copied by so many threads; `place` of lane r is that of row r."""
    makers = (partial(make, threads // TILE) for make in (_copy_chosen_rows, _convert_chosen_rows, _copy_chosen_whole))
    return RowOrder(_chosen, *makers, 16, threads)


def fetch_rows(qtype, factor, width, wide=None, first=0, order=IN_ORDER):
    """A device function that begins to copy rows of `width` values of a cache type into a tile of type `factor`.

    (target, source, stride, rows, thread): rows of a `source` of `order`, `stride` bytes from slot to slot; past `rows`
    of them come zeros. The tile's rows have `wide` values, as many by default, and these begin at value `first`. Rows
    of 16-bit values are copied by ``cp.async``; rows that are converted are there when it returns.
    """
    wide = wide or width
    if qtype == factor:
        return order.copy_rows(width, wide, first)
    return order.convert_rows(CACHE_ROWS[qtype].halves, width, wide, first)


def unpack_rows(qtype, rank, rope, threads):
    """A device function (target, source, thread) with which so many threads make a tile of rows in shared memory, as
    `RowOrder.copy_whole` left them: rows of `rank` values of a cache type with blocks, and behind them rows of `rope`
    float16, which may be 0."""
    halves, row_bytes, size = CACHE_ROWS[qtype].shared_halves, ggml.row_bytes(qtype, rank), rank + rope
    pieces, lanes, mask = rank // 8, lanes_of_row(rank), swizzle(size)
    rope_pieces, rope_lanes = rope // 8, lanes_of_row(rope) if rope else 1

    @device
    def unpack(target, source, thread):
        for row in range(thread // lanes, TILE, threads // lanes):
            to = target + 2 * size * row
            for piece in range(thread % lanes, pieces, lanes):
                h0, h1, h2, h3 = halves(source + row_bytes * row, piece)
                ptx.store_shared_u32x4(to + 16 * (piece ^ (row & mask)), h0, h1, h2, h3)
        for row in range(thread // rope_lanes, TILE, threads // rope_lanes):
            to, at = target + 2 * size * row, source + TILE * row_bytes + 2 * rope * row
            for piece in range(thread % rope_lanes, rope_pieces, rope_lanes):
                w0, w1, w2, w3 = ptx.load_shared_u32x4(at + 16 * piece)
                ptx.store_shared_u32x4(to + 16 * ((pieces + piece) ^ (row & mask)), w0, w1, w2, w3)

    return unpack
