"""`pymla.cpu.quantise`: what holds for every type, and types of floats. Families of types have tests of their own."""

import json

import numpy as np
import pytest
import quantise as benchmark
from click.testing import CliRunner
from compare import assert_close

from pymla import cpu, ggml
from pymla.cpu.quantise import QUANTISERS, quantise
from pymla.errors import PymlaError
from pymla.reference.quant import dequantise
from pymla.reference.quant import quantise as reference_quantise


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_types_of_the_table_are_known():
    assert set(QUANTISERS) <= set(ggml.SUPPORTED)
    for qtype, each in QUANTISERS.items():
        assert each.whole_rows == (qtype in ggml.FLOATS or ggml.ROW_HEADER[qtype] > 0)
        assert each.scratch > 0


@pytest.mark.parametrize("qtype", ggml.FLOATS, ids=ggml.NAME.get)
@pytest.mark.parametrize("columns", [1, 8, 13, 64])
def test_floats_are_rounded_as_by_the_reference(qtype, columns):
    rng = np.random.default_rng(columns)
    x = (rng.standard_normal((5, columns)) * 10.0 ** rng.integers(-9, 5, (5, columns))).astype(np.float32)
    x[1, 0], x[2, 0], x[3, 0] = 1 + 2.0**-8, -(1 + 3 * 2.0**-9), 65520
    expected = reference_quantise(np.where(np.abs(x) < 65520, x, 65519.996).astype(np.float32), qtype)
    np.testing.assert_array_equal(quantise(np.where(np.abs(x) < 65520, x, np.float32(65519.996)), qtype), expected)


def test_rows_may_lie_in_a_file():
    x = normal(3, 64)
    expected = quantise(x, ggml.Q8_0)
    x.flags.writeable = False
    np.testing.assert_array_equal(quantise(x, ggml.Q8_0), expected)


def test_out_is_the_callers():
    x, out = normal(3, 64), np.full((3, 68), 255, np.uint8)
    assert quantise(x, ggml.Q8_0, out=out) is out
    np.testing.assert_array_equal(out, quantise(x, ggml.Q8_0))
    with pytest.raises(ValueError, match="out: expected uint8"):
        quantise(x, ggml.Q8_0, out=out[:, :34])
    with pytest.raises(ValueError, match="rows: expected float32"):
        quantise(x.astype(np.float64), ggml.Q8_0)
    with pytest.raises(ValueError, match="rows: expected float32"):
        quantise(x[:, ::2], ggml.Q8_0)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_no_weights(shape):
    found = quantise(np.empty(shape, np.float32), ggml.Q8_0)
    assert found.shape == (shape[0], ggml.row_bytes(ggml.Q8_0, shape[1]))


def test_what_cannot_be_quantised_is_refused():
    x = normal(2, 64)
    with pytest.raises(PymlaError, match=r"weights cannot be quantised to Q4_0_R8; choose F32, F16, BF16, Q4_0"):
        quantise(x, ggml.Q4_0_R8)
    with pytest.raises(PymlaError, match="48 columns are no multiple of Q8_0's block of 32"):
        quantise(x[:, :48].copy(), ggml.Q8_0)
    with pytest.raises(PymlaError, match=r"importance of \(32,\) columns for weights of 64"):
        quantise(x, ggml.Q8_0, np.ones(32, np.float32))
    for wrong in (-1, np.nan, np.inf):
        importance = np.ones(64, np.float32)
        importance[5] = wrong
        with pytest.raises(PymlaError, match=f"importance of column 5 is {wrong}"):
            quantise(x, ggml.Q8_0, importance)


def test_only_ratios_of_importance_matter():
    x, importance = normal(4, 128), np.exp(2 * normal(128, seed=1))
    expected = quantise(x, ggml.Q4_0, importance)
    for factor in (2.0**-100, 2.0**100):
        np.testing.assert_array_equal(quantise(x, ggml.Q4_0, importance * np.float32(factor)), expected)
    assert not np.array_equal(expected, quantise(x, ggml.Q4_0))


def test_blocks_without_importance_are_like_any():
    x, importance = normal(4, 96), np.exp(normal(96, seed=1))
    importance[32:64] = 0
    found, size = quantise(x, ggml.Q4_0, importance), ggml.BLOCK_BYTES[ggml.Q4_0]
    np.testing.assert_array_equal(found[:, size : 2 * size], quantise(x, ggml.Q4_0)[:, size : 2 * size])


def test_importance_is_obeyed():
    """A column that alone matters is exact, up to the rounding of a half."""
    x, importance = normal(64, 32), np.zeros(32, np.float32)
    x[:, 7], importance[7] = np.linspace(0.5, 4, 64), 1e-9
    numbers = dequantise(quantise(x, ggml.Q4_0, importance), ggml.Q4_0)
    assert_close(numbers[:, 7], x[:, 7], rtol_max=2.0**-10, reason="the scale is a half")


@pytest.mark.usefixtures("all_cores")
def test_any_number_of_threads_finds_the_same():
    x, importance = normal(37, 96), np.exp(normal(96, seed=1))
    before, found = cpu.thread_count(), []
    try:
        for count in (1, 2, 3):
            cpu.set_threads(count)
            found.append(quantise(x, ggml.Q4_0, importance))
    finally:
        cpu.set_threads(before)
    assert all(np.array_equal(found[0], each) for each in found)


def test_the_benchmark_makes_a_table(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    path = tmp_path / "quantise.json"
    done = CliRunner().invoke(benchmark.main, ["--rows", "3", "--types", "q8_0", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "Q8_0" in done.output
    plain, weighted = json.loads(path.read_text())["types"]
    assert (plain["type"], plain["importance"], weighted["importance"]) == ("Q8_0", False, True)
    assert 0 < plain["pymla"]["error"] < 1e-4
    assert plain["pymla"]["weights_per_s"] > 0
    assert plain["peer"] is None
    refused = CliRunner().invoke(benchmark.main, ["--types", "q8_0,q4_9"])
    assert refused.exit_code == 2
    assert "Q4_9: no type that can be written" in refused.output
