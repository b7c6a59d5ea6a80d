"""The expanded form of attention on integers, for a cache of 8 bits.

Keys and values become panels (`pymla.cpu.attention.tiles`) as they are expanded. The lanes of
keys are tokens, and their head dimensions run along K; the lanes of values are head dimensions, and tokens run along
K. Keys have a scale for `KEY_BLOCK` dimensions, values a scale for each token, which goes into the softmax weights.
Those are quantised per 64 tokens. So no number depends on a token that its query does not see.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.array_types import A2, A3, F2, F3, I1
from pymla.cpu.attention.softmax import LOG2E, token_softmax
from pymla.cpu.attention.tiles import (
    BLOCK_BYTES,
    PANEL_BYTES,
    SCORE_ROWS,
    VALUE_ROWS,
    WEIGHTS,
    four,
    four_from,
    quantise_codes,
    quantise_weights,
    store_keys,
    tile_scores,
    tile_values,
)
from pymla.cpu.contract import check
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import (
    absolute,
    address,
    farther,
    farthest,
    load_f32xL,
    mul,
    round_even,
    splat_f32xL,
    store_i32,
)
from pymla.cpu.machine.simd_words import BIAS, WORD, store_words
from pymla.cpu.matmul.activations import INPUT, Activation, counting
from pymla.cpu.matmul.gemm import Buffers, multiply_rows_for
from pymla.cpu.matmul.gemm_amx import SPARE_COLUMNS
from pymla.cpu.matmul.gemm_f32 import F32_ROWS, F32_SCRATCH, multiply_rows_f32_for
from pymla.cpu.matmul.matrices import MATRICES, Matrices
from pymla.cpu.matmul.unpacked import PAIR_ROWS as ROWS
from pymla.cpu.matmul.unpacked import SCRATCH
from pymla.cpu.memory import allocate, allocate_f32, empty
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.jit import helper, kernel, variants

#: Keys that a block of queries meets at a time.
TOKENS = 128
#: Dimensions of an expanded key with a common scale: with 32, a fifth of the scores' instructions were for scales.
KEY_BLOCK = 64
#: Most tokens that are expanded at a time, a multiple of `TOKENS`: the more, the less often weights are unpacked.
EXPANDED = 512
#: Most queries of a head that share the reading of keys and values.
QUERIES = 192

#: Bytes of a block of a key's codes.
_KEY_BYTES = KEY_BLOCK // 32 * BLOCK_BYTES


class Panels(NamedTuple):
    """Expanded keys and values of some heads; tokens are padded to a multiple of `TOKENS`."""

    keys: np.ndarray  # uint8 (H, tokens // LANES, D // 32 * PANEL_BYTES): D is a multiple of `KEY_BLOCK`
    key_scales: np.ndarray  # float32 (H, tokens // LANES, D // KEY_BLOCK * LANES)
    key_starts: np.ndarray  # int32, likewise: minus `BIAS` times the sums of the codes of a block
    values: np.ndarray  # uint8 (H, tokens // 32, v * BLOCK_BYTES): v is a multiple of ROWS
    value_scales: np.ndarray  # float32 (H, tokens)
    tokens: int  # without the padding
    size: int  # numbers of a key
    v: int  # numbers of a value

    @classmethod
    def empty(cls, tokens, heads, size, v):
        """For so many tokens and heads, keys of `size` and values of `v` numbers."""
        given = tokens, size, v
        tokens, v, blocks = -(-tokens // TOKENS) * TOKENS, -(-v // ROWS) * ROWS, -(-size // KEY_BLOCK)
        return cls(
            empty((heads, tokens // LANES, blocks * KEY_BLOCK // 32 * PANEL_BYTES), np.uint8),
            empty((heads, tokens // LANES, blocks * LANES), np.float32),
            empty((heads, tokens // LANES, blocks * LANES), np.int32),
            empty((heads, tokens // 32, v * BLOCK_BYTES), np.uint8),
            empty((heads, tokens), np.float32),
            *given,
        )

    @property
    def sizes(self):
        """Tokens, heads, and numbers of a key and of a value."""
        return self.tokens, len(self.keys), self.size, self.v


BYTES3 = types.Array(types.uint8, 3, "C")
I3 = types.Array(types.int32, 3, "C")
PANELS = types.NamedTuple((BYTES3, F3, I3, BYTES3, F2, types.int64, types.int64, types.int64), Panels)


def expand(c_kv, k_pe, k_b, v_b, out):
    """Keys and values of some heads from latent rows, as `Panels`; otherwise as `attention.expand`."""
    check.expand(c_kv, k_pe, k_b, v_b, out.sizes)
    x, tokens, heads = Activation(c_kv), len(c_kv), len(k_b.data)
    # Two items for each thread, where there are so many.
    share = tokens * heads // (2 * threads.thread_count())
    size = min(max(share // TOKENS, 1) * TOKENS, EXPANDED)
    # The two matrices may have different types: k_b is derived where the file has it transposed.
    inputs = x.panels(k_b.qtype), x.panels(v_b.qtype)
    matrices = Matrices.of(k_b), Matrices.of(v_b)
    _expand(k_b.qtype, v_b.qtype)[heads * -(-tokens // size), 1](*matrices, *inputs, counting(tokens), k_pe, size, out)


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence over `Panels`; `q` float32 (T, H, D), `out` (T, H, v) with any strides."""
    check.expanded(q, keys_values.sizes, positions, out)
    tokens, heads, _ = q.shape
    size = QUERIES
    # Four items for each thread, where there are so many.
    if heads * -(-tokens // size) < 4 * threads.thread_count():
        size = QUERIES // 2
    _expanded[heads * -(-tokens // size), 1](q, keys_values, positions, scale * LOG2E, size, out)
    return out


def kernels(k_b, v_b):
    """What this form launches for ``W_k_b`` and ``W_v_b`` of these types."""
    return [_expand(k_b, v_b), _expanded]


@variants
def _expand(key_type, value_type):
    """Keys and values of matrices of two types."""
    multiply_keys, multiply_values = multiply_head_for(key_type), multiply_head_for(value_type)

    @kernel(
        MATRICES,
        MATRICES,
        INPUT,
        INPUT,
        I1,
        A2,
        types.int64,
        PANELS,
    )
    def _expand(first, last, k_b, v_b, x, y, index, k_pe, size, out):
        """Over blocks of `size` tokens of each head."""
        tokens = len(k_pe)
        groups = (tokens + size - 1) // size
        blocks, v = out.key_scales.shape[2] // LANES, out.values.shape[2] // BLOCK_BYTES
        scratch = allocate(max(SCRATCH, F32_SCRATCH))
        result = allocate_f32(size + SPARE_COLUMNS, ROWS)
        keys = np.zeros((size, KEY_BLOCK * blocks), np.float32)
        values = np.zeros((size, v), np.float32)
        codes = np.empty((size, blocks * _KEY_BYTES), np.uint8)
        for item in range(first, last):
            h, begin = item // groups, item % groups * size
            count = min(size, tokens - begin)
            padded = (count + TOKENS - 1) // TOKENS * TOKENS
            multiply_keys(k_b, h, x, index, begin, count, scratch, result, keys)
            multiply_values(v_b, h, y, index, begin, count, scratch, result, values)
            for t in range(count):
                for i in range(k_pe.shape[1]):
                    keys[t, k_b.rows + i] = k_pe[begin + t, i]
            # Tokens that are missing are zeros.
            keys[count:padded], values[count:padded] = 0, 0
            for t in range(padded):
                scales = address(out.key_scales[h, (begin + t) // LANES, t % LANES :])
                starts = address(out.key_starts[h, (begin + t) // LANES, t % LANES :])
                for i in range(blocks):
                    x_at, at = address(keys[t]) + 4 * KEY_BLOCK * i, address(codes[t]) + _KEY_BYTES * i
                    sums = quantise_codes(x_at, KEY_BLOCK, at, scales + 4 * LANES * i, 0)
                    store_i32(starts + 4 * LANES * i, np.int32(-BIAS * sums))
            for t in range(0, padded, LANES):
                store_keys(address(codes[t]), codes.shape[1], address(out.keys[h, (begin + t) // LANES]))
            for t in range(0, padded, 32):
                store_values(values[t:], out.values[h, (begin + t) // 32], out.value_scales[h, begin + t :])

    return _expand


@functools.cache
def multiply_head_for(qtype):
    """A function ``(w, h, x, index, begin, count, scratch, result, out)``: ``out[t, :rows] = W[h] @ x[begin + t]`` for
    `count` tokens."""
    if qtype not in ggml.QUANTISED:
        multiply_rows_f32 = multiply_rows_f32_for(qtype)

        @helper
        def multiply_head(w, h, x, index, begin, count, scratch, result, out):
            for r in range(0, w.rows, F32_ROWS):
                multiply_rows_f32(w, h, r, x.x[begin : begin + count], out[:, r:], address(scratch))

        return multiply_head
    multiply_rows = multiply_rows_for(qtype)

    @helper
    def multiply_head(w, h, x, index, begin, count, scratch, result, out):
        stride, buffers = 4 * out.shape[1], Buffers(address(scratch), address(result))
        for r in range(0, w.rows, ROWS):
            at = address(out[0, r:]) - stride * begin
            multiply_rows(w, h, r, x, index, (begin, begin + count), buffers, at, stride)

    return multiply_head


@helper
def store_values(rows, panels, scales):
    """Thirty-two tokens' values, float32 (32, v), as panels of `LANES` dimensions, and a scale for each token."""
    v = rows.shape[1]
    inverse = np.empty(32, np.float32)
    for t in range(32):
        most = splat_f32xL(np.float32(0))
        for i in range(0, v, LANES):
            most = farther(absolute(load_f32xL(address(rows[t]) + 4 * i)), most)
        most_of_all = farthest(most)
        inverse[t] = 0
        if most_of_all > 0:
            inverse[t] = np.float32(127) / most_of_all
        scales[t] = most_of_all / np.float32(127)
    out = address(panels)
    for i in range(0, v, LANES):
        for t in range(0, 32, 4):
            a, b = scaled_row(rows, inverse, t, i), scaled_row(rows, inverse, t + 1, i)
            c, d = scaled_row(rows, inverse, t + 2, i), scaled_row(rows, inverse, t + 3, i)
            store_words(out + 4 * LANES * (t // WORD), 4 * LANES, a, b, c, d)
        out += PANEL_BYTES


@helper
def scaled_row(rows, factors, t, i):
    """Codes of `LANES` values of a row."""
    return round_even(mul(load_f32xL(address(rows[t]) + 4 * i), splat_f32xL(factors[t])))


@helper
def _queries(rows, i, count):
    """Addresses of four queries' rows from the i-th on; a tile at the edge repeats the last one."""
    a, b, c, d = four_from(i, count)
    return four(rows, a, b, c, d)


@kernel(F3, PANELS, I1, types.float64, types.int64, A3)
def _expanded(first, last, q, panels, positions, scale, size, out):
    """Over blocks of `size` queries of each head. Late blocks have more to read: they are dealt out first."""
    tokens, heads, v = out.shape
    blocks, padded_v = panels.key_scales.shape[2] // LANES, panels.values.shape[2] // BLOCK_BYTES
    groups = (tokens + size - 1) // size
    query = np.zeros(KEY_BLOCK * blocks, np.float32)
    codes = np.empty((size, blocks * _KEY_BYTES), np.uint8)
    scales = np.empty((size, blocks), np.float32)
    scores = allocate_f32(size, TOKENS)
    weights = np.empty((size, TOKENS // 32 * BLOCK_BYTES), np.uint8)
    weight_scales = np.empty((size, TOKENS // WEIGHTS), np.float32)
    state = np.empty((size, 2), np.float32)
    result = allocate_f32(size, padded_v)
    for item in range(first, last):
        begin, h = (groups - 1 - item // heads) * size, item % heads
        count = min(size, tokens - begin)
        for i in range(count):
            for j in range(q.shape[2]):
                query[j] = q[begin + i, h, j] * np.float32(scale)
            for j in range(blocks):
                at = address(codes[i]) + _KEY_BYTES * j
                quantise_codes(address(query) + 4 * KEY_BLOCK * j, KEY_BLOCK, at, address(scales[i, j:]), BIAS)
        state[:, 0] = -np.inf
        state[:, 1] = 0
        result[:] = 0
        length = positions[begin + count - 1] + 1
        for block in range(0, length, TOKENS):
            seen = min(TOKENS, length - block)
            for s in range(0, seen, ROWS):
                panel = (block + s) // LANES
                p, p_next = address(panels.keys[h, panel]), address(panels.keys[h, panel + 1])
                d, d_next = address(panels.key_scales[h, panel]), address(panels.key_scales[h, panel + 1])
                z, z_next = address(panels.key_starts[h, panel]), address(panels.key_starts[h, panel + 1])
                for i in range(0, count, SCORE_ROWS):
                    x, sx = _queries(codes, i, count), _queries(scales, i, count)
                    at, bt = _queries(scores[:, s:], i, count), _queries(scores[:, s + LANES :], i, count)
                    tile_scores(x, x, sx, sx, blocks, KEY_BLOCK, p, p_next, d, d_next, z, z_next, 4 * LANES, at, bt)
            for i in range(count):
                visible, token_scales = positions[begin + i] + 1 - block, address(panels.value_scales[h, block:])
                at, target = address(scores[i]), address(result[i])
                token_softmax(at, TOKENS, visible, token_scales, state[i], target, padded_v)
                for s in range(TOKENS // WEIGHTS):
                    target = address(weights[i]) + WEIGHTS // 32 * BLOCK_BYTES * s
                    quantise_weights(at + 4 * WEIGHTS * s, target, address(weight_scales[i, s:]))
            for s in range(0, seen, WEIGHTS):
                depth = min(WEIGHTS, seen - s + 31) // 32
                for j in range(0, padded_v, ROWS):
                    p = address(panels.values[h, (block + s) // 32]) + BLOCK_BYTES * j
                    for i in range(0, count, VALUE_ROWS):
                        words, word_scales = weights[:, s // 32 * BLOCK_BYTES :], weight_scales[:, s // WEIGHTS :]
                        x, sx = _queries(words, i, count), _queries(word_scales, i, count)
                        t = i + VALUE_ROWS - 4
                        y, sy = _queries(words, t, count), _queries(word_scales, t, count)
                        at, bt = _queries(result[:, j:], i, count), _queries(result[:, j:], t, count)
                        tile_values(x, y, 4, sx, sy, depth, p, BLOCK_BYTES * padded_v, at, bt)
        for i in range(count):
            for j in range(v):
                out[begin + i, h, j] = result[i, j] / state[i, 1]
