"""Attention over a cache of whole keys and values of all heads (``--mla 0``)."""

from __future__ import annotations

import numpy as np
from numba import types

from pymla.constants import LOG2E
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
from pymla.cpu.formats.rows import dequantise_row_for
from pymla.cpu.machine.simd import address
from pymla.cpu.runtime.array_types import A3, CACHE, F3, STEP
from pymla.cpu.runtime.jit import Kernel, helper, kernel, variants
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor


def full(q: np.ndarray, keys: QTensor, values: QTensor, step: Step, scale: float, out: np.ndarray) -> np.ndarray:
    """Attention over a cache that has keys and values of every head in each row; `q` float32 (T, H, nope + R),
    contiguous, `out` float32 (T, H, v).

    As `pymla.reference.attention.full`: within 2e-6 of the largest result, for every type of cache, as rows are
    dequantised to float32.
    """
    check.full(q, keys, values, step, scale, out)
    tokens, heads, _ = q.shape
    items = heads * -(-tokens // BLOCK_QUERIES)
    full_rows(keys.qtype, values.qtype)[items, 1](q, keys, values, step, scale * LOG2E, out)
    return out


def kernels(keys: int, values: int) -> list[Kernel]:
    """The kernels of this form over a cache of two types."""
    return [full_rows(keys, values)]


@helper
def _run_end(seq_of, begin, stop):
    """The token behind the last one, of those up to `stop`, that follows token `begin` in the same sequence."""
    end = begin + 1
    while end < stop and seq_of[end] == seq_of[begin]:
        end += 1
    return end


@variants
def full_rows(key_type, value_type):
    """The kernel for a cache of two types."""
    read_key, read_value = dequantise_row_for(key_type), dequantise_row_for(value_type)

    @kernel(F3, CACHE, CACHE, STEP, types.float64, A3)
    def full_rows(first, last, q, keys, values, step, scale, out):
        """Over blocks of queries of each head. A block may reach over sequences: each of them is a run of its own."""
        tokens, heads, v = out.shape
        size = q.shape[2]
        key_bytes, value_bytes = keys.data.shape[1] // heads, values.data.shape[1] // heads
        blocks = (tokens + BLOCK_QUERIES - 1) // BLOCK_QUERIES
        memory = block_memory(size, v)
        key_rows, value_rows = np.empty((PAGE, size), np.float32), np.empty((PAGE, v), np.float32)
        for item in range(first, last):
            begin, h = (blocks - 1 - item // heads) * BLOCK_QUERIES, item % heads
            stop = min(begin + BLOCK_QUERIES, tokens)
            while begin < stop:
                end = _run_end(step.seq_of, begin, stop)
                block = start_block(memory, q[begin:end], h, scale, v)
                table = step.block_tables[step.seq_of[begin]]
                length = rows_seen(step.positions[begin:end])
                for p in range(0, length, PAGE):
                    seen = min(PAGE, length - p)
                    for s in range(seen):
                        slot = table[p // PAGE] * PAGE + s
                        read_key(address(keys.data[slot]) + h * key_bytes, address(key_rows[s]), size)
                        read_value(address(values.data[slot]) + h * value_bytes, address(value_rows[s]), v)
                    page = Page(address(key_rows), address(value_rows), 4 * size, 4 * v, p, seen)
                    attend_page(page, step.positions[begin:end], block)
                finish_block(block, h, out[begin:end])
                begin = end

    return full_rows
