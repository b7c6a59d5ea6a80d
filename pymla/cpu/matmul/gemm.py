"""Products of weights with many columns of activations (gemm), by panels: rows of weights side by side in vector lanes.

`product` unpacks two panels of weights, a slice of K at a time that stays in the innermost cache, and runs tiles over
all columns: `tile_32` and `tile_16`, and with AMX `gemm_amx`. Unpacking is amortised over the columns. Float
types go the same way in float32: `pymla.cpu.matmul.gemm_f32`.
"""

import functools
from typing import Any, NamedTuple

from pymla.cpu.formats import FORMATS
from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_amx import configure, release
from pymla.cpu.matmul import gemm_amx, tile_16, tile_32
from pymla.cpu.matmul.matrices import copy, row_at
from pymla.cpu.matmul.tile import add_minima, three_columns
from pymla.cpu.matmul.unpacked import (
    CHUNK,
    PAIR_ROWS,
    RESULT_BYTES,
    Chunk,
    prefetch_rows,
    two_groups,
    unpack_pair_for,
)
from pymla.cpu.runtime.compiling import helper


class Buffers(NamedTuple):
    """Memory of a thread for products."""

    scratch: int  # address of `unpacked.SCRATCH` bytes
    results: int  # address of float32 (columns + `gemm_amx.SPARE_COLUMNS`, PAIR_ROWS)


class Tile(NamedTuple):
    """The functions of a module of tiles."""

    sources: Any
    add_columns: Any
    widest: int  # columns of activations that `add_columns` takes


def tile_for(form):
    """The `Tile` of a quantised type's `Format`."""
    if form.takes_tiles:
        return Tile(gemm_amx.sources, gemm_amx.add_columns, gemm_amx.TILE_COLUMNS)
    if form.scale_each == 16:
        return Tile(tile_16.sources, tile_16.add_columns, tile_16.WIDEST)
    add_columns = tile_32.add_columns_for(form.code_bits, form.zero_point)
    return Tile(tile_32.sources, add_columns, tile_32.WIDEST)


@functools.cache
def product_for(take, qtype):
    """Make `product` for a quantised type and a function that takes the results: ``take(results, first, last, where)``
    has the address of those of columns `first` to `last`, `PAIR_ROWS` float32 each, as soon as they are complete, while
    a cache has them."""
    form = FORMATS[qtype]
    sources, add_columns, widest = tile_for(form)
    tiles, minimum_each, chunk_bytes = form.takes_tiles, form.minimum_each, CHUNK // 256 * form.bytes_256
    unpack_pair = unpack_pair_for(form.unpack)

    @helper
    def product(rows, k, x, index, columns, buffers, where):
        """Two groups of up to `LANES` rows of weights times columns of activations.

        Parameters
        ----------
        rows : PairOfRows
        k : int
        x : Input
            Quantised activations (T, K).
        index : int32 array
            The activations of each column; for tiles of AMX they follow each other (`activations.consecutive`).
        columns : range of int, as (first, behind the last)
            Of `index`.
        buffers : Buffers
            The results have lanes of the first group, then of the second.
        where : tuple
            The last argument of `take`.
        """
        begin, end = columns
        read, out = sources(x), buffers.results - RESULT_BYTES * begin
        rows_a_tile = -(-PAIR_ROWS * widest // (end - begin))
        if tiles:
            configure()
            gemm_amx.clear(buffers.results, end - begin)
        for start in range(0, k, CHUNK):
            chunk = Chunk(k, start, min(CHUNK, k - start) // 32)
            unpack_pair(rows, start, chunk.blocks, buffers.scratch)
            # Memory works on the rows that are unpacked next while tiles are computed.
            ahead = start // CHUNK * chunk_bytes + chunk_bytes if start + CHUNK < k else rows.following
            asked = 0
            i = begin
            while i < end:
                asked = prefetch_rows(rows, asked, rows_a_tile, ahead, chunk_bytes)
                add_columns(read, index, i, end, chunk, buffers.scratch, out)
                stop = min(i + widest, end)
                if minimum_each > 0:
                    for j in range(i, stop, 3):
                        three, results = three_columns(index, j, stop, chunk, out)
                        sums = address(x.half_sums) if minimum_each == 16 else address(x.sums)
                        add_minima(sums, minimum_each, three, chunk.blocks, buffers.scratch, results)
                if start + CHUNK >= k:
                    take(out + RESULT_BYTES * i, i, stop, where)
                i = stop
        if tiles:
            release()

    return product


@helper
def take_rows(results, first, last, where):
    """Results of columns `first` to `last` to rows of float32; `where` has the address of row 0, bytes from row to row,
    and the count of numbers."""
    at, stride, count = where
    for t in range(first, last):
        copy(results + RESULT_BYTES * (t - first), at + stride * t, count)


@functools.cache
def multiply_rows_for(qtype):
    """Make a function ``(w, matrix, begin, x, index, columns, buffers, out, out_stride)``: up to `PAIR_ROWS` rows of
    one of the `Matrices`, from row `begin` on, times columns of activations (first, behind the last). `out` is the
    address of the results of column 0, float32, and `out_stride` the bytes from column to column."""
    product = product_for(take_rows, qtype)

    @helper
    def multiply_rows(w, matrix, begin, x, index, columns, buffers, out, out_stride):
        count = min(PAIR_ROWS, w.rows - begin)
        rows = two_groups(row_at(w, matrix, begin), w.row_stride, count)
        product(rows, x.x.shape[1], x, index, columns, buffers, (out, out_stride, count))

    return multiply_rows
