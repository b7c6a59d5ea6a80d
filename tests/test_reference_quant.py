"""The reference's activations in 8 bits."""

import numpy as np
import pytest

from pymla.reference import quant


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
