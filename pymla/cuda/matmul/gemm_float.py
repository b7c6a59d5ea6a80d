"""Products of a matrix of floats, in float32."""

import functools

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.formats import FLOATS
from pymla.cuda.machine.ptx import WARP, fma, lane, load_f32, load_f32x4, load_shared_f32x4, shared_address
from pymla.cuda.matmul.few_tokens import WARP_ROWS, WARP_TOKENS, store_few, store_few_rows
from pymla.cuda.matmul.operands import INPUT, MATRICES, THREADS, WARPS, four_rows, input_row, row_address
from pymla.cuda.runtime.array_types import F2
from pymla.cuda.runtime.jit import device, kernel

#: Rows, and tokens, of a block's tile.
FLOAT_TILE = 64

#: Columns of a slice in shared memory, and float32 from one to the next.
_SLICE, _APART = 16, FLOAT_TILE + 4

_FLOATS = _SLICE * _APART


@device
def four_inputs(x, heads, matrix, t):
    """The addresses of the float32 activations of tokens from t on, as `input_row` finds them."""
    stride = 4 * x.columns
    return (
        x.x + stride * input_row(x, heads, matrix, t),
        x.x + stride * input_row(x, heads, matrix, t + 1),
        x.x + stride * input_row(x, heads, matrix, t + 2),
        x.x + stride * input_row(x, heads, matrix, t + 3),
    )


@device
def dot_four(w, x, sum):
    """``sum + w · x`` of four numbers each."""
    return fma(w[0], x[0], fma(w[1], x[1], fma(w[2], x[2], fma(w[3], x[3], sum))))


@device
def dots_four(w, x, sums):
    """`dot_four` of four tokens."""
    s0, s1, s2, s3 = sums
    return dot_four(w, x[0], s0), dot_four(w, x[1], s1), dot_four(w, x[2], s2), dot_four(w, x[3], s3)


@device
def times_four(weight, x, sums):
    """``sums + weight * x`` of four tokens."""
    s0, s1, s2, s3 = sums
    return fma(weight, x[0], s0), fma(weight, x[1], s1), fma(weight, x[2], s2), fma(weight, x[3], s3)


@functools.cache
def gemv_float_kernel(qtype):
    """A product in float32 with few tokens."""
    one, four, nbytes = FLOATS[qtype]

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def gemv_float(w, x, heads, out):
        """A warp takes a row of matrix y and tokens from ``WARP_TOKENS * z`` on."""
        matrix, row, t = (
            cuda.blockIdx.y,
            WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP,
            WARP_TOKENS * cuda.blockIdx.z,
        )
        at, columns, me = row_address(w, matrix, row), x.columns, lane()
        x0, x1, x2, x3 = four_inputs(x, heads, matrix, t)
        s0 = s1 = s2 = s3 = np.float32(0)
        several = len(out) > 1
        # Rows are aligned for four weights at a time where four divides their length.
        whole = columns if columns & 3 == 0 else 0
        for k in range(4 * me, whole, 4 * WARP):
            weights = four(at + nbytes * k)
            s0 = dot_four(weights, load_f32x4(x0 + 4 * k), s0)
            if several:
                s1 = dot_four(weights, load_f32x4(x1 + 4 * k), s1)
                s2 = dot_four(weights, load_f32x4(x2 + 4 * k), s2)
                s3 = dot_four(weights, load_f32x4(x3 + 4 * k), s3)
        for k in range(whole + me, columns, WARP):
            weight = one(at + nbytes * k)
            s0 = fma(weight, load_f32(x0 + 4 * k), s0)
            s1 = fma(weight, load_f32(x1 + 4 * k), s1)
            s2 = fma(weight, load_f32(x2 + 4 * k), s2)
            s3 = fma(weight, load_f32(x3 + 4 * k), s3)
        store_few(out, t, matrix * w.rows + row, w.rows - row, (s0, s1, s2, s3))

    return gemv_float


