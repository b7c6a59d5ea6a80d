"""The kernels of `pymla.cpu.quant`: products of matrices with few tokens (gemv), with many (gemm), and with a vector
for each head."""

import numpy as np
from numba import types

from pymla.cpu.formats import FORMATS
from pymla.cpu.formats.rows import dequantise_row_for
from pymla.cpu.machine.simd import address, load_f32x32, store_f32x32
from pymla.cpu.matmul.activations import INPUT, parts
from pymla.cpu.matmul.gemm import Buffers, multiply_rows_for
from pymla.cpu.matmul.gemm_amx import SPARE_COLUMNS
from pymla.cpu.matmul.gemm_f32 import F32_ROWS, F32_SCRATCH, multiply_rows_f32_for
from pymla.cpu.matmul.gemv import dot_rows_for, dot_rows_of_tokens_for, four_tokens
from pymla.cpu.matmul.matrices import MATRICES, row_at
from pymla.cpu.matmul.unpacked import PAIR_ROWS, SCRATCH
from pymla.cpu.memory import allocate, allocate_f32, fetch_ahead
from pymla.cpu.runtime.array_types import A3, F2, F3, I1, WEIGHTS_BYTES
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.jit import helper, kernel, variants

#: Bytes of a block of rows that stays in the second-level cache while several tokens use it.
SHARED_ROWS_BYTES = 128 << 10


