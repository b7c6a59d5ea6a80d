"""Products with matrices, norms and rope of every backend against their definitions, at odd sizes."""

import itertools

import numpy as np
import pytest
from cases import (
    GPU_REPRESENTATIVES,
    REPRESENTATIVES,
    ROWS,
    TOKENS,
    bytes_alike,
    columns,
    random_qtensor,
    rows_to_norm,
)
from compare import assert_close
from definitions import dense, layer_norm, rms_norm, rotated, tempered
from tested import SIMULATED, assert_quantised, each_backend

from pymla import ggml
from pymla.tensor import QTensor

pytestmark = [each_backend, pytest.mark.filterwarnings("error")]

TYPES = GPU_REPRESENTATIVES if SIMULATED else REPRESENTATIVES
EXACT = {"rtol_max": 2e-6, "reason": "order of summation"}
INT8 = {"rtol_max": 5e-6, "reason": "the same int8 activations are multiplied, in float64"}
ONE_ROW = {"rtol_max": 1e-5, "reason": "a single result may cancel to a 400th of its terms"}


def both(tolerance):
    return {"cpu": tolerance, "cuda": tolerance}


def shapes(qtype):
    """Rows and columns."""
    if not SIMULATED:
        return itertools.product(ROWS, columns(qtype))
    if qtype not in ggml.QUANTISED:
        return (1, 7), (5, 96), (6, 132)
    block = ggml.BLOCK_SIZE[qtype]
    return ((1, 256), (5, 768)) if block == 256 else ((1, block), (5, 3 * block), (6, 11 * block))


def check_matmul(backend, w, x):
    actual = backend.result(backend.quant.matmul, w, backend.activation(x), shape=(len(x), len(w.data)))
    expected = backend.seen(x, w.qtype).astype(np.float64) @ dense(w).T
    assert_close(actual, expected, **backend.tolerance(**both(ONE_ROW if actual.size == 1 else INT8)))


@pytest.mark.parametrize("tokens", (1, 3, 9) if SIMULATED else TOKENS)
@pytest.mark.parametrize("qtype", TYPES, ids=ggml.NAME.get)
def test_matmul(backend, qtype, tokens):
    for rows, k in shapes(qtype):
        check_matmul(backend, random_qtensor(qtype, rows, k), backend.normal(tokens, k))


@pytest.mark.parametrize("tokens", [1, 6, 9])
def test_matmul_of_several_matrices(backend, tokens):
    """Part of the rows of each of three matrices, so that the matrices lie apart: their results, one after another."""
    w, x = random_qtensor(ggml.Q4_0, 3, 9, 64), backend.normal(tokens, 64)
    part = QTensor(w.qtype, backend.put(w).data[:, 2:7])
    actual = backend.result(backend.quant.matmul, part, backend.activation(x), shape=(tokens, 15))
    seen = backend.seen(x, w.qtype).astype(np.float64)
    expected = np.concatenate([seen @ matrix[2:7].T for matrix in dense(w)], axis=1)
    assert_close(actual, expected, **backend.tolerance(**both(INT8)))


@pytest.mark.parametrize("byte", [0, 255, 0x80, 0x7F])
@pytest.mark.parametrize("qtype", [each for each in TYPES if each in ggml.QUANTISED], ids=ggml.NAME.get)
def test_matmul_at_extreme_codes(backend, qtype, byte):
    """All codes alike, against activations of ±127: where 16-bit sums of products would overflow. Blocks of 32 come in
    an eight, a four and one by itself, which the CPU's kernels take apart."""
    count = 13 if ggml.BLOCK_SIZE[qtype] == 32 and not SIMULATED else 2
    size = count * ggml.BLOCK_SIZE[qtype]
    w = QTensor(qtype, bytes_alike(qtype, 3, size, byte))
    signs = np.stack([np.ones(size), -np.ones(size), np.resize([1, -1], size)]).astype(backend.dtype)
    for x in (signs, np.tile(signs, (3, 1))):
        actual = backend.result(backend.quant.matmul, w, backend.activation(x), shape=(len(x), 3))
        np.testing.assert_allclose(actual, x.astype(np.float64) @ dense(w).T, rtol=1e-6, atol=1e-3)


