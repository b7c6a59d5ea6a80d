"""Sparse attention: the absorbed form over chosen positions.

The chosen rows of a token are gathered, as the bytes that they are, into pages of a small cache of its own, and the
kernels of `pymla.cpu.attention.absorbed_form` run over that. So a row is fetched from anywhere in the cache once for
all heads. Of V3.2, 2,048 rows of 8 bits are 1.4 MB, which are read and written once; the 128 heads multiply 285 million
numbers with them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.attention import absorbed_form
from pymla.cpu.cache_types import CODE_BYTES
from pymla.cpu.contract import check
from pymla.cpu.machine.simd import address, load_i8x32, load_i16, store_i8x32, store_i16
from pymla.cpu.memory import empty
from pymla.cpu.runtime.array_types import CACHE, I1, I2, STEP
from pymla.cpu.runtime.jit import Kernel, helper, kernel
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor

#: Bytes of gathered rows that are in memory at a time, or those of one token.
_GATHERED_BYTES = 16 << 20


class Gathered(NamedTuple):
    """Rows that were gathered for T tokens, k each, padded to whole pages: token t is the only one of sequence t."""

    latent: QTensor
    rope: QTensor
    latent_codes: int  # bytes of a row of `latent`, but for scales that lie behind the codes of all rows of a page
    rope_codes: int
    positions: np.ndarray  # int32 (T,): of the last of a token's rows

    @classmethod
    def empty(cls, latent: QTensor, rope: QTensor, widths: tuple[int, int], tokens: int, k: int) -> Gathered:
        """Of caches whose rows have so many numbers."""
        slots = tokens * _whole_pages(k) * PAGE
        made = (QTensor(rows.qtype, empty((slots, rows.data.shape[1]), np.uint8)) for rows in (latent, rope))
        codes = (_code_bytes(rows, width) for rows, width in zip((latent, rope), widths, strict=True))
        return cls(*made, *codes, empty((tokens,), np.int32))

    @property
    def step(self) -> Step:
        """The step whose tokens attend to their rows."""
        tokens = np.arange(len(self.positions), dtype=np.int32)
        pages = np.arange(len(self.latent.data) // PAGE, dtype=np.int32)
        return Step(tokens, self.positions, tokens, tokens, pages.reshape(len(tokens), -1))


GATHERED = types.NamedTuple((CACHE, CACHE, types.int64, types.int64, I1), Gathered)


def sparse(
    q: np.ndarray,
    latent: QTensor,
    rope: QTensor,
    step: Step,
    chosen: np.ndarray,
    scale: float,
    out: np.ndarray,
) -> np.ndarray:
    """`absorbed` over the chosen positions of each token, int32 (T, k), alone.

    As `pymla.reference.attention.sparse`, with the precision of `absorbed`.
    """
    check.sparse(q, latent, rope, step, chosen, scale, out)
    rank, k = out.shape[2], chosen.shape[1]
    row_bytes = latent.data.shape[1] + rope.data.shape[1]
    at_once = max(1, _GATHERED_BYTES // (_whole_pages(k) * PAGE * row_bytes))
    for begin in range(0, len(q), at_once):
        some = slice(begin, begin + at_once)
        tokens = len(q[some])
        gathered = Gathered.empty(latent, rope, (rank, q.shape[2] - rank), tokens, k)
        gather[tokens * _whole_pages(k)](chosen[some], latent, rope, step.part(begin, begin + tokens), gathered)
        absorbed_form.attend(q[some], gathered.latent, gathered.rope, gathered.step, scale, out[some])
    return out


def kernels(latent: int, rope: int) -> list[Kernel]:
    """The kernels of `sparse` over a cache of two types."""
    return [gather, *absorbed_form.kernels(latent, rope)]


def _whole_pages(rows: int) -> int:
    return -(-rows // PAGE)


def _code_bytes(rows: QTensor, width: int) -> int:
    """Bytes of a row, but for scales that lie behind the codes of all rows of a page."""
    return CODE_BYTES[rows.qtype](width) if rows.qtype in CODE_BYTES else rows.data.shape[1]


@kernel(I2, CACHE, CACHE, STEP, GATHERED)
def gather(first, last, chosen, latent, rope, step, out):
    """Over pages of gathered rows: copy the rows of chosen positions, int32 (T, k)."""
    k = chosen.shape[1]
    pages = (k + PAGE - 1) // PAGE
    for number in range(first, last):
        t, begin = number // pages, number % pages * PAGE
        table = step.block_tables[step.seq_of[t]]
        stop = min(begin + PAGE, k)
        while stop > begin and chosen[t, stop - 1] < 0:
            stop -= 1
        is_last = stop == k or chosen[t, stop] < 0
        if is_last and (stop > begin or begin == 0):
            out.positions[t] = stop - 1
        for i in range(begin, stop):
            position = chosen[t, i]
            slot, row = table[position // PAGE] * PAGE + position % PAGE, number * PAGE + i - begin
            _copy_row(latent, slot, out.latent, row, out.latent_codes)
            _copy_row(rope, slot, out.rope, row, out.rope_codes)


@helper
def _copy_row(source, slot, target, row, code_bytes):
    """Copy the row in a slot of a cache to a row of another one of its type."""
    scale_bytes, scales = source.data.shape[1] - code_bytes, PAGE * code_bytes
    from_page, to_page = address(source.data[slot // PAGE * PAGE]), address(target.data[row // PAGE * PAGE])
    i, j = slot % PAGE, row % PAGE
    _copy(from_page + code_bytes * i, to_page + code_bytes * j, code_bytes)
    _copy(from_page + scales + scale_bytes * i, to_page + scales + scale_bytes * j, scale_bytes)


@helper
def _copy(source, target, nbytes):
    """Copy an even number of bytes from one address to another."""
    whole = nbytes // 32 * 32
    for i in range(0, whole, 32):
        store_i8x32(target + i, load_i8x32(source + i))
    for i in range(whole, nbytes, 2):
        store_i16(target + i, load_i16(source + i))
