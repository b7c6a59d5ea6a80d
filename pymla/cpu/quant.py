"""Products with quantised matrices. Twin of `pymla.reference.quant`.

Quantised types multiply on integers: activations become int8 with a scale per 32 values, once for all matrices that read
them (`Activation`). Float types multiply in float32.

>>> import numpy as np
>>> from pymla import ggml
>>> from pymla.cpu import quant
>>> from pymla.reference.quant import quantise
>>> from pymla.weights import QTensor
>>> w = QTensor(ggml.Q8_0, quantise(np.eye(64, dtype=np.float32), ggml.Q8_0))
>>> x = np.arange(64, dtype=np.float32)[None]
>>> out = np.empty((1, 64), np.float32)
>>> bool(np.abs(quant.matmul(w, quant.Activation(x), out) - x).max() < 0.5)
True
"""

from typing import NamedTuple

import numpy as np
from numba import prange, types

from pymla import ggml
from pymla.cpu.formats import (
    dequantise_row,
    dot_float,
    dot_row,
    dot_unpacked,
    has_minimum,
    is_float,
    unpack_row,
)
from pymla.cpu.jit import inline, kernel

F32 = ggml.F32

#: Numba types of the kernels' arguments.
BYTES = types.Array(types.uint8, 2, "C", readonly=True)
F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "C")
F3 = types.Array(types.float32, 3, "C")
I8 = types.Array(types.int8, 2, "C")
I1 = types.Array(types.int32, 1, "C")

#: Up to this many tokens each row is read once per token, straight from the file; beyond, it is unpacked once for all.
FEW = 3


#: Parallel loops over rows make this many chunks, more than any machine here has threads.
CHUNKS = 64


class Matrices(NamedTuple):
    """Several matrices of a QTensor for a kernel: rows of a matrix are contiguous, matrices may lie apart."""

    qtype: int
    address: int
    matrix_stride: int  # bytes
    row_stride: int
    count: int
    rows: int

    @classmethod
    def of(cls, w):
        """The view of a QTensor with three-dimensional data."""
        return cls(w.qtype, w.data.__array_interface__["data"][0], *w.data.strides[:2], *w.data.shape[:2])


MATRICES = types.NamedUniTuple(types.int64, 6, Matrices)


class Activation:
    """The input of one or several matrices, quantised at most once.

    Parameters
    ----------
    x : float32 array (T, K), contiguous

    Attributes
    ----------
    codes : int8 array (T, K)
    scale, sums : float32 array (T, K // 32)
        ``x ≈ codes * scale``; the sum of ``codes * scale`` over 32 values.
    """

    def __init__(self, x):
        self.x = x
        self._quantised = None

    def quantised(self, qtype):
        """``codes, scale, sums``; empty arrays where `qtype` multiplies in float32."""
        if qtype not in ggml.QUANTISED:
            return _NONE
        if self._quantised is None:
            tokens, columns = self.x.shape
            codes = np.empty((tokens, columns), np.int8)
            scale = np.empty((tokens, columns // 32), np.float32)
            sums = np.empty((tokens, columns // 32), np.float32)
            quantise_activations(self.x, codes, scale, sums)
            self._quantised = codes, scale, sums
        return self._quantised


_NONE = np.empty((0, 0), np.int8), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)


def matmul(w, activation, out):
    """``out = x @ W.T``: `w` of N rows and K columns, `activation` of (T, K), `out` float32 (T, N)."""
    codes, scale, sums = activation.quantised(w.qtype)
    multiply = matvec if len(out) <= FEW else matmul_many
    multiply(w.qtype, w.data, activation.x, codes, scale, sums, out)
    return out


def matmul_heads(w, x, out):
    """A matrix for each head: ``out[t, h] = W[h] @ x[t, h]``, `x` float32 (T, H, K), `out` float32 (T, H, N)."""
    _matmul_heads(Matrices.of(w), x, out)
    return out


def embedding_rows(w, tokens, out):
    """Rows `tokens` (int32 (T,)) of the embedding matrix as float32 (T, K)."""
    _embedding_rows(w.qtype, w.data, tokens, out)
    return out


@inline
def quantise_row(x, codes, scale, sums):
    """One vector of activations: float32 (K,) to int8 codes (K,), float32 scale and sums (K // 32,)."""
    for block in range(len(scale)):
        largest = np.float32(0)
        for i in range(32):
            largest = max(largest, abs(x[32 * block + i]))
        scale[block] = largest / np.float32(127)
        inverse = np.float32(0)
        if largest > 0:
            inverse = np.float32(127) / largest
        total = np.float32(0)
        for i in range(32):
            code = np.rint(x[32 * block + i] * inverse)
            codes[32 * block + i] = np.int8(code)
            total += code
        sums[block] = total * scale[block]


@kernel(F2, I8, F2, F2)
def quantise_activations(x, codes, scale, sums):
    """Activations (T, K) as int8 codes (T, K) with a float32 scale and sum (T, K // 32) for every 32 values."""
    for t in prange(len(x)):
        quantise_row(x[t], codes[t], scale[t], sums[t])


@kernel(types.int64, BYTES, F2, I8, F2, F2, F2)
def matvec(qtype, data, x, codes, scale, sums, out):
    """`matmul` for few tokens: every row of blocks is read straight from the file."""
    rows, columns = len(data), x.shape[1]
    chunks = min(rows, CHUNKS)
    for chunk in prange(chunks):
        for t in range(len(x)):
            for r in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
                out[t, r] = dot_row(
                    qtype,
                    data[r].ctypes.data,
                    x[t].ctypes.data,
                    codes[t:].ctypes.data,
                    scale[t:].ctypes.data,
                    sums[t:].ctypes.data,
                    columns,
                )


@kernel(types.int64, BYTES, F2, I8, F2, F2, F2)
def matmul_many(qtype, data, x, codes, scale, sums, out):
    """`matmul` for many tokens: every row is unpacked once and stays in the cache for all of them."""
    rows, columns = len(data), x.shape[1]
    chunks = min(rows, CHUNKS)
    floats, minimum = is_float(qtype), has_minimum(qtype)
    for chunk in prange(chunks):
        unpacked = np.empty(columns, np.int8)
        d = np.empty(columns // 4, np.float32)
        m = np.empty(columns // 32, np.float32)
        for r in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
            row = data[r].ctypes.data
            if floats:
                for t in range(len(x)):
                    out[t, r] = dot_float(qtype, row, x[t].ctypes.data, columns)
            else:
                unpack_row(qtype, row, unpacked.ctypes.data, d.ctypes.data, m.ctypes.data, columns)
                for t in range(len(x)):
                    out[t, r] = dot_unpacked(
                        unpacked.ctypes.data,
                        d.ctypes.data,
                        m.ctypes.data,
                        minimum,
                        codes[t].ctypes.data,
                        scale[t].ctypes.data,
                        sums[t].ctypes.data,
                        columns,
                    )


@kernel(MATRICES, F3, F3)
def _matmul_heads(w, x, out):
    tokens, heads, columns = x.shape
    for h in prange(heads):
        row = np.empty(columns, np.float32)
        for r in range(w.rows):
            dequantise_row(w.qtype, w.address + h * w.matrix_stride + r * w.row_stride, row.ctypes.data, columns)
            for t in range(tokens):
                out[t, h, r] = dot_float(F32, row.ctypes.data, x[t, h].ctypes.data, columns)


@kernel(types.int64, BYTES, I1, F2)
def _embedding_rows(qtype, data, tokens, out):
    for t in prange(len(tokens)):
        dequantise_row(qtype, data[tokens[t]].ctypes.data, out[t].ctypes.data, out.shape[1])