def test_activations_are_quantised(backend):
    x = backend.normal(7, 96)
    x[2, :32] = 0
    activation = backend.activation(x)
    np.testing.assert_array_equal(backend.memory.to_host(activation.x), x)
    if backend.rounds:
        assert_quantised(backend, activation, ggml.Q4_0, x)


@pytest.mark.parametrize("qtype", TYPES, ids=ggml.NAME.get)
def test_embedding_rows(backend, qtype):
    k = 768 if qtype in ggml.QUANTISED else 99
    w, tokens = random_qtensor(qtype, 9, k), np.array([8, 0, 3, 3], np.int32)
    for scale in (1.0, 12.5):
        actual = backend.result(backend.quant.embedding_rows, w, tokens, scale, shape=(4, k))
        assert_close(actual, scale * dense(w)[tokens], **backend.tolerance(**both(EXACT)))


@pytest.mark.parametrize("tokens", [1, 2, 9] if SIMULATED else [1, 7])
@pytest.mark.parametrize("qtype", (ggml.F16, ggml.Q8_0, ggml.Q6_K) if SIMULATED else TYPES, ids=ggml.NAME.get)
def test_matmul_heads(backend, qtype, tokens):
    k = shapes(qtype)[0][1] if SIMULATED else 256
    w, x = random_qtensor(qtype, 3, 5, k), backend.normal(tokens, 3, k)
    actual = backend.result(backend.quant.matmul_heads, w, x, shape=(tokens, 3, 5))
    seen = backend.seen(x.reshape(-1, k), qtype).reshape(x.shape).astype(np.float64)
    expected = [[matrix @ seen[t, h] for h, matrix in enumerate(dense(w))] for t in range(tokens)]
    assert_close(actual, expected, **backend.tolerance(**both(INT8)))


@pytest.mark.parametrize("qtype", TYPES, ids=ggml.NAME.get)
def test_matmul_heads_transposed(backend, qtype):
    """The first columns of wider queries to the first ones of wider results, as absorption takes them."""
    heads, rows, tokens = 2, 37, 2
    k = max(64, ggml.BLOCK_SIZE[qtype]) if qtype in ggml.QUANTISED else 70
    w, x = random_qtensor(qtype, heads, rows, k), backend.normal(tokens, heads, rows + 5)
    out = backend.unset(tokens, heads, k + 3)
    backend.quant.matmul_heads_transposed(backend.put(w), backend.put(x)[..., :rows], out[..., :k])
    actual, x = backend.memory.to_host(out), x.astype(np.float64)
    expected = [[matrix.T @ x[t, h, :rows] for h, matrix in enumerate(dense(w))] for t in range(tokens)]
    assert_close(actual[..., :k], expected, **backend.tolerance(**both(EXACT)))
    assert np.isnan(actual[..., k:]).all()


@pytest.mark.parametrize("columns", [8, 70, 300])
def test_rms_norm(backend, columns):
    """Of columns of a wider array; rows by themselves, as their sizes differ by a million."""
    x, weight, eps = rows_to_norm(columns)
    x = x.astype(backend.dtype) / 3
    wide = np.full((len(x), columns + 29), np.nan, backend.dtype)
    wide[:, :columns] = x
    actual = backend.result(backend.norm.rms_norm, backend.put(wide)[:, :columns], weight, eps, shape=x.shape)
    for row, wanted in zip(actual, rms_norm(x, weight, eps), strict=True):
        assert_close(row, wanted, **backend.tolerance(**both(EXACT)))
    # Into columns of a wider array.
    out = backend.put(np.full_like(wide, np.nan))
    backend.norm.rms_norm(backend.put(x), backend.put(weight), eps, out[:, 9 : 9 + columns])
    out = backend.memory.to_host(out)
    np.testing.assert_array_equal(out[:, 9 : 9 + columns], actual)
    assert np.isnan(out[:, :9]).all()
    assert np.isnan(out[:, 9 + columns :]).all()


