"""Every type on the CPU: all functions of its `Format`, in a kernel that calls each of them once, against the
reference. Operations are tested with a few types (`cases.REPRESENTATIVES`)."""

import assembly
import cpu_functions
import numpy as np
import pytest
from cases import REPRESENTATIVES, as_multiplied, bytes_alike, features, random_bytes, random_qtensor, unrepresented
from compare import assert_close

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.matmul.activations import Activation
from pymla.cpu.runtime import isa
from pymla.reference.quant import dequantise, quantise, quantise_activations
from pymla.tensor import QTensor

TYPES = pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
QUANTISED = pytest.mark.parametrize("qtype", ggml.QUANTISED, ids=ggml.NAME.get)

INT8 = {"rtol_max": 5e-6, "reason": "NumPy multiplies the same int8 activations, in float64"}
WEIGHTS = {"rtol_max": 3e-7, "reason": "a scale, its product with a code and a minimum are each rounded once"}


def row_lengths(qtype):
    """Every number of blocks of 32 behind eights and fours, as far as the type's own blocks allow it. For float types
    also lengths that are no multiple of 8."""
    lengths = [32 * blocks for blocks in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 24, 40, 44)]
    lengths += [1, 15, 17, 100] if qtype not in ggml.QUANTISED else []
    return [k for k in lengths if k % ggml.BLOCK_SIZE[qtype] == 0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_blocks_close(actual, expected):
    """Rows agree in every 32 weights by themselves: scales of blocks may differ by much."""
    for at in range(0, expected.shape[1], 32):
        assert_close(actual[:, at : at + 32], expected[:, at : at + 32], **WEIGHTS)


def check(w, x, start=0):
    """Call all functions of a type and compare. `start`: the column at which a panel begins."""
    form, (rows, k) = FORMATS[w.qtype], (len(w.data), x.shape[1])
    weights = dequantise(w.data, w.qtype)
    expected = as_multiplied(x, w.qtype).astype(np.float64) @ weights.astype(np.float64).T

    results = cpu_functions.call(w, x, 1, start, np.zeros((rows, k), np.float32))
    assert_close(results.products, expected, **INT8)
    assert_close(results.of_tokens, expected.repeat(4, axis=0), **INT8)
    whole = k // 32 * 32
    assert_blocks_close(results.sums[:, :whole], weights[:, :whole])
    if form.unpack is not None:
        assert_blocks_close(cpu_functions.panel_weights(w.qtype, results, start), weights[:, start:])
    if form.load_one is not None:
        np.testing.assert_array_equal(results.weights, weights)
    if cpu_functions.writes_rows(w.qtype):
        np.testing.assert_array_equal(results.written, quantise(x, w.qtype))

    before = np.abs(weights).max() * normal(rows, k, seed=2)
    results = cpu_functions.call(w, x, -0.75, start, before)
    assert_blocks_close(results.sums[:, :whole], (before - 0.75 * weights.astype(np.float64))[:, :whole])


@TYPES
def test_functions(qtype):
    """At every row length; of the panel's rows the last ones are repeated."""
    for k in row_lengths(qtype):
        for rows in (isa.LANES, isa.LANES - 3):
            check(random_qtensor(qtype, rows, k), normal(1, k))
            if k > 256:
                check(random_qtensor(qtype, rows, k, seed=1), normal(1, k), start=256)


@QUANTISED
def test_random_bytes(qtype):
    """Codes and scales that no quantiser writes."""
    check(QTensor(qtype, random_bytes(qtype, isa.LANES, 512)), normal(1, 512))


@QUANTISED
@pytest.mark.parametrize("byte", [0, 255, 0x80, 0x7F])
def test_extreme_codes(qtype, byte):
    """All codes alike, against activations of ±127: where 16-bit sums of products would overflow. Blocks of 32 come in
    an eight, a four and one by itself, which rows take apart."""
    k = 13 * 32 if 13 * 32 % ggml.BLOCK_SIZE[qtype] == 0 else 512
    w = QTensor(qtype, bytes_alike(qtype, 3, k, byte))
    for x in (np.ones(k), -np.ones(k), np.resize([1, -1], k)):
        x = x.astype(np.float32)[None]
        results = cpu_functions.call(w, x, 1, 0, np.zeros((3, k), np.float32))
        expected = x.astype(np.float64) @ dequantise(w.data, qtype).astype(np.float64).T
        for products in (results.products, results.of_tokens):
            np.testing.assert_allclose(products, expected.repeat(len(products), axis=0), rtol=1e-6, atol=1e-3)


@pytest.mark.skipif(isa.ISA not in assembly.DOTS, reason="the portable level leaves the choice of instructions to LLVM")
@QUANTISED
def test_dot_instructions_without_spills(qtype):
    """The loops of `dot_four` and `dot_tokens`."""
    assembly.check_dot_loops(cpu_functions.assembly(qtype), assembly.share_moved((qtype,)))


def test_every_feature_has_a_representative():
    missing = unrepresented(ggml.SUPPORTED, REPRESENTATIVES, features)
    assert not missing, "add a type with this feature to cases.REPRESENTATIVES"


@pytest.mark.parametrize("blocks", [1, 3, 4, 7, 8, 12, 13, 17])
def test_orders_lose_no_activation(blocks):
    """Codes of a row are the same in every order, each at another place."""
    x = normal(3, 32 * blocks)
    expected, _ = quantise_activations(x)
    for qtype in ggml.QUANTISED:
        codes = Activation(x).rows(qtype).codes
        np.testing.assert_array_equal(np.sort(codes, axis=1), np.sort(expected, axis=1))