@helper
def rows_at_once(tokens, stride, rows):
    """Rows that tokens read one after the other; all where there is one token."""
    return max(16, SHARED_ROWS_BYTES // stride) if tokens > 1 else rows


@variants
def matmul_rows(qtype):
    """`matmul` for few tokens: blocks are read straight from the file."""
    dot_rows = dot_rows_of_tokens_for(qtype)

    @kernel(MATRICES, INPUT, I1, F2)
    def matmul_rows(first, last, w, x, index, out):
        """`matmul` for few tokens, over the rows of all matrices: blocks are read straight from the file. `index`
        counts the tokens."""
        columns, size = x.x.shape[1], rows_at_once(len(out), w.row_stride, last - first)
        r = first
        while r < last:
            matrix, i = r // w.rows, r % w.rows
            count = min(size, last - r, w.rows - i)
            row = row_at(w, matrix, i)
            for t in range(0, len(out), 4):
                four, number = four_tokens(x, index, t, len(out)), min(4, len(out) - t)
                dot_rows(row, w.row_stride, count, four, number, columns, address(out[t, r:]), 4 * out.shape[1])
            r += count

    return matmul_rows


@variants
def matmul_panels(qtype):
    """`matmul` for many tokens and a quantised type."""
    multiply_rows = multiply_rows_for(qtype)

    @kernel(MATRICES, INPUT, I1, F2)
    def matmul_panels(first, last, w, x, index, out):
        """Over groups of `PAIR_ROWS` rows of each matrix."""
        tokens, groups = len(x.x), (w.rows + PAIR_ROWS - 1) // PAIR_ROWS
        scratch, results = allocate(SCRATCH), allocate_f32(tokens + SPARE_COLUMNS, PAIR_ROWS)
        for item in range(first, last):
            buffers = Buffers(address(scratch), address(results))  # in the loop, so that it keeps the arrays alive
            matrix, begin = item // groups, item % groups * PAIR_ROWS
            at = address(out[0, matrix * w.rows + begin :])
            multiply_rows(w, matrix, begin, x, index, (0, tokens), buffers, at, 4 * out.shape[1])

    return matmul_panels


@variants
def matmul_float(qtype):
    """`matmul` for many tokens and a float type."""
    multiply_rows = multiply_rows_f32_for(qtype)

    @kernel(MATRICES, INPUT, F2)
    def matmul_float(first, last, w, x, out):
        """Over groups of `F32_ROWS` rows of each matrix."""
        groups, scratch = (w.rows + F32_ROWS - 1) // F32_ROWS, allocate(F32_SCRATCH)
        for item in range(first, last):
            matrix, begin = item // groups, item % groups * F32_ROWS
            multiply_rows(w, matrix, begin, x.x, out[:, matrix * w.rows + begin :], address(scratch))

    return matmul_float


@variants
def matmul_heads(qtype):
    """`matmul_heads`."""
    dot_rows = dot_rows_for(qtype)

    @kernel(MATRICES, INPUT, F3)
    def matmul_heads(first, last, w, x, out):
        """`matmul_heads` over the rows of all heads."""
        tokens, heads, _ = out.shape
        columns, size = x.x.shape[1], rows_at_once(tokens, w.row_stride, last - first)
        r = first
        while r < last:
            h, i = r // w.rows, r % w.rows
            count = min(size, last - r, w.rows - i)
            row = row_at(w, h, i)
            for t in range(tokens):
                dot_rows(row, w.row_stride, count, parts(x, t * heads + h), columns, address(out[t, h, i:]))
            r += count

    return matmul_heads


@variants
def matmul_heads_transposed(qtype):
    """`matmul_heads_transposed`: sums of scaled rows."""
    add_rows = _add_rows_for(qtype)

    @kernel(MATRICES, A3, types.int64, A3)
    def matmul_heads_transposed(first, last, w, x, shares, out):
        """Over shares of the tokens of each head."""
        tokens = len(x)
        for item in range(first, last):
            h, share = item // shares, item % shares
            for t in range(tokens * share // shares, tokens * (share + 1) // shares):
                out[t, h, :] = 0
                add_rows(w, h, x[t, h], out[t, h])

    return matmul_heads_transposed


def _add_rows_for(qtype):
    """Make a function ``(w, matrix, weights, out)``: add the rows of one of the `Matrices` times their weights, a
    float32 array, to the float32 array `out`."""
    add_block, load_one, size = FORMATS[qtype].add_block, FORMATS[qtype].load_one, FORMATS[qtype].number_bytes

    @inlined
    def add_four(rows, weights, block, sums):
        """Add a block of four rows times their weights to float32 at `sums`."""
        acc = add_block(rows[0], block, weights[0], load_f32x32(sums))
        acc = add_block(rows[1], block, weights[1], acc)
        acc = add_block(rows[2], block, weights[2], acc)
        store_f32x32(sums, add_block(rows[3], block, weights[3], acc))

    @helper
    def add_rows(w, matrix, weights, out):
        """Four rows, a quarter of the matrix apart, are added at a time, each a stream that the processor
        prefetches."""
        columns, stride, first, sums = len(out), w.row_stride, row_at(w, matrix, 0), address(out)
        blocks, apart = columns // 32, w.rows // 4
        for i in range(apart):
            a, b, c, d = i, i + apart, i + 2 * apart, i + 3 * apart
            rows = first + a * stride, first + b * stride, first + c * stride, first + d * stride
            four = weights[a], weights[b], weights[c], weights[d]
            for each in rows:
                fetch_ahead(each, stride)
            for block in range(blocks):
                add_four(rows, four, block, sums + 128 * block)
        for i in range(4 * apart, w.rows):
            row, weight = first + i * stride, weights[i]
            for block in range(blocks):
                at = sums + 128 * block
                store_f32x32(at, add_block(row, block, weight, load_f32x32(at)))
        if load_one is not None:  # types with blocks have no columns behind the last block
            for c in range(32 * blocks, columns):
                for i in range(w.rows):
                    out[c] += weights[i] * load_one(first + i * stride + c * size)

    return add_rows


@variants
def embedding_rows(qtype):
    """`embedding_rows`."""
    dequantise_row = dequantise_row_for(qtype)

    @kernel(WEIGHTS_BYTES, I1, types.float64, F2)
    def embedding_rows(first, last, data, tokens, scale, out):
        """Over tokens."""
        factor = np.float32(scale)
        for t in range(first, last):
            dequantise_row(address(data[tokens[t]]), address(out[t]), out.shape[1])
            for i in range(out.shape[1]):
                out[t, i] *= factor

    return embedding_rows
