"""Interleaved rows of a file as rows of their plain type, at the speed of memory.

`pymla.reference.formats` says in NumPy, type by type, which bit of a unit of interleaved blocks goes where: a bit of
the result is a bit of the unit, or two of them xor each other. This module looks at the result for every single bit,
and turns that into a list of operations on words. So one kernel serves all types (`pymla.cpu.interleaved`), and no
layout is written down twice.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cpu.interleaved import Moves, Places, Words, plain_words
from pymla.cpu.runtime.compiling import compile_all
from pymla.host.arrays import empty_aligned
from pymla.reference.formats import plain_blocks, unit_of, write_headers

_WORD_BYTES, _WORD_BITS = 4, 32
#: Single bits that are looked at together, so that their units take little memory.
_BITS_AT_ONCE = 512


class _Term(NamedTuple):
    """A term of `Words`."""

    at: int
    stride: int
    shift: int  # to the right, from -31 to 31
    mask: int


class _Word(NamedTuple):
    """A word of a row's plain blocks."""

    to: int
    constant: int
    terms: list[_Term]

    @property
    def is_quad(self) -> bool:
        """Whether one register takes the words of four rows."""
        return all(term.stride == _WORD_BYTES for term in self.terms)

    @property
    def cost(self) -> int:
        """Instructions that it takes, about, for four rows."""
        return 8 + (9 if self.is_quad else 16) * len(self.terms)


class _Bits(NamedTuple):
    """Which bits of a unit make which bits of a row of the result: int arrays (n,), sorted by `to`, or xor each other
    where one of these occurs again."""

    to: np.ndarray  # bit of the result
    source: np.ndarray  # bit of the unit, for the first row
    stride: np.ndarray  # bytes from there to the bit for the next row


def compile_kernel(progress: Callable[[int, int, str], object], warn: Callable[[str], object]) -> None:
    """Have the kernel of `plain_rows` ready; arguments as for `pymla.backend.Backend.compile_for`."""
    compile_all([plain_words.compiled], progress, warn)


