"""Every quantised type on the GPU: all functions of its `Format`, in a kernel that calls each of them once, against the
reference. Operations are tested with a few types (`cases.REPRESENTATIVES`)."""

import cuda_functions
import numpy as np
import pytest
import simulated  # noqa: F401 - skips this file where kernels are not simulated
from cases import REPRESENTATIVES, random_bytes, random_qtensor
from cuda_functions import BLOCKS
from test_cpu_formats import assert_blocks_close

from pymla import ggml
from pymla.cuda import memory
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.formats.loads import GLOBAL, linear, words_of
from pymla.reference.quant import dequantise, quantise_activations

COLUMNS = 32 * BLOCKS


def test_every_type_has_its_functions():
    assert set(ggml.QUANTISED) <= set(FORMATS)
    assert set(FLOATS) == set(ggml.SUPPORTED) - set(ggml.QUANTISED)


@pytest.mark.parametrize("qtype", FLOATS, ids=ggml.NAME.get)
def test_floats(qtype):
    data, form = random_bytes(qtype, 1, 16), FLOATS[qtype]
    there, expected = memory.to_device(data), dequantise(data, qtype)[0]
    assert form.nbytes == ggml.BLOCK_BYTES[qtype]
    assert [form.one(there.address + form.nbytes * i) for i in range(16)] == expected.tolist()
    fours = [form.four(there.address + form.nbytes * i) for i in range(0, 16, 4)]
    np.testing.assert_array_equal(np.concatenate(fours), expected)


@pytest.mark.parametrize(
    "values", [(7,), (7, 7, 7, 7), (4, 5, 6, 7, 12, 13, 14, 15), (0, 4, 2, 6), (0, 0, 4, 4, 8, 8, 12, 12)]
)
def test_places_are_sums_over_bits(values):
    assert [linear(*values)(i) for i in range(len(values))] == list(values)


@pytest.mark.parametrize("values", [(0, 1, 2, 4), (0, 1, 5, 6, 25, 26, 30, 31)], ids=["no sum", "three constants"])
def test_places_without_a_rule_are_refused(values):
    with pytest.raises(ValueError, match=r"sums|multiplications"):
        linear(*values)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 16])
def test_words(alignment, count):
    """At the end of an array, at each of the places that an alignment allows."""
    raw = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8)
    for at in range(16, 32, alignment):
        there = memory.to_device(raw[: at + 4 * count])
        expected = raw[at : at + 4 * count].view("<i4").tolist()
        assert list(words_of(GLOBAL, alignment, count)(there.address + at)) == expected


def rows_of(qtype, kind):
    """As many rows as there are places where one begins."""
    rows = cuda_functions.starts(qtype)
    if kind == "random bytes":
        return random_bytes(qtype, rows, COLUMNS)
    return random_qtensor(qtype, rows, COLUMNS).data


@pytest.mark.parametrize("kind", ["weights", "random bytes"])
@pytest.mark.parametrize("qtype", FORMATS, ids=ggml.NAME.get)
def test_functions(qtype, kind):
    data = rows_of(qtype, kind)
    weights = dequantise(data, qtype)
    x, scale = quantise_activations(np.random.default_rng(0).standard_normal((1, COLUMNS), dtype=np.float32))
    results = cuda_functions.call(qtype, data, x[0], scale[0])
    assert_blocks_close(results.weights, weights)
    assert_blocks_close(cuda_functions.block_weights(qtype, results), weights)
    products = (weights.astype(np.float64) * x * scale.repeat(32, axis=1)).reshape(-1, BLOCKS, 32).sum(axis=2)
    terms = np.abs(weights * x * scale.repeat(32, axis=1)).reshape(-1, BLOCKS, 32).sum(axis=2)
    expected = np.arange(len(data))[:, None] + products
    assert (np.abs(results.products - expected) <= 1e-6 * (terms + np.arange(len(data))[:, None])).all()


def structures(qtype):
    """What kernels know of a type besides its functions: the numbers of its blocks, and whether rows have a header."""
    form = FORMATS[qtype]
    return ("numbers", form.halves, form.minimum, form.minima), ("header", form.row_scale is not None)


def test_every_structure_has_a_representative():
    found = {each for qtype in REPRESENTATIVES if qtype in FORMATS for each in structures(qtype)}
    missing = [ggml.NAME[qtype] for qtype in FORMATS if not found.issuperset(structures(qtype))]
    assert not missing, "add one type of each structure to cases.REPRESENTATIVES"
