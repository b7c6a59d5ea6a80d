"""What tests of quantisers share: errors, and whether blocks are as a search leaves them."""

import json
from pathlib import Path

import golden_quantise
import numpy as np

from pymla import ggml, planes
from pymla.cpu.quantise import quantise
from pymla.cpu.quantise.frame import quantised_rows
from pymla.reference.formats import blocks_of_rows, dequantise_rows

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quantise_errors.json").read_text())
CASES = list(golden_quantise.cases())


def assert_errors_are_below_those_of_ggml(qtype, at_most):
    """The recorded errors of the C++ programs, times a factor."""
    assert GOLDEN["crc32"] == golden_quantise.checksum(), (
        "NumPy draws other numbers: run tools/golden_quantise.py again"
    )
    for case in CASES:
        data = quantise(case.rows, qtype, case.importance)
        found = golden_quantise.weighted_error(data, qtype, case.rows, case.importance)
        expected = GOLDEN["errors"][ggml.NAME[qtype]][case.name]
        assert found <= at_most * expected, (ggml.NAME[qtype], case.name, found / expected)


def weights(n, columns, seed=0):
    """Rows of weights with a few large ones, and the importance of columns, which differs by some hundreds."""
    rng = np.random.default_rng(seed)
    x = (0.02 * rng.standard_t(6, (n, columns))).astype(np.float32)
    return x, np.exp(1.5 * rng.standard_normal(columns)).astype(np.float32)


def errors(x, qtype, importance, data=None):
    """Weighted squared errors of each weight, float64; of rows as `quantise` makes them by default."""
    data = quantise(x, qtype, importance) if data is None else data
    off = x.astype(np.float64) - dequantise_rows(data, qtype, x.shape[1])
    return off * off if importance is None else off * off * importance


def assert_codes_are_nearest(x, qtype, data):
    """Each small block has, up to rounding, the smallest error that its scale allows, with its levels moved or not."""
    layout = planes.LAYOUTS[qtype]
    each, blocks = blocks_of_rows(data, qtype)
    scales = each.codes(blocks).scales
    scales = np.repeat(scales, x.size // scales.size // layout.each, axis=1).reshape(-1, 1, 1).astype(np.float64)
    small = x.reshape(-1, layout.each, 1).astype(np.float64)
    found = errors(x, qtype, None, data).reshape(-1, layout.each).sum(axis=1)
    distances = []
    for moved in {0, layout.codes.moved}:
        levels = np.array(layout.codes.levels, np.float64) + moved
        distances.append((np.abs(small - scales * levels).min(axis=2) ** 2).sum(axis=1))
    off = np.abs(found[:, None] - np.stack(distances, axis=1)).min(axis=1)
    assert (off <= 1e-4 * found + 1e-20).all(), (ggml.NAME[qtype], off.max())


def quantised_by(kernel, qtype, x, importance):
    """A row of weights as a kernel, or its source, makes it."""
    columns = len(x)
    out = np.full((1, ggml.row_bytes(qtype, columns)), 255, np.uint8)
    together = columns if ggml.ROW_HEADER[qtype] else ggml.BLOCK_SIZE[qtype]
    with np.errstate(all="ignore"):
        kernel(0, columns // together, x, importance / importance.max(), together, out[0])
    return out


def assert_python_does_the_same(qtype, columns):
    """The kernel as Python, on registers that are arrays, writes the same bytes for one row."""
    x, importance = weights(1, columns, seed=3)
    made = quantised_rows(qtype)
    expected = quantised_by(made.py_func, qtype, x[0], importance)
    np.testing.assert_array_equal(quantised_by(made, qtype, x[0], importance), expected)


def assert_extremes_are_finite(qtype, columns):
    """Weights without any size, and of the smallest and the largest sizes: results are finite, and not worse than
    zeros, of which the first are made. A column, or all columns, without importance change no other one's result."""
    x, importance = weights(3, columns, seed=4)
    zeros = np.zeros((1, columns), np.float32)
    np.testing.assert_array_equal(dequantise_rows(quantise(zeros, qtype, importance), qtype, columns), zeros)
    for size in (1e-38, 1e-30, 1e-12, 1e-6, 1e6, 1e30, 1e37):
        scaled = x * np.float32(size)
        values = dequantise_rows(quantise(scaled, qtype, importance), qtype, columns).astype(np.float64)
        assert np.isfinite(values).all(), size
        error = (importance * (scaled - values) ** 2).sum()
        assert error <= 1.0001 * (importance * scaled.astype(np.float64) ** 2).sum(), size
    nothing = np.zeros(columns, np.float32)
    np.testing.assert_array_equal(quantise(x, qtype, nothing), quantise(x, qtype))
    importance[: columns // 2] = 0
    values = dequantise_rows(quantise(x, qtype, importance), qtype, columns)
    # Weights without importance are kept as well as others where they have a small block of their own.
    assert np.square(x - values).sum() < 0.5 * np.square(x).sum()
