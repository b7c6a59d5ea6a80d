"""`pymla.files.values` against the weights themselves, dequantised."""

import math
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
from pymla.reference.formats import FORMATS, INTERLEAVED
from pymla.reference.quant import QUANTISERS, dequantise, quantise

#: Columns of a tensor: some blocks of every type.
COLUMNS = 1024
#: Of every kind of scales. In the first types a block has them, in the others a row.
BLOCKS = (
    *(ggml.F32, ggml.F16, ggml.BF16, ggml.Q4_0, ggml.Q4_1, ggml.Q8_0, ggml.Q2_K, ggml.Q6_K, ggml.IQ1_M, ggml.TQ1_0),
    *(ggml.MXFP4, ggml.NVFP4, ggml.Q4_K_R4, ggml.MXFP4_R8, ggml.BF16_R16),
)
ROWS = (ggml.Q8_KV, ggml.IQ2_KS, ggml.IQ4_KS, ggml.IQ4_KS_R4, ggml.Q8_KV_R8, ggml.IQ1_M_R4)
every_type = pytest.mark.parametrize("qtype", [*FORMATS, *INTERLEAVED], ids=ggml.NAME.get)
types = pytest.mark.parametrize("qtype", [*BLOCKS, *ROWS], ids=ggml.NAME.get)
types_of_blocks = pytest.mark.parametrize("qtype", BLOCKS, ids=ggml.NAME.get)
types_of_rows = pytest.mark.parametrize("qtype", ROWS, ids=ggml.NAME.get)

#: Numbers by the kind of a type's scales, as hexadecimal bytes.
NAN = {"f32": "00 00 c0 7f", "f16": "00 7e", "nibbles": "00 7e", "bf16": "c0 7f", "e8m0": "ff"}
INFINITY = {"f32": "00 00 80 ff", "f16": "00 fc", "nibbles": "00 fc", "bf16": "80 ff", "e8m0": "ff"}
MINUS_ZERO = {"f32": "00 00 00 80", "f16": "00 80", "nibbles": "00 80", "bf16": "00 80", "e8m0": "00", "e4m3": "80"}

#: Weights of blocks whose scale is the smallest number, where that is not zero.
TINY = {"e8m0": 1e-37}


def tensor(qtype, *shape):
    """Random weights, none of them zero, that can be written to."""
    shape = (*shape[:-2], shape[-2] * ggml.ROWS_TOGETHER[qtype], shape[-1])
    data = random_qtensor(qtype, *shape).data.reshape(-1).copy()
    if ggml.plain_type(qtype) in ggml.FLOATS:
        data = np.maximum(data, 1)
    return TensorInfo("t", qtype, shape, data, Path("t.gguf"))


def blocks_of(info):
    """The bytes of blocks, a row for each, that can be written to."""
    return info.data.reshape(-1, values.block_bytes(info))


def put(info, block, number, numbers=1):
    """Write hexadecimal bytes where a block's first scales are."""
    kind, first, _ = ggml.SCALES[info.qtype]
    raw = np.frombuffer(bytes.fromhex(number), np.uint8)
    if kind == "nibbles":
        words = blocks_of(info)[block, first : first + 8].view(np.uint16)
        words[...] = words & 0x0FFF | raw.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) << 12
    else:
        blocks_of(info)[block, first : first + numbers * len(raw)] = np.tile(raw, numbers)


def codes_of(info):
    """Numbers of the bytes of a block that hold codes only. Float types have none."""
    kind, first, count = ggml.SCALES[info.qtype]
    size = 8 if kind == "nibbles" else count * len(bytes.fromhex(MINUS_ZERO[kind]))
    return [byte for byte in range(values.block_bytes(info)) if not first <= byte < first + size]


def holding(qtype, nan, infinite):
    """Blocks that hold NaN, and blocks that hold infinity."""
    info = tensor(qtype, 24, COLUMNS)
    for found, kinds in ((nan, NAN), (infinite, INFINITY)):
        for block in found:
            put(info, block, kinds[ggml.SCALES[qtype].kind])
    return info


