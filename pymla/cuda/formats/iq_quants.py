"""Types whose codes are vectors of a codebook: IQ1, IQ2 and IQ3.

A table has a nibble for each number of a vector, its place among the levels: a selector, with which ``prmt`` looks up
four of them. That is half of the bytes of the levels, so that fewer lines of the first cache are read. In selectors of
few levels, the highest bit of the three that choose a byte is the sign: it chooses a level or its negative.
"""

import numpy as np

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cuda.formats.blocks import format_of_blocks
from pymla.cuda.formats.levels import FIRST_WORD, packed
from pymla.cuda.formats.loads import GLOBAL, SHARED, words_of
from pymla.cuda.machine.ptx import f16_value, load_u16, load_u32, prmt, table, to_f32
from pymla.cuda.runtime.jit import device, unrolled

#: A sign, or a shift down, in each of eight nibbles.
_ALL_SIGNS = 0x44444444


def _table(name):
    """A device function that gives the address of a codebook: eight or four nibbles for each vector, of which each is
    the place of a number among those that occur."""

    def make():
        vectors = codebook(name)
        _, places = np.unique(vectors, return_inverse=True)
        count = vectors.shape[1]
        nibbles = places.reshape(-1, count).astype(np.uint32) << 4 * np.arange(count, dtype=np.uint32)
        return np.bitwise_or.reduce(nibbles, axis=1).astype(f"u{count // 2}")

    return table(f"codebook_{name.lower()}", make)


_ENTRIES_OF_IQ1, _ENTRIES_OF_IQ2_XXS = _table("IQ1_S"), _table("IQ2_XXS")
_ENTRIES_OF_IQ2_XS, _ENTRIES_OF_IQ2_S = _table("IQ2_XS"), _table("IQ2_S")


def _format_of(qtype, read_from, group, word, halves=False):
    """The `Format` of a type.

    ``read_from(memory)`` is a device function (block, i) -> (source, scale, other): what is read of 32 weights, and
    their two numbers. ``group(source, g)`` gives the two selectors of eight weights, ``word(selector)`` the codes of
    four.
    """
    read_shared, read_global = read_from(SHARED), read_from(GLOBAL)

    @device
    def two_words(_, g, source):
        first, second = group(source, g)
        return word(first), word(second)

    four_groups, nowhere = unrolled(two_words, 4), (0,) * 4

    @device
    def whole(block, i):
        source, d, other = read_shared(block, i)
        p0, p1, p2, p3 = four_groups(0, nowhere, source)
        return p0 + p1 + p2 + p3, d, other

    @device
    def piece(block, i, w):
        source, d, other = read_global(block, i)
        (first, second), (third, fourth) = group(source, w >> 1), group(source, 2 + (w >> 1))
        is_second = w & 1
        return word(second if is_second else first), word(fourth if is_second else third), d, other

    return format_of_blocks(qtype, piece, whole, halves)


# Codes.


def _word_of_few(levels, others):
    """`word` of up to four levels, and those that signs choose in their place."""
    first, second = packed(levels), packed(others)

    @device
    def word(selector):
        return prmt(first, second, selector)

    return word


def _word_of_eight(levels):
    """`word` of eight positive levels: a selector is nibbles, and bits 2 of nibbles that make them negative."""
    first, second = packed(levels[:4]), packed(levels[4:])

    @device
    def word(selector):
        nibbles, signs = selector
        positive = prmt(first, second, nibbles)
        # Each byte is the negative one: 256 less the positive one, which is not 0, so that nothing is borrowed.
        return prmt(positive, 0x01010100 - positive, FIRST_WORD | signs)

    return word


@device
def _spread(bits):
    """Eight bits, as bits 2 of nibbles."""
    pairs = (bits | bits << 12) & 0x000F000F
    pairs = (pairs | pairs << 6) & 0x03030303
    return ((pairs | pairs << 3) & 0x11111111) << 2


@device
def _with_signs(nibbles, bits):
    """Two selectors of eight nibbles and as many bits of signs."""
    selector = nibbles | _spread(bits)
    return selector, selector >> 16