@functools.cache
def gemm_float_kernel(qtype):
    """A product in float32 with many tokens, but with fewer tiles than multiprocessors."""
    one, four, nbytes = FLOATS[qtype]

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def gemm_float(w, x, heads, out):
        """A warp takes `WARP_ROWS` rows (y) of matrix z and `WARP_TOKENS` tokens; warps of a block have neighbouring
        tokens."""
        matrix, t = cuda.blockIdx.z, WARP_TOKENS * (WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP)
        first, columns, me = WARP_ROWS * cuda.blockIdx.y, x.columns, lane()
        r0, r1, r2, r3 = four_rows(w, matrix, first)
        x0, x1, x2, x3 = four_inputs(x, heads, matrix, t)
        zero = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        s0 = s1 = s2 = s3 = zero
        whole = columns if columns & 3 == 0 else 0
        for k in range(4 * me, whole, 4 * WARP):
            v = load_f32x4(x0 + 4 * k), load_f32x4(x1 + 4 * k), load_f32x4(x2 + 4 * k), load_f32x4(x3 + 4 * k)
            s0, s1 = dots_four(four(r0 + nbytes * k), v, s0), dots_four(four(r1 + nbytes * k), v, s1)
            s2, s3 = dots_four(four(r2 + nbytes * k), v, s2), dots_four(four(r3 + nbytes * k), v, s3)
        for k in range(whole + me, columns, WARP):
            y = load_f32(x0 + 4 * k), load_f32(x1 + 4 * k), load_f32(x2 + 4 * k), load_f32(x3 + 4 * k)
            s0, s1 = times_four(one(r0 + nbytes * k), y, s0), times_four(one(r1 + nbytes * k), y, s1)
            s2, s3 = times_four(one(r2 + nbytes * k), y, s2), times_four(one(r3 + nbytes * k), y, s3)
        store_few_rows(out, t, matrix * w.rows + first, w.rows - first, (s0, s1, s2, s3))

    return gemm_float


@functools.cache
def gemm_float_tiles_kernel(qtype):
    """A product in float32 with many tokens."""
    one, _, nbytes = FLOATS[qtype]

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def gemm_float_tiles(w, x, heads, out):
        """A block takes `FLOAT_TILE` rows (y) of matrix z and as many tokens (x), a thread 8 rows and 4 tokens of
        these."""
        weights = cuda.shared.array(_FLOATS, np.float32, alignment=16)
        inputs = cuda.shared.array(_FLOATS, np.float32, alignment=16)
        thread, matrix, columns = cuda.threadIdx.x, cuda.blockIdx.z, x.columns
        first, t = FLOAT_TILE * cuda.blockIdx.y, FLOAT_TILE * cuda.blockIdx.x
        # This thread copies half of a slice of a row and of a token.
        number, begin = thread >> 1, _SLICE // 2 * (thread & 1)
        row = row_address(w, matrix, first + number)
        token = x.x + 4 * columns * input_row(x, heads, matrix, t + number)
        from_weights = shared_address(weights) + 32 * (thread >> 4)
        from_inputs = shared_address(inputs) + 16 * (thread & 15)
        zero = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
        for start in range(0, columns, _SLICE):
            for i in range(begin, begin + _SLICE // 2):
                inside, at = start + i < columns, _APART * i + number
                weights[at] = one(row + nbytes * (start + i)) if inside else np.float32(0)
                inputs[at] = load_f32(token + 4 * (start + i)) if inside else np.float32(0)
            cuda.syncthreads()
            for k in range(_SLICE):
                w0, w1, w2, w3 = load_shared_f32x4(from_weights + 4 * _APART * k)
                w4, w5, w6, w7 = load_shared_f32x4(from_weights + 4 * _APART * k + 16)
                values = load_shared_f32x4(from_inputs + 4 * _APART * k)
                s0, s1 = times_four(w0, values, s0), times_four(w1, values, s1)
                s2, s3 = times_four(w2, values, s2), times_four(w3, values, s3)
                s4, s5 = times_four(w4, values, s4), times_four(w5, values, s5)
                s6, s7 = times_four(w6, values, s6), times_four(w7, values, s7)
            cuda.syncthreads()
        # Rows are neighbours in `out`.
        t += 4 * (thread & 15)
        column = matrix * w.rows + first + 8 * (thread >> 4)
        left = w.rows - first - 8 * (thread >> 4)
        for i in range(4):
            if t + i < len(out):
                store_rows(out, t + i, column, left, s0[i], s1[i], s2[i], s3[i])
                store_rows(out, t + i, column + 4, left - 4, s4[i], s5[i], s6[i], s7[i])

    return gemm_float_tiles


@device
def store_rows(out, t, column, left, s0, s1, s2, s3):
    """Results of four rows, of which `left` are there."""
    if left > 0:
        out[t, column] = s0
    if left > 1:
        out[t, column + 1] = s1
    if left > 2:
        out[t, column + 2] = s2
    if left > 3:
        out[t, column + 3] = s3
