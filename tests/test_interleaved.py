"""Interleaved rows as plain ones: the compiled moves against the reference, and the reference by its weights."""

import numpy as np
import pytest
from random_weights import random_blocks

from pymla import ggml
from pymla.models.interleaved import moves_of, plain_rows
from pymla.reference import formats
from pymla.reference.quant import dequantise

types = pytest.mark.parametrize("qtype", ggml.PLAIN, ids=ggml.NAME.get)


@types
def test_rows_are_those_of_the_reference(qtype):
    """Any bytes, in rows of 1, 3 and 4 units or more."""
    rng, together = np.random.default_rng(0), ggml.ROWS_TOGETHER[qtype]
    for groups, columns in ((1, 256), (3, 768), (2, 1024)):
        data = rng.integers(0, 256, (groups * together, ggml.row_bytes(qtype, columns)), np.uint8)
        expected = formats.plain_rows(data, qtype)
        data.flags.writeable = False
        rows = plain_rows(data, qtype)
        assert rows.shape == (len(data), ggml.row_bytes(ggml.PLAIN[qtype], columns))
        np.testing.assert_array_equal(rows, expected)


@types
def test_weights_stay_the_same(qtype):
    shape = 2 * ggml.ROWS_TOGETHER[qtype], 768
    pieces = random_blocks(0, "w", shape, qtype, 1.0)
    data = np.concatenate([piece.reshape(-1).view(np.uint8) for piece in pieces]).reshape(shape[0], -1)
    rows = formats.plain_rows(data, qtype)
    before, after = dequantise(data, qtype), dequantise(rows, ggml.PLAIN[qtype])
    np.testing.assert_array_equal(after.view(np.uint32), before.view(np.uint32))
    assert formats.plain_rows(data[:0], qtype).shape == (0, rows.shape[1])


@pytest.mark.parametrize("columns", [32, 96])
def test_rows_shorter_than_a_k_quant(columns):
    data = np.random.default_rng(1).integers(0, 256, (8, ggml.row_bytes(ggml.IQ4_NL_R4, columns)), np.uint8)
    np.testing.assert_array_equal(plain_rows(data, ggml.IQ4_NL_R4), formats.plain_rows(data, ggml.IQ4_NL_R4))


@types
def test_nothing_beyond_a_unit_is_read_or_written(qtype):
    unit, rows = formats.unit_of(qtype), ggml.ROWS_TOGETHER[qtype]
    covered = set()
    for words in moves_of(qtype):
        assert len(words.begin) == len(words.to) + 1
        assert (words.at >= 0).all()
        assert (words.at + words.stride * (rows - 1) + 4 <= unit.mixed_bytes).all()
        assert ((words.right == 0) | (words.left == 0)).all()
        assert words.to.size == 0 or (words.to.min() >= 0 and words.to.max() + 4 <= unit.plain_bytes)
        covered |= {byte for at in words.to.tolist() for byte in range(at, at + 4)}
    assert covered == set(range(unit.plain_bytes))
