"""CUDA kernels for quantised matrices, norms and rope against their twins in the reference, in the simulator."""

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import random_qtensor, rows_to_norm
from compare import assert_close

from pymla import ggml, reference
from pymla.cuda import memory, norm, quant, rope
from pymla.cuda.formats import FORMATS
from pymla.cuda.matmul.gemm_layout import TILE_ROWS, WIDE, tile_widths
from pymla.errors import PymlaError
from pymla.tensor import QTensor

EXACT = {"rtol_max": 2e-6, "reason": "order of summation"}
INT8 = {"rtol_max": 5e-6, "reason": "the reference multiplies the same int8 activations, in float64"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def on_device(w):
    return QTensor(w.qtype, memory.to_device(w.data))


def result(function, *arguments, shape):
    """What a function writes to its last argument, which holds NaN before."""
    out = memory.empty(shape, np.float32)
    assert np.isnan(memory.to_host(out)).all()
    arguments = [memory.to_device(each) if isinstance(each, np.ndarray) else each for each in arguments]
    return memory.to_host(function(*arguments, out))


def as_multiplied(x, qtype):
    """The activations that a product with `qtype` really sees."""
    if qtype not in ggml.QUANTISED:
        return x
    codes, scale = reference.quant.quantise_activations(x)
    return (codes.reshape(len(x), -1, 32) * scale[..., None]).reshape(x.shape)


def columns(qtype):
    """Row lengths: one block, several, and for small blocks an odd number of them."""
    if qtype not in ggml.QUANTISED:
        return (7, 96, 132)
    return (256, 768) if qtype == ggml.Q6_K else (32, 96, 352)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_matmul(qtype, tokens):
    for rows, k in zip((1, 5, 6), columns(qtype), strict=False):
        w, x = random_qtensor(qtype, rows, k), normal(tokens, k)
        actual = result(quant.matmul, on_device(w), quant.Activation(memory.to_device(x)), shape=(tokens, rows))
        seen = reference.quant.Activation(as_multiplied(x, qtype).astype(np.float64))
        assert_close(actual, reference.quant.matmul(w, seen, np.empty((tokens, rows))), **INT8)


@pytest.mark.parametrize("enough", [1, 1000])
@pytest.mark.parametrize("qtype", [ggml.F16, ggml.Q4_1, ggml.Q6_K], ids=ggml.NAME.get)
def test_matmul_of_several_tiles(qtype, enough, monkeypatch):
    """More rows and tokens than a block of threads takes, as many tiles and as few."""
    monkeypatch.setattr(quant, "ENOUGH_TILES", enough)
    k, rows, tokens = 33 if qtype == ggml.F16 else ggml.BLOCK_SIZE[qtype], 67, 66
    w, x = random_qtensor(qtype, rows, k), normal(tokens, k)
    actual = result(quant.matmul, on_device(w), quant.Activation(memory.to_device(x)), shape=(tokens, rows))
    seen = reference.quant.Activation(as_multiplied(x, qtype).astype(np.float64))
    assert_close(actual, reference.quant.matmul(w, seen, np.empty((tokens, rows))), **INT8)


@pytest.mark.parametrize("qtype", ggml.QUANTISED, ids=ggml.NAME.get)
def test_matmul_of_long_rows(qtype):
    """More blocks than a warp reads at a time, and in tiles more slices than are in shared memory."""
    for k, many in ((1408 if qtype != ggml.Q6_K else 1536, 9), (2048, 3)):
        w, x = random_qtensor(qtype, 5, k), normal(many, k)
        for tokens in (1, 2, many):
            there = quant.Activation(memory.to_device(x[:tokens]))
            actual = result(quant.matmul, on_device(w), there, shape=(tokens, 5))
            seen = reference.quant.Activation(as_multiplied(x[:tokens], qtype).astype(np.float64))
            assert_close(actual, reference.quant.matmul(w, seen, np.empty((tokens, 5))), **INT8)


@pytest.mark.parametrize(
    ("qtype", "activations"),
    [(qtype, activations) for qtype in FORMATS for activations in tile_widths(qtype)],
    ids=lambda x: ggml.NAME.get(x, x),
)
def test_matmul_in_tiles(qtype, activations, monkeypatch):
    """Narrow and wide tiles of rows that begin at every place that 16 bytes have, the last ones not full."""
    monkeypatch.setattr(quant, "ENOUGH_TILES", 1 if activations == WIDE else 1000)
    k = 96 if qtype != ggml.Q6_K else 256
    w, x = random_qtensor(qtype, TILE_ROWS + 3, k), normal(activations + 2, k)
    starts = {int(each) % 16 for each in on_device(w).data.strides[0] * np.arange(len(w.data))}
    assert starts == set(range(0, 16, 4 if qtype == ggml.Q4_1 else 2))
    actual = result(quant.matmul, on_device(w), quant.Activation(memory.to_device(x)), shape=(len(x), len(w.data)))
    seen = reference.quant.Activation(as_multiplied(x, qtype).astype(np.float64))
    assert_close(actual, reference.quant.matmul(w, seen, np.empty(actual.shape)), **INT8)


@pytest.mark.parametrize("tokens", [1, 6, 9])
def test_matmul_of_several_matrices(tokens):
    """Part of the rows of each of three matrices, so that the matrices lie apart."""
    w, x = random_qtensor(ggml.Q4_0, 3, 9, 64), normal(tokens, 64)
    data = memory.to_device(w.data)[:, 2:7]
    actual = result(quant.matmul, QTensor(w.qtype, data), quant.Activation(memory.to_device(x)), shape=(tokens, 15))
    seen = as_multiplied(x, w.qtype).astype(np.float64)
    expected = [
        reference.quant.matmul(QTensor(w.qtype, each[2:7]), reference.quant.Activation(seen), np.empty((tokens, 5)))
        for each in w.data
    ]
    assert_close(actual, np.concatenate(expected, axis=1), **INT8)


@pytest.mark.parametrize("byte", [0, 255, 0x80, 0x7F])
@pytest.mark.parametrize("qtype", ggml.QUANTISED, ids=ggml.NAME.get)
def test_matmul_at_extreme_codes(qtype, byte):
    """All codes alike, against activations of ±127."""
    block = np.full((3, 2, ggml.BLOCK_BYTES[qtype]), byte, np.uint8)
    for at in {ggml.Q4_0: (0,), ggml.Q4_1: (0, 2), ggml.Q8_0: (0,), ggml.Q6_K: (208,)}[qtype]:
        block[..., at : at + 2] = np.array([1], np.float16).view(np.uint8)
    w = QTensor(qtype, block.reshape(3, -1))
    size = 2 * ggml.BLOCK_SIZE[qtype]
    signs = np.stack([np.ones(size), -np.ones(size), np.resize([1, -1], size)]).astype(np.float32)
    for x in (signs, np.tile(signs, (3, 1))):
        actual = result(quant.matmul, on_device(w), quant.Activation(memory.to_device(x)), shape=(len(x), 3))
        expected = x.astype(np.float64) @ reference.quant.dequantise(w.data, qtype).astype(np.float64).T
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-3)


