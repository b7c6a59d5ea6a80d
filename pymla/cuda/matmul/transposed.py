"""Products with transposed matrices, in float32, as absorption needs them."""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.machine.ptx import WARP, fma, lane, shfl_xor
from pymla.cuda.matmul.operands import MATRICES, THREADS, WARPS, row_address
from pymla.cuda.runtime.array_types import STRIDED3
from pymla.cuda.runtime.jit import device, kernel


@functools.cache
def transposed_kernel(qtype):
    """The kernel of products with a transposed matrix of a type."""
    return _transposed_float_kernel(qtype) if qtype in FLOATS else _transposed_kernel(qtype)


def _transposed_kernel(qtype):
    """The product with a transposed matrix, in float32."""
    piece, weights = FORMATS[qtype].piece, FORMATS[qtype].weights

    @kernel(MATRICES, STRIDED3, STRIDED3, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def gemv_transposed(w, x, out):
        """A block takes 32 columns (x) of head y and token z; every thread a piece of one in 32 rows."""
        partial = cuda.shared.array((WARPS, 32), np.float32)
        thread, block, h, t = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        part = thread & 3
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for row in range(thread >> 2, w.rows, THREADS // 4):
            w0, w1, w2, w3, w4, w5, w6, w7 = weights(piece(row_address(w, h, row), block, part))
            factor = x[t, h, row]
            s0, s1, s2, s3 = fma(w0, factor, s0), fma(w1, factor, s1), fma(w2, factor, s2), fma(w3, factor, s3)
            s4, s5, s6, s7 = fma(w4, factor, s4), fma(w5, factor, s5), fma(w6, factor, s6), fma(w7, factor, s7)
        s0, s1, s2, s3 = every_fourth(s0), every_fourth(s1), every_fourth(s2), every_fourth(s3)
        s4, s5, s6, s7 = every_fourth(s4), every_fourth(s5), every_fourth(s6), every_fourth(s7)
        if lane() < 4:
            warp, k = thread // WARP, 4 * part
            partial[warp, k], partial[warp, k + 1], partial[warp, k + 2], partial[warp, k + 3] = s0, s1, s2, s3
            k += 16
            partial[warp, k], partial[warp, k + 1], partial[warp, k + 2], partial[warp, k + 3] = s4, s5, s6, s7
        cuda.syncthreads()
        if thread < 32:
            result = partial[0, thread] + partial[1, thread] + partial[2, thread] + partial[3, thread]
            out[t, h, 32 * block + thread] = result

    return gemv_transposed


@device
def every_fourth(x):
    """The sum over the lanes that are a multiple of four apart."""
    x += shfl_xor(x, 4)
    x += shfl_xor(x, 8)
    return x + shfl_xor(x, 16)


def _transposed_float_kernel(qtype):
    """The product with a transposed matrix of floats."""
    one, _, nbytes = FLOATS[qtype]

    @kernel(MATRICES, STRIDED3, STRIDED3, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def gemv_transposed(w, x, out):
        """A block takes 32 columns (x) of head y and token z, a lane a column, a warp one in four rows."""
        partial = cuda.shared.array((WARPS, 32), np.float32)
        thread, h, t = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        warp, column = thread // WARP, 32 * cuda.blockIdx.x + thread % WARP
        sum = np.float32(0)
        if column < out.shape[2]:
            for row in range(warp, w.rows, WARPS):
                sum = fma(one(row_address(w, h, row) + nbytes * column), x[t, h, row], sum)
        partial[warp, thread % WARP] = sum
        cuda.syncthreads()
        if thread < 32 and column < out.shape[2]:
            out[t, h, column] = partial[0, thread] + partial[1, thread] + partial[2, thread] + partial[3, thread]

    return gemv_transposed
