"""Products of a quantised matrix with few tokens: a warp takes four rows straight from the file's blocks."""

import functools

from numba import cuda, types

from pymla import ggml
from pymla.cuda.formats import FORMATS
from pymla.cuda.machine.ptx import WARP, global_address, lane, store_f32, warp_sum
from pymla.cuda.matmul.few_tokens import WARP_ROWS, WARP_TOKENS, store_few_rows
from pymla.cuda.matmul.operands import INPUT, MATRICES, THREADS, WARPS, four_rows, input_row
from pymla.cuda.matmul.rows import row_products
from pymla.cuda.runtime.array_types import F2
from pymla.cuda.runtime.jit import kernel


@functools.cache
def gemv_kernel(qtype):
    """A product with one token."""
    products, blocks = row_products(qtype, WARP_ROWS, 1), 3 if FORMATS[qtype].many_registers else 4

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS, min_blocks=blocks)
    def gemv(w, x, heads, out):
        """A warp takes `WARP_ROWS` rows of matrix y."""
        matrix, me = cuda.blockIdx.y, lane()
        first = WARP_ROWS * (WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP)
        s0, s1, s2, s3 = products(four_rows(w, matrix, first), (input_row(x, heads, matrix, 0),), x)
        r0, r1, r2, r3 = warp_sum(s0[0]), warp_sum(s1[0]), warp_sum(s2[0]), warp_sum(s3[0])
        if me < WARP_ROWS and first + me < w.rows:
            result = r0 if me == 0 else r1 if me == 1 else r2 if me == 2 else r3
            store_f32(global_address(out) + 4 * (matrix * w.rows + first + me), result)

    return gemv


@functools.cache
def gemv_few_kernel(qtype):
    """A product with up to `WARP_TOKENS` tokens, which share the rows that are read."""
    products = row_products(qtype, WARP_ROWS, WARP_TOKENS)

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def gemv_few(w, x, heads, out):
        """As `matvec`, for tokens from ``WARP_TOKENS * x`` on; y are rows and z matrices."""
        matrix, t = cuda.blockIdx.z, WARP_TOKENS * cuda.blockIdx.x
        first = WARP_ROWS * (WARPS * cuda.blockIdx.y + cuda.threadIdx.x // WARP)
        numbers = (
            input_row(x, heads, matrix, t),
            input_row(x, heads, matrix, t + 1),
            input_row(x, heads, matrix, t + 2),
            input_row(x, heads, matrix, t + 3),
        )
        s0, s1, s2, s3 = products(four_rows(w, matrix, first), numbers, x)
        store_few_rows(out, t, matrix * w.rows + first, w.rows - first, (s0, s1, s2, s3))

    return gemv_few
