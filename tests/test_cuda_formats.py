"""The device functions of every quantised type that kernels of the GPU are made for, against the reference."""

import functools

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import random_bytes
from compare import assert_close
from numba import cuda, types
from tested import BACKENDS

from pymla import ggml
from pymla.cuda import memory, quant
from pymla.cuda.formats import FORMATS
from pymla.cuda.formats.runs import Run, copying
from pymla.cuda.machine import ptx
from pymla.cuda.matmul.embedding import embedding_rows_kernel
from pymla.cuda.matmul.operands import Matrices
from pymla.cuda.runtime.array_types import F1, I2
from pymla.cuda.runtime.jit import KERNELS, kernel
from pymla.reference.formats import dequantise_rows
from pymla.tensor import QTensor

CUDA = BACKENDS[0]
TYPES = pytest.mark.parametrize("qtype", FORMATS, ids=ggml.NAME.get)


def columns_of(qtype):
    """Two blocks of the type, and 64 weights at least."""
    return max(64, 2 * ggml.BLOCK_SIZE[qtype])


@TYPES
def test_pieces(qtype):
    w = QTensor(qtype, random_bytes(qtype, 3, columns_of(qtype)))
    expected = dequantise_rows(w.data, qtype, columns_of(qtype))
    out = memory.to_device(np.full(expected.shape, np.nan, np.float32))
    tokens = memory.to_device(np.arange(3, dtype=np.int32))
    put = CUDA.put(w)
    embedding_rows_kernel(qtype)[3, 128](Matrices.of(put), tokens, out)
    assert_close(memory.to_host(out), expected, rtol_max=3e-7, reason="products and sums are rounded otherwise")


@functools.cache
def dot_kernel(qtype, columns):
    """Products of the blocks of a row, which lanes read from shared memory."""
    block, dot, row_scale = FORMATS[qtype].block, FORMATS[qtype].dot, FORMATS[qtype].row_scale
    run, header = Run.of(qtype, columns // 32), ggml.ROW_HEADER[qtype]
    copy, room = copying(run, 32), 16 * run.pieces

    def dots(row, x, out):
        at, me = ptx.shared_address(cuda.shared.array(room, np.uint8, alignment=16)), ptx.lane()
        copy(at, row + header, run.nbytes, me)
        ptx.cp_async_commit()
        ptx.cp_async_wait(0)
        ptx.syncwarp()
        if me < len(out):
            words = x[me, 0], x[me, 1], x[me, 2], x[me, 3], x[me, 4], x[me, 5], x[me, 6], x[me, 7]
            total = 0
            for word in words:
                total = ptx.dp4a(word, 0x01010101, total)
            scale = np.float32(0.5)
            product = dot(block(at + (row + header & 15), me), words, scale, scale * ptx.to_f32(total), np.float32(3))
            out[me] = row_scale(row) * (product - np.float32(3)) + np.float32(3) if row_scale else product

    made = kernel(types.int64, I2, F1, variant="test")(dots)
    del KERNELS[made.__name__]
    return made


@TYPES
def test_blocks(qtype):
    """In rows that begin at several places of 16 bytes, behind each other."""
    columns, rows = columns_of(qtype), 5
    w = QTensor(qtype, random_bytes(qtype, rows, columns))
    put, codes = CUDA.put(w), np.random.default_rng(1).integers(-127, 128, (columns // 32, 32), dtype=np.int8)
    for row in range(rows):
        out = memory.to_device(np.full(columns // 32, np.nan, np.float32))
        x = memory.to_device(np.ascontiguousarray(codes).view(np.int32))
        dot_kernel(qtype, columns)[1, 32](put.data.address + row * put.data.strides[0], x, out)
        weights = dequantise_rows(w.data[row : row + 1], qtype, columns).reshape(-1, 32)
        expected = 3 + (weights.astype(np.float64) * codes / 2).sum(axis=1)
        assert_close(memory.to_host(out), expected, rtol_max=2e-6, reason="sums of integers, in float32")


def multiply(w, activation, out):
    """`quant.matmul`, also of types that are not run yet."""
    quant._product(w, activation, 1, out)
    return out


def check_products(qtype, tokens, columns):
    w, x = QTensor(qtype, random_bytes(qtype, 5, columns)), CUDA.normal(tokens, columns)
    actual = CUDA.result(multiply, w, CUDA.activation(x), shape=(tokens, 5))
    expected = CUDA.seen(x, ggml.Q8_0).astype(np.float64) @ dequantise_rows(w.data, qtype, columns).T.astype(np.float64)
    assert_close(actual, expected, rtol_max=5e-6, reason="the same int8 activations are multiplied, in float64")


@TYPES
@pytest.mark.parametrize("tokens", [1, 2])
def test_products_of_few_tokens(qtype, tokens):
    check_products(qtype, tokens, 3 * columns_of(qtype) // 2)


@pytest.mark.parametrize(
    "qtype", [ggml.Q2_K, ggml.MXFP4, ggml.NVFP4, ggml.Q1_0, ggml.IQ2_KS, ggml.IQ2_BN], ids=ggml.NAME.get
)
def test_products_of_many_tokens(qtype):
    """Minima of halves; blocks that begin at any byte; scales of halves; blocks of 128; rows with headers."""
    check_products(qtype, 9, max(96, ggml.BLOCK_SIZE[qtype]) // ggml.BLOCK_SIZE[qtype] * ggml.BLOCK_SIZE[qtype])
