"""Types of tensors: the reference's functions against gguf-py, and the CPU's against the reference."""

import gguf
import numpy as np
import pytest
from cases import QUANTISED_REPRESENTATIVES, REPRESENTATIVES, columns, random_bytes, random_qtensor
from compare import assert_close

from pymla import cpu, ggml, reference
from pymla.cpu import formats as cpu_formats
from pymla.errors import PymlaError
from pymla.reference import formats, quant
from pymla.tensor import QTensor

Q6_0 = ggml.ID["Q6_0"]
TYPES = pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)


def test_every_type_has_a_row_everywhere():
    assert formats.FORMATS.keys() >= set(ggml.SUPPORTED)
    assert cpu_formats.FORMATS.keys() == set(ggml.SUPPORTED)
    for qtype, form in cpu_formats.FORMATS.items():
        assert form.bytes_256 == ggml.row_bytes(qtype, 256) - ggml.ROW_HEADER[qtype]
        assert bool(form.code_bits) == (qtype in ggml.QUANTISED)
        assert (form.dot_four is None) == (form.unpack is None) == (form.load_one is not None) == (not form.code_bits)


@pytest.mark.parametrize("qtype", ggml.FLOATS, ids=ggml.NAME.get)
def test_floats_are_bit_exact(qtype):
    """Other types are compared in `test_formats_reference`."""
    data = random_bytes(qtype, 33, 512)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(qtype))
    actual = quant.dequantise(data, qtype)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@TYPES
def test_dequantise_of_no_rows(qtype):
    assert quant.dequantise(np.empty((3, 0, ggml.row_bytes(qtype, 512)), np.uint8), qtype).shape == (3, 0, 512)


def test_q6_0_rounds_as_ggml_rounds_q5_0():
    """ik_llama.cpp's type, which gguf-py does not know: the number of largest magnitude becomes code 0, others the
    nearest one, and blocks that it has already stay as they are."""
    x = np.random.default_rng(1).standard_normal((257, 32), dtype=np.float32)
    x[3] = 0
    blocks = quant.quantise(x, Q6_0)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    extreme = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], axis=1)
    np.testing.assert_array_equal(d, (extreme / -32).astype(np.float16))
    numbers = quant.dequantise(blocks, Q6_0)
    step = np.abs(d)
    # The other end of the codes is 31 steps away, not 32; the scale is a half.
    assert (np.abs(numbers - x) <= np.where(x * d > 30.5 * d**2, 1.02, 0.52) * step).all()
    np.testing.assert_array_equal(quant.dequantise(quant.quantise(numbers, Q6_0), Q6_0), numbers)


@pytest.mark.parametrize("name", [name for name in quant.QUANTISERS if ggml.ID[name] != Q6_0])
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
        (0x7F800001, 0x7FC0),  # NaN stays NaN
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


@pytest.mark.parametrize("qtype", REPRESENTATIVES, ids=ggml.NAME.get)
def test_rows_on_the_cpu_are_those_of_the_reference(qtype):
    """`dequantise_row`, which adds blocks to zero."""
    for k in (*columns(qtype), *(() if qtype in ggml.QUANTISED else (1, 31))):
        w = QTensor(qtype, random_bytes(qtype, 9, k))
        tokens = np.array([8, 0, 3, 3], np.int32)
        actual = cpu.quant.embedding_rows(w, tokens, 1.0, np.full((4, k), np.nan, np.float32))
        expected = reference.quant.embedding_rows(w, tokens, 1.0, np.empty((4, k), np.float32))
        fused = cpu_formats.FORMATS[qtype].minimum_each > 0
        tolerance = {"rtol_max": 2e-7, "reason": "d * code + m is rounded once"} if fused else {"rtol_max": 1e-12}
        assert_close(actual, expected, **{"reason": "the same product"} | tolerance)


@pytest.mark.parametrize("qtype", QUANTISED_REPRESENTATIVES, ids=ggml.NAME.get)
@pytest.mark.parametrize("tokens", ["one", "all"])
def test_every_weight_is_in_its_place(qtype, tokens):
    """Products with activations of which all but one are zero: by rows of weights, and by panels."""
    k = 1280 if ggml.BLOCK_SIZE[qtype] > 32 else 800  # more than the columns that are unpacked at a time
    w, x = random_qtensor(qtype, 19, k), np.eye(k, dtype=np.float32)
    out = np.full((k, 19), np.nan, np.float32)
    for at in range(k) if tokens == "one" else [slice(None)]:
        token = slice(at, at + 1) if tokens == "one" else at
        cpu.quant.matmul(w, cpu.quant.Activation(x[token]), out[token])
    assert_close(out, quant.dequantise(w.data, qtype).T, rtol_max=1e-6, reason="127 times a scale of 1 / 127")
