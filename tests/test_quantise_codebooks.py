"""Quantisers of IQ1, IQ2 and IQ3: against all entries and signs of the codebook in float64, and against the errors that
llama.cpp leaves."""

import functools
import json
from pathlib import Path

import golden_quantise
import numpy as np
import pytest
from golden_quantise import weighted_error

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.quantise import quantise
from pymla.cpu.quantise.block_scales import vertex
from pymla.cpu.quantise.fields import places_of, write
from pymla.planes import Plane
from pymla.reference.formats import FORMATS
from pymla.vectors import VECTORS, Field

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quantise_errors.json").read_text())
CASES = {case.name: case for case in golden_quantise.cases()}
IQ2_AND_3 = ggml.IQ2_XXS, ggml.IQ2_XS, ggml.IQ2_S, ggml.IQ3_XXS, ggml.IQ3_S
IQ1 = ggml.IQ1_S, ggml.IQ1_M
TYPES = pytest.mark.parametrize("qtype", IQ2_AND_3 + IQ1, ids=lambda qtype: ggml.NAME[qtype])
#: Sums of a search are float32: relative to the squared sum of all weights.
TOLERANCE = 2e-6


@functools.cache
def example():
    """Rows of weights with a few large ones and small blocks of very different sizes, and an importance."""
    rng = np.random.default_rng(26)
    rows = rng.standard_normal((3, 512)) * np.exp(rng.normal(0, 0.5, (3, 32)).repeat(16, axis=1))
    rows[rng.random(rows.shape) < 0.01] *= 5
    return rows.astype(np.float32), np.exp(rng.normal(0, 1.5, 512)).astype(np.float32)


@functools.cache
def quantised(qtype):
    rows, importance = example()
    return quantise(rows, qtype, importance)


def dequantised(blocks, qtype):
    size = ggml.BLOCK_BYTES[qtype]
    return FORMATS[qtype].dequantise(blocks.reshape(-1, size)).reshape(len(blocks), -1)


def error(rows, importance, found):
    """The weighted squared error, in float64."""
    return float((importance * (rows.astype(np.float64) - found) ** 2).sum())


def as_blocks(qtype):
    """Weights, importance, scales of small blocks and codes of the example, each with a block in each row."""
    rows, importance = example()
    codes = FORMATS[qtype].codes(quantised(qtype).reshape(-1, ggml.BLOCK_BYTES[qtype]))
    weights = np.broadcast_to(importance, rows.shape)
    blocks = len(codes.codes)
    return (each.reshape(blocks, -1).astype(np.float64) for each in (rows, weights, codes.scales, codes.codes))


def least_of_eight(qtype, x, w, scale):
    """The smallest error of eight weights with a scale, over all entries and all signs that the type has."""
    vectors = VECTORS[qtype]
    table = codebook(vectors.name).astype(np.float64)
    patterns = [p for p in range(256) if vectors.signs.bits == 8 or p.bit_count() % 2 == 0]
    is_negative = np.array(patterns)[:, None] >> np.arange(8) & 1
    size = table.shape[1]
    found = np.zeros(len(patterns))
    for first in range(0, 8, size):
        own = slice(first, first + size)
        costs = np.stack([w[own] * (x[own] - sign * scale * table) ** 2 for sign in (1, -1)])
        chosen = np.stack([1 - is_negative[:, own], is_negative[:, own]])
        found += np.einsum("sej,spj->pe", costs, chosen, optimize=True).min(axis=1)
    return found.min()


def least_of_vectors(x, w, scale):
    """The smallest errors of eight weights of IQ1 with a scale, moved up and down: float64 (2,)."""
    table = 8 * codebook("IQ1_S").astype(np.float64)
    return np.array([(w * (x - scale * (table + move)) ** 2).sum(axis=1).min() for move in (1, -1)])


def least_error(qtype, x, w, scale):
    """The smallest error of a small block with a scale."""
    runs = zip(x.reshape(-1, 8), w.reshape(-1, 8), strict=True)
    if qtype in IQ2_AND_3:
        return sum(least_of_eight(qtype, *run, scale) for run in runs)
    errors = np.array([least_of_vectors(*run, scale) for run in runs])
    return errors.sum(axis=0).min() if qtype == ggml.IQ1_S else errors.min(axis=1).sum()


@TYPES
def test_entries_and_signs_are_the_best_of_all_for_their_scale(qtype):
    for x, w, scales, codes in zip(*(each[:1] for each in as_blocks(qtype)), strict=True):
        count = len(scales)
        parts = zip(x.reshape(count, -1), w.reshape(count, -1), scales, codes.reshape(count, -1), strict=True)
        for own_x, own_w, scale, own_codes in parts:
            found = (own_w * (own_x - scale * own_codes) ** 2).sum()
            assert found <= least_error(qtype, own_x, own_w, scale) + TOLERANCE * (w * x**2).sum()


