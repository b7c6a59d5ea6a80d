"""Quantisers of types of four bits whose codes are levels, and of ternary types: against every scale there is, and
against the errors of llama.cpp's own."""

import numpy as np
import pytest
from quantising import (
    assert_codes_are_nearest,
    assert_errors_are_below_those_of_ggml,
    assert_extremes_are_finite,
    assert_python_does_the_same,
    errors,
    weights,
)

from pymla import cpu, ggml, planes
from pymla.cpu.quantise import quantise
from pymla.cpu.quantise.iq4 import _E4M3
from pymla.reference.formats import FORMATS, dequantise_rows

TYPES = (ggml.IQ4_NL, ggml.IQ4_XS, ggml.MXFP4, ggml.NVFP4, ggml.TQ1_0, ggml.TQ2_0)
BLOCKS = 8
#: The error, relative to that of llama.cpp, that no case may exceed. It has no search for MXFP4, TQ1_0 and TQ2_0.
AT_MOST = {ggml.IQ4_NL: 0.95, ggml.IQ4_XS: 0.95, ggml.MXFP4: 0.96, ggml.TQ1_0: 0.5, ggml.TQ2_0: 0.5}


def names(*types):
    return pytest.mark.parametrize("qtype", types, ids=ggml.NAME.get)


def best_errors(x, w, levels, scales):
    """The smallest weighted error (n,) of rows (n, each) with any of some scales (n or 1, s)."""
    best = np.full(len(x), np.inf)
    levels = np.sort(np.array(levels, np.float64))
    middles = (levels[1:] + levels[:-1]) / 2
    for scale in np.asarray(scales, np.float64).T[..., None]:
        with np.errstate(divide="ignore", invalid="ignore"):
            nearest = levels[np.searchsorted(middles, np.where(scale == 0, 0, x / scale))]
        best = np.minimum(best, (w * (x - scale * nearest) ** 2).sum(axis=1))
    return best


def blocks_of(qtype, each):
    """Weights of some blocks as rows of small blocks, their importance, and the errors that `quantise` leaves."""
    columns = BLOCKS * ggml.BLOCK_SIZE[qtype]
    x, importance = weights(1, columns)
    found = errors(x, qtype, importance).reshape(-1, each).sum(axis=1)
    return x.reshape(-1, each).astype(np.float64), importance.reshape(-1, each).astype(np.float64), found


def halves_from(smallest, count, step=1):
    """IEEE halves of either sign, from one of some size on, for each of `smallest`: (n, 2 * count)."""
    first = np.asarray(smallest, np.float16).view(np.uint16).reshape(-1, 1)
    found = (first + step * np.arange(count, dtype=np.uint16)).view(np.float16).astype(np.float64)
    return np.concatenate([-found, found], axis=1)


def test_iq4_nl_beside_every_half():
    """Those that give the farthest weight a level from 40 to 260."""
    x, w, found = blocks_of(ggml.IQ4_NL, 32)
    best = best_errors(x, w, planes.IQ4_LEVELS, halves_from(np.abs(x).max(axis=1) / 260, 2800))
    assert (found >= 0.9999 * best).all()
    assert found.sum() <= 1.005 * best.sum()


def test_iq4_xs_beside_many_scales():
    """Every number for each small block, and every thirty-second half for the block, over an octave."""
    x, w, found = blocks_of(ggml.IQ4_XS, 32)
    numbers = np.arange(-32, 32)
    for i in range(0, len(x), 16):
        block, importance = x[i : i + 8], w[i : i + 8]
        scales = halves_from(np.abs(block).max() / 127 / 40, 32, 32)[0]
        best = min(best_errors(block, importance, planes.IQ4_LEVELS, (d * numbers)[None]).sum() for d in scales)
        assert found[i : i + 8].sum() <= 1.02 * best


def test_mxfp4_beside_every_power_of_two():
    x, w, found = blocks_of(ggml.MXFP4, 32)
    best = best_errors(x, w, planes.LAYOUTS[ggml.MXFP4].codes.levels, 2.0 ** np.arange(-60, 20)[None])
    np.testing.assert_allclose(found, best, rtol=1e-4)


def test_nvfp4_beside_every_scale():
    x, w, found = blocks_of(ggml.NVFP4, 16)
    best = best_errors(x, w, planes.LAYOUTS[ggml.NVFP4].codes.levels, _E4M3[None])
    np.testing.assert_allclose(found, best, rtol=1e-4)


def test_e4m3_is_that_of_the_reference():
    blocks = np.zeros((127, 36), np.uint8)
    blocks[:, 0], blocks[:, 4] = np.arange(127), 1  # the level of code 1 is 1
    np.testing.assert_array_equal(_E4M3, FORMATS[ggml.NVFP4].dequantise(blocks)[:, 0])


@names(ggml.TQ1_0, ggml.TQ2_0)
def test_ternary_beside_every_bound(qtype):
    """With the codes that a bound gives, the best scale is a mean: the best of all bounds has the smallest error."""
    x, w, found = blocks_of(qtype, 256)
    order = np.argsort(-np.abs(x), axis=1)
    sizes, importance = (np.take_along_axis(each, order, axis=1) for each in (np.abs(x), w))
    gains = np.cumsum(importance * sizes, axis=1) ** 2 / np.cumsum(importance, axis=1)
    best = (w * x * x).sum(axis=1) - gains.max(axis=1)
    assert (found >= 0.999 * best).all()
    assert found.sum() <= 1.002 * best.sum()


@names(ggml.IQ4_NL, ggml.IQ4_XS, ggml.MXFP4, ggml.NVFP4)
def test_blocks_are_what_the_search_meant(qtype):
    x, importance = weights(3, 768)
    for given in (importance, None):
        assert_codes_are_nearest(x, qtype, quantise(x, qtype, given))


@names(ggml.TQ1_0, ggml.TQ2_0)
def test_ternary_codes_are_nearest(qtype):
    x, importance = weights(3, 768)
    data = quantise(x, qtype, importance)
    found = dequantise_rows(data, qtype, 768).reshape(-1, 256)
    scale = np.abs(found).max(axis=1, keepdims=True)
    expected = np.where(np.abs(x.reshape(-1, 256)) > scale / 2, np.copysign(scale, x.reshape(-1, 256)), 0)
    np.testing.assert_array_equal(found, expected)


@names(*AT_MOST)
def test_errors_are_below_those_of_llama_cpp(qtype):
    assert_errors_are_below_those_of_ggml(qtype, AT_MOST[qtype])


@names(*TYPES)
def test_extremes(qtype):
    assert_extremes_are_finite(qtype, 512)


@names(*TYPES)
def test_python_does_the_same(qtype):
    assert_python_does_the_same(qtype, 256)


@pytest.mark.usefixtures("all_cores")
def test_threads_change_nothing():
    x, importance = weights(9, 512)
    expected, threads = quantise(x, ggml.IQ4_XS, importance), cpu.thread_count()
    try:
        cpu.set_threads(1 if threads > 1 else 2)
        np.testing.assert_array_equal(quantise(x, ggml.IQ4_XS, importance), expected)
    finally:
        cpu.set_threads(threads)
