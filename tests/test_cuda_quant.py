"""What the GPU's products have for themselves (`test_matrices.py` has what all backends share): tiles and long rows."""

import math

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import GPU_REPRESENTATIVES, random_qtensor
from test_matrices import check_matmul
from tested import BACKENDS

from pymla import ggml
from pymla.cuda import memory, quant
from pymla.cuda.matmul.gemm_layout import TILE_ROWS, WIDE, tile_widths
from pymla.errors import PymlaError

CUDA = BACKENDS[0]
QUANTISED = [qtype for qtype in GPU_REPRESENTATIVES if qtype in ggml.QUANTISED]


@pytest.mark.parametrize("enough", [1, 1000])
@pytest.mark.parametrize("qtype", [ggml.F16, ggml.Q4_1, ggml.Q6_K], ids=ggml.NAME.get)
def test_matmul_of_several_tiles(qtype, enough, monkeypatch):
    """More rows and tokens than a block of threads takes, as many tiles and as few."""
    monkeypatch.setattr(quant, "ENOUGH_TILES", enough)
    k, rows, tokens = 33 if qtype == ggml.F16 else ggml.BLOCK_SIZE[qtype], 67, 66
    check_matmul(CUDA, random_qtensor(qtype, rows, k), CUDA.normal(tokens, k))


@pytest.mark.parametrize("qtype", QUANTISED, ids=ggml.NAME.get)
def test_matmul_of_long_rows(qtype):
    """More blocks than a warp reads at a time, and in tiles more slices than are in shared memory."""
    long, in_tiles = (1536, 768) if ggml.BLOCK_SIZE[qtype] == 256 else (1408, 1408)
    for k, tokens in ((long, 1), (long, 2), (in_tiles, 9), (2048, 1), (2048, 3)):
        check_matmul(CUDA, random_qtensor(qtype, 5, k), CUDA.normal(tokens, k))


@pytest.mark.parametrize(
    ("qtype", "activations"),
    [(qtype, activations) for qtype in QUANTISED for activations in tile_widths(qtype)],
    ids=lambda x: ggml.NAME.get(x, x),
)
def test_matmul_in_tiles(qtype, activations, monkeypatch):
    """Narrow and wide tiles of rows that begin at every place that 16 bytes have, the last ones not full."""
    monkeypatch.setattr(quant, "ENOUGH_TILES", 1 if activations == WIDE else 1000)
    k = max(96, ggml.BLOCK_SIZE[qtype])
    w = random_qtensor(qtype, TILE_ROWS + 3, k)
    starts = {int(each) % 16 for each in CUDA.put(w).data.strides[0] * np.arange(len(w.data))}
    assert starts == set(range(0, 16, math.gcd(16, w.data.shape[1])))
    check_matmul(CUDA, w, CUDA.normal(activations + 2, k))


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("qtype", [ggml.MXFP4, ggml.NVFP4, ggml.Q1_0, ggml.IQ2_BN, ggml.Q8_KV], ids=ggml.NAME.get)
def test_matmul_of_other_blocks(qtype, tokens):
    """Blocks of 17 bytes, which begin at any byte; of 64 and 128 weights; behind headers of 4 and 8 bytes."""
    columns = 3 * max(32, ggml.BLOCK_SIZE[qtype])
    check_matmul(CUDA, random_qtensor(qtype, 5, columns), CUDA.normal(tokens, columns))


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_fault_shows_in_its_token(fault):
    x = CUDA.normal(10, 64)
    x[4, 40] = fault
    w = random_qtensor(ggml.Q4_1, 3, 64)
    for tokens in (5, 10):
        actual = CUDA.result(quant.matmul, w, CUDA.activation(x[:tokens]), shape=(tokens, 3))
        assert np.isnan(actual[4]).all()
        assert np.isfinite(np.delete(actual, 4, axis=0)).all()


def test_activations_are_contiguous():
    with pytest.raises(PymlaError, match=r"Activation: x is an array with strides .*; a contiguous one"):
        quant.Activation(memory.to_device(CUDA.normal(3, 64))[:, :32])