@pytest.mark.parametrize("qtype", [ggml.IQ2_XS, ggml.IQ3_XXS], ids=lambda qtype: ggml.NAME[qtype])
def test_small_blocks_have_the_best_multiple_of_the_number_of_the_block(qtype):
    layout = VECTORS[qtype].layout.scales
    for x, w, scales, codes in zip(*(each[:1] for each in as_blocks(qtype)), strict=True):
        d = quantised(qtype)[0, :2].view(np.float16)[0].astype(np.float64)
        count = len(scales)
        parts = zip(x.reshape(count, -1), w.reshape(count, -1), scales, codes.reshape(count, -1), strict=True)
        for own_x, own_w, scale, own_codes in parts:
            found = (own_w * (own_x - scale * own_codes) ** 2).sum()
            number = round((scale / d - layout.plus) / layout.times)
            for other in {max(number - 1, 0), min(number + 1, 15)} - {number}:
                least = least_error(qtype, own_x, own_w, d * (layout.times * other + layout.plus))
                assert found <= least + TOLERANCE * (w * x**2).sum()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@TYPES
def test_error_is_below_that_of_llama_cpp(qtype, case):
    """llama.cpp has some of these types only with an importance."""
    assert GOLDEN["crc32"] == golden_quantise.checksum(), (
        "NumPy draws other numbers: run tools/golden_quantise.py again"
    )
    found = weighted_error(quantise(case.rows, qtype, case.importance), qtype, case.rows, case.importance)
    expected = GOLDEN["errors"][ggml.NAME[qtype]].get(case.name, 0.5)
    print(f"{found / expected:.4f} of the error of llama.cpp")
    assert found < expected


@TYPES
def test_rows_by_themselves_are_the_same(qtype):
    rows, importance = example()
    alone = [quantise(rows[i : i + 1], qtype, importance)[0] for i in range(len(rows))]
    np.testing.assert_array_equal(np.array(alone), quantised(qtype))


@TYPES
def test_importance_counts(qtype):
    """Columns with importance have a smaller error with it than without; those without it are still near."""
    rows, _ = example()
    importance = np.zeros(512, np.float32)
    importance[::3] = 7
    found = dequantised(quantise(rows, qtype, importance), qtype)
    assert error(rows, importance, found) < error(rows, importance, dequantised(quantise(rows, qtype), qtype))
    assert error(rows, 1 - importance / 7, found) < (rows**2).sum()


@TYPES
def test_zeros_and_extreme_sizes(qtype):
    rows, importance = example()
    sizes = np.float32([0, 1e-44, 1e-30, 1e-8, 1e-6, 1e-3, 1, 1e5, 1e15, 3e37])[:, None]
    given = rows[:1, :256] / np.abs(rows[0, :256]).max() * sizes
    found = dequantised(quantise(np.ascontiguousarray(given), qtype, importance[:256]), qtype)
    assert np.isfinite(found).all()
    assert not found[:3].any()
    errors = (importance[:256] * (given.astype(np.float64) - found) ** 2).sum(axis=1)
    energies = (importance[:256] * given.astype(np.float64) ** 2).sum(axis=1)
    # What halves hold exactly enough is as good at every size; beyond their range nothing is worse than zeros.
    assert (errors <= energies).all()
    ratios = errors[5:8] / energies[5:8]
    np.testing.assert_allclose(ratios, ratios[1], rtol=0.05)


@TYPES
def test_a_block_with_one_weight(qtype):
    rows = np.zeros((1, 256), np.float32)
    rows[0, 77] = -3
    found = dequantised(quantise(rows, qtype), qtype)
    assert np.abs(found).argmax() == 77
    assert -3.1 < found[0, 77] < -1
    assert error(rows, np.ones(256), found) < 9


@TYPES
def test_weights_of_one_size_stay(qtype):
    """Every codebook has an entry of equal magnitudes, if only of the smallest ones."""
    rows = np.repeat(np.float32([[0.3], [-70]]), 256, axis=1)
    np.testing.assert_allclose(dequantised(quantise(rows, qtype), qtype), rows, rtol=2e-3)


def test_numbers_are_written_to_their_places():
    """Fields of words, of which some numbers reach into a second byte, and planes, one above the other."""
    fields = Field(2, 5, per=3, stride=2), Plane(8, 2, 1, 5)
    places, block, numbers = places_of(fields, 9), np.zeros(12, np.uint8), [0, 127, 1, 64, 37, 90, 5, 126, 33]
    for i, number in enumerate(numbers):
        write(block, places, i, number)
    words = block[2:8].view(np.uint16).astype(int)
    low = words[:, None] >> np.arange(0, 15, 5) & 31
    high = block[8:11, None] >> np.arange(0, 8, 2) & 3
    assert (low.reshape(-1) | high.reshape(-1)[:9].astype(int) << 5).tolist() == numbers


def test_the_top_of_a_curve_is_that_of_a_parabola():
    positions = np.float32([1, 2, 3, 4])
    curve = -((positions - np.float32(2.75)) ** 2)
    assert vertex(curve, 2, 4, positions) == pytest.approx(2.75)
    assert vertex(positions, 3, 4, positions) == 4
    assert vertex(np.zeros(4, np.float32), 1, 4, positions) == 2
