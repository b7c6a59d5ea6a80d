"""Nearest levels of a table: machine code against NumPy, for tables of every size, at the level in use."""

import numba
import numpy as np
import pytest

from pymla import ggml, planes
from pymla.cpu.machine.simd_levels import as_halves, nearest_of
from pymla.cpu.machine.simd_quantise import load_f32x16, store_f32x16

TABLES = [planes.LAYOUTS[qtype].codes.levels for qtype in (ggml.IQ2_K, ggml.IQ3_K, ggml.IQ4_K, ggml.IQ5_K, ggml.IQ6_K)]
TABLES += [(-1, 4)]


def compiled(program):
    return numba.njit("void(int64, int64)", error_model="numpy")(program)


def program_of(table):
    """Levels and codes of 16 numbers at an address: 64 bytes, and 16 bytes behind them."""
    nearest, store_codes = nearest_of(table, [200 - i for i in range(len(table))])

    def program(x, out):
        store_f32x16(out, nearest(load_f32x16(x)))
        store_codes(out + 64, load_f32x16(x))

    return program


def halves_program(x, out):
    store_f32x16(out, as_halves(load_f32x16(x)))


def run(program, x, nbytes):
    out = np.full((len(x) // 16, nbytes), 255, np.uint8)
    for row, result in zip(x.reshape(-1, 16), out, strict=True):
        program(row.ctypes.data, result.ctypes.data)
    return out


@pytest.mark.parametrize("table", TABLES, ids=len)
def test_nearest_levels(table):
    levels = np.array(table, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    rng = np.random.default_rng(0)
    x = [levels, middles, np.nextafter(middles, np.float32(1e3)), np.nextafter(middles, np.float32(-1e3))]
    x += [rng.uniform(-140, 140, 1000), np.array([0, -0.0, 1e30, -1e30, np.inf, -np.inf, 1e-40])]
    x = np.concatenate(x).astype(np.float32)
    x = np.resize(x, -(-len(x) // 16) * 16)
    program = program_of(table)
    found = run(compiled(program), x, 80)
    np.testing.assert_array_equal(found, run(program, x, 80))
    chosen = found[:, :64].reshape(-1).view(np.float32)
    np.testing.assert_array_equal(200 - found[:, 64:].reshape(-1), np.searchsorted(levels, chosen))
    is_finite = np.isfinite(x)
    distance = np.abs(x[:, None].astype(np.float64) - levels)[is_finite]
    np.testing.assert_array_equal(np.abs(x.astype(np.float64) - chosen)[is_finite], distance.min(axis=1))


def test_the_lower_of_two_levels_that_are_equally_near():
    nearest, _ = nearest_of((-1, 4, 6, 10), range(4))
    np.testing.assert_array_equal(nearest(np.array([1.5, 5, 8, 9], np.float32)), [-1, 4, 6, 10])


def test_halves():
    numbers = [0, 1, 1 + 2**-11, -1 - 3 * 2**-11, 65504, 65519, 65520, 1e30, -1e30, np.inf, 2**-25, 2**-24, -6e-8, 3e-8]
    x = np.resize(np.array(numbers, np.float32), 16)
    found = run(halves_program, x, 64)
    np.testing.assert_array_equal(run(compiled(halves_program), x, 64), found)
    values = found.reshape(-1).view(np.float32)
    expected = np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(values, expected)
