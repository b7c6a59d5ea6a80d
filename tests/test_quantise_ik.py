"""Quantisers of ik_llama.cpp's types."""

import pytest
from quantising import (
    assert_codes_are_nearest,
    assert_errors_are_below_those_of_ggml,
    assert_extremes_are_finite,
    assert_python_does_the_same,
    errors,
    weights,
)

from pymla import ggml
from pymla.cpu.quantise import quantise
from pymla.cpu.quantise.ik_quants import QUANTISERS

types = pytest.mark.parametrize("qtype", QUANTISERS, ids=ggml.NAME.get)


@types
def test_blocks_are_what_the_search_meant(qtype):
    x, importance = weights(2, 768)
    for given in (importance, None):
        assert_codes_are_nearest(x, qtype, quantise(x, qtype, given))


@types
def test_errors_are_below_those_of_ik_llama_cpp(qtype):
    assert_errors_are_below_those_of_ggml(qtype, 1.0)


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
