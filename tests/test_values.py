"""`pymla.files.values` against the weights themselves, dequantised."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cases import random_qtensor
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla import ggml
from pymla.files import values
from pymla.files.gguf_reader import TensorInfo
from pymla.reference.quant import QUANTISERS, dequantise, quantise

#: Columns of a tensor: some blocks of every type.
COLUMNS = 1024
#: The byte of a block at which the float16 or float32 begins that all its weights are multiples of.
SCALES = {qtype: row.halves[0] if row.halves else 0 for qtype, row in ggml.TYPES.items()}
NAN = {ggml.F32: "00 00 c0 7f", ggml.BF16: "c0 7f"}
INFINITY = {ggml.F32: "00 00 80 ff", ggml.BF16: "80 ff"}
types = pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)


def tensor(qtype, *shape):
    """Random weights, none of them zero, that can be written to."""
    data = random_qtensor(qtype, *shape).data.reshape(-1).copy()
    if qtype not in ggml.QUANTISED:
        data = np.maximum(data, 1)
    return TensorInfo("t", qtype, shape, data, Path("t.gguf"))


def codes_of(qtype):
    """Numbers of the bytes of a block that hold codes: all but its scales and minima. Float types have none."""
    row = ggml.TYPES[qtype]
    scales = [byte for half in row.halves for byte in (half, half + 1)] + list(range(*(row.int8_scales or (0, 0))))
    return [byte for byte in range(ggml.BLOCK_BYTES[qtype]) if byte not in scales] if row.is_quantised else []


def holding(qtype, nan, infinite):
    """Blocks that hold NaN, and blocks that hold infinity."""
    info = tensor(qtype, 8, COLUMNS)
    blocks = info.data.reshape(-1, ggml.BLOCK_BYTES[qtype])
    for found, default, kinds in ((nan, "00 7e", NAN), (infinite, "00 fc", INFINITY)):
        for block in found:
            raw = np.frombuffer(bytes.fromhex(kinds.get(qtype, default)), np.uint8)
            blocks[block, SCALES[qtype] : SCALES[qtype] + len(raw)] = raw
    return info


def by_block(info):
    """The weights, a row for each block."""
    with np.errstate(invalid="ignore"):
        return dequantise(info.data, info.qtype).reshape(-1, ggml.BLOCK_SIZE[info.qtype])


@types
@pytest.mark.parametrize("chunk", [1, 1000, values.CHUNK_BYTES])
def test_nan_and_infinity(monkeypatch, qtype, chunk):
    monkeypatch.setattr(values, "CHUNK_BYTES", max(chunk, ggml.BLOCK_BYTES[qtype]))
    clean = values.scan(tensor(qtype, 8, COLUMNS))
    assert clean[1:] == (0, None, 0, [])
    assert clean.blocks == 8 * COLUMNS // ggml.BLOCK_SIZE[qtype]
    for nan, infinite in (([7], []), ([], [0]), ([9, clean.blocks - 1], [6, 20])):
        info = holding(qtype, nan, infinite)
        found = values.scan(info)
        expected = np.flatnonzero(~np.isfinite(by_block(info)).all(axis=1))
        assert (found.not_finite, found.first_not_finite) == (len(expected), expected[0])
        assert expected.tolist() == sorted([*nan, *infinite])


def test_the_minimum_of_q4_1():
    info = tensor(ggml.Q4_1, 2, COLUMNS)
    info.data.reshape(-1, 20)[5, 2:4] = [0, 0x7C]
    assert values.scan(info)[1:3] == (1, 5)
    # A block whose scale is zero is constant, and zero only with its minimum.
    info.data.reshape(-1, 20)[:, :2] = 0
    assert values.scan(info).zero == 0
    info.data.reshape(-1, 20)[:, :4] = 0
    assert values.scan(info).is_zero


def test_the_inner_scales_of_q6_k():
    info = tensor(ggml.Q6_K, 4, COLUMNS)
    info.data.reshape(-1, 210)[:, 192:208] = 0
    assert values.scan(info).is_zero
    info.data[207] = 1
    assert values.scan(info).zero == 15
    assert values.scan(info).hole(info) is None


@types
def test_zero_with_either_sign(qtype):
    info = tensor(qtype, 4, COLUMNS)
    size, at = ggml.BLOCK_BYTES[qtype], SCALES[qtype]
    sign = {ggml.F32: [0, 0, 0, 0x80]}.get(qtype, [0, 0x80])
    info.data.reshape(-1, size)[:, at : at + len(sign)] = sign
    for half in ggml.TYPES[qtype].halves:
        info.data.reshape(-1, size)[:, half : half + 2] = sign
    assert not by_block(info).any()
    assert values.scan(info).is_zero
    assert values.may_have_hole(info)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    qtype=st.sampled_from(ggml.SUPPORTED),
    holes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4000)), max_size=3),
    chunk=st.sampled_from([256, 600, 5000, 1 << 20]),
    start=st.randoms(use_true_random=False),
)
def test_zeros_are_those_of_the_weights(qtype, holes, chunk, start):
    """Zero blocks are those whose weights are zero with any codes, and empty ones have no other bytes, wherever chunks
    end."""
    info = tensor(qtype, 16, COLUMNS)
    for _, length in holes:
        at = start.randrange(info.data.size)
        info.data[at : at + length] = 0
    coded = info._replace(data=info.data.copy())
    coded.data.reshape(-1, ggml.BLOCK_BYTES[qtype])[:, codes_of(qtype)] = 0x11
    zero = ~by_block(coded).any(axis=1)
    empty = ~info.data.reshape(len(zero), -1).any(axis=1)
    edges = np.flatnonzero(np.diff(empty, prepend=False, append=False)).reshape(-1, 2)
    least = values.HOLE_BYTES // ggml.BLOCK_BYTES[qtype]
    expected = [(a, b) for a, b in edges.tolist() if b - a >= least]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "CHUNK_BYTES", chunk)
        found = values.scan(info)
    assert (found.zero, found.empty) == (zero.sum(), expected)


@types
@pytest.mark.parametrize(("start", "stop"), [(0, 9000), (5000, 12345), (30_001, None), (-2100, None), (-601, None)])
def test_holes(qtype, start, stop):
    """Bytes that were never written, at places that have nothing to do with rows."""
    info = tensor(qtype, 64, COLUMNS)
    assert values.scan(info).hole(info) is None
    assert not values.may_have_hole(info)
    info.data[start:stop] = 0
    first, last = values.scan(info).hole(info)
    size = ggml.BLOCK_BYTES[qtype]
    begin, end, _ = slice(start, stop).indices(info.data.size)
    assert abs(first * size - begin) <= size
    assert abs(last * size - end) <= size
    if start == 0 or stop is None:
        assert values.may_have_hole(info)


@types
@pytest.mark.parametrize(("first", "stop"), [(0, 1), (3, 9), (60, 64)])
def test_whole_rows_may_be_zero(qtype, first, stop):
    """Rows of tokens that pad a vocabulary, and experts without use."""
    info = tensor(qtype, 64, COLUMNS)
    rows = info.data.reshape(64, -1)
    rows[first:stop] = 0
    found = values.scan(info)
    assert len(found.empty) == 1
    assert found.zero == (stop - first) * found.blocks // 64
    assert found.hole(info) is None


@types
@pytest.mark.parametrize("value", [1e-9, 1e-12, 0.0])
def test_weights_that_are_too_small_for_their_type(qtype, value):
    """Those of tokens that never occurred: zero in float16, from anywhere in one row to anywhere in another."""
    if ggml.NAME[qtype] not in QUANTISERS:  # the scale of such a block is zero, and its codes are not
        small = tensor(qtype, 1, COLUMNS).data.reshape(-1, ggml.BLOCK_BYTES[qtype])
        for half in ggml.TYPES[qtype].halves:
            small[:, half : half + 2] = 0
    else:
        x = np.full((1, COLUMNS), value, np.float32) * np.where(np.arange(COLUMNS) % 3, 1, -1)
        small = quantise(x, qtype).reshape(-1, ggml.BLOCK_BYTES[qtype])
    info = tensor(qtype, 64, COLUMNS)
    blocks = info.data.reshape(-1, ggml.BLOCK_BYTES[qtype])
    per_row = len(small)
    whole = value == 0  # exactly zero are rows of padding
    first, stop = 3 * per_row + (0 if whole else per_row // 2 + 1), 30 * per_row
    blocks[first:stop] = small[np.arange(first, stop) % per_row]
    assert values.scan(info).hole(info) is None


@pytest.mark.parametrize("qtype", ggml.QUANTISED, ids=ggml.NAME.get)
def test_a_hole_torn_inside_blocks(qtype):
    """A hole whose zero blocks happen to be whole rows."""
    info = tensor(qtype, 64, 256)
    size = ggml.BLOCK_BYTES[qtype]
    row, half = info.data.size // 64, size // 2
    for start, stop in ((8 * row - half, 40 * row), (8 * row, 40 * row + half)):
        torn = info._replace(data=info.data.copy())
        torn.data[start:stop] = 0
        assert values.scan(torn).hole(torn), (start, stop)


def test_a_large_hole_is_found_by_the_samples():
    """One of a fifteenth of the tensor, wherever it is."""
    info = tensor(ggml.Q4_0, 500, COLUMNS)
    length = info.data.size // (values.SAMPLES - 1) + 2 * values.HOLE_BYTES
    for start in range(0, info.data.size - length, length // 3):
        holed = info._replace(data=info.data.copy())
        holed.data[start : start + length] = 0
        assert values.may_have_hole(holed)


@types
def test_memory_is_bounded(monkeypatch, qtype):
    """Zeros here and there, as 16-bit floats have them, are not kept."""
    info = tensor(qtype, 2048, COLUMNS)
    info.data[::2] = 0
    monkeypatch.setattr(values, "CHUNK_BYTES", 1 << 16)
    tracemalloc.start()
    try:
        values.scan(info)
        assert tracemalloc.get_traced_memory()[1] < 8 << 16
    finally:
        tracemalloc.stop()


def test_progress():
    info, calls = tensor(ggml.Q8_0, 64, COLUMNS), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "CHUNK_BYTES", 20_000)
        values.scan(info, calls.append)
    assert calls == sorted(set(calls))
    assert (calls[0], calls[-1]) == (0, info.data.size)
