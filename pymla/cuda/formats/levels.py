"""Codes that stand for levels: tables of 4 to 64 int8, which are looked up in registers (``prmt``).

A ``prmt`` picks four of eight bytes. Of longer tables every eight are looked up with the low three bits of the codes,
and the others choose among the results, two at a time.
"""

import functools

from pymla.cuda.machine.ptx import prmt
from pymla.cuda.runtime.jit import device

#: One, and the highest bit, in each byte of a word.
ONES, SIGNS = 0x01010101, 0x80808080
#: Two selectors of a ``prmt`` that keep its first word. With bit 2 of a nibble set, a byte comes from the second word.
FIRST_WORD = 0x32103210


@functools.cache
def looked_up(levels):
    """A device function (first, second): two words of four codes as two words of four levels.

    `levels` are int8 or bytes, and as many as codes. The nibbles of both words are looked up together: where they are
    the two halves of the same bytes, it takes nothing to put them together.
    """
    table = _table(levels)
    if len(levels) <= 8:

        @device
        def pair_of_few(first, second):
            nibbles = first | second << 4
            return _in_order(table(nibbles, 0, 0, 0), table(nibbles >> 16, 0, 0, 0))

        return pair_of_few

    @device
    def pair(first, second):
        low = first & 0x0F0F0F0F | second << 4 & 0xF0F0F0F0
        high = first >> 4 & 0x0F0F0F0F | second & 0xF0F0F0F0
        three = low & 0x77777777
        third = low >> 1 & 0x44444444 | FIRST_WORD
        fourth, fifth = high << 2 & 0x44444444 | FIRST_WORD, high << 1 & 0x44444444 | FIRST_WORD
        return _in_order(table(three, third, fourth, fifth), table(three >> 16, third >> 16, fourth >> 16, fifth >> 16))

    return pair


@functools.cache
def variants_looked_up(levels):
    """A device function (first, second, moved): as `looked_up`, with all of a word's levels moved up by the bytes of a
    word of `moved`, which has one for each of the two."""
    # Levels are bytes from 0 on here, so that a sum of them stays in its byte.
    look_up = looked_up(tuple(level + 128 for level in levels))

    @device
    def pair(first, second, moved):
        first, second = look_up(first, second)
        return (first + moved[0]) ^ SIGNS, (second + moved[1]) ^ SIGNS

    return pair


def level_of(levels):
    """A device function (code): one of 16 levels, which are int8."""
    w0, w1, w2, w3 = (packed(levels[i : i + 4]) for i in range(0, 16, 4))

    @device
    def level(code):
        # The byte, and three times its sign.
        selector = (code & 7) * 0x1111 | 0x8880
        return prmt(w2, w3, selector) if code & 8 else prmt(w0, w1, selector)

    return level


@device
def _in_order(a, b):
    """Bytes of two words, taken by turns of one and the other, apart."""
    return prmt(a, b, 0x6420), prmt(a, b, 0x7531)


def _table(levels):
    """A device function of four selectors, of which the low 16 bits count: the low three bits of four codes, and
    choices by their bits 3, 4 and 5."""
    if len(levels) <= 8:
        low, high = packed(levels[:4]), packed(levels[4:])

        @device
        def eight(three, third, fourth, fifth):
            return prmt(low, high, three)

        return eight
    half = len(levels) // 2
    left, right, bit = _table(levels[:half]), _table(levels[half:]), half.bit_length() - 4

    @device
    def chosen(three, third, fourth, fifth):
        choice = (third, fourth, fifth)[bit]
        return prmt(left(three, third, fourth, fifth), right(three, third, fourth, fifth), choice)

    return chosen


def packed(numbers):
    """Up to four int8 or bytes as a word."""
    return sum((number & 255) << 8 * i for i, number in enumerate(numbers))
