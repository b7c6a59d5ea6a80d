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
    for at in ggml.TYPES[qtype].halves:
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
    for given in (x, x.astype(np.float64)):
        np.testing.assert_array_equal(quant.quantise(given, qtype), expected)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F807FFF, 0x3F80),  # below the middle between two bfloat16
        (0x3F808000, 0x3F80),  # the middle goes to the even one, down or up
        (0x3F818000, 0x3F82),
        (0x3F808001, 0x3F81),
        (0xC0FF8000, 0xC100),
        (0x00008001, 0x0001),  # subnormal numbers
        (0x7F7F7FFF, 0x7F7F),
        (0x7F7F8000, 0x7F80),  # overflows
        (0x7F800000, 0x7F80),  # infinities
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FC0),  # what is not a number stays so
        (0xFFFFFFFF, 0xFFFF),
        (0x7FA10000, 0x7FE1),
    ],
)
def test_bf16_is_rounded_to_the_nearest(bits, expected):
    x = np.array([[bits]], np.uint32).view(np.float32)
    assert quant.quantise(x, ggml.BF16).view(np.uint16).item() == expected
    oracle = gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16)
    assert oracle.view(np.uint16).item() == expected
    back = quant.dequantise(quant.quantise(x, ggml.BF16), ggml.BF16)
    assert back.view(np.uint32).item() == expected << 16


def test_quantise_refuses():
    with pytest.raises(PymlaError, match="Q6_K"):
        quant.quantise(np.zeros((1, 256), np.float32), ggml.Q6_K)
    with pytest.raises(PymlaError, match="33 columns"):
        quant.quantise(np.zeros((1, 33), np.float32), ggml.Q8_0)


@pytest.mark.filterwarnings("error")
def test_quantise_activations():
    x = np.random.default_rng(2).standard_normal((5, 96))  # float64, which is rounded to float32 first
    x[2, :32] = 0
    x[3, :32] = np.linspace(-1, 1, 32)
    codes, scale = quant.quantise_activations(x)
    assert (codes.dtype, scale.dtype) == (np.int8, np.float32)
    assert (codes.shape, scale.shape) == ((5, 96), (5, 3))
    for t, b in np.ndindex(5, 3):
        block = x[t, 32 * b : 32 * b + 32].astype(np.float32)
        largest = max(map(abs, block))
        assert scale[t, b] == largest / np.float32(127)
        expected = [round(float(value) * 127 / float(largest)) if largest else 0 for value in block]
        assert codes[t, 32 * b : 32 * b + 32].tolist() == expected


@pytest.mark.parametrize(
    ("value", "largest", "code"),
    [(-0.8364946246147156, 0.8816167116165161, -120), (1.112899661064148, 1.9767589569091797, 72)],
)
def test_products_with_the_inverse_scale_are_float32(value, largest, code):
    """Values that float64 would round to the other neighbour: the kernels multiply in float32."""
    x = np.zeros((1, 32), np.float32)
    x[0, :2] = value, largest
    assert quant.quantise_activations(x)[0][0, :2].tolist() == [code, 127]
