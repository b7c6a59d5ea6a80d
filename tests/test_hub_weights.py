"""Weights of checkpoints that are quantised: the kernels against definitions and torch, and which of them are read."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hub import V3, hub_folder, random_weights, safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla import ggml
from pymla.cpu import checkpoint_types as cpu
from pymla.errors import PymlaError
from pymla.files.checkpoint_encodings import Quantisation
from pymla.make.hub_config import HubConfig
from pymla.make.hub_quantisation import read_quantisation
from pymla.make.hub_weights import HubWeights
from pymla.reference import checkpoint_types as reference
from pymla.reference.quant import dequantise
from pymla.small_floats import E2M1, E4M3, E8M0

BOTH = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])


def random_codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def random_scales(*shape):
    return np.random.default_rng(1).uniform(-2, 2, shape).astype(np.float32)


def test_every_number_of_eight_and_of_four_bits():
    """By their definitions, in other words: sign, exponent and mantissa of E4M3 as Python's own hexadecimal floats."""

    def e4m3(code):
        exponent, mantissa = code >> 3 & 15, code & 7
        text = f"0x{1 if exponent else 0}.{mantissa * 2:x}p{max(exponent, 1) - 7}"
        return float.fromhex(("-" if code & 128 else "") + text)

    assert np.isnan(E4M3[[127, 255]]).all()
    assert [float(E4M3[code]) for code in range(256) if code & 127 != 127] == [
        e4m3(code) for code in range(256) if code & 127 != 127
    ]
    assert np.isnan(E8M0[255])
    assert [float(value) for value in E8M0[:255]] == [2.0 ** (code - 127) for code in range(255)]
    assert sorted(set(np.abs(E2M1).tolist())) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_numbers_of_eight_bits_are_those_of_torch():
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(E8M0, codes.view(torch.float8_e8m0fnu).float().numpy())


@BOTH
def test_bf16(backend):
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    found = backend.from_bf16(codes)
    assert (found.dtype, found.shape) == (np.float32, (256, 256))
    np.testing.assert_array_equal(found.view(np.uint32), codes.astype(np.uint32) * 65536)


