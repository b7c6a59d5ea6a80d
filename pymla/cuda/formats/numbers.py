"""Scales and minima of types whose blocks are bit planes: from `pymla.planes`, and from both memories."""

import functools

import numpy as np

from pymla import planes
from pymla.cuda.formats.loads import linear
from pymla.cuda.machine.ptx import as_f32, f16_value, load_f16, load_f32, to_f32
from pymla.cuda.runtime.jit import device


def numbers_of(layout, blocks, memory, lift):
    """A device function (block, i): the two numbers (`Format.block`) of the 32 weights with number i of a block at an
    address. Codes are ``2 ** lift`` times those of the type, and a type has `blocks` of 32 weights in a block."""
    scale_of = functools.partial(_scale, layout, blocks, memory, lift)
    if layout.minima:
        d, minima = scale_of(1, 0), _minima(layout, blocks, memory)
        if layout.each == 16:
            d = _float(layout, memory, lift)
    elif layout.each == 16:
        d, minima = scale_of(2, 0), scale_of(2, 1)
    else:
        d = minima = scale_of(1, 0)

    @device
    def numbers(block, i):
        return d(block, i), minima(block, i)

    return numbers


def _scale(layout, blocks, memory, lift, step, offset):
    """A device function (block, i): the scale of small block ``step * i + offset``."""
    number = _float(layout, memory, lift, step, offset)
    if layout.scales is None:
        return number
    integer = _integer(layout.scales, blocks, memory, step, offset)

    @device
    def scale(block, i):
        return number(block, i) * to_f32(integer(block, i))

    return scale


def _minima(layout, blocks, memory):
    """A device function (block, i): the minimum, or the word of both halves' minima."""
    half, at = memory.half, layout.minimum_at
    if layout.each == 32:
        minimum = _integer(layout.minima, blocks, memory, 1, 0)

        @device
        def one(block, i):
            return -f16_value(half(block + at)) * to_f32(minimum(block, i))

        return one
    first, second = (_integer(layout.minima, blocks, memory, 2, offset) for offset in range(2))

    @device
    def both(block, i):
        # Minima are taken off: the float16 has its sign turned.
        return (half(block + at) ^ 0x8000) << 16 | second(block, i) << 8 | first(block, i)

    return both


def _float(layout, memory, lift, step=1, offset=0):
    """A device function (block, i): the float that scales are multiples of, less what the header of a row has of it."""
    at, unit, byte, half = layout.scale_at, np.float32(2.0**-lift), memory.byte, memory.half

    @device
    def half_float(block, i):
        return f16_value(half(block + at)) * unit

    @device
    def e8m0(block, i):
        return _half_of_e8m0(byte(block + at)) * unit

    @device
    def e4m3(block, i):
        return _half_of_e4m3(byte(block + at + step * i + offset)) * unit

    @device
    def of_row(block, i):
        return unit

    return {planes.HALF: half_float, planes.E8M0: e8m0, planes.E4M3: e4m3}.get(layout.scale, of_row)


@device
def _half_of_e8m0(exponent):
    """Half of ``2 ** (exponent - 127)``. The first two are subnormal."""
    return as_f32(exponent - 1 << 23 if exponent > 1 else 0x200000 << exponent)


@device
def _half_of_e4m3(number):
    """Half of an unsigned E4M3 number: its bits are those of a float32 whose exponent is 120 less. 127 is 0."""
    number &= 127
    return as_f32(number << 20) * np.float32(2.0**119) if number < 127 else np.float32(0)


def _integer(scales, blocks, memory, step, offset):
    """A device function (block, i): integer ``step * i + offset`` of those of a block."""
    bits, minus, signed = bits_of(scales.planes, memory, blocks, step, offset), scales.minus, scales.signed
    times, plus = scales.times, scales.plus

    @device
    def integer(block, i):
        number = bits(block, i)
        if signed:
            number = (number ^ 128) - 128
        return times * (number - minus) + plus

    if scales.negative is None:
        return integer
    sign = bits_of((scales.negative,), memory, blocks, step, offset)

    @device
    def with_sign(block, i):
        number = integer(block, i)
        return -number if sign(block, i) else number

    return with_sign


def bits_of(parts, memory, blocks, step, offset):
    """A device function (block, i): number ``step * i + offset`` of those that planes of a block at an address hold,
    before anything is made of it."""
    first, *others = parts
    places = [first.place(step * i + offset) for i in range(blocks)]
    byte, bit = (linear(*each) for each in zip(*places, strict=True))
    load, mask, place = memory.byte, (1 << first.bits) - 1, first.shift

    @device
    def bits(block, i):
        return (load(block + byte(i)) >> bit(i) & mask) << place

    if not others:
        return bits
    rest = bits_of(others, memory, blocks, step, offset)

    @device
    def together(block, i):
        return bits(block, i) | rest(block, i)

    return together


def row_scale_of(layout):
    """`Format.row_scale`."""
    return {planes.ROW_FLOAT: load_f32, planes.ROW_HALF: load_f16}.get(layout.scale)
