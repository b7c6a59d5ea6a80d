"""Expanded keys and values as panels of codes, for a cache of 8 bits.

The lanes of the panels of keys are tokens, and their head dimensions run along the words; the lanes of the panels of
values are head dimensions, and tokens run along the words. Keys have a scale for a block of dimensions, values a scale
for each token. So no number depends on a token that a query does not see.

Trained models have a few dimensions in which keys are many times larger than elsewhere, and queries smaller. The
rotated dimensions, where this is worst, are codes of 16 bits, once for all heads. The others are mixed by a Hadamard
matrix (`pymla.cpu.attention.hadamard`) before they become codes of 8 bits.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.attention.codes import (
    BLOCK_BYTES,
    PANEL_BLOCK_BYTES,
    even,
    quantise_codes,
    quantise_i16,
    store_i16_panel,
    store_panel,
)
from pymla.cpu.attention.hadamard import mix
from pymla.cpu.attention.value_tiles import VALUE_COLUMNS
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
from pymla.cpu.matmul.unpacked import PAIR_ROWS, SCRATCH
from pymla.cpu.memory import allocate, allocate_f32, empty
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import A2, F2, F3, I1
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import Kernel, helper, kernel, variants
from pymla.tensor import QTensor

#: Panels are padded to a multiple of as many tokens: the keys that a block of queries meets at a time.
KEY_TOKENS = 128
#: The most dimensions of a key with a common scale: with 32, a fifth of the scores' instructions were for scales.
_LARGEST_BLOCK = 128
#: Most tokens that are expanded at a time, a multiple of `KEY_TOKENS`: the more, the less often weights are unpacked.
_MOST_TOKENS = 512
#: Tokens of a panel of values.
_VALUE_TOKENS = 32


class Panels(NamedTuple):
    """Expanded keys and values of some heads. Tokens are padded to a multiple of `KEY_TOKENS`, numbers of a key that
    are not rotated to one of 32, those of a value to one of `VALUE_COLUMNS`."""

    keys: np.ndarray  # uint8 (H, tokens // LANES, padded nope // 32 * PANEL_BLOCK_BYTES)
    key_scales: np.ndarray  # float32 (H, tokens // LANES, padded nope // block * LANES)
    key_starts: np.ndarray  # int32, likewise: minus `BIAS` times the sum of a block's codes
    rope: np.ndarray  # uint8 (tokens // LANES, LANES * 2 * R): int16 codes of the rotated numbers; an odd R is padded
    rope_scales: np.ndarray  # float32 (tokens // LANES, LANES)
    values: np.ndarray  # uint8 (H, tokens // 32, padded v * BLOCK_BYTES)
    value_scales: np.ndarray  # float32 (H, tokens)
    tokens: int  # S, without the padding
    nope: int  # numbers of a key that are not rotated
    rotated: int  # and that are, R
    v: int  # numbers of a value
    block: int  # numbers of a key that have a common scale

    @classmethod
    def empty(cls, tokens: int, heads: int, nope: int, rotated: int, v: int) -> Panels:
        """Memory for so many tokens and heads, keys of `nope` and `rotated` numbers and values of `v`."""
        given = tokens, nope, rotated, v
        tokens, nope = -(-tokens // KEY_TOKENS) * KEY_TOKENS, -(-nope // 32) * 32
        block = math.gcd(nope, _LARGEST_BLOCK)
        v = -(-v // VALUE_COLUMNS) * VALUE_COLUMNS
        return cls(
            empty((heads, tokens // LANES, nope // 32 * PANEL_BLOCK_BYTES), np.uint8),
            empty((heads, tokens // LANES, nope // block * LANES), np.float32),
            empty((heads, tokens // LANES, nope // block * LANES), np.int32),
            empty((tokens // LANES, LANES * 2 * even(rotated)), np.uint8),
            empty((tokens // LANES, LANES), np.float32),
            empty((heads, tokens // _VALUE_TOKENS, v * BLOCK_BYTES), np.uint8),
            empty((heads, tokens), np.float32),
            *given,
            block,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Tokens, heads, and numbers of a key and of a value."""
        return self.tokens, len(self.keys), self.nope + self.rotated, self.v


