"""Two panels of weights, unpacked: how they lie in scratch memory, and how rows become them.

A panel is `LANES` rows side by side, as ``[K / 4][LANES][4]`` codes, so that four activations, broadcast, meet four
weights of every row in one instruction. A product has two panels, of `CHUNK` columns of K at a time, which stay in the
first-level cache.
"""

from typing import NamedTuple

from pymla.cpu.formats.panels import DECODED_ROW
from pymla.cpu.machine.simd import prefetch_l2
from pymla.cpu.machine.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.machine.simd_panels import panel_rows
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import AMX, LANES

#: Rows of a product: those of two panels.
PAIR_ROWS = 2 * LANES
#: Bytes of the results of one column of activations: a float32 for each row.
RESULT_BYTES = 4 * PAIR_ROWS
#: Columns of K that are unpacked at a time: two panels and their scales stay in the first-level cache, beside what
#: tiles of AMX need there.
CHUNK = 256 if AMX else 512
#: Bytes of scratch of a product: codes, scales and minima of two panels, sums of tiles, and rows of a panel that are
#: decoded before they are transposed.
SCRATCH = PAIR_ROWS * (CHUNK + 2 * 4 * CHUNK // 16) + TILE_SCRATCH + LANES * DECODED_ROW
#: Where the first panel's codes, scales and minima, the sums of tiles and decoded rows begin in scratch, and how far
#: behind them those of the second panel.
CODES, SCALES, MINIMA = 0, PAIR_ROWS * CHUNK, PAIR_ROWS * (CHUNK + CHUNK // 4)
SUMS = PAIR_ROWS * (CHUNK + 2 * CHUNK // 4)
DECODED = SUMS + TILE_SCRATCH
NEXT_CODES, NEXT_SCALES, NEXT_MINIMA = LANES * CHUNK, LANES * (CHUNK // 4), LANES * (CHUNK // 4)


class PairOfRows(NamedTuple):
    """Two groups of up to `LANES` rows of weights, each of which becomes a panel. Lanes past the end of a group repeat
    its last row."""

    first: int  # address of the first row of the first group
    second: int  # address of the first row of the second group
    first_count: int
    second_count: int
    stride: int  # bytes from row to row
    following: int  # bytes from each row to the one that the caller takes next, which is prefetched


class Chunk(NamedTuple):
    """Columns of K that are unpacked."""

    k: int  # columns of a row
    start: int  # the first unpacked column
    blocks: int  # of 32 columns


@helper
def two_groups(row, stride, count):
    """Up to `PAIR_ROWS` rows that follow each other as a `PairOfRows`. Where they make no second group, the last row
    of the first stands in for it. The caller takes the rows behind them next."""
    following = PAIR_ROWS * stride
    if count > LANES:
        return PairOfRows(row, row + LANES * stride, LANES, count - LANES, stride, following)
    return PairOfRows(row, row + (count - 1) * stride, count, 1, stride, following)


def unpack_pair_for(unpack):
    """Make a function ``(rows, start, blocks, scratch)``: blocks of 32 columns of a `PairOfRows`, from column `start`
    on, as two panels. `unpack` is that of a type."""

    @helper
    def unpack_pair(rows, start, blocks, scratch):
        for half in range(2):
            row, count = (rows.first, rows.first_count) if half == 0 else (rows.second, rows.second_count)
            unpack(
                panel_rows(row, rows.stride, count),
                start // 32,
                blocks,
                scratch + CODES + half * NEXT_CODES,
                scratch + SCALES + half * NEXT_SCALES,
                scratch + MINIMA + half * NEXT_MINIMA,
                scratch + DECODED,
            )

    return unpack_pair


@helper
def prefetch_rows(rows, asked, count, offset, nbytes):
    """Prefetch `nbytes` of up to `count` rows of a `PairOfRows`, from `offset` bytes behind each row's beginning on,
    the first `asked` rows of which have been prefetched. Returns how many have been then."""
    for _ in range(count):
        if asked < rows.first_count + rows.second_count:
            row = rows.first + asked * rows.stride
            if asked >= rows.first_count:
                row = rows.second + (asked - rows.first_count) * rows.stride
            for at in range(0, nbytes, 64):
                prefetch_l2(row + offset + at)
            asked += 1
    return asked