@device
def _even_signs(sevens):
    """Eight signs of each byte with seven of them: the last one makes the number of negative ones even."""
    parity = sevens ^ sevens >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return sevens | (parity & 0x01010101) << 7


@device
def _four_sevens(word):
    """Four times seven bits of a word, each in a byte."""
    return word & 0x7F | word << 1 & 0x7F00 | word << 2 & 0x7F0000 | word << 3 & 0x7F000000


# IQ2.

_MAGNITUDES = (8, 25, 43)
_IQ2_WORD = _word_of_few((*_MAGNITUDES, 0), [-level for level in _MAGNITUDES])


def _iq2_xxs(memory):
    words, half = words_of(memory, 2, 2), memory.half

    @device
    def read(block, i):
        indices, word = words(block + 2 + 8 * i)
        d = f16_value(half(block)) * np.float32(1 / 8) * to_f32(2 * (word >> 28 & 15) + 1)
        return (indices, _even_signs(_four_sevens(word))), d, d

    return read


def _iq2_xs(memory):
    words, half, byte = words_of(memory, 2, 2), memory.half, memory.byte

    @device
    def read(block, i):
        first, second = words(block + 2 + 8 * i)
        signs = _even_signs(prmt(first, second, 0x7531) >> 1 & 0x7F7F7F7F)
        d, scales = f16_value(half(block)) * np.float32(1 / 8), byte(block + 66 + i)
        return (first, second, signs), d * to_f32(2 * (scales & 15) + 1), d * to_f32(2 * (scales >> 4) + 1)

    return read


def _iq2_s(memory):
    words, half, byte = words_of(memory, 2, 1), memory.half, memory.byte

    @device
    def read(block, i):
        (low,), (signs,), high = words(block + 2 + 4 * i), words(block + 34 + 4 * i), byte(block + 66 + i)
        d, scales = f16_value(half(block)) * np.float32(1 / 8), byte(block + 74 + i)
        return (low, high, signs), d * to_f32(2 * (scales & 15) + 1), d * to_f32(2 * (scales >> 4) + 1)

    return read


@device
def _group_of_iq2_xxs(source, g):
    indices, signs = source
    return _with_signs(load_u32(_ENTRIES_OF_IQ2_XXS() + 4 * (indices >> 8 * g & 255)), signs >> 8 * g & 255)


@device
def _group_of_iq2_xs(source, g):
    first, second, signs = source
    word = first if g < 2 else second
    return _with_signs(load_u32(_ENTRIES_OF_IQ2_XS() + 4 * (word >> 16 * (g & 1) & 511)), signs >> 8 * g & 255)


@device
def _group_of_iq2_s(source, g):
    low, high, signs = source
    index = low >> 8 * g & 255 | (high >> 2 * g & 3) << 8
    return _with_signs(load_u32(_ENTRIES_OF_IQ2_S() + 4 * index), signs >> 8 * g & 255)


IQ2_XXS = _format_of(ggml.IQ2_XXS, _iq2_xxs, _group_of_iq2_xxs, _IQ2_WORD)
IQ2_XS = _format_of(ggml.IQ2_XS, _iq2_xs, _group_of_iq2_xs, _IQ2_WORD, halves=True)
IQ2_S = _format_of(ggml.IQ2_S, _iq2_s, _group_of_iq2_s, _IQ2_WORD, halves=True)


# IQ3.


def _iq3_xxs(memory):
    words, word, half = words_of(memory, 2, 2), words_of(memory, 2, 1), memory.half

    @device
    def read(block, i):
        first, second = words(block + 2 + 8 * i)
        (signs,) = word(block + 66 + 4 * i)
        d = f16_value(half(block)) * np.float32(1 / 4) * to_f32(2 * (signs >> 28 & 15) + 1)
        return (first, second, 0, _even_signs(_four_sevens(signs))), d, d

    return read


def _iq3_s(memory):
    words, word, half, byte = words_of(memory, 2, 2), words_of(memory, 2, 1), memory.half, memory.byte

    @device
    def read(block, i):
        first, second = words(block + 2 + 8 * i)
        high, (signs,) = byte(block + 66 + i), word(block + 74 + 4 * i)
        d = f16_value(half(block)) * to_f32(2 * (byte(block + 106 + (i >> 1)) >> 4 * (i & 1) & 15) + 1)
        return (first, second, high, signs), d, d

    return read


