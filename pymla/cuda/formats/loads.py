"""Loads of a type's bytes, from global memory and from shared memory alike, and where these bytes lie.

Functions that read a block are made once for each of the two memories. Where bytes of 32 weights lie is a sum of the
bits of their number, each times a constant, in every type: `linear` makes a function of it.
"""

import functools
from typing import NamedTuple

from pymla.cuda.machine.ptx import (
    funnel_shift_r,
    load_shared_u8,
    load_shared_u16,
    load_shared_u32,
    load_shared_u32x2,
    load_shared_u32x4,
    load_u8,
    load_u16,
    load_u32,
    load_u32_around,
    load_u32x2,
    load_u32x4,
)
from pymla.cuda.runtime.jit import device, unrolled


class Memory(NamedTuple):
    """Device functions of an address."""

    byte: object  # 0 to 255
    half: object  # 16 bits, 0 to 65535
    word: object
    word_around: object  # of which some bytes lie in the block
    two_words: object
    four_words: object


GLOBAL = Memory(load_u8, load_u16, load_u32, load_u32_around, load_u32x2, load_u32x4)
SHARED = Memory(load_shared_u8, load_shared_u16, load_shared_u32, load_shared_u32, load_shared_u32x2, load_shared_u32x4)


@functools.cache
def words_of(memory, alignment, count):
    """A device function (address): `count` words at an address that `alignment` divides."""
    word = memory.word_around
    if alignment % 4:

        @device
        def load(_, i, address):
            return word(address + 4 * i)

        between, aligned, nowhere = unrolled(_between, count), unrolled(load, count), (0,) * count

        @device
        def words(address):
            # The last one is read again where the address is a multiple of 4: behind it may be nothing.
            first = aligned(0, nowhere, address & -4)
            last = (word(address + (4 * count - 1) & -4),)
            return between(0, first, (first[1:] + last, address << 3))

        return words
    return _aligned_words(memory, alignment, count)


@device
def _between(low, i, fixed):
    """32 bits of a word and the next one."""
    following, shift = fixed
    return funnel_shift_r(low, following[i], shift)


def _aligned_words(memory, alignment, count):
    """`words_of` an address that 4 divides, in as few loads as can be."""
    width = next(width for width in (4, 2, 1) if count % width == 0 and alignment % (4 * width) == 0)
    load = {4: memory.four_words, 2: memory.two_words, 1: memory.word}[width]
    if count == 1:

        @device
        def one(address):
            return (load(address),)

        return one
    if width == count:
        return load
    half = count // 2
    left, right = _aligned_words(memory, alignment, half), _aligned_words(memory, alignment, count - half)

    @device
    def words(address):
        return left(address) + right(address + 4 * half)

    return words


@functools.cache
def linear(*values):
    """A device function that gives element i of constants, of which there are a power of two.

    They must be sums of a constant for each bit of i that is set: the function then takes a multiplication or two.
    """
    base, bits = values[0], (len(values) - 1).bit_length()
    steps = [values[1 << bit] - base for bit in range(bits)]
    for i, value in enumerate(values):
        if value != base + sum(step for bit, step in enumerate(steps) if i >> bit & 1):
            raise ValueError(f"{values} are no sums of constants for the bits of an index")
    terms: list[tuple[int, int, int]] = []  # the first bit, the mask of this one and the following, and their factor
    for bit, step in enumerate(steps):
        if terms and bit and step and step == 2 * steps[bit - 1]:
            first, mask, factor = terms[-1]
            terms[-1] = first, 2 * mask + 1, factor
        elif step:
            terms.append((bit, 1, step))
    if len(terms) > 2:
        raise ValueError(f"{values} take {len(terms)} multiplications")
    (first, mask, factor), (first2, mask2, factor2) = (*terms, (0, 0, 0), (0, 0, 0))[:2]

    @device
    def value(i):
        return base + (i >> first & mask) * factor + (i >> first2 & mask2) * factor2

    return value