@pytest.mark.parametrize("columns", [8, 70, 300])
def test_layer_norm(backend, columns):
    """As `test_rms_norm`, with a mean."""
    x, weight, eps = rows_to_norm(columns)
    x, bias = (x + x.std(1, keepdims=True)).astype(backend.dtype) / 3, backend.normal(columns).astype(np.float32)
    wide = np.full((len(x), columns + 29), np.nan, backend.dtype)
    wide[:, :columns] = x
    actual = backend.result(backend.norm.layer_norm, backend.put(wide)[:, :columns], weight, bias, eps, shape=x.shape)
    for row, wanted in zip(actual, layer_norm(x, weight, bias, eps), strict=True):
        assert_close(row, wanted, **backend.tolerance(**both(EXACT)))
    there = backend.put(x.copy())
    backend.norm.layer_norm(there, backend.put(weight), backend.put(bias), eps, there)
    np.testing.assert_array_equal(backend.memory.to_host(there), actual)


@pytest.mark.parametrize("columns", [8, 32, 70, 96, 99, 1056, 2112])
def test_norm_and_residual(backend, columns):
    """Nothing or a second array is added first. What the norm gives is quantised as any activation."""
    x, weight, eps = rows_to_norm(columns)
    x = x.astype(backend.dtype) / 3
    y = backend.normal(*x.shape, seed=2)
    for added in (None, y):
        total = x if added is None else x + added
        there, out = backend.put(x.copy()), backend.unset(*x.shape)
        arguments = [] if added is None else [backend.put(added)]
        activation = backend.norm.normed(there, backend.put(weight), eps, out, *arguments)
        assert activation.x is out
        np.testing.assert_array_equal(backend.memory.to_host(there), total)
        actual = backend.memory.to_host(out)
        for row, wanted in zip(actual, rms_norm(total, weight, eps), strict=True):
            assert_close(row, wanted, **backend.tolerance(**both(EXACT)))
        if backend.rounds and columns % 32 == 0:
            assert_quantised(backend, activation, ggml.Q4_0, actual)
    there = backend.put(x.copy())
    assert backend.norm.add(there, backend.put(y)) is there
    np.testing.assert_array_equal(backend.memory.to_host(there), x + y)


@pytest.mark.parametrize("layout", ["interleaved", "neox"])
@pytest.mark.parametrize("pairs", [2, 33])
def test_rope(backend, pairs, layout):
    """Of part of a wider array, as queries and keys are."""
    positions, inv_freq = np.array([0, 5, 100_000], np.int32), np.geomspace(1, 0.01, pairs)
    cos_sin = backend.result(backend.rope.angles, positions, inv_freq, 1.5, shape=(3, pairs, 2))
    angles = positions[:, None] * inv_freq
    expected = 1.5 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    assert_close(cos_sin, expected, **backend.tolerance(**both(EXACT)))
    x = backend.normal(3, 5, 2 * pairs + 7)
    there = backend.put(x.copy())
    getattr(backend.rope, f"rope_{layout}")(there[:, :, 1:-1], backend.put(cos_sin))
    actual = backend.memory.to_host(there)
    expected = rotated(x[..., 1:-1], positions, inv_freq, 1.5, layout)
    assert_close(actual[..., 1:-1], expected, **backend.tolerance(**both(EXACT)))
    np.testing.assert_array_equal(actual[..., :6], x[..., :6])
    np.testing.assert_array_equal(actual[..., -1], x[..., -1])


@pytest.mark.parametrize("size", [1, 24])
def test_attention_temperature(backend, size):
    """Below the length, at its multiples, and far beyond."""
    positions = np.array([0, 99, 100, 299, 300, 1_000_000], np.int32)
    x = backend.normal(len(positions), 3, size)
    there = backend.put(x.copy())
    assert backend.rope.temper(there, backend.put(positions), 0.1, 100) is there
    actual = backend.memory.to_host(there)
    assert_close(actual, tempered(x, positions, 0.1, 100), **backend.tolerance(**both(EXACT)))
    np.testing.assert_array_equal(actual[:2], x[:2])
