"""Types of ternary digits, five in a byte: TQ1_0, and IQ1_BN of ik_llama.cpp.

A byte is the number times 256 / 243, rounded up: multiplied with a power of 3 modulo 256, its leading digit is what
three times it carries over.
"""

import numpy as np

from pymla import ggml
from pymla.cuda.formats.blocks import format_of_blocks
from pymla.cuda.formats.levels import ONES, SIGNS, packed
from pymla.cuda.formats.loads import GLOBAL, SHARED, words_of
from pymla.cuda.machine.ptx import f16_value, load_f16, load_shared_u16, load_u8
from pymla.cuda.runtime.jit import device, unrolled

_LOW_BYTES = 0x00FF00FF  # of the halves of a word


@device
def _codes(even, odd):
    """Leading digits less 1 of four numbers modulo 256, in the halves of two words: bytes 0 and 2, and 1 and 3."""
    even, odd = (even & _LOW_BYTES) * 3, (odd & _LOW_BYTES) * 3
    return (even >> 8 & 0x00030003 | odd & 0x03000300) + 127 * ONES ^ SIGNS


@device
def _codes_of_word(word, power):
    """Digits less 1 of four bytes, the same of each: multiplied with `power`, they lead."""
    return _codes((word & _LOW_BYTES) * power, (word >> 8 & _LOW_BYTES) * power)


# TQ1_0. Its 256 weights are the first digits of 32 bytes, their second digits, and so on to the fifth; then likewise
# those of 16 bytes, and four digits of four bytes.


def _eight_bytes(*numbers):
    """Eight bytes as an integer, the first one lowest."""
    return packed(numbers[:4]) | packed(numbers[4:]) << 32


#: Powers that make the digits of the first 16 weights lead, and those of the others, by the number of the 32.
_FIRST_POWERS, _SECOND_POWERS = _eight_bytes(1, 3, 9, 27, 81, 1, 9, 81), _eight_bytes(1, 3, 9, 27, 81, 3, 27, 1)
#: Those of the four digits of a word, four weights each.
_POWERS_OF_LAST = packed((1, 3, 9, 27))
#: The word that has the last 16 weights.
_LAST = 48


@device
def _first_bytes(i):
    """The first byte of the first 16 weights, and the power."""
    return 0 if i < 5 else 32, _FIRST_POWERS >> 8 * i & 255


@device
def _second_bytes(i):
    """The same of the other 16. Of the last ones it is three words before their only word."""
    return 16 if i < 5 else 32 if i < 7 else _LAST - 12, _SECOND_POWERS >> 8 * i & 255


@device
def _first_codes(word, k, power):
    return _codes_of_word(word, power)


@device
def _second_codes(word, k, fixed):
    last_word, is_last, power = fixed
    return _codes_of_word(last_word if is_last else word, _POWERS_OF_LAST >> 8 * k & 255 if is_last else power)


_four_words, _one_word = words_of(SHARED, 2, 4), words_of(GLOBAL, 2, 1)
_four_first, _four_second = unrolled(_first_codes, 4), unrolled(_second_codes, 4)


@device
def _tq1_0_block(block, i):
    (first, power), (second, other_power) = _first_bytes(i), _second_bytes(i)
    words, d = _four_words(block + second), f16_value(load_shared_u16(block + 52))
    codes = _four_first(0, _four_words(block + first), power)
    return codes + _four_second(0, words, (words[3], i == 7, other_power)), d, d


@device
def _tq1_0_piece(block, i, w):
    (first, power), (second, other_power) = _first_bytes(i), _second_bytes(i)
    (word,), (last,) = _one_word(block + first + 4 * w), _one_word(block + _LAST)
    (other,), d = _one_word(block + second + 4 * w), load_f16(block + 52)
    return _first_codes(word, w, power), _second_codes(other, w, (last, i == 7, other_power)), d, d


TQ1_0 = format_of_blocks(ggml.TQ1_0, _tq1_0_piece, _tq1_0_block)


# IQ1_BN. Of 64 weights, 16 at a time are 15 digits of three bytes, lowest ones first, and a digit of the last byte.


def _sixteen(memory):
    """A device function (block, j): 16 codes, number j of a block, as four words."""
    byte = memory.byte

    @device
    def four_codes(b0, p0, b1, p1, b2, p2, b3, p3):
        return _codes(b0 * p0 + b2 * (p2 << 16), b1 * p1 + b3 * (p3 << 16))

    @device
    def sixteen(block, j):
        b0, b1, b2, last = byte(block + 3 * j), byte(block + 3 * j + 1), byte(block + 3 * j + 2), byte(block + 12)
        power = _POWERS_OF_ONES >> 8 * j & 255
        return (
            four_codes(b0, 81, b0, 27, b0, 9, b0, 3),
            four_codes(b0, 1, b1, 81, b1, 27, b1, 9),
            four_codes(b1, 3, b1, 1, b2, 81, b2, 27),
            four_codes(b2, 9, b2, 3, b2, 1, last, power),
        )

    return sixteen


#: Powers that make the digits of the last byte lead.
_POWERS_OF_ONES = packed((81, 27, 9, 3))
_sixteen_shared, _sixteen_global = _sixteen(SHARED), _sixteen(GLOBAL)
_ONE = np.float32(1)


@device
def _iq1_bn_block(block, i):
    return _sixteen_shared(block, 2 * i) + _sixteen_shared(block, 2 * i + 1), _ONE, _ONE


@device
def _iq1_bn_piece(block, i, w):
    f0, f1, f2, f3 = _sixteen_global(block, 2 * i)
    s0, s1, s2, s3 = _sixteen_global(block, 2 * i + 1)
    first = f0 if w == 0 else f1 if w == 1 else f2 if w == 2 else f3
    second = s0 if w == 0 else s1 if w == 1 else s2 if w == 2 else s3
    return first, second, _ONE, _ONE


@device
def _row_scale(row):
    """The half of a row's header, which begins at any byte."""
    return f16_value(load_u8(row) | load_u8(row + 1) << 8)


IQ1_BN = format_of_blocks(ggml.IQ1_BN, _iq1_bn_piece, _iq1_bn_block, row_scale=_row_scale)