def plain_rows(data: np.ndarray, qtype: int) -> np.ndarray:
    """Rows of an interleaved type as rows of ``ggml.PLAIN[qtype]``: `pymla.reference.formats.plain_rows`, compiled.

    Parameters
    ----------
    data : uint8 array (rows, row_bytes)
        Contiguous.
    qtype : int
        An interleaved type.

    Returns
    -------
    uint8 array (rows, row_bytes of the plain type)
    """
    together, header, plain = ggml.ROWS_TOGETHER[qtype], ggml.ROW_HEADER[qtype], ggml.PLAIN[qtype]
    unit, columns = unit_of(qtype), ggml.columns(qtype, data.shape[1])
    rows = empty_aligned((len(data), ggml.row_bytes(plain, columns)), np.uint8)
    places = Places(
        rows=together,
        units=columns // unit.weights,
        mixed_unit=unit.mixed_bytes,
        mixed_first=together * header,
        mixed_group=together * data.shape[1],
        plain_unit=unit.plain_bytes,
        plain_first=ggml.ROW_HEADER[plain],
        plain_row=rows.shape[1],
    )
    plain_words[len(data) // together](data, moves_of(qtype), places, rows)
    heads = data.reshape(len(data) // together, places.mixed_group)[:, : places.mixed_first]
    write_headers(rows, heads.reshape(len(data), header), qtype)
    return rows


@functools.cache
def moves_of(qtype: int) -> Moves:
    """The moves that make a unit of interleaved blocks plain."""
    unit, constant, bits = unit_of(qtype), _constant(qtype), _bits(qtype)
    words = []
    for at in range(unit.plain_bytes - _WORD_BYTES + 1):
        value = constant[0, at : at + _WORD_BYTES].copy().view(np.int32)[0]
        words.append(_Word(at, int(value), _terms(bits, at, unit.mixed_bytes, len(constant))))
    chosen = _cover(words, unit.plain_bytes)
    quads, others = ([word for word in chosen if word.is_quad is wanted] for wanted in (True, False))
    return Moves(_arrays(quads), _arrays(others))


def _arrays(words: list[_Word]) -> Words:
    terms = [term for word in words for term in word.terms]
    return Words(
        to=_int64(word.to for word in words),
        constant=_int64(word.constant for word in words),
        begin=np.cumsum([0, *(len(word.terms) for word in words)], dtype=np.int64),
        at=_int64(term.at for term in terms),
        stride=_int64(term.stride for term in terms),
        right=_int64(max(term.shift, 0) for term in terms),
        left=_int64(max(-term.shift, 0) for term in terms),
        mask=_int64(term.mask for term in terms),
    )


def _int64(numbers: Iterable[int]) -> np.ndarray:
    return np.fromiter(numbers, np.int64)


def _constant(qtype: int) -> np.ndarray:
    """The result for a unit of zeros: uint8 (rows, plain_bytes)."""
    return plain_blocks(np.zeros((1, unit_of(qtype).mixed_bytes), np.uint8), qtype)[0]


def _bits(qtype: int) -> _Bits:
    """Every single bit of a unit, and the bits that it turns over in the result."""
    nbytes, constant, found = unit_of(qtype).mixed_bytes, _constant(qtype), []
    for first in range(0, 8 * nbytes, _BITS_AT_ONCE):
        numbers = np.arange(first, min(first + _BITS_AT_ONCE, 8 * nbytes))
        units = np.zeros((len(numbers), nbytes), np.uint8)
        units[np.arange(len(numbers)), numbers // 8] = 1 << numbers % 8
        turned = plain_blocks(units, qtype) ^ constant
        each, row, byte = np.nonzero(turned)
        which, bit = np.nonzero(turned[each, row, byte][:, None] >> np.arange(8, dtype=np.uint8) & 1)
        each, row, to = each[which], row[which], 8 * byte[which] + bit
        found.append(np.stack([row, to, numbers[each]]))
    row, to, source = (pairs := np.concatenate(found, axis=1))[:, np.lexsort(pairs[::-1])]
    to, source = to.reshape(len(constant), -1), source.reshape(len(constant), -1)
    stride = (source[1] - source[0]) // 8
    return _Bits(to[0], source[0], stride)  # the other rows are like the first two


def _terms(bits: _Bits, at: int, nbytes: int, rows: int) -> list[_Term]:
    """The terms of the word of the result that begins at a byte: bits that move by the same distance are one, if a word
    of the unit, of `nbytes` bytes, has all of them."""
    first, stop = np.searchsorted(bits.to, [8 * at, 8 * at + _WORD_BITS])
    by_distance: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for to, source, stride in zip(*(each[first:stop].tolist() for each in bits), strict=True):
        by_distance.setdefault((source - to, stride), []).append((source, to - 8 * at))
    terms = []
    for (_, stride), pairs in by_distance.items():
        while pairs:
            byte = pairs[0][0] // 8
            near = [pair for pair in pairs if pair[0] // 8 < byte + _WORD_BYTES]
            pairs = pairs[len(near) :]
            # Neither the first row's word nor the last row's reaches beyond the unit.
            begin = min(byte, nbytes - _WORD_BYTES - stride * (rows - 1))
            shift = near[0][0] - 8 * begin - near[0][1]
            terms.append(_Term(begin, stride, shift, sum(1 << to for _, to in near)))
    return terms


def _cover(words: list[_Word], nbytes: int) -> list[_Word]:
    """Words that cover `nbytes` bytes and cost least; they may overlap. `words` has one for every byte at which one may
    begin."""
    best: list[tuple[float, list[int]]] = [(0, []), *((np.inf, []) for _ in range(nbytes))]
    for covered in range(nbytes):
        cost, chosen = best[covered]
        for at in range(max(0, covered - _WORD_BYTES + 1), min(covered, nbytes - _WORD_BYTES) + 1):
            end = at + _WORD_BYTES
            best[end] = min(best[end], (cost + words[at].cost, [*chosen, at]))
    return [words[at] for at in best[nbytes][1]]
