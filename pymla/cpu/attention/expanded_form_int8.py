"""The expanded form on integers, over keys and values as panels of codes (`pymla.cpu.attention.key_value_panels`).

Queries become codes of 8 bits, and so do the softmax weights of 64 positions at a time, times the scales of these
positions' values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.constants import LOG2E
from pymla.cpu.attention.codes import BLOCK_BYTES, WEIGHT_GROUP, quantise_codes, quantise_weights
from pymla.cpu.attention.key_value_panels import KEY_BLOCK, KEY_BLOCK_BYTES, KEY_TOKENS, PANELS, Panels
from pymla.cpu.attention.query_blocks import rows_seen
from pymla.cpu.attention.row_addresses import Rows, four_from, moved, rows_apart
from pymla.cpu.attention.score_tiles import SCORE_COLUMNS, SCORE_ROWS, Panel, tile_scores
from pymla.cpu.attention.softmax import token_softmax
from pymla.cpu.attention.value_tiles import VALUE_COLUMNS, VALUE_ROWS, tile_values
from pymla.cpu.machine.simd import address, load_f32, splat_f32xL, store_f32, store_f32xL
from pymla.cpu.machine.simd_words import BIAS
from pymla.cpu.memory import allocate
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import A3, F3, I1
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import Kernel, helper, kernel

#: Most queries of a head that share the reading of keys and values.
_MOST_QUERIES = 192
#: Bytes of the codes, and of the scales, of a query's `KEY_TOKENS` weights.
_WEIGHT_BYTES = KEY_TOKENS // 32 * BLOCK_BYTES
_WEIGHT_SCALE_BYTES = 4 * KEY_TOKENS // WEIGHT_GROUP


def expanded(q: np.ndarray, panels: Panels, positions: np.ndarray, scale: float, out: np.ndarray) -> np.ndarray:
    """Causal attention over `Panels`; arguments as `expanded_form.expanded` checks them."""
    tokens, heads, _ = q.shape
    size = _MOST_QUERIES
    # Four items for each thread, where there are so many queries.
    if heads * -(-tokens // size) < 4 * threads.thread_count():
        size = _MOST_QUERIES // 2
    expanded_panels[heads * -(-tokens // size), 1](q, panels, positions, scale * LOG2E, size, out)
    return out


def kernels() -> list[Kernel]:
    """The kernels of this form."""
    return [expanded_panels]


class QueryBlock(NamedTuple):
    """Addresses of the queries of a block and their online softmax, and sizes."""

    codes: int  # `code_bytes` for each query, with bias
    scales: int  # float32 (queries, blocks)
    scores: int  # float32 (queries, KEY_TOKENS); in the end softmax weights
    weights: int  # codes of KEY_TOKENS weights for each query
    weight_scales: int  # float32 (queries, KEY_TOKENS // WEIGHT_GROUP)
    state: int  # float32 (queries, 2): running maximum and sum
    result: int  # float32 (queries, padded): accumulated values
    count: int  # queries
    blocks: int  # of a key
    padded: int  # numbers of a value, padded


@helper
def _block_memory(queries, blocks, padded):
    """Memory for so many queries, with keys of `blocks` blocks and values of `padded` numbers."""
    of_query = blocks * (KEY_BLOCK_BYTES + 4) + 4 * KEY_TOKENS + _WEIGHT_BYTES + _WEIGHT_SCALE_BYTES + 8 + 4 * padded
    return allocate(queries * of_query)


@helper
def _block_at(memory, queries, count, blocks, padded):
    """A block of `count` queries in memory for `queries`. Scores and results begin with a cache line."""
    scores = memory
    result = scores + 4 * KEY_TOKENS * queries
    codes = result + 4 * padded * queries
    weights = codes + blocks * KEY_BLOCK_BYTES * queries
    scales = weights + _WEIGHT_BYTES * queries
    weight_scales = scales + 4 * blocks * queries
    state = weight_scales + _WEIGHT_SCALE_BYTES * queries
    return QueryBlock(codes, scales, scores, weights, weight_scales, state, result, count, blocks, padded)


@kernel(F3, PANELS, I1, types.float64, types.int64, A3)
def expanded_panels(first, last, q, panels, positions, scale, size, out):
    """Over blocks of `size` queries of each head. Late blocks have more rows to read: they are dealt out first."""
    tokens, heads, _ = out.shape
    blocks, padded = panels.key_scales.shape[2] // LANES, panels.values.shape[2] // BLOCK_BYTES
    groups = (tokens + size - 1) // size
    memory = _block_memory(size, blocks, padded)
    query = np.zeros(KEY_BLOCK * blocks, np.float32)
    for item in range(first, last):
        begin, h = (groups - 1 - item // heads) * size, item % heads
        stop = min(begin + size, tokens)
        block = _block_at(address(memory), size, stop - begin, blocks, padded)
        _take_queries(q[begin:stop], h, scale, query, block)
        length = rows_seen(positions[begin:stop])
        for p in range(0, length, KEY_TOKENS):
            seen = min(KEY_TOKENS, length - p)
            for s in range(0, seen, SCORE_COLUMNS):
                number = (p + s) // LANES
                _compute_scores(_key_panel(panels, h, number), _key_panel(panels, h, number + 1), s, block)
            _compute_weights(address(panels.value_scales[h, p:]), positions[begin:stop], p, block)
            for s in range(0, seen, WEIGHT_GROUP):
                depth = min(WEIGHT_GROUP, seen - s + 31) // 32
                _add_values(address(panels.values[h, (p + s) // 32]), depth, s // WEIGHT_GROUP, block)
        _finish(block, h, out[begin:stop])


@helper
def _take_queries(q, h, scale, query, block):
    """Quantise queries (T, H, D) of head `h`, times a scale, and begin with an empty online softmax. `query` is scratch
    for a query, float32 with zeros behind its D numbers."""
    for i in range(q.shape[0]):
        for j in range(q.shape[2]):
            query[j] = q[i, h, j] * np.float32(scale)
        codes, scales = block.codes + KEY_BLOCK_BYTES * block.blocks * i, block.scales + 4 * block.blocks * i
        for j in range(block.blocks):
            at = codes + KEY_BLOCK_BYTES * j
            quantise_codes(address(query) + 4 * KEY_BLOCK * j, KEY_BLOCK, at, scales + 4 * j, BIAS)
        store_f32(block.state + 8 * i, np.float32(-np.inf))
        store_f32(block.state + 8 * i + 4, np.float32(0))
        for j in range(0, block.padded, LANES):
            store_f32xL(block.result + 4 * (block.padded * i + j), splat_f32xL(np.float32(0)))


@helper
def _key_panel(panels, h, number):
    """A panel of keys of head `h`."""
    return Panel(
        address(panels.keys[h, number]), address(panels.key_scales[h, number]), address(panels.key_starts[h, number])
    )


@helper
def _compute_scores(panel, other, column, block):
    """Scores of a block with the keys of two panels, from a column of its scores on."""
    code_bytes, scale_bytes = KEY_BLOCK_BYTES * block.blocks, 4 * block.blocks
    scores = block.scores + 4 * column
    for i in range(0, block.count, SCORE_ROWS):
        numbers = four_from(i, block.count)
        x = Rows(rows_apart(block.codes, code_bytes, numbers), rows_apart(block.scales, scale_bytes, numbers))
        at = rows_apart(scores, 4 * KEY_TOKENS, numbers)
        tile_scores(x, x, panel, other, block.blocks, KEY_BLOCK, 4 * LANES, at, moved(at, 4 * LANES))


@helper
def _compute_weights(value_scales, positions, first, block):
    """Scores with the keys from position `first` on become softmax weights, as codes, of the queries at some positions.
    `value_scales` is the address of the scales of these keys' values."""
    for i in range(len(positions)):
        visible, scores = positions[i] + 1 - first, block.scores + 4 * KEY_TOKENS * i
        state, result = block.state + 8 * i, block.result + 4 * block.padded * i
        token_softmax(scores, KEY_TOKENS, visible, value_scales, state, result, block.padded)
        codes, scales = block.weights + _WEIGHT_BYTES * i, block.weight_scales + _WEIGHT_SCALE_BYTES * i
        for s in range(KEY_TOKENS // WEIGHT_GROUP):
            at = codes + _WEIGHT_BYTES * WEIGHT_GROUP // KEY_TOKENS * s
            quantise_weights(scores + 4 * WEIGHT_GROUP * s, at, scales + 4 * s)


@helper
def _add_values(values, depth, group, block):
    """Add the weighted values of up to `WEIGHT_GROUP` rows, in `depth` panels at an address, to a block's results.
    `group` is the number of the rows' weights."""
    weights = block.weights + _WEIGHT_BYTES * WEIGHT_GROUP // KEY_TOKENS * group
    weight_scales, panel_step = block.weight_scales + 4 * group, BLOCK_BYTES * block.padded
    for j in range(0, block.padded, VALUE_COLUMNS):
        result = block.result + 4 * j
        for i in range(0, block.count, VALUE_ROWS):
            first, second = four_from(i, block.count), four_from(i + VALUE_ROWS - 4, block.count)
            x = Rows(rows_apart(weights, _WEIGHT_BYTES, first), rows_apart(weight_scales, _WEIGHT_SCALE_BYTES, first))
            y = Rows(rows_apart(weights, _WEIGHT_BYTES, second), rows_apart(weight_scales, _WEIGHT_SCALE_BYTES, second))
            at, bt = rows_apart(result, 4 * block.padded, first), rows_apart(result, 4 * block.padded, second)
            tile_values(x, y, 4, depth, values + BLOCK_BYTES * j, panel_step, at, bt)


@helper
def _finish(block, h, out):
    """Write the values, over the softmax's sums, to head `h` of `out` (T, H, v)."""
    for i in range(out.shape[0]):
        total, result = load_f32(block.state + 8 * i + 4), block.result + 4 * block.padded * i
        for j in range(out.shape[2]):
            out[i, h, j] = load_f32(result + 4 * j) / total
