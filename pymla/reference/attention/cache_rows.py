"""Rows of the cache in memory: into their slots, and back as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymla.contract import FLOAT16, FLOATS
from pymla.pages import HADAMARD_TYPES, PAGE, READ, STORED, LatentCache, block_rows
from pymla.reference import memory
from pymla.reference.attention.hadamard import mix
from pymla.reference.contract import check
from pymla.reference.quant import dequantise, quantise
from pymla.tensor import QTensor


def latent_cache(layout: Sequence[tuple[int, int]], slots: int) -> LatentCache:
    """Memory for the rows ``c_kv`` and ``k_pe`` of one layer. What it holds is not set.

    Parameters
    ----------
    layout : ((type, rank), (type, R))
        ggml types of the two rows and how many numbers they have, from `pymla.engine.cache_layout.row_layout`.
    slots : int
        Rows of each; a multiple of 64.

    Raises
    ------
    PymlaError
        The blocks of a type do not divide its row.
    """
    return LatentCache(*block_rows(memory, layout, slots))


def store(rows: np.ndarray, slots: np.ndarray, cache: QTensor) -> None:
    """Write rows into slots of the cache, rounded to its type. Slots that are not named keep their bytes. Rows of
    `pymla.pages.HADAMARD_TYPES` are mixed before.

    Parameters
    ----------
    rows : float16, float32 or float64 array (T, W)
        May be columns of a wider array. T may be 0.
    slots : int32 array (T,), from 0 to the cache's slots - 1
        Where a slot is named twice, the later row stays.
    cache : QTensor of rows of W numbers
        Of a type of `pymla.pages.CACHE_TYPES` whose blocks divide W.

    Raises
    ------
    PymlaError
        Shapes, dtypes or the type do not fit each other, or a slot is not one of the cache.

    Notes
    -----
    Types round as in llama.cpp's ``ggml-quants.c`` (`pymla.reference.quant.quantise`, byte for byte as gguf-py does).
    """
    check.store(rows, slots, cache, (*FLOATS, *FLOAT16))
    rows = rows.astype(np.float32)
    if cache.qtype in HADAMARD_TYPES:
        rows = mix(rows) * np.float32(STORED)
    cache.data[slots] = quantise(rows, cache.qtype)


def load(cache: QTensor, block_table: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The first S rows of a sequence as numbers.

    Parameters
    ----------
    cache : QTensor of rows of W numbers
        Of a type of `pymla.pages.CACHE_TYPES`.
    block_table : int32 array (pages,)
        Pages of the sequence. Only the first ⌈S / 64⌉ are looked at; these are from 0 to the cache's pages - 1.
    out : float array (S, W)
        S is at most 64 * pages, and may be 0.

    Returns
    -------
    `out`

    Raises
    ------
    PymlaError
        Shapes, dtypes or the type do not fit each other, or a page is not one of the cache.
    """
    check.load(cache, block_table, out)
    return read_rows(cache, block_table, out)


def read_rows(cache: QTensor, block_table: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`load` for arguments that were checked before."""
    positions = np.arange(len(out))
    out[...] = row_numbers(cache, block_table[positions // PAGE] * PAGE + positions % PAGE, out.shape[1], out.dtype)
    return out


def row_numbers(cache: QTensor, slots: np.ndarray, width: int, dtype: np.dtype) -> np.ndarray:
    """The rows in some slots of the cache as numbers: float array (len(slots), width)."""
    rows = np.empty((len(slots), width), dtype)
    rows[...] = dequantise(cache.data[slots], cache.qtype)
    return mix(rows) * rows.dtype.type(READ) if cache.qtype in HADAMARD_TYPES else rows
