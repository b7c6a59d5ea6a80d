"""Tiles of AMX: two panels of codes of up to 5 bits times sixteen columns of activations.

Codes have a sign here, so that sums begin with zero. Codes of activations lie as tiles take them (`empty_columns`).
"""

import numpy as np

from pymla.cpu.machine.simd import address, load_f32xL, splat_f32xL, store_f32xL
from pymla.cpu.machine.simd_amx import (
    BLOCK,
    SUMS,
    add_rows_to,
    add_scaled_sums,
    dot_tiles,
    load_tile,
    store_four,
    store_tile,
    zero_rows,
    zero_tile,
)
from pymla.cpu.matmul.unpacked import CODES, NEXT_CODES, NEXT_SCALES, RESULT_BYTES, SCALES
from pymla.cpu.matmul.unpacked import SUMS as SUMS_OF_TILES
from pymla.cpu.memory import empty
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import AMX, LANES

#: Columns of a tile.
TILE_COLUMNS = 16
#: Columns behind the last one that tiles read, and whose results they write.
SPARE_COLUMNS = TILE_COLUMNS - 1 if AMX else 0

_PANEL = 16 * BLOCK  # bytes of a block of sixteen rows
_ROW = 64  # bytes of sixteen float32


def empty_columns(columns: int, k: int) -> np.ndarray:
    """Memory for codes of so many columns, int8 (K / 32, bytes): block after block, and in a block column after column.

    The bytes from block to block are not a multiple of 4,096, nor near one, so that the blocks of sixteen columns have
    room side by side in the first-level cache.
    """
    lines = -(-BLOCK * (columns + SPARE_COLUMNS) // 64)
    lines += (9 - lines) % 16
    return empty((k // BLOCK, 64 * lines), np.int8)


@helper
def sources(x):
    """What `add_columns` reads of an `activations.Input`: addresses of codes and scales, and the bytes from a block's
    codes to the next block's."""
    return address(x.codes), address(x.scale), x.codes.shape[1]


@helper
def clear(results, columns):
    """Set the results of some columns, rounded up to whole tiles, to zero."""
    nothing = splat_f32xL(np.float32(0))
    tiles = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    for at in range(0, tiles * TILE_COLUMNS * RESULT_BYTES, 4 * LANES):
        store_f32xL(results + at, nothing)


@helper
def add_columns(x, index, i, last, chunk, scratch, out):
    """Add two panels times the sixteen columns from the i-th on to the results, as `add_columns` of `tile_32`; but
    results of the first chunk are added as well (`clear`), and activations follow each other
    (`activations.consecutive`)."""
    codes, scales, step = x
    column = np.int64(index[i])
    scale_bytes = chunk.k // 8
    codes += chunk.start // 32 * step + BLOCK * column
    scales += column * scale_bytes + chunk.start // 8
    for half in range(2):
        add_panel(
            codes,
            step,
            scales,
            scale_bytes,
            chunk.blocks,
            scratch + CODES + half * NEXT_CODES,
            scratch + SCALES + half * NEXT_SCALES,
            scratch + SUMS_OF_TILES,
            out + RESULT_BYTES * i + half * 4 * LANES,
        )


@helper
def add_panel(x, x_bytes, scales, scale_bytes, blocks, panel, panel_scales, scratch, out):
    """Add a panel times sixteen columns to the results.

    Parameters
    ----------
    x, x_bytes : int
        Address of the first column's codes, `BLOCK` from column to column, and bytes from block to block.
    scales, scale_bytes : int
        Address of its scales, and bytes from column to column.
    blocks : int
        Of 32 codes.
    panel, panel_scales : int
        Addresses of the codes and of the scales, (blocks, 16), of sixteen rows of weights.
    scratch : int
        Address of `simd_amx.SCRATCH` bytes.
    out : int
        Address of the first column's results of this panel, float32 (16,).
    """
    rows, fours = zero_rows(), blocks // 4
    if fours:
        _dot_four(x, x_bytes, panel)
        store_four(scratch)
        # The processor multiplies the next four blocks while the sums of the last four are scaled.
        for _ in range(fours - 1):
            x, panel = x + 4 * x_bytes, panel + 4 * _PANEL
            _dot_four(x, x_bytes, panel)
            rows = _scale_four(rows, scratch, panel_scales, scales, scale_bytes)
            store_four(scratch)
            panel_scales, scales = panel_scales + 4 * _ROW, scales + 16
        rows = _scale_four(rows, scratch, panel_scales, scales, scale_bytes)
        x, panel, panel_scales, scales = x + 4 * x_bytes, panel + 4 * _PANEL, panel_scales + 4 * _ROW, scales + 16
    for _ in range(blocks % 4):
        zero_tile(0)
        load_tile(4, x, BLOCK)
        load_tile(6, panel, 64)
        dot_tiles(0, 4, 6)
        store_tile(0, scratch, 64)
        rows = add_scaled_sums(rows, scratch, load_f32xL(panel_scales), scales, scale_bytes)
        x, panel, panel_scales, scales = x + x_bytes, panel + _PANEL, panel_scales + _ROW, scales + 4
    add_rows_to(out, RESULT_BYTES, rows)


@inlined
def _dot_four(x, x_bytes, panel):
    """Products of four blocks, in tiles 0 to 3."""
    zero_tile(0)
    load_tile(4, x, BLOCK)
    load_tile(6, panel, 64)
    dot_tiles(0, 4, 6)
    zero_tile(1)
    load_tile(5, x + x_bytes, BLOCK)
    load_tile(7, panel + _PANEL, 64)
    dot_tiles(1, 5, 7)
    zero_tile(2)
    load_tile(4, x + 2 * x_bytes, BLOCK)
    load_tile(6, panel + 2 * _PANEL, 64)
    dot_tiles(2, 4, 6)
    zero_tile(3)
    load_tile(5, x + 3 * x_bytes, BLOCK)
    load_tile(7, panel + 3 * _PANEL, 64)
    dot_tiles(3, 5, 7)


@inlined
def _scale_four(rows, sums, panel_scales, scales, scale_bytes):
    """Add the sums of four tiles, scaled."""
    rows = add_scaled_sums(rows, sums, load_f32xL(panel_scales), scales, scale_bytes)
    rows = add_scaled_sums(rows, sums + SUMS, load_f32xL(panel_scales + _ROW), scales + 4, scale_bytes)
    rows = add_scaled_sums(rows, sums + 2 * SUMS, load_f32xL(panel_scales + 2 * _ROW), scales + 8, scale_bytes)
    return add_scaled_sums(rows, sums + 3 * SUMS, load_f32xL(panel_scales + 3 * _ROW), scales + 12, scale_bytes)
