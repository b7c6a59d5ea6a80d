"""Weights of four bits as GPTQ and AWQ store them: with the columns of a matrix first, and a zero point for each scale.

| | ``m.qweight``, int32 | ``m.qzeros``, int32 | ``m.scales`` |
| --- | --- | --- | --- |
| GPTQ | (K / 8, R): eight columns in a word | (n, R / 8): eight rows in a word, less 1 | (n, R) |
| AWQ | (K, R / 8): eight rows in a word | (n, R / 8): eight rows in a word | (n, R) |

for R rows and K columns in n groups. A word has the first in its lowest bits; in AWQ they are the rows 0, 2, 4, 6, 1,
3, 5, 7. In GPTQ's second version nothing is taken off the zero points. Sources: AutoGPTQ's
``qlinear_cuda_old.py``, AutoAWQ's ``packing_utils.py`` (version ``gemm``).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.files.checkpoint_encodings import DTYPES, INT4_COLUMNS, Encoding, Entry

#: Where a word of AWQ has each of its eight rows.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Int4Rows(NamedTuple):
    """Rows of a weight, as `pymla.reference.checkpoint_types.from_int4` takes them."""

    codes: np.ndarray  # int32 (rows, K / 8)
    scales: np.ndarray  # of the type of `DTYPES` (rows, n)
    zeros: np.ndarray  # uint8 (rows, n)


def read_rows(encoding: Encoding, start: int, stop: int) -> Int4Rows:
    """Rows of a weight that is stored in one of both ways.

    Raises
    ------
    PymlaError
        The file cannot be read, or columns are not in the order of their groups.
    """
    assert encoding.scales is not None
    assert encoding.zeros is not None
    order = None if encoding.kind == "GPTQ" else _AWQ_ORDER
    if encoding.groups is not None:
        _check_order(encoding.groups, encoding.block[1])
    zeros = _unpacked(encoding.zeros, start, stop, order) + np.uint8(encoding.zeros_from)
    scales = _columns(encoding.scales, start, stop)
    if order is None:
        codes = _columns(encoding.codes, start, stop)
    else:
        nibbles = _unpacked(encoding.codes, start, stop, order)
        codes = np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4).view("<i4")
    return Int4Rows(codes, scales, zeros)


def _unpacked(entry: Entry, start: int, stop: int, order: tuple[int, ...] | None) -> np.ndarray:
    """Rows whose four bits are eight in a word, in an order: uint8 (rows, what the tensor has first)."""
    first = start // INT4_COLUMNS
    words = _columns(entry, first, -(-stop // INT4_COLUMNS))
    octets = words.view(np.uint8).reshape(*words.shape, 4)
    nibbles = np.stack([octets & 15, octets >> 4], -1).reshape(*words.shape, INT4_COLUMNS)
    if order is not None:
        nibbles = nibbles[..., order]
    rows = nibbles.transpose(0, 2, 1).reshape(-1, words.shape[1])
    return np.ascontiguousarray(rows[start - INT4_COLUMNS * first :][: stop - start])


def _columns(entry: Entry, start: int, stop: int) -> np.ndarray:
    """Columns of a matrix as rows, contiguous."""
    dtype, (rows, columns) = DTYPES[entry.dtype], entry.shape
    found = np.empty((rows, stop - start), dtype)
    try:
        with entry.path.open("rb", buffering=0) as file:
            for row in range(rows):
                file.seek(entry.start + (row * columns + start) * dtype.itemsize)
                if file.readinto(found[row].data.cast("B")) != found[row].nbytes:
                    raise PymlaError(f"{entry.path}: has become shorter while it was read; download it again")
    except OSError as error:
        raise PymlaError(f"{entry.path}: cannot be read ({error.strerror or error})") from error
    return np.ascontiguousarray(found.T)


def _check_order(groups: Entry, size: int) -> None:
    """Raise PymlaError unless the columns of a group are beside each other, in the order of groups."""
    path: Path = groups.path
    try:
        found = np.fromfile(path, DTYPES[groups.dtype], groups.shape[0], offset=groups.start)
    except OSError as error:
        raise PymlaError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not np.array_equal(found, np.arange(groups.shape[0]) // size):
        raise PymlaError(f"{path}: groups of columns are not in order (`desc_act`); such weights are not read")
