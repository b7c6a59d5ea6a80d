"""The expanded form on integers, over keys and values as panels of codes (`pymla.cpu.attention.key_value_panels`).

Queries become codes as keys are: of 16 bits where they are rotated, of 8 bits elsewhere, after they were mixed. Softmax
weights of 64 positions at a time become codes of 8 bits, times the scales of these positions' values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.constants import LOG2E
from pymla.cpu.attention.codes import (
    BLOCK_BYTES,
    PANEL_BLOCK_BYTES,
    WEIGHT_GROUP,
    even,
    quantise_codes,
    quantise_i16,
    quantise_weights,
)
from pymla.cpu.attention.hadamard import mix
from pymla.cpu.attention.key_value_panels import KEY_TOKENS, PANELS, Panels
from pymla.cpu.attention.query_blocks import rows_seen
from pymla.cpu.attention.row_addresses import Rows, four_from, moved, rows_apart
from pymla.cpu.attention.score_tiles import SCORE_COLUMNS, SCORE_ROWS, KeyPanel, Panel, tile_key_scores
from pymla.cpu.attention.softmax import token_softmax
from pymla.cpu.attention.value_tiles import VALUE_COLUMNS, VALUE_ROWS, tile_values
from pymla.cpu.machine.simd import address, load_f32, load_f32xL, mul, splat_f32xL, store_f32, store_f32xL
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

    codes: int  # `plain` codes for each query, with bias
    scales: int  # float32 (queries, blocks)
    rope: int  # int16 (queries, rotated): codes of the rotated numbers
    rope_scales: int  # float32 (queries,)
    scores: int  # float32 (queries, KEY_TOKENS); in the end softmax weights
    weights: int  # codes of KEY_TOKENS weights for each query
    weight_scales: int  # float32 (queries, KEY_TOKENS // WEIGHT_GROUP)
    state: int  # float32 (queries, 2): running maximum and sum
    result: int  # float32 (queries, padded): accumulated values
    count: int  # queries
    plain: int  # numbers of a key that are not rotated, padded
    blocks: int  # of these numbers
    rotated: int  # numbers of a key that are, padded to an even number
    padded: int  # numbers of a value, padded


@helper
def _block_memory(queries, plain, blocks, rotated, padded):
    """Memory for so many queries, with sizes as `QueryBlock` has them."""
    of_key = plain // 32 * BLOCK_BYTES + 4 * blocks + 2 * rotated + 4
    return allocate(queries * (of_key + 4 * KEY_TOKENS + _WEIGHT_BYTES + _WEIGHT_SCALE_BYTES + 8 + 4 * padded))


@helper
def _block_at(memory, queries, count, plain, blocks, rotated, padded):
    """A block of `count` queries in memory for `queries`. Scores and results begin with a cache line."""
    scores = memory
    result = scores + 4 * KEY_TOKENS * queries
    codes = result + 4 * padded * queries
    weights = codes + plain // 32 * BLOCK_BYTES * queries
    rope = weights + _WEIGHT_BYTES * queries
    scales = rope + 2 * rotated * queries
    rope_scales = scales + 4 * blocks * queries
    weight_scales = rope_scales + 4 * queries
    state = weight_scales + _WEIGHT_SCALE_BYTES * queries
    return QueryBlock(
        codes, scales, rope, rope_scales, scores, weights, weight_scales, state, result,
        count, plain, blocks, rotated, padded,
    )  # fmt: skip


@kernel(F3, PANELS, I1, types.float64, types.int64, A3)
def expanded_panels(first, last, q, panels, positions, scale, size, out):
    """Over blocks of `size` queries of each head. Late blocks have more rows to read: they are dealt out first."""
    tokens, heads, _ = out.shape
    plain, padded = panels.keys.shape[2] // PANEL_BLOCK_BYTES * 32, panels.values.shape[2] // BLOCK_BYTES
    blocks = plain // panels.block
    groups, rotated = (tokens + size - 1) // size, even(panels.rotated)
    memory = _block_memory(size, plain, blocks, rotated, padded)
    query = np.zeros(plain + panels.rotated, np.float32)
    for item in range(first, last):
        begin, h = (groups - 1 - item // heads) * size, item % heads
        stop = min(begin + size, tokens)
        block = _block_at(address(memory), size, stop - begin, plain, blocks, rotated, padded)
        _take_queries(q[begin:stop], h, scale, panels.nope, query, block)
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
def _take_queries(q, h, scale, nope, query, block):
    """Quantise queries (T, H, D) of head `h`, times a scale, and begin with an empty online softmax. `query` is scratch
    for float32: the `nope` numbers that are not rotated, padded to whole blocks, and the rotated ones."""
    plain, count = block.plain, block.plain // block.blocks
    for i in range(q.shape[0]):
        source, target = address(q[i, h]), address(query)
        _copy_scaled(source, nope, np.float32(scale / count), target)
        for j in range(nope, plain):
            query[j] = 0
        _copy_scaled(source + 4 * nope, len(query) - plain, np.float32(scale), target + 4 * plain)
        rope = block.rope + 2 * block.rotated * i
        rope_scale = quantise_i16(address(query) + 4 * plain, len(query) - plain, rope)
        store_f32(block.rope_scales + 4 * i, rope_scale)
        codes, scales = block.codes + plain // 32 * BLOCK_BYTES * i, block.scales + 4 * block.blocks * i
        for j in range(block.blocks):
            x, at = address(query) + 4 * count * j, codes + count // 32 * BLOCK_BYTES * j
            mix(x, count)
            quantise_codes(x, count, at, scales + 4 * j, BIAS)
        store_f32(block.state + 8 * i, np.float32(-np.inf))
        store_f32(block.state + 8 * i + 4, np.float32(0))
        for j in range(0, block.padded, LANES):
            store_f32xL(block.result + 4 * (block.padded * i + j), splat_f32xL(np.float32(0)))


@helper
def _copy_scaled(source, count, factor, target):
    """Copy `count` float32 from address to address, times a factor."""
    whole, factors = count // LANES * LANES, splat_f32xL(factor)
    for i in range(0, 4 * whole, 4 * LANES):
        store_f32xL(target + i, mul(load_f32xL(source + i), factors))
    for i in range(4 * whole, 4 * count, 4):
        store_f32(target + i, load_f32(source + i) * factor)


@helper
def _key_panel(panels, h, number):
    """A panel of keys of head `h`."""
    scales, starts = address(panels.key_scales[h, number]), address(panels.key_starts[h, number])
    rope = Panel(address(panels.rope[number]), address(panels.rope_scales[number]), 0)
    return KeyPanel(Panel(address(panels.keys[h, number]), scales, starts), rope)


@helper
def _compute_scores(panel, other, column, block):
    """Scores of a block with the keys of two panels, from a column of its scores on."""
    code_bytes, scale_bytes, rope_bytes = block.plain // 32 * BLOCK_BYTES, 4 * block.blocks, 2 * block.rotated
    scores, sizes = block.scores + 4 * column, (block.blocks, block.plain // block.blocks, block.rotated // 2)
    for i in range(0, block.count, SCORE_ROWS):
        numbers = four_from(i, block.count)
        x = Rows(rows_apart(block.codes, code_bytes, numbers), rows_apart(block.scales, scale_bytes, numbers))
        y = Rows(rows_apart(block.rope, rope_bytes, numbers), rows_apart(block.rope_scales, 4, numbers))
        at = rows_apart(scores, 4 * KEY_TOKENS, numbers)
        tile_key_scores(x, y, panel, other, sizes, 4 * LANES, at, moved(at, 4 * LANES))


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
        _copy_scaled(result, out.shape[2], np.float32(1) / total, address(out[i, h]))
