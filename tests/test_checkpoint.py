import math

import numpy as np
import pytest
from hub import V2, hub_folder, random_weights, safetensors

from pymla.checkpoint import Checkpoint
from pymla.errors import PymlaError


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_rows(tmp_path, dtype, files):
    weights = random_weights(V2)
    checkpoint = Checkpoint(hub_folder(tmp_path / "Tiny", V2, weights, dtype, files))
    assert checkpoint.names == set(weights)
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(checkpoint.rows(name, 3, 9), weights[name][3:9])
    np.testing.assert_array_equal(checkpoint.rows(name, 3, 3), weights[name][3:3])
    for name, value in weights.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value)


def e4m3(code):
    """The value of a float8 code, after the format's definition (arXiv:2209.05433, table 1)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -magnitude if code & 128 else magnitude


def test_every_float8_value(tmp_path):
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8).reshape(2, 127)
    scale = np.array([[1.5], [0.25]], np.float32)
    safetensors(tmp_path / "model.safetensors", {"x": ("F8_E4M3", codes), "x_scale_inv": scale})
    checkpoint = Checkpoint(tmp_path, (1, 128))
    checkpoint.expect("x", (2, 127))
    assert checkpoint.names == {"x"}
    expected = np.array([[e4m3(int(code)) for code in row] for row in codes], np.float32) * scale
    np.testing.assert_array_equal(checkpoint.read("x"), expected)
    np.testing.assert_array_equal(checkpoint.rows("x", 1, 2), expected[1:])


def test_float8_not_a_number(tmp_path):
    stored = {"x": ("F8_E4M3", np.array([[127]], np.uint8)), "x_scale_inv": np.ones((1, 1), np.float32)}
    safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(PymlaError, match="tensor x holds infinity or NaN"):
        Checkpoint(tmp_path).read("x")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"y": np.ones(3, np.float32)}, "tensor x is missing"),
        ({"x": np.ones((3, 2), np.float32)}, r"tensor x has shape \(3, 2\); config.json asks for \(2, 3\)"),
        ({"x": ("I32", np.ones((2, 3), np.int32))}, "tensor x is of type I32"),
        ({"x": ("F32", np.ones((2, 3), np.float16))}, "tensor x does not fit"),
        ({"x": ("F8_E4M3", np.ones((2, 3), np.uint8))}, "tensor x_scale_inv is missing"),
        (
            {"x": ("F8_E4M3", np.ones((2, 3), np.uint8)), "x_scale_inv": np.ones((2, 1), np.float32)},
            r"x_scale_inv has shape \(2, 1\)",
        ),
    ],
)
def test_what_is_expected_and_not_there(tmp_path, stored, message):
    safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(PymlaError, match=message):
        Checkpoint(tmp_path).expect("x", (2, 3))
