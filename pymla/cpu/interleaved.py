"""Interleaved rows as plain ones: bits that move from word to word, as `pymla.models.interleaved` lists them."""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_rows import four_words, load_apart, load_quads, store_apart, xor_moved
from pymla.cpu.runtime.array_types import WEIGHTS_BYTES
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.jit import kernel


class Words(NamedTuple):
    """Words of a row's plain blocks, and what they are made of: int64 arrays.

    Word i is ``constant[i]`` xor the terms from ``begin[i]`` to ``begin[i + 1]``. A term is
    ``word >> right << left & mask`` of a word of the unit.
    """

    to: np.ndarray  # of each word: the byte of a row's blocks at which it begins
    constant: np.ndarray
    begin: np.ndarray
    at: np.ndarray  # of each term: the byte of the unit at which its word begins, for the first row
    stride: np.ndarray  # bytes from there to the word of the next row
    right: np.ndarray
    left: np.ndarray
    mask: np.ndarray


class Moves(NamedTuple):
    """What makes the plain blocks of a unit of interleaved ones."""

    quads: Words  # of which all terms are words of neighbouring rows one behind the other
    others: Words


class Places(NamedTuple):
    """Where units lie in groups of interleaved rows and in plain rows, in bytes."""

    rows: int  # in a group, a multiple of 4
    units: int  # in a row
    mixed_unit: int
    mixed_first: int  # behind the headers of the group's rows
    mixed_group: int
    plain_unit: int
    plain_first: int
    plain_row: int


_WORDS = types.NamedUniTuple(types.Array(types.int64, 1, "C"), len(Words._fields), Words)
_MOVES = types.NamedUniTuple(_WORDS, len(Moves._fields), Moves)
_PLACES = types.NamedUniTuple(types.int64, len(Places._fields), Places)
_PLAIN = types.Array(types.uint8, 2, "C")


@inlined
def _move_quads(source, words, rows, target, row_bytes):
    """Words of a unit, for all rows of its group: a register has those of four."""
    for i in range(len(words.to)):
        for row in range(0, rows, 4):
            acc = four_words(words.constant[i])
            for j in range(words.begin[i], words.begin[i + 1]):
                quads = load_quads(source + words.at[j] + 4 * row)
                acc = xor_moved(acc, quads, words.right[j], words.left[j], words.mask[j])
            store_apart(target + words.to[i] + row * row_bytes, row_bytes, acc)


@inlined
def _move_others(source, words, rows, target, row_bytes):
    """The same where words of neighbouring rows lie apart."""
    for i in range(len(words.to)):
        for row in range(0, rows, 4):
            acc = four_words(words.constant[i])
            for j in range(words.begin[i], words.begin[i + 1]):
                stride = words.stride[j]
                apart = load_apart(source + words.at[j] + row * stride, stride)
                acc = xor_moved(acc, apart, words.right[j], words.left[j], words.mask[j])
            store_apart(target + words.to[i] + row * row_bytes, row_bytes, acc)


@kernel(WEIGHTS_BYTES, _MOVES, _PLACES, _PLAIN)
def plain_words(first, last, mixed, moves, places, rows):
    """Groups of interleaved rows `mixed` as plain `rows`, but for the headers of rows."""
    source, target = address(mixed) + places.mixed_first, address(rows) + places.plain_first
    for group in range(first, last):
        for unit in range(places.units):
            at = source + group * places.mixed_group + unit * places.mixed_unit
            to = target + group * places.rows * places.plain_row + unit * places.plain_unit
            _move_quads(at, moves.quads, places.rows, to, places.plain_row)
            _move_others(at, moves.others, places.rows, to, places.plain_row)
