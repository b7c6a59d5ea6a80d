"""Codes that stand for levels: tables of 4 to 64 int8.

Tables of up to 32 are looked up in registers. A ``prmt`` picks four of eight bytes. Of longer tables every eight are
looked up with the low three bits of the codes, and the others choose among the results, two at a time. With 64 levels
that would be 15 ``prmt`` for four codes, and as many moves of the table's words. Four loads and three ``prmt`` are less
(a gemv has 21 % fewer instructions); the table is one line of the first cache.
"""

import functools

import numpy as np

from pymla.cuda.machine.ptx import load_u8, prmt, table
from pymla.cuda.runtime.jit import device

#: Levels that are looked up in registers.
_IN_REGISTERS = 32

#: One, and the highest bit, in each byte of a word.
ONES, SIGNS = 0x01010101, 0x80808080
#: Two selectors of a ``prmt`` that keep its first word. With bit 2 of a nibble set, a byte comes from the second word.
FIRST_WORD = 0x32103210


@device
def word_of_bytes(b0, b1, b2, b3):
    """The low bytes of four integers, as a word."""
    return prmt(prmt(b0, b1, 0x0040), prmt(b2, b3, 0x0040), 0x5410)


@functools.cache
def looked_up(levels):
    """A device function (first, second): two words of four codes as two words of four levels.

    `levels` are int8 or bytes, and as many as codes. The nibbles of both words are looked up together: where they are
    the two halves of the same bytes, it takes nothing to put them together.
    """
    if len(levels) > _IN_REGISTERS:
        return _looked_up_in_memory(levels)
    of_four = _of_four(levels)
    if len(levels) <= 8:

        @device
        def pair_of_few(first, second):
            nibbles = first | second << 4
            return _in_order(of_four(nibbles, 0, 0), of_four(nibbles >> 16, 0, 0))

        return pair_of_few

    @device
    def pair(first, second):
        low = first & 0x0F0F0F0F | second << 4 & 0xF0F0F0F0
        high = first >> 4 & 0x0F0F0F0F | second & 0xF0F0F0F0
        three = low & 0x77777777
        third, fourth = low >> 1 & 0x44444444 | FIRST_WORD, high << 2 & 0x44444444 | FIRST_WORD
        return _in_order(of_four(three, third, fourth), of_four(three >> 16, third >> 16, fourth >> 16))

    return pair


def _looked_up_in_memory(levels):
    """`looked_up` of many levels."""
    place = table(f"levels_of_{len(levels)}", lambda: np.array([level & 255 for level in levels], np.uint8))

    @device
    def level(code):
        return load_u8(place() + (code & 255))

    @device
    def word(codes):
        return word_of_bytes(level(codes), level(codes >> 8), level(codes >> 16), level(codes >> 24))

    @device
    def pair(first, second):
        return word(first), word(second)

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


def _of_four(levels):
    """A device function of three selectors, of which the low 16 bits count: the low three bits of four codes, and
    choices by their bits 3 and 4. It gives four levels, as bytes of a word."""
    if len(levels) <= 8:
        low, high = packed(levels[:4]), packed(levels[4:])

        @device
        def of_eight(three, third, fourth):
            return prmt(low, high, three)

        return of_eight
    half = len(levels) // 2
    left, right, is_fourth = _of_four(levels[:half]), _of_four(levels[half:]), half == 16

    @device
    def chosen(three, third, fourth):
        choice = fourth if is_fourth else third
        return prmt(left(three, third, fourth), right(three, third, fourth), choice)

    return chosen


def packed(numbers):
    """Up to four int8 or bytes as a word."""
    return sum((number & 255) << 8 * i for i, number in enumerate(numbers))