def _group_of_iq3(entries):
    """`group` of two vectors of four: bytes of indices, their ninth bits, and signs."""

    @device
    def group(source, g):
        first, second, high, signs = source
        low, ninth = (first if g < 2 else second) >> 16 * (g & 1), high >> 2 * g
        one, other = low & 255 | (ninth & 1) << 8, low >> 8 & 255 | (ninth & 2) << 7
        spread = _spread(signs >> 8 * g & 255)
        return (load_u16(entries() + 2 * one), spread), (load_u16(entries() + 2 * other), spread >> 16)

    return group


IQ3_XXS = _format_of(
    ggml.IQ3_XXS, _iq3_xxs, _group_of_iq3(_table("IQ3_XXS")), _word_of_eight((4, 12, 20, 28, 36, 44, 52, 62))
)
IQ3_S = _format_of(ggml.IQ3_S, _iq3_s, _group_of_iq3(_table("IQ3_S")), _word_of_eight(range(1, 16, 2)))


# IQ1: eighths, so that vectors of -1, 0 and 1 that are shifted by an eighth are integers.


def _iq1_s(memory):
    words, half = words_of(memory, 2, 1), memory.half

    @device
    def read(block, i):
        (low,), word = words(block + 2 + 4 * i), half(block + 34 + 2 * i)
        d = f16_value(half(block)) * np.float32(1 / 8) * to_f32(2 * (word >> 12 & 7) + 1)
        return (low, word), d, d

    return read


def _iq1_m(memory):
    word, two_words, half = memory.word, memory.two_words, memory.half

    @device
    def read(block, i):
        low, nibbles, small = word(block + 4 * i), half(block + 32 + 2 * i), half(block + 48 + (i & -2))
        # The highest four bits of four halves are those of the scale, the lowest ones first.
        first, second = two_words(block + 48)
        bits = first >> 12 & 0xF | first >> 24 & 0xF0 | second >> 4 & 0xF00 | second >> 16 & 0xF000
        d, small = f16_value(bits) * np.float32(1 / 8), small >> 6 * (i & 1)
        return (low, nibbles), d * to_f32(2 * (small & 7) + 1), d * to_f32(2 * (small >> 3 & 7) + 1)

    return read


def _iq1_m_r1(memory):
    word, half = words_of(memory, 2, 1), memory.half

    @device
    def read(block, i):
        (low,), nibbles, small = word(block + 4 * i), half(block + 32 + 2 * i), half(block + 48 + (i & -2))
        d, small = f16_value(half(block + 56)) * np.float32(1 / 8), small >> 8 * (i & 1)
        return (low, nibbles), d * to_f32(small & 15), d * to_f32(small >> 4 & 15)

    return read


@device
def _group_of_iq1_s(source, g):
    low, word = source
    index = low >> 8 * g & 255 | (word >> 3 * g & 7) << 8
    selector = load_u32(_ENTRIES_OF_IQ1() + 4 * index) | (word >> 15 & 1) * _ALL_SIGNS
    return selector, selector >> 16


@device
def _group_of_iq1_m(source, g):
    low, nibbles = source
    nibble = nibbles >> 4 * g
    index = low >> 8 * g & 255 | (nibble & 7) << 8
    selector = load_u32(_ENTRIES_OF_IQ1() + 4 * index) | (nibble >> 3 & 1) * _ALL_SIGNS
    return selector, selector >> 16


_IQ1_WORD = _word_of_few((-7, 1, 9, 0), (-9, -1, 7))
IQ1_S = _format_of(ggml.IQ1_S, _iq1_s, _group_of_iq1_s, _IQ1_WORD)
IQ1_M = _format_of(ggml.IQ1_M, _iq1_m, _group_of_iq1_m, _IQ1_WORD, halves=True)
IQ1_M_R1 = _format_of(ggml.IQ1_M_R1, _iq1_m_r1, _group_of_iq1_m, _IQ1_WORD, halves=True)
