"""tokenizer.model: a vocabulary of the sentencepiece package, a protocol buffer (its ``sentencepiece_model.proto``).

What is wanted of it are a few fields, so that it is read here, and the package need not be installed.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pymla.errors import PymlaError
from pymla.make.hub_vocabulary import read_bytes
from pymla.printable import shown
from pymla.text.vocabulary import BYTE, NORMAL

NAME = "tokenizer.model"


# Numbers of fields.
_PIECES, _NORMALISER = 1, 3  # of the model
_TEXT, _SCORE, _KIND = 1, 2, 3  # of a piece
_NORMALISER_NAME, _DUMMY_PREFIX = 1, 3

# Kinds of fields on the wire, and the bytes of those of a fixed size.
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


class Piece(NamedTuple):
    """A token."""

    text: str
    score: float
    kind: int  # as ``tokenizer.ggml.token_type`` numbers them, which are the file's own numbers


class Model(NamedTuple):
    """What a file says."""

    pieces: list[Piece]  # by their ids
    normaliser: str  # "identity" where texts stay as they are
    dummy_prefix: bool  # whether a text gets a blank in front


class _Damaged(ValueError):
    """Bytes that are no protocol buffer, or none of a vocabulary."""


def read_model(path: Path) -> Model:
    """Read a file.

    Raises
    ------
    PymlaError
        The file cannot be read or is damaged.
    """
    try:
        return _model(memoryview(read_bytes(path)))
    except _Damaged as error:
        raise PymlaError(f"{path}: no vocabulary of sentencepiece, or damaged: {error}; download it again") from None


def _model(data: memoryview) -> Model:
    pieces: list[Piece] = []
    normaliser, dummy_prefix = "", True
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(len(pieces), _message(number, value)))
        elif number == _NORMALISER:
            for inner, setting in _fields(_message(number, value)):
                if inner == _NORMALISER_NAME:
                    normaliser = _text(inner, setting)
                elif inner == _DUMMY_PREFIX:
                    dummy_prefix = bool(setting)
    if not pieces:
        raise _Damaged("it has no tokens")
    return Model(pieces, normaliser, dummy_prefix)


def _piece(index: int, data: memoryview) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == _TEXT:
            text = _text(number, value)
        elif number == _SCORE:
            score = _float32(value)
        elif number == _KIND:
            kind = value if isinstance(value, int) else 0
    if not math.isfinite(score):
        raise _Damaged(f"token {index} has score {score}")
    if not NORMAL <= kind <= BYTE:
        raise _Damaged(f"token {index} is of kind {shown(kind)}")
    return Piece(text, score, kind)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields: an int, or bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise _Damaged(f"a field of kind {kind} at byte {at}")
        if size > end - at:
            raise _Damaged(f"a field at byte {at} of {end} has {size} bytes")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            raise _Damaged("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _Damaged(f"a number of more than 64 bits at byte {at}")


def _message(number: int, value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Damaged(f"field {number} is a number")
    return value


def _text(number: int, value: int | memoryview) -> str:
    try:
        return bytes(_message(number, value)).decode()
    except UnicodeDecodeError:
        raise _Damaged(f"field {number} is no UTF-8") from None


def _float32(value: int | memoryview) -> float:
    if isinstance(value, int) or len(value) != 4:
        raise _Damaged("a score is no float32")
    score: float = struct.unpack("<f", value)[0]
    return score
