"""Types whose blocks are bit planes, made from `pymla.planes`.

A word of a plane has some bits of four neighbouring codes, in its four bytes. Words of several planes are shifted to
their places and put together; then codes are made signed, or are looked up where they stand for levels.
"""

import functools
import math

from pymla import ggml, planes
from pymla.cuda.formats.blocks import alignment_of, format_of_blocks
from pymla.cuda.formats.levels import ONES, SIGNS, looked_up, variants_looked_up
from pymla.cuda.formats.loads import GLOBAL, SHARED, linear, words_of
from pymla.cuda.formats.numbers import bits_of, numbers_of, row_scale_of
from pymla.cuda.machine.ptx import funnel_shift_r
from pymla.cuda.runtime.jit import device, unrolled


def format_of(qtype):
    """The `Format` of a type of `pymla.planes.LAYOUTS`."""
    layout = planes.LAYOUTS[qtype]
    blocks, alignment, lift = ggml.BLOCK_SIZE[qtype] // 32, alignment_of(qtype), _lift(layout.codes)
    numbers, codes = numbers_of(layout, blocks, SHARED, lift), _eight_words(layout, blocks, alignment, lift)
    own_numbers, own_codes = numbers_of(layout, blocks, GLOBAL, lift), _two_words(layout, blocks, alignment, lift)

    @device
    def whole(block, i):
        d, other = numbers(block, i)
        return codes(block, i), d, other

    @device
    def piece(block, i, w):
        c0, c1 = own_codes(block, i, w)
        d, other = own_numbers(block, i)
        return c0, c1, d, other

    minima = _has_minima_of_halves(layout)
    return format_of_blocks(
        qtype,
        piece,
        whole,
        halves=layout.each == 16 and not minima,
        minimum=layout.each == 32 and layout.minima is not None,
        minima=minima,
        row_scale=row_scale_of(layout),
    )


def _has_minima_of_halves(layout):
    """Whether 16 weights have a minimum. Codes are then multiplied with their integer scales, so that one scale is left
    for 32."""
    return layout.each == 16 and layout.minima is not None


def _lift(codes):
    """The bit at which codes begin. Those whose highest bit counts as it does with its sign turned lie in the high bits
    of their bytes: to turn it there makes them signed."""
    bits = max(plane.shift + plane.bits for plane in codes.planes)
    return 8 - bits if codes.minus == 1 << bits - 1 else 0


def _eight_words(layout, blocks, alignment, lift):
    """A device function (block, i): the 32 codes with number i of a block at an address of shared memory, eight
    words."""
    fields = [_eight_fields(plane, blocks, alignment, lift) for plane in layout.codes.planes]
    words, halves, finish = functools.reduce(_joined(8), fields), _for_halves(layout, blocks, SHARED), _finish(layout)

    @device
    def finish_pair(word, k, fixed):
        behind, of_halves = fixed
        return finish(word, behind[k], of_halves)

    finish_all = unrolled(finish_pair, 4)

    @device
    def eight(block, i):
        found = words(block, i)
        p0, p1, p2, p3 = finish_all(0, found[:4], (found[4:], halves(block, i)))
        return p0[0], p1[0], p2[0], p3[0], p0[1], p1[1], p2[1], p3[1]

    return eight


def _two_words(layout, blocks, alignment, lift):
    """A device function (block, i, w): words w and w + 4 of the 32 codes with number i of a block in global memory."""
    fields = [_two_fields(plane, blocks, alignment, lift) for plane in layout.codes.planes]
    words, halves, finish = functools.reduce(_joined(2), fields), _for_halves(layout, blocks, GLOBAL), _finish(layout)

    @device
    def two(block, i, w):
        first, second = words(block, i << 2 | w)
        return finish(first, second, halves(block, i))

    return two


def _joined(count):
    """What makes of two functions that give `count` words one whose words have the bits of both."""
    join = unrolled(_join, count)

    def joined(one, other):
        @device
        def words(block, i):
            return join(0, one(block, i), other(block, i))

        return words

    return joined


@device
def _join(word, k, others):
    return word | others[k]