_BYTES2, _BYTES3 = types.Array(types.uint8, 2, "C"), types.Array(types.uint8, 3, "C")
_I3 = types.Array(types.int32, 3, "C")
PANELS = types.NamedTuple((_BYTES3, F3, _I3, _BYTES2, F2, _BYTES3, F2, *[types.int64] * 5), Panels)


def expand(c_kv: np.ndarray, k_pe: np.ndarray, k_b: QTensor, v_b: QTensor, out: Panels) -> Panels:
    """Keys and values of some heads from latent rows, as `Panels`; arguments as `expanded_form.expand` checks them."""
    x, tokens, heads = Activation(c_kv), len(c_kv), len(k_b.data)
    # Two items for each thread, where there are so many tokens.
    share = tokens * heads // (2 * threads.thread_count())
    size = min(max(share // KEY_TOKENS, 1) * KEY_TOKENS, _MOST_TOKENS)
    # The two matrices may have different types: k_b is derived where the file has it transposed.
    inputs = x.panels(k_b.qtype), x.panels(v_b.qtype)
    matrices, items = (Matrices.of(k_b), Matrices.of(v_b)), heads * -(-tokens // size)
    expand_panels(k_b.qtype, v_b.qtype)[items, 1](*matrices, *inputs, counting(tokens), size, out)
    rope_panels[len(out.rope)](k_pe, out)
    return out


def kernels(k_b: int, v_b: int) -> list[Kernel]:
    """The kernels of `expand` with ``W_k_b`` and ``W_v_b`` of some types."""
    return [expand_panels(k_b, v_b), rope_panels]


@variants
def expand_panels(key_type, value_type):
    """The kernel for matrices of two types."""
    multiply_keys, multiply_values = multiply_head_for(key_type), multiply_head_for(value_type)

    @kernel(MATRICES, MATRICES, INPUT, INPUT, I1, types.int64, PANELS)
    def expand_panels(first, last, k_b, v_b, x, y, index, size, out):
        """Over groups of `size` tokens of each head: all but the rotated numbers. `x` and `y` are the latent rows as
        the matrices `k_b` and `v_b` take them, and `index` counts them."""
        tokens = out.tokens
        groups = (tokens + size - 1) // size
        nope, v = out.keys.shape[2] // PANEL_BLOCK_BYTES * 32, out.values.shape[2] // BLOCK_BYTES
        panels, result = allocate(max(SCRATCH, F32_SCRATCH)), allocate_f32(size + SPARE_COLUMNS, PAIR_ROWS)
        keys, values = np.zeros((size, nope), np.float32), np.zeros((size, v), np.float32)
        codes = np.empty((size, nope // 32 * BLOCK_BYTES), np.uint8)
        for item in range(first, last):
            h, begin = item // groups, item % groups * size
            count = min(size, tokens - begin)
            padded = (count + KEY_TOKENS - 1) // KEY_TOKENS * KEY_TOKENS
            buffers = Buffers(address(panels), address(result))
            multiply_keys(k_b, h, x, index, begin, count, buffers, keys)
            multiply_values(v_b, h, y, index, begin, count, buffers, values)
            # The tokens of the padding are zeros, and so are numbers of the padding, which were mixed before.
            keys[count:padded], values[count:padded] = 0, 0
            keys[:count, k_b.rows :] = 0
            _store_keys(address(keys), nope, address(codes), h, begin, padded, out)
            for t in range(0, padded, _VALUE_TOKENS):
                panel = (begin + t) // _VALUE_TOKENS
                store_values(values[t:], out.values[h, panel], out.value_scales[h, begin + t :])

    return expand_panels


@functools.cache
def multiply_head_for(qtype):
    """A function ``(w, h, x, index, begin, count, buffers, out)``: ``out[t, :rows] = W[h] @ x[begin + t]`` for `count`
    tokens."""
    if qtype not in ggml.QUANTISED:
        multiply_rows_f32 = multiply_rows_f32_for(qtype)

        @helper
        def multiply_head(w, h, x, index, begin, count, buffers, out):
            for r in range(0, w.rows, F32_ROWS):
                multiply_rows_f32(w, h, r, x.x[begin : begin + count], out[:, r:], buffers.scratch)

        return multiply_head
    multiply_rows = multiply_rows_for(qtype)

    @helper
    def multiply_head(w, h, x, index, begin, count, buffers, out):
        stride = 4 * out.shape[1]
        for r in range(0, w.rows, PAIR_ROWS):
            at = address(out[0, r:]) - stride * begin
            multiply_rows(w, h, r, x, index, (begin, begin + count), buffers, at, stride)

    return multiply_head


@helper
def _store_keys(keys, nope, codes, h, begin, count, out):
    """Store keys of head `h` of `count` tokens from token `begin` on as panels. `keys`, `nope` float32 for each token,
    which are mixed in place, and `codes`, scratch for their codes, are addresses; `LANES` divides `count`."""
    row_bytes, block = nope // 32 * BLOCK_BYTES, out.block
    for t in range(count):
        scales = address(out.key_scales[h, (begin + t) // LANES, t % LANES :])
        starts = address(out.key_starts[h, (begin + t) // LANES, t % LANES :])
        for i in range(nope // block):
            x, at = keys + 4 * (nope * t + block * i), codes + row_bytes * t + block // 32 * BLOCK_BYTES * i
            mix(x, block)
            total = quantise_codes(x, block, at, scales + 4 * LANES * i, 0)
            store_i32(starts + 4 * LANES * i, np.int32(-BIAS * total))
    for t in range(0, count, LANES):
        store_panel(codes + row_bytes * t, row_bytes, address(out.keys[h, (begin + t) // LANES]))


@kernel(A2, PANELS)
def rope_panels(first, last, k_pe, out):
    """Over panels: the rotated numbers of `LANES` tokens. The tokens of the padding are zeros."""
    row_bytes = out.rope.shape[1] // LANES
    codes = np.empty((LANES, row_bytes), np.uint8)
    for panel in range(first, last):
        for lane in range(LANES):
            t = panel * LANES + lane
            if t < len(k_pe):
                out.rope_scales[panel, lane] = quantise_i16(address(k_pe[t]), k_pe.shape[1], address(codes[lane]))
            else:
                codes[lane], out.rope_scales[panel, lane] = 0, 0
        store_i16_panel(address(codes), row_bytes, address(out.rope[panel]))


@helper
def store_values(rows, panels, scales):
    """Store values of 32 tokens, float32 (32, padded v), as panels of `LANES` dimensions, with a scale for each."""
    v = rows.shape[1]
    inverse = np.empty(_VALUE_TOKENS, np.float32)
    for t in range(_VALUE_TOKENS):
        most = splat_f32xL(np.float32(0))
        for i in range(0, v, LANES):
            most = farther(absolute(load_f32xL(address(rows[t]) + 4 * i)), most)
        abs_max = farthest(most)
        inverse[t] = 0
        if abs_max > 0:
            inverse[t] = np.float32(127) / abs_max
        scales[t] = abs_max / np.float32(127)
    out = address(panels)
    for i in range(0, v, LANES):
        for t in range(0, _VALUE_TOKENS, 4):
            a, b = _codes_of_row(rows, inverse, t, i), _codes_of_row(rows, inverse, t + 1, i)
            c, d = _codes_of_row(rows, inverse, t + 2, i), _codes_of_row(rows, inverse, t + 3, i)
            store_words(out + 4 * LANES * (t // WORD), 4 * LANES, a, b, c, d)
        out += PANEL_BLOCK_BYTES


@helper
def _codes_of_row(rows, factors, t, i):
    """The codes of `LANES` numbers of row `t`, from number `i` on."""
    return round_even(mul(load_f32xL(address(rows[t]) + 4 * i), splat_f32xL(factors[t])))
