"""The facts about bit planes against the functions of the reference, which read the same types in other words."""

import numpy as np
import pytest

from pymla import ggml, planes
from pymla.reference import formats


def read(bits, places, blocks):
    """Numbers (n, count) of `bits` bits at places of blocks, (n, block bytes)."""
    words = np.pad(blocks.astype(np.uint32), ((0, 0), (0, 1)))  # a number may reach into the next byte
    byte, shift = np.array(places).T
    return (words[:, byte] | words[:, byte + 1] << 8) >> shift.astype(np.uint32) & ((1 << bits) - 1)


def numbers(each, count, blocks):
    """The numbers (n, count) that several planes hold."""
    parts = [read(p.bits, [p.place(i) for i in range(count)], blocks).astype(np.int64) << p.shift for p in each]
    return np.bitwise_or.reduce(parts)


def codes(layout, blocks, size):
    found, each = layout.codes, layout.each
    result = numbers(found.planes, size, blocks) - found.minus
    if found.signed:
        result = (result ^ 128) - 128
    if found.levels:
        result = np.array(found.levels)[result]
    if found.variants:
        result += found.moved * np.repeat(numbers((found.variants,), size // each, blocks), each, axis=1)
    return result


def scales(found, count, blocks):
    result = numbers(found.planes, count, blocks)
    if found.signed:
        result = (result ^ 128) - 128
    result = np.array(found.levels)[result - found.minus] if found.levels else result - found.minus
    result = result * found.times + found.plus
    return np.where(numbers((found.negative,), count, blocks) == 1, -result, result) if found.negative else result


@pytest.mark.parametrize("qtype", planes.LAYOUTS, ids=ggml.NAME.get)
def test_planes_are_those_of_the_reference(qtype):
    layout, header, size = planes.LAYOUTS[qtype], ggml.ROW_HEADER[qtype], ggml.BLOCK_SIZE[qtype]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (500, header + ggml.BLOCK_BYTES[qtype]), dtype=np.uint8)
    number = rng.standard_normal((500, 1)).astype(np.float16)
    at = layout.scale_at + header
    if layout.scale == planes.HALF:
        blocks[:, at : at + 2] = number.view(np.uint8)
    elif layout.scale == planes.ROW_HALF:
        blocks[:, :2] = number.view(np.uint8)
    elif layout.scale == planes.ROW_FLOAT:
        blocks[:, :4] = number.astype(np.float32).view(np.uint8)
    if layout.minima:
        blocks[:, layout.minimum_at : layout.minimum_at + 2] = number.view(np.uint8)
    expected = formats.FORMATS[qtype].codes(blocks)
    found, inner = codes(layout, blocks[:, header:], size), blocks[:, header:]
    assert layout.codes.lowest <= found.min()
    assert found.max() <= layout.codes.highest
    assert (found == expected.codes).all()
    count = size // layout.each
    if layout.scales:
        product = number.astype(np.float32) * scales(layout.scales, count, inner).astype(np.float32)
        np.testing.assert_array_equal(product, expected.scales)
    if layout.minima:
        product = number.astype(np.float32) * scales(layout.minima, count, inner).astype(np.float32)
        np.testing.assert_array_equal(-product, expected.minima)
