"""The absorbed form with all scores of a token in memory (``--mla 2``), for comparison with the online softmax."""

from __future__ import annotations

import numpy as np
from numba import types

from pymla.cpu.attention.cache_rows import read_cache_row_for
from pymla.cpu.contract import check
from pymla.cpu.formats import FORMATS
from pymla.cpu.machine.simd import address
from pymla.cpu.matmul.matrices import add_scaled
from pymla.cpu.runtime.array_types import A3, CACHE, F2, F3, STEP
from pymla.cpu.runtime.jit import Kernel, kernel, variants
from pymla.ggml import F32
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

_dot_f32 = FORMATS[F32].dot_row


def absorbed_materialised(
    q: np.ndarray, latent: QTensor, rope: QTensor, step: Step, scale: float, out: np.ndarray
) -> np.ndarray:
    """`absorbed` with all scores of a token in memory before the first value is read, one token after the other.

    As `pymla.reference.attention.absorbed_materialised`, in float32 over every type of cache: within 2e-6 of the
    largest result, and 1e-3 where the rotated dimensions are codes of 12 bits.
    """
    check.absorbed(q, latent, rope, step, scale, out, "absorbed_materialised")
    tokens, heads, _ = out.shape
    pages = step.block_tables.shape[1]
    for t in range(tokens):
        scores = np.empty((heads, pages * PAGE), np.float32)
        materialised_scores(latent.qtype, rope.qtype)[pages](q, latent, rope, step, out.shape[2], scale, t, scores)
        materialised_values(latent.qtype)[heads, 1](scores, latent, step, t, out)
    return out


def kernels(latent: int, rope: int) -> list[Kernel]:
    """The kernels of this form over a cache of two types."""
    return [materialised_scores(latent, rope), materialised_values(latent)]


@variants
def materialised_scores(latent_type, rope_type):
    """The scores of one token."""
    read_latent, read_rope = read_cache_row_for(latent_type), read_cache_row_for(rope_type)

    @kernel(F3, CACHE, CACHE, STEP, types.int64, types.float64, types.int64, F2)
    def materialised_scores(first, last, q, latent, rope, step, rank, scale, t, scores):
        """Over pages of the step's block tables: scores (H, S) of token `t`. Positions behind it get none."""
        heads, size = q.shape[1], q.shape[2]
        table = step.block_tables[step.seq_of[t]]
        row = np.empty(size, np.float32)
        for page in range(first, last):
            for p in range(page * PAGE, min(page * PAGE + PAGE, step.positions[t] + 1)):
                slot = table[page] * PAGE + p % PAGE
                read_latent(latent, slot, address(row), rank)
                read_rope(rope, slot, address(row[rank:]), size - rank)
                for h in range(heads):
                    score = _dot_f32(address(row), address(q[t, h]), size)
                    scores[h, p] = score * np.float32(scale)

    return materialised_scores


@variants
def materialised_values(latent_type):
    """The softmax and the values of one token."""
    read_latent = read_cache_row_for(latent_type)

    @kernel(F2, CACHE, STEP, types.int64, A3)
    def materialised_values(first, last, scores, latent, step, t, out):
        """Over heads: scores (H, S) of token `t` become weights in place, and its values the sum of weighted rows."""
        rank = out.shape[2]
        length = step.positions[t] + 1
        table = step.block_tables[step.seq_of[t]]
        row = np.empty(rank, np.float32)
        for h in range(first, last):
            largest = scores[h, 0]
            for p in range(length):
                largest = max(largest, scores[h, p])
            total = np.float32(0)
            for p in range(length):
                scores[h, p] = np.exp(scores[h, p] - largest)
                total += scores[h, p]
            out[t, h, :] = 0
            for p in range(length):
                slot = table[p // PAGE] * PAGE + p % PAGE
                read_latent(latent, slot, address(row), rank)
                add_scaled(scores[h, p] / total, address(row), address(out[t, h]), rank)

    return materialised_values
