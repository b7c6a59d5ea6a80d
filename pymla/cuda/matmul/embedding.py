"""Rows of a matrix, times a number, as float32."""

import functools

from numba import cuda

from pymla import ggml
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.machine.ptx import valid_index
from pymla.cuda.matmul.operands import MATRICES, THREADS, row_address
from pymla.cuda.runtime.array_types import F2, F32, I1
from pymla.cuda.runtime.jit import kernel


@functools.cache
def embedding_rows_kernel(qtype):
    """The kernel of rows of a type."""
    return _float_kernel(qtype) if qtype in FLOATS else _quantised_kernel(qtype)


def _quantised_kernel(qtype):
    """Rows as float32."""
    piece, weights = FORMATS[qtype].piece, FORMATS[qtype].weights

    @kernel(MATRICES, I1, F32, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def embedding_rows(w, tokens, scale, out):
        """A block takes a token, every thread a piece."""
        t = cuda.blockIdx.x
        row = row_address(w, 0, valid_index(tokens[t], w.rows))
        for i in range(cuda.threadIdx.x, out.shape[1] >> 3, THREADS):
            block, part = i >> 2, i & 3
            k = 32 * block + 4 * part
            w0, w1, w2, w3, w4, w5, w6, w7 = weights(piece(row, block, part))
            out[t, k], out[t, k + 1], out[t, k + 2], out[t, k + 3] = scale * w0, scale * w1, scale * w2, scale * w3
            k += 16
            out[t, k], out[t, k + 1], out[t, k + 2], out[t, k + 3] = scale * w4, scale * w5, scale * w6, scale * w7

    return embedding_rows


def _float_kernel(qtype):
    """Rows of floats as float32."""
    one, _, nbytes = FLOATS[qtype]

    @kernel(MATRICES, I1, F32, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def embedding_rows(w, tokens, scale, out):
        """A block takes a token."""
        t = cuda.blockIdx.x
        row = row_address(w, 0, valid_index(tokens[t], w.rows))
        for k in range(cuda.threadIdx.x, out.shape[1], THREADS):
            out[t, k] = scale * one(row + nbytes * k)

    return embedding_rows
