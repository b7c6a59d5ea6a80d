"""The expanded form: keys and values of every head from the rows of the cache, then causal attention of each head.

Expanded keys and values are float32 (`KeysValues`), or for a cache of 8 bits codes (`Panels`), which are multiplied on
integers (`pymla.cpu.attention.expanded_form_int8`).

>>> import numpy as np
>>> from pymla.cpu import attention
>>> q, keys, values = (np.ones((5, 2, size), np.float32) for size in (48, 48, 32))
>>> positions = np.arange(5, dtype=np.int32)
>>> out = np.empty((5, 2, 32), np.float32)
>>> attention.expanded(q, attention.KeysValues(keys, values), positions, 48**-0.5, out)[4, 1, :3].tolist()
[1.0, 1.0, 1.0]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.constants import LOG2E
from pymla.cpu.attention import expanded_form_int8, key_value_panels
from pymla.cpu.attention.key_value_panels import Panels
from pymla.cpu.attention.query_blocks import (
    BLOCK_QUERIES,
    Page,
    attend_page,
    block_memory,
    finish_block,
    rows_seen,
    start_block,
)
from pymla.cpu.contract import check
from pymla.cpu.machine.simd import address
from pymla.cpu.matmul.activations import Activation
from pymla.cpu.quant import matmul, matmul_kernels
from pymla.cpu.runtime.array_types import A2, A3, F3, I1
from pymla.cpu.runtime.jit import Kernel, kernel
from pymla.pages import PAGE
from pymla.tensor import QTensor


class KeysValues(NamedTuple):
    """Expanded keys and values of some heads of a sequence, in float32."""

    keys: np.ndarray  # float32 (S, H, nope + R)
    values: np.ndarray  # float32 (S, H, v)


def keys_values(
    tokens: int, heads: int, nope: int, rotated: int, v: int, exact: bool, dtype: type[np.floating] = np.float32
) -> KeysValues | Panels:
    """Memory for expanded keys and values, as `pymla.reference.attention.keys_values`.

    `exact` ones are `KeysValues` of `dtype`, float32. The others are `Panels`, with 8 bits and 16 for the rotated
    numbers, which are several times faster to multiply and suit a cache of 8 bits.
    """
    if not exact:
        return Panels.empty(tokens, heads, nope, rotated, v)
    return KeysValues(np.empty((tokens, heads, nope + rotated), dtype), np.empty((tokens, heads, v), dtype))


def expand(
    c_kv: np.ndarray, k_pe: np.ndarray, k_b: QTensor, v_b: QTensor, out: KeysValues | Panels
) -> KeysValues | Panels:
    """Keys and values of some heads from latent rows, as `pymla.reference.attention.expand`.

    Where matrices are quantised, `c_kv` is rounded to 8 bits as in `pymla.cpu.quant.matmul`; where `out` is `Panels`,
    so are keys and values, but for the rotated numbers, which get 12. `c_kv` must be contiguous.
    """
    if isinstance(out, Panels):
        check.expand(c_kv, k_pe, k_b, v_b, out.sizes, out.rotated)
        return key_value_panels.expand(c_kv, k_pe, k_b, v_b, out)
    check.expand(c_kv, k_pe, k_b, v_b, check.sizes("expand", out))
    length, heads, v = out.values.shape
    x, nope = Activation(c_kv), np.empty((length, heads, k_b.data.shape[1]), np.float32)
    matmul(k_b, x, nope.reshape(length, heads * nope.shape[2]))
    matmul(v_b, x, out.values.reshape(length, heads * v))
    join_keys[length](nope, k_pe, out.keys)
    return out


def expanded(
    q: np.ndarray, keys_values: KeysValues | Panels, positions: np.ndarray, scale: float, out: np.ndarray
) -> np.ndarray:
    """Causal attention of one sequence over expanded keys and values; `q` float32 (T, H, nope + R), contiguous, `out`
    float32 (T, H, v).

    As `pymla.reference.attention.expanded`: within 2e-6 of the largest result over `KeysValues`. Over `Panels` queries
    and softmax weights are rounded to 8 bits as keys and values are, and rotated numbers to 12: the root mean square of
    results' errors is below 2 % of their length, also where a few rotated dimensions of the keys are 100 times larger.
    """
    if isinstance(keys_values, Panels):
        check.expanded(q, keys_values.sizes, positions, out)
        return expanded_form_int8.expanded(q, keys_values, positions, scale, out)
    check.expanded(q, check.sizes("expanded", keys_values), positions, out)
    tokens, heads, _ = q.shape
    expanded_rows[heads * -(-tokens // BLOCK_QUERIES), 1](q, *keys_values, positions, scale * LOG2E, out)
    return out


def expand_kernels(k_b: int, v_b: int, exact: bool) -> list[Kernel]:
    """The kernels of `expand` with ``W_k_b`` and ``W_v_b`` of some types."""
    return [*matmul_kernels(k_b), *matmul_kernels(v_b), join_keys] if exact else key_value_panels.kernels(k_b, v_b)


def kernels(exact: bool) -> list[Kernel]:
    """The kernels of `expanded`."""
    return [expanded_rows] if exact else expanded_form_int8.kernels()


@kernel(F3, A2, F3)
def join_keys(first, last, nope, k_pe, keys):
    """Over tokens: ``keys[s, h] = [nope[s, h]; k_pe[s]]``."""
    size = nope.shape[2]
    for s in range(first, last):
        for h in range(keys.shape[1]):
            for i in range(size):
                keys[s, h, i] = nope[s, h, i]
            for i in range(k_pe.shape[1]):
                keys[s, h, size + i] = k_pe[s, i]


@kernel(F3, F3, F3, I1, types.float64, A3)
def expanded_rows(first, last, q, keys, values, positions, scale, out):
    """Over blocks of queries of each head. Late blocks have more rows to read: they are dealt out first."""
    tokens, heads, v = out.shape
    size = q.shape[2]
    blocks = (tokens + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    memory = block_memory(size, v)
    for item in range(first, last):
        begin, h = (blocks - 1 - item // heads) * BLOCK_QUERIES, item % heads
        stop = min(begin + BLOCK_QUERIES, tokens)
        block = start_block(memory, q[begin:stop], h, scale, v)
        length = rows_seen(positions[begin:stop])
        for p in range(0, length, PAGE):
            rows = address(keys[p, h]), address(values[p, h])
            page = Page(rows[0], rows[1], 4 * heads * size, 4 * heads * v, p, min(PAGE, length - p))
            attend_page(page, positions[begin:stop], block)
        finish_block(block, h, out[begin:stop])
