"""Files of sessions: tokens, arrays, and facts about them, of which nothing is taken from a damaged file.

========  ============================================================================
8 bytes   ``pymlases``
uint32    version of the format
uint32    bytes of the header, n
uint32    checksum of the header
n bytes   the header, JSON: facts, tokens, shapes of the arrays, checksum of what follows
int32     the tokens
uint8     the arrays, one after the other
========  ============================================================================

Everything is little-endian. Checksums are CRC-32: they tell that a file was damaged, not who wrote it.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from pymla.errors import PymlaError
from pymla.files import outputs

MAGIC = b"pymlases"
VERSION = 1

_PREAMBLE = struct.Struct("<8sIII")


class Session(NamedTuple):
    """What a file holds."""

    facts: dict[str, Any]
    tokens: np.ndarray  # int32 (T,)
    arrays: list[np.ndarray]  # uint8


def write(path: Path, facts: Mapping[str, Any], tokens: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
    """Write a file; an older one of this name stays as it is until the new one is complete.

    Parameters
    ----------
    path : Path
    facts : mapping of str and anything that JSON has
    tokens : int32 array (T,)
    arrays : sequence of uint8 array
        Contiguous.

    Raises
    ------
    PymlaError
        The file cannot be written.
    """
    pieces = [np.ascontiguousarray(tokens, "<i4").view(np.uint8), *(array.reshape(-1) for array in arrays)]
    shapes, checksum = [array.shape for array in arrays], 0
    for piece in pieces:
        checksum = zlib.crc32(piece.data, checksum)
    fields = {"facts": dict(facts), "tokens": len(tokens), "shapes": shapes, "checksum": checksum}
    header = json.dumps(fields).encode()
    outputs.check_space(path, sum(piece.nbytes for piece in pieces))
    with outputs.replacing(path) as part, part.open("wb") as file:
        file.write(_PREAMBLE.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
        for piece in pieces:
            file.write(piece.data)


def read(path: Path) -> Session:
    """Read a file.

    Raises
    ------
    PymlaError
        It cannot be read, is none of this format and version, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:  # a ValueError is of a path that no file can have
        raise PymlaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read(path: Path, file: BufferedReader, nbytes: int) -> Session:
    start = file.read(_PREAMBLE.size)
    if start[: len(MAGIC)] != MAGIC:
        raise PymlaError(f"{path}: is no session that pymla has saved; give a file that `sessions.save` has written")
    if len(start) < _PREAMBLE.size:
        _damaged(path, "it ends in its first bytes")
    _, version, length, header_checksum = _PREAMBLE.unpack(start)
    if version != VERSION:
        raise PymlaError(
            f"{path}: a session of version {version}, and this pymla reads version {VERSION}; save it again"
        )
    if length > nbytes:
        _damaged(path, f"its header of {length} bytes does not fit the {nbytes} of the file")
    header = file.read(length)
    if zlib.crc32(header) != header_checksum:
        _damaged(path, "its header has another checksum")
    try:
        fields = json.loads(header)
        facts, tokens, checksum = dict(fields["facts"]), int(fields["tokens"]), int(fields["checksum"])
        shapes = [tuple(map(int, shape)) for shape in fields["shapes"]]
        sizes = [4 * tokens, *(int(np.prod(shape)) for shape in shapes)]
    except (ValueError, KeyError, TypeError, RecursionError):
        _damaged(path, "its header cannot be understood")
    if min(sizes) < 0 or sum(sizes) != nbytes - _PREAMBLE.size - length:
        _damaged(path, f"{sum(sizes)} bytes should follow its header, and {nbytes - _PREAMBLE.size - length} do")
    body = np.empty(sum(sizes), np.uint8)
    if file.readinto(body.data) != len(body) or zlib.crc32(body.data) != checksum:
        _damaged(path, "its contents have another checksum")
    parts = np.split(body, np.cumsum(sizes)[:-1])
    arrays = [part.reshape(shape) for part, shape in zip(parts[1:], shapes, strict=True)]
    return Session(facts, parts[0].view("<i4"), arrays)


def _damaged(path: Path, reason: str) -> NoReturn:
    raise PymlaError(f"{path}: damaged: {reason}; save the session again")
