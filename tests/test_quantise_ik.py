"""Quantisers of ik_llama.cpp's types.

One function makes them all from the layouts of types. Two are compiled: with halves of blocks and with floats of rows.
The others run as Python, on a block.
"""

import numpy as np
import pytest
from quantising import (
    assert_codes_are_nearest,
    assert_errors_are_below_those_of_ggml,
    assert_extremes_are_finite,
    assert_python_does_the_same,
    errors,
    quantised_by,
    weights,
)

from pymla import ggml
from pymla.cpu.quantise import quantise
from pymla.cpu.quantise.frame import quantised_rows
from pymla.cpu.quantise.ik_quants import QUANTISERS

COMPILED = (ggml.IQ6_K, ggml.IQ4_KS)
types = pytest.mark.parametrize("qtype", COMPILED, ids=ggml.NAME.get)
#: Relative to the squares of the weights, without importance: the largest error of a type with so many levels.
LARGEST = {4: 0.15, 8: 0.04, 16: 0.01, 32: 0.003, 64: 0.0005}


@types
def test_blocks_are_what_the_search_meant(qtype):
    x, importance = weights(2, 768)
    for given in (importance, None):
        assert_codes_are_nearest(x, qtype, quantise(x, qtype, given))


@pytest.mark.parametrize("qtype", [qtype for qtype in QUANTISERS if qtype not in COMPILED], ids=ggml.NAME.get)
def test_a_block_as_python(qtype):
    x, importance = weights(1, 256, seed=5)
    for given in (importance, np.ones_like(importance)):
        data = quantised_by(quantised_rows(qtype).py_func, qtype, x[0], given)
        assert_codes_are_nearest(x, qtype, data)
    levels = 1 << int(ggml.NAME[qtype][2])
    assert errors(x, qtype, None, data).sum() < LARGEST[levels] * np.square(x).sum()


@types
def test_errors_are_below_those_of_ik_llama_cpp(qtype):
    assert_errors_are_below_those_of_ggml(qtype, 0.98)


@types
def test_extremes(qtype):
    assert_extremes_are_finite(qtype, 512)


@types
def test_python_does_the_same(qtype):
    assert_python_does_the_same(qtype, 256)


@types
def test_importance_counts(qtype):
    x, importance = weights(4, 1024)
    with_it, without = errors(x, qtype, importance).sum(), quantise(x, qtype)
    assert with_it < 0.97 * errors(x, qtype, importance, without).sum()
