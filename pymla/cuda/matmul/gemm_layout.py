"""Shared memory of a block that multiplies a tile: offsets of its parts, and orders in which lanes that access it
together are in different banks."""

import functools
from typing import NamedTuple

from pymla.cuda.formats import FORMATS
from pymla.cuda.formats.runs import Run
from pymla.cuda.matmul.operands import THREADS
from pymla.cuda.runtime.jit import device

#: Rows of a tile: each thread unpacks one of them.
TILE_ROWS = THREADS
#: Activations of a tile.
NARROW, WIDE = 64, 128
#: Slices of the columns in shared memory: one is multiplied, the others are on their way.
STAGES = 3
#: Bytes of the 64 codes of a row or activation in a slice.
SLICE = 64


class Layout(NamedTuple):
    """Sizes of a type's tile, and offsets in bytes of its parts in shared memory."""

    activations: int
    strips: int  # of 16 rows, which a warp multiplies with 64 activations
    warps_along_rows: int
    slices_of_run: int  # of a type whose own blocks are longer than a slice, several are copied at once
    row_stride: int  # from row to row of the bytes as they lie in memory
    inputs: int  # codes of activations, stage by stage
    totals: int  # sums of activations, where the type has a minimum
    factors: int  # scales of activations
    raw: int  # bytes of rows as they lie in memory
    codes: int  # unpacked codes of a slice of the rows
    numbers: int  # the rows' two numbers, of both blocks of a slice
    named_rows: int  # addresses that threads have named: of rows,
    named_codes: int  # of codes of activations,
    named_scales: int  # and of their scales
    nbytes: int


@functools.cache
def layout_of(qtype: int, activations: int) -> Layout:
    """The layout for a type, with `NARROW` or `WIDE` activations."""
    run = Run.of(qtype, 2)
    slices_of_run = run.blocks // 2
    stages_of_runs = STAGES if slices_of_run == 1 else 2
    # An odd number of pieces between rows: reads of 32 rows meet a bank as rarely as can be.
    row_stride = 16 * (run.pieces | 1) if slices_of_run == 1 else 16 * run.pieces
    strips = 2 * activations // 64
    sizes = (
        STAGES * activations * SLICE,
        STAGES * activations * 8 if FORMATS[qtype].minimum else 0,
        STAGES * activations * 8,
        stages_of_runs * TILE_ROWS * row_stride,
        TILE_ROWS * SLICE,
        TILE_ROWS * 16,
        TILE_ROWS * 8,
        activations * 8,
        64 * 16,
    )
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return Layout(activations, strips, TILE_ROWS // (16 * strips), slices_of_run, row_stride, *offsets)


def tile_widths(qtype: int) -> tuple[int, ...]:
    """Activations of the tiles that a type has. One with two products for a block would spill registers in wide
    tiles."""
    return (NARROW,) if has_two_products(qtype) else (NARROW, WIDE)


def has_two_products(qtype: int) -> bool:
    """Whether blocks have two scales, or minima, so that a tile takes two products for one."""
    return FORMATS[qtype].halves or FORMATS[qtype].minima


@device
def swizzled(row, chunk):
    """Where 16 of a row's 64 codes lie: eight rows, or two chunks of four, that are accessed together are in different
    banks."""
    return SLICE * row + 16 * (chunk ^ (row >> 1 & 3))


@device
def place_of_activation(i):
    """Where the numbers of activation i lie: of 16, a lane finds its four together."""
    return (i & -16) + 4 * (i >> 1 & 3) + 2 * (i >> 3 & 1) + (i & 1)


@device
def place_of_row(i):
    """Where the numbers of row i lie: a lane finds those of two rows that are 8 apart together."""
    return (i & -16) + 2 * (i & 7) + (i >> 3 & 1)