def test_quantise_activations():
    x = normal(7, 96)
    x[2, :32] = 0
    activation = quant.Activation(memory.to_device(x))
    activation.input(ggml.Q4_0)
    codes, scales = memory.to_host(activation.codes), memory.to_host(activation.scales)
    expected_codes, expected_scale = reference.quant.quantise_activations(x)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales[..., 0], expected_scale)
    np.testing.assert_allclose(scales[..., 1], codes.reshape(7, 3, 32).sum(-1) * expected_scale, rtol=1e-6)
    assert activation.input(ggml.Q8_0) == activation.input(ggml.Q4_0)


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_fault_shows_in_its_token(fault):
    x = normal(10, 64)
    x[4, 40] = fault
    w = on_device(random_qtensor(ggml.Q4_1, 3, 64))
    for tokens in (5, 10):
        actual = result(quant.matmul, w, quant.Activation(memory.to_device(x[:tokens])), shape=(tokens, 3))
        assert np.isnan(actual[4]).all()
        assert np.isfinite(np.delete(actual, 4, axis=0)).all()


def test_activations_are_contiguous():
    with pytest.raises(PymlaError, match=r"Activation: x is an array with strides .*; a contiguous one"):
        quant.Activation(memory.to_device(normal(3, 64))[:, :32])


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_embedding_rows(qtype):
    k = 768 if qtype in ggml.QUANTISED else 99
    w = random_qtensor(qtype, 9, k)
    tokens = np.array([8, 0, 3, 3], np.int32)
    actual = result(quant.embedding_rows, on_device(w), tokens, shape=(4, k))
    assert_close(actual, reference.quant.embedding_rows(w, tokens, np.empty((4, k), np.float32)), **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("qtype", [ggml.F16, ggml.Q8_0, ggml.Q6_K], ids=ggml.NAME.get)
def test_matmul_heads(qtype, tokens):
    k = columns(qtype)[0]
    w, x = random_qtensor(qtype, 3, 5, k), normal(tokens, 3, k)
    actual = result(quant.matmul_heads, on_device(w), x, shape=(tokens, 3, 5))
    seen = as_multiplied(x.reshape(-1, k), qtype).reshape(x.shape)
    assert_close(actual, reference.quant.matmul_heads(w, seen, np.empty((tokens, 3, 5))), **INT8)


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_matmul_heads_transposed(qtype):
    """The first columns of wider queries to the first ones of wider results, as absorption takes them."""
    heads, rows, k, tokens = 2, 37, max(64, ggml.BLOCK_SIZE[qtype]) if qtype in ggml.QUANTISED else 70, 2
    w, x = random_qtensor(qtype, heads, rows, k), normal(tokens, heads, rows + 5)
    out = memory.empty((tokens, heads, k + 3), np.float32)
    quant.matmul_heads_transposed(on_device(w), memory.to_device(x)[..., :rows], out[..., :k])
    actual = memory.to_host(out)
    matrices = reference.quant.dequantise(w.data, qtype).astype(np.float64)
    assert_close(actual[..., :k], np.einsum("thn,hnk->thk", x[..., :rows], matrices), **EXACT)
    assert np.isnan(actual[..., k:]).all()


def test_norm_and_residual():
    x, weight = normal(3, 399), normal(300, seed=1)
    actual = result(norm.rms_norm, memory.to_device(x)[:, :300], weight, 1e-6, shape=(3, 300))
    expected = reference.norm.rms_norm(x[:, :300], weight, 1e-6, np.empty((3, 300), np.float32))
    assert_close(actual, expected, **EXACT)
    y, sum = normal(3, 399, seed=2), memory.to_device(x)
    norm.add(sum, memory.to_device(y))
    np.testing.assert_array_equal(memory.to_host(sum), x + y)


@pytest.mark.parametrize("columns", [32, 96, 1056, 2112, 70])
def test_norm_with_sum_and_quantising(columns):
    """Against the launches that it stands for."""
    x, y, weight = normal(3, columns), normal(3, columns, seed=2), normal(columns, seed=1)
    x[1, :32] = y[1, :32] = 0
    for other in (None, y):
        here, there = x.copy(), memory.to_device(x)
        out = memory.empty(x.shape, np.float32)
        added = None if other is None else memory.to_device(other)
        activation = norm.normed(there, memory.to_device(weight), 1e-6, out, added)
        expected = reference.norm.normed(here, weight, 1e-6, np.empty_like(x), other).x
        np.testing.assert_array_equal(memory.to_host(there), here)
        actual = memory.to_host(out)
        assert_close(actual, expected, **EXACT)
        assert activation.x is out
        if columns % 32 == 0:
            codes, scale = reference.quant.quantise_activations(actual)
            np.testing.assert_array_equal(memory.to_host(activation.codes), codes)
            scales = memory.to_host(activation.scales)
            np.testing.assert_array_equal(scales[..., 0], scale)
            np.testing.assert_allclose(scales[..., 1], codes.reshape(3, -1, 32).sum(-1, dtype=int) * scale, rtol=1e-6)


@pytest.mark.parametrize("columns", [32, 70])
def test_eps_of_the_norm(columns):
    x, weight, eps, expected = rows_to_norm(columns)
    there = memory.to_device(x)
    fused = norm.normed(there, memory.to_device(weight), eps, memory.empty(x.shape, np.float32)).x
    for actual in (result(norm.rms_norm, there, weight, eps, shape=x.shape), memory.to_host(fused)):
        for row, wanted in zip(actual, expected, strict=True):  # each by itself: their sizes differ by a million
            assert_close(row, wanted, **EXACT)


@pytest.mark.parametrize("pairs", [2, 33])
def test_rope(pairs):
    positions, inv_freq = np.array([0, 5, 100_000], np.int32), np.geomspace(1, 0.01, pairs)
    actual = result(rope.angles, positions, inv_freq, 1.5, shape=(3, pairs, 2))
    expected = reference.rope.angles(positions, inv_freq, 1.5, np.empty((3, pairs, 2), np.float32))
    assert_close(actual, expected, **EXACT)
    # Part of a wider array, as queries and keys are.
    x = normal(3, 5, 2 * pairs + 7)
    rotated = memory.to_device(x)
    rope.rope_interleaved(rotated[:, :, 1:-1], memory.to_device(expected))
    rotated = memory.to_host(rotated)
    assert_close(rotated[..., 1:-1], reference.rope.rope_interleaved(x[..., 1:-1].copy(), expected), **EXACT)
    np.testing.assert_array_equal(rotated[..., :6], x[..., :6])
    np.testing.assert_array_equal(rotated[..., -1], x[..., -1])
