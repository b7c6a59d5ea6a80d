"""The reference's block formats against gguf-py."""

import gguf
import numpy as np
import pytest

from pymla import ggml
from pymla.errors import PymlaError
from pymla.reference import quant


def random_blocks(qtype, rows, columns, seed=0):
    """Random bytes as blocks, with scales that are finite numbers."""
    rng = np.random.default_rng(seed)
    if qtype in (ggml.F32, ggml.F16, ggml.BF16):
        return quant.quantise(rng.standard_normal((rows, columns), dtype=np.float32), qtype)
    blocks = rng.integers(0, 256, (rows, columns // ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype]), dtype=np.uint8)
    halves = {ggml.Q4_0: (0,), ggml.Q4_1: (0, 2), ggml.Q8_0: (0,), ggml.Q6_K: (208,)}[qtype]
    for at in halves:
        scale = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_dequantise_is_bit_exact(qtype):
    data = random_blocks(qtype, 33, 512)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(qtype))
    actual = quant.dequantise(data, qtype)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("name", quant.QUANTISERS)
def test_quantise_is_byte_exact(name):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((257, 96), dtype=np.float32) * np.exp(rng.standard_normal((257, 1))).astype(np.float32)
    x[3] = 0
    x[4, 32:64] = 0
    x[5] = 1e-7
    x[6] = np.rint(x[6] * 4) / 4  # ties
    x[7] = np.repeat([1.0, -1.0], 48)
    qtype = ggml.ID[name]
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType(qtype)).view(np.uint8).reshape(257, -1)
    np.testing.assert_array_equal(quant.quantise(x, qtype), expected)


def test_bf16_keeps_nan_and_infinity():
    x = np.array([[np.nan, np.inf, -np.inf, 3.3895314e38]], np.float32)
    back = quant.dequantise(quant.quantise(x, ggml.BF16), ggml.BF16)
    assert np.isnan(back[0, 0])
    np.testing.assert_array_equal(back[0, 1:3], x[0, 1:3])


def test_quantise_refuses():
    with pytest.raises(PymlaError, match="Q6_K"):
        quant.quantise(np.zeros((1, 256), np.float32), ggml.Q6_K)
    with pytest.raises(PymlaError, match="33 columns"):
        quant.quantise(np.zeros((1, 33), np.float32), ggml.Q8_0)


def test_quantise_activations():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 96), dtype=np.float32)
    x[2, :32] = 0
    codes, scale = quant.quantise_activations(x)
    assert codes.min() >= -127
    back = codes.reshape(5, 3, 32) * scale[..., None]
    assert np.abs(back.reshape(5, 96) - x).max() <= scale.max() / 2 * 1.001
    assert scale[2, 0] == 0
    assert not codes[2, :32].any()
