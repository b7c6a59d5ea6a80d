"""Blocks of queries of one head that share the reading of keys and values, in float32.

The expanded form and attention over whole keys and values take the rows of the cache a page at a time into the online
softmax of a block (`pymla.cpu.attention.softmax`).
"""

from typing import NamedTuple

import numpy as np

from pymla.cpu.attention.softmax import query_softmax
from pymla.cpu.machine.simd import address, load_f32, load_f32x8, splat_f32, store_f32, store_f32x8
from pymla.cpu.matmul.gemm_f32 import tile_f32, transpose_panel
from pymla.cpu.memory import allocate
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE

#: Most queries of a block.
BLOCK_QUERIES = 64
#: Keys that become a panel at a time, and dimensions of a tile of values.
_TILE_COLUMNS = 16


class QueryBlock(NamedTuple):
    """Addresses of the queries of a block, their online softmax, and scratch, all float32, and sizes."""

    queries: int  # (BLOCK_QUERIES, size): scaled
    panel: int  # (size, 16): scratch for keys, side by side
    scores: int  # (BLOCK_QUERIES, PAGE); in the end softmax weights
    values: int  # (PAGE, width): scratch
    state: int  # (BLOCK_QUERIES, 2): running maximum and sum
    result: int  # (BLOCK_QUERIES, width): accumulated values
    size: int  # numbers of a key
    v: int  # numbers of a value
    width: int  # v, padded to whole tiles


class Page(NamedTuple):
    """Rows of keys and values, float32, at positions that follow each other."""

    keys: int  # address of the first row
    values: int
    key_stride: int  # bytes from row to row
    value_stride: int
    first: int  # position of the first row
    seen: int  # rows, at most PAGE


@helper
def block_memory(size, v):
    """Memory for blocks with keys of `size` and values of `v` numbers: zeros, as tiles compute with the padding."""
    width = _padded(v)
    of_query, of_page = size + PAGE + 2 + width, width
    memory = allocate(4 * (BLOCK_QUERIES * of_query + PAGE * of_page + size * _TILE_COLUMNS))
    memory[:] = 0
    return memory


@helper
def start_block(memory, q, h, scale, v):
    """A block of queries (T, H, size) of head `h`, times a scale, with an empty online softmax, in `block_memory`."""
    count, _, size = q.shape
    width = _padded(v)
    queries = address(memory)
    panel = queries + 4 * BLOCK_QUERIES * size
    scores = panel + 4 * size * _TILE_COLUMNS
    values = scores + 4 * BLOCK_QUERIES * PAGE
    result = values + 4 * PAGE * width
    state = result + 4 * BLOCK_QUERIES * width
    for i in range(count):
        for j in range(size):
            store_f32(queries + 4 * (i * size + j), q[i, h, j] * np.float32(scale))
        store_f32(state + 8 * i, np.float32(-np.inf))
        store_f32(state + 8 * i + 4, np.float32(0))
        for j in range(0, 4 * width, 32):
            store_f32x8(result + 4 * i * width + j, splat_f32(np.float32(0)))
    return QueryBlock(queries, panel, scores, values, state, result, size, v, width)


@helper
def _padded(v):
    """`v`, padded to whole tiles."""
    return (v + _TILE_COLUMNS - 1) // _TILE_COLUMNS * _TILE_COLUMNS


@helper
def rows_seen(positions):
    """Rows that at least one of the queries at some positions sees."""
    largest = positions[0]
    for position in positions:
        largest = max(largest, position)
    return largest + 1


@helper
def attend_page(page, positions, block):
    """Take a `Page` into the online softmax of a block, whose queries have some positions."""
    size, width, seen = block.size, block.width, page.seen
    count = len(positions)
    # Tiles have four queries: those past the last query are computed, and not used.
    rows = (count + 3) // 4 * 4
    for s in range(0, seen, _TILE_COLUMNS):
        keys = page.keys + s * page.key_stride
        transpose_panel(keys, page.key_stride, min(_TILE_COLUMNS, seen - s), size, block.panel)
        for i in range(0, rows, 4):
            at = block.scores + 4 * (PAGE * i + s)
            tile_f32(
                block.queries + 4 * size * i, 4 * size, 8 * size, 12 * size, 4,
                block.panel, 64, size, at, 4 * PAGE, False,
            )  # fmt: skip
    for s in range(seen):
        _copy(page.values + s * page.value_stride, block.values + 4 * width * s, block.v)
    for i in range(count):
        visible, state, result = positions[i] + 1 - page.first, block.state + 8 * i, block.result + 4 * width * i
        query_softmax(block.scores + 4 * PAGE * i, PAGE, min(seen, visible), state, result, width)
    for i in range(0, rows, 4):
        for j in range(0, block.v, _TILE_COLUMNS):
            at = block.result + 4 * (width * i + j)
            tile_f32(
                block.scores + 4 * PAGE * i, 4 * PAGE, 8 * PAGE, 12 * PAGE, 4,
                block.values + 4 * j, 4 * width, seen, at, 4 * width, True,
            )  # fmt: skip


@helper
def _copy(source, target, count):
    """Copy `count` float32 from address to address."""
    whole = count // 8 * 8
    for i in range(0, 4 * whole, 32):
        store_f32x8(target + i, load_f32x8(source + i))
    for i in range(4 * whole, 4 * count, 4):
        store_f32(target + i, load_f32(source + i))


@helper
def finish_block(block, h, out):
    """Write the values, over the softmax's sums, to head `h` of `out` (T, H, v)."""
    for i in range(out.shape[0]):
        total, result = load_f32(block.state + 8 * i + 4), block.result + 4 * block.width * i
        for j in range(block.v):
            out[i, h, j] = load_f32(result + 4 * j) / total