def _eight_fields(plane, blocks, alignment, lift):
    """A device function (block, i): a plane's bits of the eight words of 32 codes, at their place in the codes."""
    places = [[plane.place(32 * i + 4 * k) for k in range(8)] for i in range(blocks)]
    firsts = [each[0] for each in places]
    (begins,) = {  # bits behind those of the first word, the same for every i
        tuple(8 * (byte - begin) + bit - low for byte, bit in each)
        for each, (begin, low) in zip(places, firsts, strict=True)
    }
    words = words_of(SHARED, math.gcd(alignment, *(byte for byte, _ in firsts)), begins[-1] // 32 + 1)
    pick, bits = _picked(*(begin // 32 for begin in begins)), tuple(begin % 32 for begin in begins)
    (byte, bit), is_fixed = _linear(firsts), len({low for _, low in firsts}) == 1
    field = _field(plane, lift, is_fixed)

    @device
    def field_of_word(word, k, low):
        return field(word, low + bits[k])

    fields = unrolled(field_of_word, 8)

    @device
    def eight(block, i):
        return fields(0, pick(words(block + byte(i))), bit(i))

    return eight


def _two_fields(plane, blocks, alignment, lift):
    """A device function (block, q): a plane's bits of words w and w + 4 of 32 codes, ``q = 4 * i + w``."""
    first, second = (
        [plane.place(32 * (q >> 2) + 16 * half + 4 * (q & 3)) for q in range(4 * blocks)] for half in range(2)
    )
    (byte, bit), (byte4, bit4) = _linear(first), _linear(second)
    field = _field(plane, lift, is_fixed=all(len({low for _, low in each}) == 1 for each in (first, second)))
    words = words_of(GLOBAL, math.gcd(alignment, *(at for at, _ in first + second)), 1)
    load, is_packed = GLOBAL.byte, plane.run == 1

    @device
    def word(address):
        return load(address) if is_packed else words(address)[0]

    @device
    def two(block, q):
        return field(word(block + byte(q)), bit(q)), field(word(block + byte4(q)), bit4(q))

    return two


def _linear(places):
    """Two functions of an index: the byte and the bit of places."""
    return tuple(linear(*each) for each in zip(*places, strict=True))


def _picked(a, b, c, d, e, f, g, h):
    """A device function that takes eight words of a tuple."""

    @device
    def pick(words):
        return words[a], words[b], words[c], words[d], words[e], words[f], words[g], words[h]

    return pick


def _field(plane, lift, is_fixed):
    """A device function (word, bit): a plane's bits of four codes, from a bit of a word on, at their place in the four
    bytes of a word. `is_fixed`: the bit is a constant."""
    place, mask = plane.shift + lift, ONES * ((1 << plane.bits) - 1)
    if plane.run == 1:
        return _field_in_order(plane.bits, place)

    @device
    def fixed(word, bit):
        return (word >> bit & mask) << place

    @device
    def turned(word, bit):
        return funnel_shift_r(word, word, bit - place) & mask << place

    return fixed if is_fixed else turned


def _field_in_order(bits, place):
    """`_field` of a plane whose bits lie in the order of the codes."""

    @device
    def one_bit(word, bit):
        # Four copies, seven bits apart, have no bit in common.
        return ((word >> bit & 15) * 0x00204081 & ONES) << place

    @device
    def two_bits(word, bit):
        byte = word >> bit & 255
        nibbles = (byte | byte << 12) & 0x000F000F
        return ((nibbles | nibbles << 6) & 0x03030303) << place

    return {1: one_bit, 2: two_bits}[bits]


def _for_halves(layout, blocks, memory):
    """A device function (block, i): what both halves of 32 codes need to be finished. With variants, what is added to
    their levels, in each byte of a word; in a type whose codes are multiplied with their scales, these."""
    codes, step = layout.codes, 32 // layout.each
    if codes.variants:
        parts, factor = (codes.variants,), codes.moved * ONES
    elif _has_minima_of_halves(layout):
        parts, factor = layout.scales.planes, 1
    else:
        return _nothing
    first, second = (bits_of(parts, memory, blocks, step, half * (step - 1)) for half in range(2))

    @device
    def both(block, i):
        return first(block, i) * factor, second(block, i) * factor

    return both


@device
def _nothing(block, i):
    return 0, 0


def _finish(layout):
    """A device function (first, second, halves): two words of numbers, one of each half, as signed codes. `halves` as
    `_for_halves` gives it."""
    codes = layout.codes
    levels, minus = codes.levels, codes.minus
    if codes.variants:
        return variants_looked_up(levels)
    if levels:
        look_up = looked_up(levels)

        @device
        def finish(first, second, _):
            return look_up(first, second)

    elif _has_minima_of_halves(layout):

        @device
        def finish(first, second, factors):
            return first * factors[0], second * factors[1]

    elif minus:
        more = 0 if _lift(codes) else (128 - minus) * ONES

        @device
        def finish(first, second, _):
            return (first + more) ^ SIGNS, (second + more) ^ SIGNS

    else:

        @device
        def finish(first, second, _):
            return first, second

    return finish
