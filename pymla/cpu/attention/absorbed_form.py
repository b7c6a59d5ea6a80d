"""The absorbed form: all heads of a token meet the rows of the cache as they are.

A page is dequantised once and meets 16 heads, the lanes of two registers, in two small float32 products. A latent cache
of 8 bits or fewer is multiplied on integers instead (`pymla.cpu.attention.absorbed_form_int8`).
"""

from __future__ import annotations

import numpy as np
from numba import types

from pymla.constants import LOG2E
from pymla.cpu.attention import absorbed_form_int8
from pymla.cpu.attention.cache_rows import read_cache_row_for
from pymla.cpu.attention.softmax import heads_softmax
from pymla.cpu.attention.splits import HEAD_GROUP, SPLITS, Splits, combine, leave_sums, start_values, take_item
from pymla.cpu.cache_types import CODE_BITS
from pymla.cpu.contract import check
from pymla.cpu.machine.simd import address
from pymla.cpu.matmul.gemm_f32 import tile_f32, transpose_panel
from pymla.cpu.quant import matmul_heads_transposed, matmul_heads_transposed_kernels
from pymla.cpu.runtime.array_types import CACHE, F3, STEP
from pymla.cpu.runtime.jit import Kernel, helper, kernel, variants
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

#: Columns of a float32 tile of values.
_TILE_COLUMNS = 16


def absorb(q: np.ndarray, k_b: QTensor, out: np.ndarray) -> np.ndarray:
    """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

    As `pymla.reference.attention.absorb`, in float32: quantised rows of `k_b` are dequantised, the queries are not
    rounded. Arrays must be contiguous.
    """
    check.absorb(q, k_b, out)
    nope = k_b.data.shape[1]
    matmul_heads_transposed(k_b, q[..., :nope], out[..., : out.shape[2] - (q.shape[2] - nope)])
    copy_rope[len(q)](q, out, q.shape[2] - nope)
    return out


def absorbed(q: np.ndarray, latent: QTensor, rope: QTensor, step: Step, scale: float, out: np.ndarray) -> np.ndarray:
    """Attention in the latent space; `q` float32 (T, H, rank + R), contiguous, `out` float32 (T, H, rank).

    As `pymla.reference.attention.absorbed`. Over a cache of float types it computes in float32: within 2e-6 of the
    largest result. Over one of 8 bits or fewer (`latent_cache`), queries and softmax weights are rounded to 8 bits, and
    rotated dimensions to 12: within 2 % of the largest result, most of it rounding of the weights.
    """
    check.absorbed(q, latent, rope, step, scale, out)
    return attend(q, latent, rope, step, scale, out)


def attend(q: np.ndarray, latent: QTensor, rope: QTensor, step: Step, scale: float, out: np.ndarray) -> np.ndarray:
    """`absorbed` of arguments that were checked."""
    splits = Splits.empty(out)
    _kernel_over(latent.qtype, rope.qtype)[splits.items, 1](q, latent, rope, step, scale * LOG2E, splits)
    return splits.combine(out, CODE_BITS.get(latent.qtype, 8) < 8)


def absorb_kernels(k_b: int) -> list[Kernel]:
    """The kernels of `absorb` with ``W_k_b`` of a type."""
    return [copy_rope, *matmul_heads_transposed_kernels(k_b)]


def kernels(latent: int, rope: int) -> list[Kernel]:
    """The kernels of `absorbed` over a cache of two types."""
    return [_kernel_over(latent, rope), combine]


def _kernel_over(latent: int, rope: int) -> Kernel:
    """The kernel over a cache of two types."""
    return absorbed_form_int8.absorbed_pages(latent) if latent in CODE_BITS else absorbed_rows(latent, rope)


@kernel(F3, F3, types.int64)
def copy_rope(first, last, q, out, size):
    """Over tokens: the last `size` numbers of each head."""
    for t in range(first, last):
        for h in range(q.shape[1]):
            for i in range(size):
                out[t, h, out.shape[2] - size + i] = q[t, h, q.shape[2] - size + i]


@variants
def absorbed_rows(latent_type, rope_type):
    """The kernel for a cache of float types, or of the blocks of ggml's types."""
    read_latent, read_rope = read_cache_row_for(latent_type), read_cache_row_for(rope_type)

    @kernel(F3, CACHE, CACHE, STEP, types.float64, SPLITS)
    def absorbed_rows(first, last, q, latent, rope, step, scale, splits):
        """Over items of `splits`; arguments as `absorbed_form_int8.absorbed_pages` takes them."""
        heads, size, rank, padded = q.shape[1], q.shape[2], splits.rank, splits.values.shape[2]
        stride = 4 * (size + _TILE_COLUMNS)
        queries, panel = np.empty((HEAD_GROUP, size), np.float32), np.empty((size, HEAD_GROUP), np.float32)
        # Tiles of values may reach past a row.
        rows = np.zeros((PAGE, size + _TILE_COLUMNS), np.float32)
        scores, state = np.empty((PAGE, HEAD_GROUP), np.float32), np.empty((2, HEAD_GROUP), np.float32)
        for number in range(first, last):
            item = take_item(number, heads, splits, step)
            if item.first_page == item.stop_page:
                continue
            for h in range(item.heads):
                for i in range(size):
                    queries[h, i] = q[item.token, item.begin + h, i] * np.float32(scale)
            transpose_panel(address(queries), 4 * size, item.heads, size, address(panel))
            values = start_values(item, address(state), splits)
            table = step.block_tables[step.seq_of[item.token]]
            for page in range(item.first_page, item.stop_page):
                seen = min(PAGE, item.length - page * PAGE)
                for s in range(seen):
                    slot, row = table[page] * PAGE + s, address(rows[s])
                    read_latent(latent, slot, row, rank)
                    read_rope(rope, slot, row + 4 * rank, size - rank)
                _compute_scores(address(rows), stride, seen, address(panel), size, address(scores))
                heads_softmax(address(scores), seen, address(state), values, padded)
                _add_values(address(scores), address(rows), stride, seen, values, rank, 4 * padded)
            leave_sums(item, address(state), splits)

    return absorbed_rows


@helper
def _compute_scores(rows, stride, seen, panel, size, scores):
    """Scores (seen, HEAD_GROUP) of a panel of queries, (size, HEAD_GROUP), with rows `stride` bytes apart; all float32
    at addresses. Tiles have four rows: those past the end repeat the last row."""
    row_bytes = 4 * HEAD_GROUP
    for s in range(0, seen, 4):
        a, b, c = min(1, seen - 1 - s), min(2, seen - 1 - s), min(3, seen - 1 - s)
        at = scores + row_bytes * s
        tile_f32(
            rows + s * stride, a * stride, b * stride, c * stride, 4,
            panel, row_bytes, size, at, row_bytes, False,
        )  # fmt: skip


@helper
def _add_values(weights, rows, stride, seen, values, rank, value_bytes):
    """Add rows, `rank` numbers `stride` bytes apart, times the weights (seen, HEAD_GROUP) of each head, to the values
    of the heads, `value_bytes` apart; all float32 at addresses."""
    for h in range(0, HEAD_GROUP, 4):
        for i in range(0, rank, _TILE_COLUMNS):
            at = values + value_bytes * h + 4 * i
            tile_f32(
                weights + 4 * h, 4, 8, 12, 4 * HEAD_GROUP,
                rows + 4 * i, stride, seen, at, value_bytes, True,
            )  # fmt: skip
