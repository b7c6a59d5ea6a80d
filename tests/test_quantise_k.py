"""Quantisers of legacy types and K-quants: errors against those of other programs and against all possible scales,
codes against their definition, weights at the ends of all ranges."""

import json
from pathlib import Path

import gguf
import golden_quantise
import numpy as np
import pytest
from golden_quantise import weighted_error

from pymla import ggml
from pymla.cpu.quantise import k_quants, legacy, quantise
from pymla.reference.formats import FORMATS
from pymla.reference.quant import dequantise

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quantise_errors.json").read_text())
CASES = {case.name: case for case in golden_quantise.cases()}
QTYPES = [*legacy.QUANTISERS, *k_quants.QUANTISERS]
TYPES = pytest.mark.parametrize("qtype", QTYPES, ids=ggml.NAME.get)
#: The smallest and the largest code.
CODES = {ggml.Q4_0: (-8, 7), ggml.Q4_1: (0, 15), ggml.Q5_0: (-16, 15), ggml.Q5_1: (0, 31), ggml.Q6_0: (-32, 31)}
CODES |= {ggml.Q8_0: (-127, 127), ggml.Q2_K: (0, 3), ggml.Q3_K: (-4, 3), ggml.Q4_K: (0, 15), ggml.Q5_K: (0, 31)}
CODES |= {ggml.Q6_K: (-32, 31)}
#: The error, relative to that of llama.cpp, or of ik_llama.cpp for Q6_0, that no case may exceed.
AT_MOST = dict.fromkeys(QTYPES, 1.0) | {ggml.Q4_0: 0.975, ggml.Q4_K: 0.97}


def weights_of(columns):
    """Rows of many sizes, some with outliers, some with zeros."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((24, columns)) * np.exp(rng.standard_normal((24, 1)))
    x[rng.random(x.shape) < 0.01] *= 20
    x[3, :32], x[4] = 0, 0
    x[5:8] = np.abs(x[5:8]) + 1
    x[8] = -0.25
    return x.astype(np.float32)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@TYPES
def test_error_is_below_that_of_ggml(qtype, case):
    assert GOLDEN["crc32"] == golden_quantise.checksum(), (
        "NumPy draws other numbers: run tools/golden_quantise.py again"
    )
    found = weighted_error(quantise(case.rows, qtype, case.importance), qtype, case.rows, case.importance)
    expected = GOLDEN["errors"][ggml.NAME[qtype]][case.name]
    print(f"{found / expected:.4f} of the error of ggml")
    assert found <= AT_MOST[qtype] * expected


@pytest.mark.parametrize("qtype", [each for each in legacy.QUANTISERS if each != ggml.Q6_0], ids=ggml.NAME.get)
def test_error_is_below_that_of_gguf_py(qtype):
    for x in (CASES["normal"].rows, weights_of(96)):
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(qtype)).view(np.uint8).reshape(len(x), -1)
        assert weighted_error(quantise(x, qtype), qtype, x, None) <= weighted_error(theirs, qtype, x, None)


@TYPES
def test_codes_are_the_nearest_ones(qtype):
    """Whatever the scales are, no other codes have a smaller error."""
    x, (low, high) = weights_of(512), CODES[qtype]
    importance = np.exp(np.random.default_rng(4).standard_normal(512)).astype(np.float32)
    blocks = quantise(x, qtype, importance).reshape(-1, ggml.BLOCK_BYTES[qtype])
    found = FORMATS[qtype].codes(blocks)
    assert found.codes.min() >= low
    assert found.codes.max() <= high
    size = np.abs(np.repeat(found.scales, found.codes.shape[1] // found.scales.shape[1], axis=1)).astype(np.float64)
    numbers, own = x.reshape(found.codes.shape).astype(np.float64), found.weights().astype(np.float64)
    ends = (found.codes == low) | (found.codes == high)
    inside = np.abs(numbers - own) <= 0.5 * size + 1e-5 * np.abs(numbers) + 1e-6 * size * high
    assert (inside | ends).all()
    # A weight beyond the last code is on its far side.
    scales = np.repeat(found.scales, found.codes.shape[1] // found.scales.shape[1], axis=1)
    beyond = np.where(found.codes == high, (numbers - own) * scales, (own - numbers) * scales)
    assert (inside | (beyond >= 0)).all()


def squared_error(x, w, scale, low, high):
    """The smallest weighted error of weights (32,) under each scale (n,), in float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(x / scale[:, None]).clip(low, high)
    return (w * (x - scale[:, None] * codes) ** 2).sum(1)


def test_q4_0_is_near_the_best_of_all_scales():
    """Against every half of either sign."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.standard_normal((32, 32)), rng.standard_t(3, (32, 32))]).astype(np.float32)
    importance = np.exp(rng.standard_normal(32)).astype(np.float32)
    numbers = dequantise(quantise(x, ggml.Q4_0, importance), ggml.Q4_0).astype(np.float64)
    ours = (importance.astype(np.float64) * (x - numbers) ** 2).sum(1)
    halves = np.arange(0x2400, 0x4400, dtype=np.uint16).view(np.float16).astype(np.float64)  # 1/64 to 4
    best = []
    for row in x.astype(np.float64):
        near = halves[(halves > np.abs(row).max() / 16) & (halves < np.abs(row).max() / 4)]
        best.append(squared_error(row, importance, np.concatenate([near, -near]), -8, 7).min())
    assert ours.sum() < 1.01 * np.sum(best)
    assert (ours < 1.2 * np.array(best)).all()


@TYPES
def test_weights_that_a_type_has_stay(qtype):
    """Rows of a block's own numbers, the first and the last code among those of every small block, and zeros."""
    low, high = CODES[qtype]
    x = np.zeros((2, 512), np.float32)
    x[0] = 0.5 * np.random.default_rng(7).integers(low, high + 1, 512)
    x[0, ::16], x[0, 1::16] = 0.5 * low, 0.5 * high
    np.testing.assert_allclose(dequantise(quantise(x, qtype), qtype), x, rtol=0, atol=1e-3 * np.abs(x).max())
    np.testing.assert_array_equal(dequantise(quantise(x, qtype), qtype)[1], 0)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e-7, 3e-6, 1e3, 1e6, 1e12, 1e30, 3e38])
@TYPES
def test_no_size_of_weights_makes_nan(qtype, size):
    """Halves hold no scales of the largest weights: these become as large as the type can write."""
    x = (np.random.default_rng(6).uniform(-1, 1, (4, 512)) * size).astype(np.float32)
    x[0, 0], x[1, 1] = size, -size
    x[2, 3:] = 0
    x[3, ::2] *= np.float32(1e-6)
    found = dequantise(quantise(x, qtype), qtype)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1.25 * np.abs(x).max().astype(np.float64) + 1e-4
    if 1e-6 < size < 1e5:
        assert weighted_error(quantise(x, qtype), qtype, x, None) < 0.2
    if size >= 1e12:
        assert np.abs(found).max() > 65504 * max(abs(each) for each in CODES[qtype]) / 2


@TYPES
def test_offsets_far_from_zero(qtype):
    """Weights on one side of zero, all alike or nearly."""
    x = np.empty((4, 256), np.float32)
    x[0], x[1] = 0.75, -0.75
    x[2], x[3] = np.linspace(0.75, 0.7501, 256), -np.linspace(100, 101, 256)
    found = dequantise(quantise(x, qtype), qtype)
    assert (np.abs(found - x).max(1) <= 0.13 * np.abs(x).max(1)).all()