def by_block(info):
    """The weights, a row for each block."""
    with np.errstate(invalid="ignore", over="ignore"):
        weights = dequantise(info.data.reshape(info.shape[-2], -1), info.qtype)
    per_row, together = values.blocks_of_row(info), ggml.ROWS_TOGETHER[info.qtype]
    parts = weights.reshape(-1, together, per_row, info.shape[-1] // per_row).swapaxes(1, 2)
    return parts.reshape(-1, together * parts.shape[-1])


@every_type
@pytest.mark.parametrize("chunk", [1000, values.CHUNK_BYTES])
def test_nan_and_infinity(monkeypatch, qtype, chunk):
    monkeypatch.setattr(values, "CHUNK_BYTES", chunk)
    clean = values.scan(tensor(qtype, 24, COLUMNS))
    assert clean[1:] == (0, None, 0, [])
    assert clean.blocks == 24 * (1 if ggml.ROW_HEADER[qtype] else COLUMNS // ggml.BLOCK_SIZE[qtype])
    if ggml.SCALES[qtype].kind not in NAN:
        return
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


@every_type
def test_zero_with_either_sign(qtype):
    info = tensor(qtype, 4, COLUMNS)
    kind, _, count = ggml.SCALES[qtype]
    put(info, slice(None), MINUS_ZERO[kind], count)
    assert np.abs(by_block(info)).max() <= TINY.get(kind, 0)
    assert values.scan(info).is_zero
    assert values.may_have_hole(info)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    qtype=st.sampled_from(BLOCKS + ROWS),
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
    blocks_of(coded)[:, codes_of(info)] = 0x11
    zero = (np.abs(by_block(coded)) <= TINY.get(ggml.SCALES[qtype].kind, 0)).all(axis=1)
    empty = ~blocks_of(info).any(axis=1)
    edges = np.flatnonzero(np.diff(empty, prepend=False, append=False)).reshape(-1, 2)
    least = max(1, values.HOLE_BYTES // values.block_bytes(info))
    expected = [(a, b) for a, b in edges.tolist() if b - a >= least]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "CHUNK_BYTES", chunk)
        found = values.scan(info)
    assert (found.zero, found.empty) == (zero.sum(), expected)


@types_of_blocks
@pytest.mark.parametrize(("start", "stop"), [(0, 9000), (5000, 12345), (30_001, None), (-2100, None), (-601, None)])
def test_holes(qtype, start, stop):
    """Bytes that were never written, at places that have nothing to do with rows."""
    info = tensor(qtype, 160, COLUMNS)
    assert values.scan(info).hole(info) is None
    assert not values.may_have_hole(info)
    info.data[start:stop] = 0
    first, last = values.scan(info).hole(info)
    size = values.block_bytes(info)
    begin, end, _ = slice(start, stop).indices(info.data.size)
    assert abs(first * size - begin) <= size
    assert abs(last * size - end) <= size
    if start == 0 or stop is None:
        assert values.may_have_hole(info)


@types_of_rows
@pytest.mark.parametrize(("start", "stop"), [(0, 9.5), (5.3, 12), (50.1, 64), (30.5, 40.5)])
def test_holes_where_rows_have_headers(qtype, start, stop):
    """A hole is of whole rows, and at one of its ends a row is torn."""
    info = tensor(qtype, 64, COLUMNS)
    assert values.scan(info).hole(info) is None
    size = values.block_bytes(info)
    info.data[int(start * size) : int(stop * size)] = 0
    assert values.scan(info).hole(info) == (math.ceil(start), int(stop))


@types
@pytest.mark.parametrize(("first", "stop"), [(0, 1), (3, 9), (60, 64)])
def test_whole_rows_may_be_zero(qtype, first, stop):
    """Rows of tokens that pad a vocabulary, and experts without use."""
    info = tensor(qtype, 64, 4 * COLUMNS)
    rows = info.data.reshape(64, -1)  # or groups of rows
    rows[first:stop] = 0
    found = values.scan(info)
    assert len(found.empty) == 1
    assert found.zero == (stop - first) * found.blocks // 64
    assert found.hole(info) is None


@types_of_blocks
@pytest.mark.parametrize("value", [1e-9, 1e-12, 0.0])
def test_weights_that_are_too_small_for_their_type(qtype, value):
    """Those of tokens that never occurred: zero in float16, from anywhere in one row to anywhere in another."""
    if ggml.NAME[qtype] not in QUANTISERS:  # the scale of such a block is zero, and its codes are not
        row = tensor(qtype, 1, COLUMNS)
        put(row, slice(None), MINUS_ZERO[ggml.SCALES[qtype].kind], ggml.SCALES[qtype].numbers)
        small = blocks_of(row)
    else:
        x = np.full((1, COLUMNS), value, np.float32) * np.where(np.arange(COLUMNS) % 3, 1, -1)
        small = quantise(x, qtype).reshape(-1, ggml.BLOCK_BYTES[qtype])
    info = tensor(qtype, 64, COLUMNS)
    per_row = len(small)
    whole = value == 0  # exactly zero are rows of padding
    first, stop = 3 * per_row + (0 if whole else per_row // 2 + 1), 30 * per_row
    blocks_of(info)[first:stop] = small[np.arange(first, stop) % per_row]
    assert values.scan(info).hole(info) is None


@pytest.mark.parametrize("qtype", [each for each in BLOCKS + ROWS if ggml.BLOCK_SIZE[each] > 2], ids=ggml.NAME.get)
def test_a_hole_torn_inside_blocks(qtype):
    """A hole whose zero blocks happen to be whole rows."""
    info = tensor(qtype, 64, 256)
    size = values.block_bytes(info)
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