@BOTH
@pytest.mark.parametrize(
    ("rows", "columns", "block", "first"),
    [(5, 7, (1, 7), 0), (9, 300, (4, 128), 3), (1, 1, (128, 128), 100), (0, 8, (2, 8), 1), (6, 40, (6, 40), 0)],
)
def test_e4m3(backend, rows, columns, block, first):
    codes = random_codes(rows, columns)
    scales = random_scales(-(-(first + rows) // block[0]), -(-columns // block[1]))
    found = backend.from_e4m3(codes, scales, block, first)
    expected = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            expected[r, c] = E4M3[codes[r, c]] * scales[(first + r) // block[0], c // block[1]]
    np.testing.assert_array_equal(found, expected)


@BOTH
@pytest.mark.parametrize(("rows", "columns", "group"), [(3, 96, 32), (1, 8, 8), (2, 64, 64), (0, 32, 32)])
def test_int4(backend, rows, columns, group):
    numbers = np.random.default_rng(0).integers(-8, 8, (rows, columns))
    # As compressed-tensors packs them: plus 8, eight in a word, the first lowest.
    words = sum((numbers[:, i::8] + 8).astype(np.uint32) << np.uint32(4 * i) for i in range(8)).view(np.int32)
    scales = random_scales(rows, columns // group)
    found = backend.from_int4(np.ascontiguousarray(words), scales)
    np.testing.assert_array_equal(found, numbers.astype(np.float32) * np.repeat(scales, group, axis=1))
    zeros = np.random.default_rng(1).integers(0, 17, scales.shape, np.uint8)
    found = backend.from_int4(np.ascontiguousarray(words), scales, zeros)
    shifted = (numbers + 8 - np.repeat(zeros, group, axis=1)).astype(np.float32)
    np.testing.assert_array_equal(found, shifted * np.repeat(scales, group, axis=1))


@BOTH
def test_mxfp4(backend):
    codes, scales = random_codes(3, 48), random_codes(3, 3, seed=2)
    scales[scales > 250] = 0
    found = backend.from_mxfp4(codes, scales)
    expected = np.empty((3, 96), np.float64)
    for r in range(3):
        for c in range(96):
            code = codes[r, c // 2] >> 4 * (c % 2) & 15
            magnitude = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]
            expected[r, c] = (-magnitude if code & 8 else magnitude) * 2.0 ** (int(scales[r, c // 32]) - 127)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    blocks = reference.mxfp4_blocks(codes, scales)
    np.testing.assert_array_equal(dequantise(blocks, ggml.MXFP4), found)


@BOTH
@pytest.mark.parametrize(("rows", "groups"), [(3, 4), (1, 1), (0, 2)])
def test_e2m1(backend, rows, groups):
    codes, scales = random_codes(rows, 8 * groups), random_scales(rows, groups)
    found = backend.from_e2m1(codes, scales)
    assert found.shape == (rows, 16 * groups)
    for r in range(rows):
        for c in range(16 * groups):
            assert found[r, c] == E2M1[codes[r, c // 2] >> 4 * (c % 2) & 15] * scales[r, c // 16]


@BOTH
def test_the_largest_magnitude(backend):
    values = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    values[17_000] = -7
    for floats, bits in ((values, np.uint32), (values.astype(np.float16), np.uint16)):
        assert backend.largest_magnitude(floats.view(bits)) == np.abs(floats).max().view(bits)
    values[3] = -np.inf
    assert backend.largest_magnitude(values.view(np.uint32)) == 0x7F800000
    values[39_999] = np.nan
    assert backend.largest_magnitude(values.view(np.uint32)) > 0x7F800000
    assert backend.largest_magnitude(np.zeros(0, np.uint16)) == 0
    assert cpu.largest_magnitude(values[:39_999].view(np.uint32), alone=True) == 0x7F800000


def test_kernels_refuse_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="scales"):
        cpu.from_e4m3(random_codes(5, 8), random_scales(1, 1), (4, 8), 0)
    with pytest.raises(ValueError, match="scales"):
        cpu.from_int4(np.zeros((2, 3), np.int32), random_scales(2, 2))
    with pytest.raises(ValueError, match="zero points"):
        cpu.from_int4(np.zeros((2, 4), np.int32), random_scales(2, 2), np.zeros((2, 1), np.uint8))
    with pytest.raises(ValueError, match="scales"):
        cpu.from_mxfp4(random_codes(2, 16), random_codes(2, 2))
    with pytest.raises(ValueError, match="scales"):
        cpu.from_e2m1(random_codes(2, 16), random_scales(2, 3))


def checkpoint(folder, tensors, **quantisation):
    safetensors(folder / "model.safetensors", tensors)
    return HubWeights(folder, Quantisation(**quantisation))


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "F8_E8M0"])
def test_scales_of_float8_in_every_type(tmp_path, kind):
    codes = random_codes(6, 8) & 63
    stored = {
        "F32": np.float32([[2], [0.5]]),
        "F16": np.float16([[2], [0.5]]),
        "BF16": np.uint16([[0x4000], [0x3F00]]),
        "F8_E8M0": np.uint8([[128], [126]]),
    }[kind]
    found = checkpoint(tmp_path, {"x": ("F8_E4M3", codes), "x_scale_inv": (kind, stored)}, block=(4, 8))
    expected = E4M3[codes] * np.float32([[2]] * 4 + [[0.5]] * 2)
    np.testing.assert_array_equal(found.read("x"), expected)
    np.testing.assert_array_equal(found.rows("x", 3, 5), expected[3:5])


@pytest.mark.parametrize(
    ("name", "shape", "scales"),
    [
        ("x_scale_inv", (4, 8), ()),
        ("x_scale_inv", (4, 8), (1,)),
        ("x_scale", (4, 8), (4,)),
        ("x_scale", (4, 8), (4, 1)),
        ("x_scale", (4, 8), (2, 2)),
        ("x_scale_inv", (3, 4, 8), (3,)),
        ("x_scale_inv", (3, 4, 8), (3, 1, 1)),
        ("x_scale_inv", (3, 4, 8), (3, 2, 2)),
    ],
)
def test_what_a_scale_of_float8_is_of(tmp_path, name, shape, scales):
    """A tensor, rows, experts or blocks of two rows and four columns."""
    codes = random_codes(*shape) & 63
    values = random_scales(*scales)
    found = checkpoint(tmp_path, {"x": ("F8_E4M3", codes), name: values}, block=(2, 4))
    found.expect("x", shape)
    assert found.names == {"x"}
    spread = values
    while spread.ndim and spread.ndim < len(shape):
        spread = spread[..., None]
    if spread.size > 1 and spread.shape[-1] > 1:
        spread = np.repeat(np.repeat(spread, 2, axis=-2), 4, axis=-1)
    np.testing.assert_array_equal(found.read("x"), E4M3[codes] * spread)


def test_mistrals_names(tmp_path):
    codes = random_codes(2, 8) & 63
    tensors = {
        "a.weight": ("F8_E4M3", codes),
        "a.qscale_weight": np.full((), 0.5, np.float32),
        "a.qscale_act": np.ones((), np.float32),
    }
    found = checkpoint(tmp_path, tensors)
    assert found.names == {"a.weight"}
    np.testing.assert_array_equal(found.read("a.weight"), E4M3[codes] / 2)


def test_int4_of_compressed_tensors(tmp_path):
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (6, 8), np.int64).astype(np.int32)
    scales = np.full((6, 2), 0x3F80, np.uint16)
    scales[4] = 0x4000
    tensors = {
        "a.weight_packed": ("I32", words),
        "a.weight_scale": ("BF16", scales),
        "a.weight_shape": ("I64", np.array([6, 64])),
    }
    found = checkpoint(tmp_path, tensors)
    assert found.names == {"a.weight"}
    found.expect("a.weight", (6, 64))
    expected = reference.from_int4(words, np.repeat(np.float32([[1], [1], [1], [1], [2], [1]]), 2, axis=1))
    np.testing.assert_array_equal(found.read("a.weight"), expected)
    np.testing.assert_array_equal(found.rows("a.weight", 4, 6), expected[4:])
    assert found.qtype("a.weight") is None


@pytest.mark.parametrize(("name", "kind"), [("x_packed", "U8"), ("x", "U8"), ("x", "I8")])
@pytest.mark.parametrize("scale_kind", ["U8", "F8_E8M0"])
def test_mxfp4_keeps_its_bits(tmp_path, name, kind, scale_kind):
    codes, scales = random_codes(2, 3, 32), random_codes(2, 3, 2) >> 1
    found = checkpoint(tmp_path, {name: (kind, codes), "x_scale": (scale_kind, scales)})
    assert found.names == {"x"}
    found.expect("x", (2, 3, 64))
    assert found.qtype("x") == ggml.MXFP4
    blocks = found.blocks("x", 1, 6)
    assert blocks.shape == (5, ggml.row_bytes(ggml.MXFP4, 64))
    np.testing.assert_array_equal(dequantise(blocks, ggml.MXFP4), found.rows("x", 1, 6))


def test_nvfp4_of_model_optimizer(tmp_path):
    """Two numbers in a byte, a scale in float8 for 16 columns, and one for all; scales of activations do not count."""
    codes, scales = random_codes(6, 32), random_codes(6, 4, seed=2) & 63
    tensors = {
        "a.weight": ("U8", codes),
        "a.weight_scale": ("F8_E4M3", scales),
        "a.weight_scale_2": np.float32(0.37),
        "a.input_scale": np.float32(3),
    }
    found = checkpoint(tmp_path, tensors)
    assert found.names == {"a.weight"}
    found.expect("a.weight", (6, 64))
    assert found.qtype("a.weight") is None
    numbers = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(6, 64)]
    expected = numbers * np.repeat(E4M3[scales] * np.float32(0.37), 16, axis=1)
    np.testing.assert_array_equal(found.rows("a.weight", 1, 6), expected[1:])


def words_of(numbers, order=range(8)):
    """Numbers of four bits, eight in a word of the last dimension, in an order of which the first is lowest."""
    return sum(numbers[..., each::8].astype(np.uint32) << np.uint32(4 * i) for i, each in enumerate(order)).view(
        np.int32
    )


def by_columns(kind, rows=24, columns=64, groups=4, seed=0):
    """A weight as GPTQ or AWQ stores it, and what it is."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(1, 16, (rows, groups))
    scales = rng.uniform(0.1, 1, (rows, groups)).astype(np.float16)
    weights = (codes - np.repeat(zeros, columns // groups, axis=1)) * np.repeat(
        scales.astype(np.float32), columns // groups, axis=1
    )
    if kind == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        qweight, qzeros = words_of(codes.T, order), words_of(zeros.T, order)
    else:
        qweight, qzeros = words_of(codes).T, words_of(zeros.T - (kind == "gptq"))
    tensors = {
        "m.qweight": ("I32", np.ascontiguousarray(qweight)),
        "m.qzeros": ("I32", np.ascontiguousarray(qzeros)),
        "m.scales": ("F16", np.ascontiguousarray(scales.T)),
    }
    if kind != "awq":
        tensors["m.g_idx"] = ("I32", np.repeat(np.arange(groups, dtype=np.int32), columns // groups))
    return tensors, weights.astype(np.float32)


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "awq"])
def test_integers_with_columns_first(tmp_path, kind):
    tensors, expected = by_columns(kind)
    found = checkpoint(tmp_path, tensors, zeros_from=int(kind == "gptq"))
    assert found.names == {"m.weight"}
    found.expect("m.weight", (24, 64))
    assert found.qtype("m.weight") is None
    for start, stop in ((0, 24), (3, 4), (5, 19), (16, 24)):
        np.testing.assert_array_equal(found.rows("m.weight", start, stop), expected[start:stop])


def test_groups_out_of_order_are_refused(tmp_path):
    tensors, _ = by_columns("gptq")
    tensors["m.g_idx"][1][[3, 40]] = tensors["m.g_idx"][1][[40, 3]]
    with pytest.raises(PymlaError, match="groups of columns are not in order"):
        checkpoint(tmp_path, tensors).read("m.weight")


def test_a_file_that_becomes_shorter(tmp_path):
    found = checkpoint(tmp_path, by_columns("awq")[0])
    path = found.encoding("m.weight").codes.path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PymlaError, match="has become shorter while it was read"):
        found.read("m.weight")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("m.qweight", ("I64", np.ones((8, 24), np.int64)), "m.qweight is of type I64"),
        ("m.scales", ("F16", np.ones(3, np.float16)), "m.qweight is of type I32"),
        ("m.scales", ("F16", np.ones((5, 24), np.float16)), r"m.scales has shape \(5, 24\)"),
        ("m.scales", ("F16", np.ones((4, 64), np.float16)), r"m.scales has shape \(4, 64\)"),
        ("m.qweight", ("I32", np.ones((64, 2), np.int32)), r"ask for \(4, 16\)"),
        ("m.scales", ("I32", np.ones((4, 24), np.int32)), "m.scales is of type I32"),
        ("m.scales", None, "m.scales is missing"),
        ("m.qzeros", None, "m.qzeros is missing"),
        ("m.qzeros", ("I32", np.ones((4, 4), np.int32)), "m.qzeros is missing or of another shape"),
        ("m.g_idx", ("I32", np.ones(63, np.int32)), "m.g_idx is of type I32 and shape"),
    ],
)
def test_integers_with_columns_first_that_are_refused(tmp_path, name, value, message):
    tensors, _ = by_columns("gptq")
    tensors = {key: each for key, each in (tensors | {name: value}).items() if each is not None}
    with pytest.raises(PymlaError, match=message):
        checkpoint(tmp_path, tensors).encoding("m.weight")


FLOAT8, INT4 = ("F8_E4M3", np.ones((4, 8), np.uint8)), ("I32", np.ones((2, 8), np.int32))


@pytest.mark.parametrize(
    ("tensors", "name", "message"),
    [
        ({"x": FLOAT8, "x_scale_inv": ("I32", np.ones((1, 1), np.int32))}, "x", "tensor x_scale_inv is of type I32"),
        ({"x": FLOAT8, "x_scale": np.ones(3, np.float32)}, "x", r"x_scale has shape \(3,\); .* ask for \(1, 1\)"),
        ({"x": ("F8_E4M3", np.ones(4, np.uint8))}, "x", "only matrices are read"),
        ({"x_packed": INT4}, "x", "tensor x_scale is missing"),
        ({"x_packed": INT4, "x_scale": np.ones((2, 3), np.float32)}, "x", r"shape \(2, 3\); .* ask for \(2, 2\)"),
        ({"x_packed": INT4, "x_scale": np.ones((2, 2)), "x_zero_point": INT4}, "x", "only symmetric weights"),
        ({"x_packed": ("I64", np.ones((2, 8), np.int64))}, "x", "tensor x_packed is of type I64"),
        ({"x_packed": ("U8", np.ones((2, 8), np.uint8)), "x_scale": FLOAT8}, "x", "x_scale is of type F8_E4M3"),
        ({"x": ("U8", np.ones((2, 8), np.uint8))}, "x", "tensor x is of type U8"),
        (
            {"x": ("U8", np.ones((2, 8), np.uint8)), "x_scale": FLOAT8, "x_scale_2": np.ones(2, np.float32)},
            "x",
            "tensor x_scale_2 is of type F32, shape",
        ),
    ],
)
def test_quantised_weights_that_are_refused(tmp_path, tensors, name, message):
    with pytest.raises(PymlaError, match=message):
        checkpoint(tmp_path, tensors).encoding(name)


def test_where_a_weight_is_not_finite(tmp_path):
    values = np.ones((5, 8), np.float32)
    values[3, 6] = np.inf
    found = checkpoint(tmp_path, {"x": values})
    with pytest.raises(PymlaError, match=r"tensor x holds infinity or NaN.* in row 3, column 6; download it again"):
        found.rows("x", 2, 5)
    found.rows("x", 0, 3)


PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}},
}


def groups(**weights):
    return PACKED | {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32} | weights}}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, Quantisation()),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, Quantisation(block=(64, 32))),
        ({"quant_method": "fp8", "weight_block_size": None}, Quantisation()),
        (groups(group_size=64), Quantisation(group=64)),
        (groups(block_structure=[8, 4]) | {"format": "float-quantized"}, Quantisation(block=(8, 4))),
        ({"quant_method": "quark"}, Quantisation()),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Quantisation()),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, Quantisation()),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, Quantisation(zeros_from=0)),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM", "zero_point": True}, Quantisation()),
    ],
)
def test_what_config_json_says(tmp_path, found, expected):
    config = V3 | {"quantization_config": found}
    folder = hub_folder(tmp_path / "Tiny", config, random_weights(V3))
    assert read_quantisation(HubConfig(folder / "config.json")) == expected


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "bitsandbytes"}, 'quant_method is "bitsandbytes"'),
        ({"quant_method": "awq"}, "bits is null"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, 'version is "gemv"'),
        ({"quant_method": "gptq", "bits": 2}, "bits is 2"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"'),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, 'quant_algo is "W4A8"'),
        ({"quant_method": ["fp8"]}, "quant_method is"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, "weight_block_size"),
        (PACKED | {"format": "marlin-24"}, "format"),
        (PACKED | {"config_groups": []}, "config_groups"),
        (PACKED | {"config_groups": {"a": {"weights": {}}, "b": {}}}, "config_groups"),
        (groups(num_bits=8), "num_bits is 8"),
        (groups(group_size="32"), "group_size"),
        (groups(block_structure=[1]) | {"format": "float-quantized"}, "block_structure"),
    ],
)
def test_what_config_json_may_not_say(tmp_path, found, message):
    folder = hub_folder(tmp_path / "Tiny", V3 | {"quantization_config": found}, random_weights(V3))
    with pytest.raises(PymlaError, match=message) as error:
        read_quantisation(HubConfig(folder / "config.json"))
    assert "\n" not in str(error.value)


#: A weight of each kind.
EVERY_KIND = {
    "a": ("F8_E4M3", random_codes(4, 40) & 63),
    "a_scale_inv": np.ones((1, 1), np.float32),
    "b": ("F8_E4M3", random_codes(4, 40) & 63),
    "b_scale": np.ones((4, 1), np.float32),
    "c_packed": ("I32", np.ones((2, 8), np.int32)),
    "c_scale": ("BF16", np.ones((2, 2), np.uint16)),
    "d_packed": ("U8", random_codes(2, 32)),
    "d_scale": ("F8_E8M0", np.full((2, 2), 127, np.uint8)),
    "e": ("BF16", np.ones((3, 5), np.uint16)),
    "g": ("U8", random_codes(2, 32)),
    "g_scale": ("F8_E4M3", np.full((2, 4), 56, np.uint8)),
    "g_scale_2": np.float32(1),
    **by_columns("gptq", rows=8, columns=32, groups=2)[0],
}
KINDS = st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "U8", "I8", "I32", "I64", "F4", ""])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 32, 40, 128, 2**40]), max_size=4)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_header_gives_weights_or_one_line(data):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.safetensors"
        safetensors(path, EVERY_KIND)
        raw = path.read_bytes()
        stop = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:stop])
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
            change = data.draw(st.sampled_from(["dtype", "shape", "name", "remove"]))
            if change == "dtype":
                header[name]["dtype"] = data.draw(KINDS)
            elif change == "shape":
                header[name]["shape"] = data.draw(SHAPES)
            elif change == "name":
                other = data.draw(
                    st.sampled_from(["a", "c", "c_zero_point", "d_scale_inv", "e_scale", "f", "d_scale_2", "m.scales"])
                )
                header[other] = header.pop(name)
            elif len(header) > 2:
                del header[name]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[stop:])
        try:
            weights = HubWeights(place)
            for name in weights.names:
                shape = weights.encoding(name).shape
                weights.expect(name, shape)
                if not shape:
                    continue  # no tensor of a model
                rows = min(3, math.prod(shape[:-1]))
                assert weights.rows(name, 0, rows).shape == (rows, shape[-1])
                if weights.qtype(name) is not None:
                    assert len(weights.blocks(name, 0, rows)) == rows
        except PymlaError as error:
            message = str(error)
            assert message.isprintable()
