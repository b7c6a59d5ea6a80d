"""Products of weights with many columns of activations, of types of every feature, against NumPy."""

import itertools

import numpy as np
import pytest
from cases import FLOAT_REPRESENTATIVES, QUANTISED_REPRESENTATIVES, as_multiplied, random_qtensor
from compare import assert_close
from test_gemv import multiplied, normal

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.matmul import kernels
from pymla.cpu.matmul.activations import Activation, consecutive, counting
from pymla.cpu.matmul.gemm import tile_for
from pymla.cpu.matmul.gemm_f32 import F32_CHUNK, F32_ROWS
from pymla.cpu.matmul.matrices import Matrices
from pymla.cpu.matmul.unpacked import CHUNK, PAIR_ROWS
from pymla.cpu.moe import grouped
from pymla.cpu.runtime.isa import LANES
from pymla.reference.quant import dequantise
from pymla.tensor import QTensor

QUANTISED = pytest.mark.parametrize("qtype", QUANTISED_REPRESENTATIVES, ids=ggml.NAME.get)
FLOATS = pytest.mark.parametrize("qtype", FLOAT_REPRESENTATIVES, ids=ggml.NAME.get)
INT8 = {"rtol_max": 5e-6, "reason": "NumPy multiplies the same int8 activations, in float64"}
F32 = {"rtol_max": 2e-6, "reason": "order of summation"}


def run(w, x):
    """`kernels.matmul_panels`, or for float types `matmul_float`, over all rows."""
    matrices = Matrices.of(w)
    out = np.full((len(x), matrices.number * matrices.rows), np.nan, np.float32)
    made = Activation(x).panels(w.qtype)
    if w.qtype in ggml.QUANTISED:
        launch = kernels.matmul_panels(w.qtype)[matrices.number * -(-matrices.rows // PAIR_ROWS)]
        launch(matrices, made, counting(len(x)), out)
    else:
        kernels.matmul_float(w.qtype)[matrices.number * -(-matrices.rows // F32_ROWS)](matrices, made, out)
    return out


@QUANTISED
def test_numbers_of_tokens(qtype):
    """Tiles of all widths, with and without columns past the end."""
    widest = tile_for(FORMATS[qtype]).widest
    w = random_qtensor(qtype, PAIR_ROWS, 512)
    for tokens in range(1, 2 * widest + 2):
        x = normal(tokens, 512)
        assert_close(run(w, x), multiplied(w, x), **INT8)


@QUANTISED
def test_row_lengths(qtype):
    """Fewer columns of K than are unpacked at a time, as many, and more with a rest of some blocks."""
    block = ggml.BLOCK_SIZE[qtype]
    for k in (block, CHUNK, CHUNK + block, 3 * CHUNK + 3 * block):
        w, x = random_qtensor(qtype, PAIR_ROWS, k), normal(7, k)
        assert_close(run(w, x), multiplied(w, x), **INT8)


@QUANTISED
def test_numbers_of_rows(qtype):
    """Rows past the end repeat the last one; where there is no second panel, it repeats the first panel's last row."""
    for rows in (1, LANES - 1, LANES, LANES + 1, PAIR_ROWS, PAIR_ROWS + 1):
        w, x = random_qtensor(qtype, rows, 256), normal(5, 256)
        assert_close(run(w, x), multiplied(w, x), **INT8)


@QUANTISED
def test_rows_that_lie_apart(qtype):
    whole, x = random_qtensor(qtype, 3, 8, 256), normal(5, 256)
    part = QTensor(qtype, whole.data[:, 1:6])
    expected = [multiplied(QTensor(qtype, matrix), x) for matrix in part.data]
    assert_close(run(part, x), np.concatenate(expected, axis=1), **INT8)


@FLOATS
def test_float_types(qtype):
    for rows, k, tokens in ((1, 1, 1), (F32_ROWS, 16, 4), (F32_ROWS + 1, F32_CHUNK + 5, 7), (40, 3 * F32_CHUNK, 9)):
        w, x = random_qtensor(qtype, rows, k), normal(tokens, k)
        assert_close(run(w, x), multiplied(w, x), **F32)


def experts_case(qtype, inner, k, counts):
    """Down matrices of experts, pairs of token and expert sorted by expert, and hidden activations of every pair."""
    w = random_qtensor(qtype, len(counts), inner, k)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return w, starts, normal(starts[-1], k)


@QUANTISED
def test_columns_by_index(qtype):
    """Down projections of experts, whose activations are those of shuffled pairs; one expert has none."""
    w, starts, x = experts_case(qtype, PAIR_ROWS + 3, 512, [4, 0, 9])
    pairs = np.arange(starts[-1], dtype=np.int32)  # a choice for each token
    index = np.random.default_rng(1).permutation(starts[-1]).astype(np.int32)
    weights = np.random.default_rng(2).random((len(pairs), 1), dtype=np.float32)
    made, columns = consecutive(qtype, Activation(x).panels(qtype), index)
    matrices, before = Matrices.of(w), normal(len(pairs), w.data.shape[1], seed=3)
    expected = np.empty(before.shape)
    for e, (begin, end) in enumerate(itertools.pairwise(starts)):
        expected[begin:end] = multiplied(QTensor(qtype, w.data[e]), x[index[begin:end]]) * weights[begin:end]
    for add in (False, True):
        out = before.copy()
        launch = grouped.down_panels(qtype)[-(-matrices.rows // PAIR_ROWS)]
        launch(matrices, matrices._replace(number=0), pairs, columns, starts, weights, made, add, out)
        assert_close(out, expected + before * add, **INT8)


@QUANTISED
def test_gate_and_up(qtype):
    rows, k = LANES + 5, 256
    gate, starts, x = experts_case(qtype, rows, k, [3, 0, 8])
    up = random_qtensor(qtype, 3, rows, k, seed=1)
    made, columns = consecutive(qtype, Activation(x).panels(qtype), counting(len(x)))
    hidden = np.full((len(x), rows), np.nan, np.float32)
    gates, ups = Matrices.of(gate), Matrices.of(up)
    none = gates._replace(number=0)
    launch = grouped.gate_up_panels(qtype)[3 * -(-rows // LANES)]
    launch(gates, ups, none, none, columns, starts, made, hidden)
    seen = as_multiplied(x, qtype).astype(np.float64)
    for e, (begin, end) in enumerate(itertools.pairwise(starts)):
        g, u = (seen[begin:end] @ dequantise(w.data[e], qtype).astype(np.float64).T for w in (gate, up))
        if begin < end:
            assert_close(hidden[begin:end], g / (1 + np.exp(-g)) * u, **INT8)
