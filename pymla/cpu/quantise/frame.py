"""Rows of floats to rows of blocks, over all threads.

Blocks are independent of each other, and so are rows of types with a header: threads take ranges of them, and the
result does not depend on the number of threads.
"""

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.quantise.quantiser import LEAST
from pymla.cpu.quantise.table import QUANTISERS
from pymla.cpu.runtime.array_types import WEIGHTS_F1
from pymla.cpu.runtime.jit import Kernel, kernel, variants
from pymla.errors import PymlaError

_BYTES = types.Array(types.uint8, 1, "C")


def quantise(
    rows: np.ndarray, qtype: int, importance: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Rows of weights as rows of blocks, with the smallest weighted squared error that the type's search finds:
    ``sum(importance * (rows - dequantised)**2)``, block by block.

    Results are the same on any number of threads. A scale that its format cannot hold, as that of a block with weights
    above 2e6 in a type of 5 bits, becomes the largest one.

    Parameters
    ----------
    rows : float32 array (n, K), C-contiguous
        Finite. K is a multiple of the type's block.
    qtype : int
        A type of `QUANTISERS`.
    importance : float32 array (K,), optional
        Of each column, not negative; such as the mean squared input of a matrix. Only ratios between the columns of a
        block matter, and none counts less than `LEAST` of the largest one. A block without any importance is quantised
        as if all of its columns had the same, as all have by default. Types of floats are rounded to nearest, whatever
        it is.
    out : uint8 array (n, row_bytes), C-contiguous, optional
        Written to, by default a new array.

    Returns
    -------
    uint8 array (n, row_bytes)
        `out`.

    Raises
    ------
    PymlaError
        The type has no quantiser, K is no multiple of its block, or an importance is negative or not finite.
    """
    if qtype not in QUANTISERS:
        raise PymlaError(f"weights cannot be quantised to {ggml.NAME.get(qtype, qtype)}; choose {_names()}")
    n, columns = rows.shape
    width = ggml.row_bytes(qtype, columns)
    if out is None:
        out = np.empty((n, width), np.uint8)
    if rows.dtype != np.float32 or not rows.flags.c_contiguous:
        raise ValueError(f"rows: expected float32, C-contiguous, got {rows.dtype}, strides {rows.strides}")
    if out.shape != (n, width) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected uint8 {n, width}, C-contiguous, got {out.dtype} {out.shape}")
    whole = QUANTISERS[qtype].whole_rows
    together = columns if whole else ggml.BLOCK_SIZE[qtype]
    if columns:
        weights = _relative(importance, columns, together)
        quantised_rows(qtype)[n * (columns // together)](rows.reshape(-1), weights, together, out.reshape(-1))
    return out


def quantise_kernels(qtype: int) -> list[Kernel]:
    """The kernels that `quantise` launches for a type."""
    return [quantised_rows(qtype)]


def _names() -> str:
    return ", ".join(ggml.NAME[qtype] for qtype in QUANTISERS)


def _relative(importance: np.ndarray | None, columns: int, together: int) -> np.ndarray:
    """The importance of columns relative to the largest one of each run of `together` columns, float32 (columns,): so
    sums of products with it do not leave the range of float32, whatever its unit. Runs without any become ones."""
    if importance is None:
        return np.ones(columns, np.float32)
    if importance.shape != (columns,):
        raise PymlaError(f"importance of {importance.shape} columns for weights of {columns}")
    if not np.all(np.isfinite(importance)) or (importance < 0).any():
        worst = np.flatnonzero(~np.isfinite(importance) | (importance < 0))[0]
        raise PymlaError(f"importance of column {worst} is {importance[worst]}: it must be finite and not negative")
    runs = importance.astype(np.float64).reshape(-1, together)
    largest = runs.max(axis=1, keepdims=True)
    relative = np.divide(runs, largest, out=np.ones_like(runs), where=largest > 0)
    return np.maximum(relative, LEAST).astype(np.float32).reshape(-1)


@variants
def quantised_rows(qtype):
    """Weights as blocks of a type, or as rows of it where these have a header."""
    quantise_block, numbers, whole_rows = QUANTISERS[qtype]
    header, size, nbytes = ggml.ROW_HEADER[qtype], ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype]
    per_weight = 1 if whole_rows else 0

    @kernel(WEIGHTS_F1, WEIGHTS_F1, types.int64, _BYTES)
    def quantised_rows(first, last, x, importance, together, out):
        """Over runs of `together` weights, each a block or a row: they lie one behind the other in `x` and `out`."""
        runs = len(importance) // together
        written = header + together // size * nbytes
        scratch = np.empty(numbers + per_weight * together, np.float32)
        for i in range(first, last):
            begin, at, to = i * together, i % runs * together, i * written
            w = importance[at : at + together]
            quantise_block(x[begin : begin + together], w, out[to : to + written], scratch)

    return quantised_rows
