"""Trellis types of ik_llama.cpp: levels come from a random number generator, which an index starts.

A group of eight or four weights has an index. The generator multiplies it modulo ``2 ** 32``, once for a weight; the
level is the sum of the four bytes of the number, six bits of each, less 126. A row begins with a float, of which its
scales are multiples.
"""

from pymla import ggml, planes
from pymla.cuda.formats.blocks import format_of_blocks
from pymla.cuda.formats.levels import ONES, SIGNS, level_of, word_of_bytes
from pymla.cuda.formats.loads import GLOBAL, SHARED, words_of
from pymla.cuda.machine.ptx import dp4a, load_f32, to_f32
from pymla.cuda.runtime.jit import device, unrolled

_FACTOR, _OFFSET, _SIX_BITS_OF_BYTES = 0xCBAC1FED, 4096, 0x3F3F3F3F
_POWERS = tuple(pow(_FACTOR, k, 1 << 32) for k in range(5))
_level_of = level_of(planes.IQ4_LEVELS)


@device
def _level(start, k):
    """Level k of a start, from 1 on."""
    return dp4a(start * _POWERS[k] & _SIX_BITS_OF_BYTES, ONES, -126)


@device
def _levels(start):
    """The first four levels of a start."""
    return word_of_bytes(_level(start, 1), _level(start, 2), _level(start, 3), _level(start, 4))


@device
def _magnitudes(start):
    """Of the first four levels."""
    return word_of_bytes(abs(_level(start, 1)), abs(_level(start, 2)), abs(_level(start, 3)), abs(_level(start, 4)))


@device
def _signed(magnitudes, bits):
    """Magnitudes, negative where the lowest bit of a byte of `bits` is set."""
    mask = (bits & ONES) * 255
    negative = (SIGNS - magnitudes) ^ SIGNS
    return negative & mask | magnitudes & ~mask


def _format_of(qtype, functions_of):
    """The `Format` of a type. ``functions_of(memory)`` are device functions: ``read(block, i)``, what is read of 32
    weights, and their scale; and ``code(_, k, source)``, word k of their codes."""
    (read, code), (own_read, own_code) = functions_of(SHARED), functions_of(GLOBAL)
    eight_codes, nowhere = unrolled(code, 8), (0,) * 8

    @device
    def whole(block, i):
        source, d = read(block, i)
        return eight_codes(0, nowhere, source), d, d

    @device
    def piece(block, i, w):
        source, d = own_read(block, i)
        return own_code(0, w, source), own_code(0, w + 4, source), d, d

    return format_of_blocks(qtype, piece, whole, row_scale=load_f32)


@device
def _start(index, k):
    """The start of word k of the two that an index stands for."""
    return (index + _OFFSET) * (_POWERS[4] if k & 1 else 1)


@device
def _half_of(words, k):
    """Of 16 bits for each two words k, in two words."""
    return (words[0] if k < 4 else words[1]) >> 16 * (k >> 1 & 1) & 0xFFFF


def _iq1_kt(memory):
    byte, word = memory.byte, memory.word

    @device
    def read(block, i):
        head, high = byte(block + i), word(block + 40 + 4 * (i & 3)) >> 4 * (i >> 2)
        return (word(block + 8 + 4 * i), high, head >> 4), to_f32(_level_of(head & 15))

    @device
    def code(_, k, source):
        (low, high, top), g = source, k >> 1
        return _levels(_start(low >> 8 * g & 255 | (high >> 8 * g & 15) << 8 | (top >> g & 1) << 12, k))

    return read, code


def _nibble_of(memory):
    """A device function (block, i): the nibble that is the scale of 32 weights, or stands for it."""
    byte = memory.byte

    @device
    def nibble(block, i):
        return byte(block + (i & 3)) >> 4 * (i >> 2) & 15

    return nibble


def _iq2_kt(memory):
    words, nibble = words_of(memory, 4, 2), _nibble_of(memory)

    @device
    def read(block, i):
        return words(block + 4 + 8 * i), to_f32(_level_of(nibble(block, i)))

    @device
    def code(_, k, source):
        return _levels(_start(_half_of(source, k), k))

    return read, code


def _iq3_kt(memory):
    words, word, nibble = words_of(memory, 4, 2), memory.word, _nibble_of(memory)

    @device
    def read(block, i):
        return (words(block + 4 + 8 * i), block + 68, i), to_f32(nibble(block, i))

    @device
    def code(_, k, source):
        indices, signs, i = source
        return _signed(_magnitudes(_start(_half_of(indices, k), k)), word(signs + 4 * k) >> i)

    return read, code


def _iq4_kt(memory):
    word, words = memory.word, words_of(memory, 4, 2)

    @device
    def read(block, i):
        head, (l0, l1), (h0, h1) = word(block + 4 * i), words(block + 32 + 8 * i), words(block + 96 + 8 * (i & 3))
        right = 4 * (i >> 2)
        return (head, l0, l1, h0 >> right, h1 >> right), to_f32((head >> 1 & 127) - 64)

    @device
    def code(_, k, source):
        """Four weights have an index here."""
        head, l0, l1, h0, h1 = source
        low, high = (l0, h0) if k < 4 else (l1, h1)
        byte = 8 * (k & 3)
        index = low >> byte & 255 | (high >> byte & 15) << 8 | (head >> 8 + 3 * k & 7) << 12
        return _levels(index + _OFFSET + (head & 1) * 32768)

    return read, code


IQ1_KT = _format_of(ggml.IQ1_KT, _iq1_kt)
IQ2_KT = _format_of(ggml.IQ2_KT, _iq2_kt)
IQ3_KT = _format_of(ggml.IQ3_KT, _iq3_kt)
IQ4_KT = _format_of(ggml.IQ4_KT, _iq4_kt)._replace(many_registers=True)
