"""Random blocks of every type: their size, mean and deviation, and the codes that occur."""

import numpy as np
import pytest
import random_weights
from random_weights import random_blocks

from pymla import ggml
from pymla.reference.formats import FORMATS, INTERLEAVED, blocks_of_rows
from pymla.reference.quant import dequantise

every_type = pytest.mark.parametrize("qtype", [*FORMATS, *INTERLEAVED], ids=ggml.NAME.get)


def rows_of(qtype, *shape, std=1.0, seed=0, name="w"):
    pieces = random_blocks(seed, name, shape, qtype, std)
    return np.concatenate([piece.reshape(-1).view(np.uint8) for piece in pieces]).reshape(*shape[:-1], -1)


@every_type
@pytest.mark.parametrize("std", [1.0, 0.012])
@pytest.mark.filterwarnings("error")
def test_mean_and_deviation(qtype, std):
    data = rows_of(qtype, 128, 2048, std=std)
    assert data.shape[1] == ggml.row_bytes(qtype, 2048)
    weights = dequantise(data, qtype).astype(np.float64) / std
    # Row scales are as few as rows.
    assert weights.std() == pytest.approx(1, abs=0.06 if ggml.ROW_HEADER[qtype] else 0.03)
    assert abs(weights.mean()) < 0.03
    # Neither a column nor a row of ones is amplified as it would be by codes whose mean is not zero.
    assert np.sqrt(np.mean(weights.mean(axis=0) ** 2) * 128) < 1.2
    assert np.sqrt(np.mean(weights.mean(axis=1) ** 2) * 2048) < 12


@every_type
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_extreme_codes_occur(qtype):
    if ggml.plain_type(qtype) in ggml.FLOATS:
        return
    kind, drawn = blocks_of_rows(rows_of(qtype, 64, 4096), qtype)
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 256, (64, drawn.shape[0] // 64 * drawn.shape[1]), np.uint8).reshape(drawn.shape)
    codes, possible = (kind.codes(blocks).codes for blocks in (drawn, any_bits))
    lowest, highest = int(possible.min()), int(possible.max())
    if lowest == -128:
        lowest = -127
    if ggml.plain_type(qtype) == ggml.IQ2_BN:
        highest = 1
    if ggml.NAME[qtype].endswith("_KT"):  # extremes of a trellis are rare
        assert codes.min() < 0.9 * lowest
        assert codes.max() > 0.9 * highest
    else:
        assert (codes.min(), codes.max()) == (lowest, highest)


@pytest.mark.parametrize("qtype", [ggml.Q4_0, ggml.IQ4_KS, ggml.Q4_K_R4, ggml.F16], ids=ggml.NAME.get)
def test_a_tensor_is_drawn_in_pieces(monkeypatch, qtype):
    whole = rows_of(qtype, 2, 64, 512)
    monkeypatch.setattr(random_weights, "CHUNK_BYTES", 10_000)
    pieces = list(random_blocks(0, "w", (2, 64, 512), qtype, 1.0))
    assert len(pieces) > 3
    assert max(piece.nbytes for piece in pieces) <= 10_000
    assert sum(piece.nbytes for piece in pieces) == whole.nbytes
    np.testing.assert_array_equal(rows_of(qtype, 2, 64, 512), rows_of(qtype, 2, 64, 512))
    assert (rows_of(qtype, 2, 64, 512) != rows_of(qtype, 2, 64, 512, name="v")).mean() > 0.5


def test_the_sum_of_codes_in_headers():
    data = rows_of(ggml.Q8_KV, 5, 96)
    sums = data[:, 8:].view(np.int8).sum(axis=1, dtype=np.int32)
    np.testing.assert_array_equal(data[:, 4:8].copy().view(np.int32)[:, 0], sums)
