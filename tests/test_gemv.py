"""Products of rows of weights with the activations of one or few tokens, of types of every feature, against NumPy."""

import numpy as np
import pytest
from cases import REPRESENTATIVES, as_multiplied, random_qtensor
from compare import assert_close

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.matmul import kernels
from pymla.cpu.matmul.activations import Activation, counting
from pymla.cpu.matmul.matrices import Matrices
from pymla.reference.quant import dequantise
from pymla.tensor import QTensor

TYPES = pytest.mark.parametrize("qtype", REPRESENTATIVES, ids=ggml.NAME.get)
INT8 = {"rtol_max": 5e-6, "reason": "NumPy multiplies the same int8 activations, in float64"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def row_lengths(qtype):
    """For blocks of 32: every number of blocks behind eights and fours. For float types also no multiple of 16."""
    if ggml.BLOCK_SIZE[qtype] == 256:
        return 256, 512, 1280
    return tuple(32 * blocks for blocks in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 44)) + (
        () if qtype in ggml.QUANTISED else (1, 15, 17, 100)
    )


def multiplied(w, x):
    """``x @ w.T`` in float64, with the activations that a product with this type sees."""
    return as_multiplied(x, w.qtype).astype(np.float64) @ dequantise(w.data, w.qtype).astype(np.float64).T


def run(w, x, items=None):
    """`kernels.matmul_rows` over all rows, in the ranges of items."""
    matrices = Matrices.of(w)
    out = np.full((len(x), matrices.number * matrices.rows), np.nan, np.float32)
    launch = kernels.matmul_rows(w.qtype)[(out.shape[1], items) if items else out.shape[1]]
    launch(matrices, Activation(x).rows(w.qtype), counting(len(x)), out)
    return out


@TYPES
def test_row_lengths(qtype):
    for k in row_lengths(qtype):
        w, x = random_qtensor(qtype, 7, k), normal(1, k)
        assert_close(run(w, x), multiplied(w, x), **INT8)


@TYPES
def test_numbers_of_rows(qtype):
    """Four rows are multiplied together; rows past the end repeat the last row, and store its result again."""
    for rows in (1, 2, 3, 4, 5, 6, 9):
        w, x = random_qtensor(qtype, rows, 512), normal(3, 512)
        for items in (None, 1, 3):
            tolerance = INT8 | ({"rtol_max": 1e-5} if rows == 1 else {})
            assert_close(run(w, x, items), multiplied(w, x), **tolerance)


@TYPES
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8])
def test_numbers_of_tokens(qtype, tokens):
    """Three or four tokens are multiplied together, where a type can; those past the end repeat the last one."""
    w, x = random_qtensor(qtype, 5, row_lengths(qtype)[-1]), normal(tokens, row_lengths(qtype)[-1])
    assert_close(run(w, x), multiplied(w, x), **INT8)


@TYPES
def test_rows_that_lie_apart(qtype):
    """Some rows of each of several matrices, which are parts of larger ones."""
    whole, x = random_qtensor(qtype, 3, 8, 256), normal(2, 256)
    part = QTensor(qtype, whole.data[:, 1:6])
    expected = [multiplied(QTensor(qtype, matrix), x) for matrix in part.data]
    assert_close(run(part, x), np.concatenate(expected, axis=1), **INT8)


@TYPES
def test_more_rows_than_stay_in_a_cache(qtype):
    """Several tokens read blocks of rows of `SHARED_ROWS_BYTES` one after the other."""
    k = 1024
    rows = 2 * kernels.SHARED_ROWS_BYTES // ggml.row_bytes(qtype, k) + 3
    w, x = random_qtensor(qtype, rows, k), normal(2, k)
    assert_close(run(w, x, rows), multiplied(w, x), **INT8)


@TYPES
def test_heads(qtype):
    w, x = random_qtensor(qtype, 3, 5, 256), normal(2, 3, 256)
    out = np.full((2, 3, 5), np.nan, np.float32)
    kernels.matmul_heads(qtype)[15](Matrices.of(w), Activation(x.reshape(6, 256)).rows(qtype), out)
    for h in range(3):
        assert_close(out[:, h], multiplied(QTensor(qtype, w.data[h]), x[:, h]), **INT8)


@TYPES
@pytest.mark.parametrize("shares", [1, 2])
def test_transposed_heads(qtype, shares):
    """Four rows are added together; the rest are added one by one."""
    k = 256 if qtype in ggml.QUANTISED else 99
    for rows in (1, 4, 7, 12):
        w, x = random_qtensor(qtype, 2, rows, k), normal(3, 2, rows)
        out = np.full((3, 2, k), np.nan, np.float32)
        kernels.matmul_heads_transposed(qtype)[2 * shares](Matrices.of(w), x, shares, out)
        for h in range(2):
            expected = x[:, h].astype(np.float64) @ dequantise(w.data[h], qtype)
            assert_close(out[:, h], expected, rtol_max=2e-6, reason="order of summation")


def test_activations_are_quantised_once_for_an_order():
    activation = Activation(normal(2, 512))
    for qtype in ggml.QUANTISED:
        for other in ggml.QUANTISED:
            same = FORMATS[qtype].order == FORMATS[other].order
            assert (activation.rows(qtype) is activation.rows(other)) == same
