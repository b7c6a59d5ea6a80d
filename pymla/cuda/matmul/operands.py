"""Matrices and activations as kernels of products take them, and the addresses of their rows."""

from typing import NamedTuple

from numba import types

from pymla.cuda.machine.ptx import WARP
from pymla.cuda.runtime.jit import device

#: Threads of a block of every product, and its warps.
THREADS = 128

WARPS = THREADS // WARP


class Matrices(NamedTuple):
    """One or several matrices of a QTensor for a kernel: rows of a matrix are contiguous, matrices may lie apart."""

    address: int
    matrix_stride: int  # bytes
    row_stride: int
    count: int
    rows: int

    @classmethod
    def of(cls, w):
        """The view of a QTensor with two- or three-dimensional data on the device."""
        data = w.data if w.data.ndim == 3 else w.data[None]
        return cls(data.address, *data.strides[:2], *data.shape[:2])


MATRICES = types.NamedUniTuple(types.int64, 5, Matrices)


class Input(NamedTuple):
    """Activations as kernels read them: addresses, and sizes. The quantised parts are 0 where only float types do."""

    x: int  # float32 (T, K)
    codes: int  # int8 (T, K)
    scales: int  # float32 (T, K // 32, 2): the scale, x ≈ codes * scale, and the sum of codes * scale
    tokens: int
    columns: int


INPUT = types.NamedUniTuple(types.int64, 5, Input)


@device
def row_address(w, matrix, row):
    """The address of a row. Rows past the end repeat the last row, so that every address can be read."""
    return w.address + matrix * w.matrix_stride + min(row, w.rows - 1) * w.row_stride


@device
def input_row(x, heads, matrix, t):
    """The row of the activations for a token and a matrix. Tokens past the end repeat the last token."""
    return min(t * heads + matrix, x.tokens - heads + matrix) if heads > 1 else min(t, x.tokens - 1)


@device
def four_rows(w, matrix, first):
    """The addresses of a warp's four rows. Rows past the end repeat the last row."""
    r0, left = row_address(w, matrix, first), w.rows - first
    r1 = r0 + (w.row_stride if left > 1 else 0)
    r2 = r1 + (w.row_stride if left > 2 else 0)
    return r0, r1, r2, r2 + (w.row_stride if left > 3 else 0)
