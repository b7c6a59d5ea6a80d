"""Models on their way into GGUF files: weights are read, quantised and written piece by piece.

A thread reads and decodes the next pieces while all cores quantise one and it is written, from tensor to tensor. Memory
holds four pieces as float32, and one quantised. What an interrupted run leaves, and what the next one makes of it, says
`pymla.files.gguf_output`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pymla import ggml
from pymla.cpu.checkpoint_types import largest_magnitude
from pymla.cpu.quantise import quantise
from pymla.files import gguf_parts, values
from pymla.files.gguf_output import Progress, Refused, Resume, write_files
from pymla.files.gguf_parts import NewFile
from pymla.files.gguf_reader import TensorInfo
from pymla.files.gguf_writer import Metadata, NewTensor
from pymla.reference.formats import dequantise_rows

if TYPE_CHECKING:
    from pymla.make.importance import Importance

__all__ = ["Pieces", "Progress", "Resume", "Source", "write_model"]

#: Bytes of a tensor in the type that it has in the file: uint8 arrays (n,) in order, each of whole rows.
Pieces = Callable[[], Iterable[np.ndarray]]

#: Bits of float32 without sign: infinity, and the largest number of IEEE halves. Scales of all types hold numbers that
#: are no larger.
_INFINITY, _HALF_MAX = 0x7F800000, int(np.float32(65504).view(np.uint32))

#: Types of floats whose bits are checked where they are copied: words, and the bits of infinity.
_FLOAT_WORDS = {
    ggml.F32: (np.uint32, _INFINITY),
    ggml.F16: (np.uint16, 0x7C00),
    ggml.BF16: (np.uint16, 0x7F80),
}


class Source(NamedTuple):
    """A tensor of the file, before it has a type."""

    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    #: Its rows in order, float32 (rows, columns), a few at a time, each piece within one matrix of the last two
    #: dimensions.
    rows: Callable[[], Iterator[np.ndarray]]


def write_model(
    path: Path,
    architecture: str,
    metadata: Metadata,
    sources: Sequence[Source],
    types: Mapping[str, int],
    *,
    importance: "Importance | None" = None,
    copies: Mapping[str, Pieces] | None = None,
    split: int | Sequence[int] | None = None,
    resume: Resume | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a model as a GGUF file, or several, which appear under their names when all are complete.

    Parameters
    ----------
    path : of the file
    architecture : ``general.architecture``
    metadata : the other keys
    sources : all tensors, in the order of the file
    types : the ggml type of each tensor by name
    importance : of the columns of matrices that are quantised
    copies : tensors that are written as they are, in their type of `types`; the rows of their sources are not read
    split : bytes of a part, at most, where its tensors are more than one; or how many tensors each part has. A model of
        one part is one file without a number. None: one file
    resume : what lets the run go on where an interrupted one stopped
    progress : called with (bytes written, bytes in all, the tensor that is being written), before the first piece and
        after each

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    PymlaError
        A weight is infinite or NaN, or too large for its type (`Refused`); a type has no quantiser; a file cannot be
        read or written.
    """
    copies = copies or {}
    tensors = []
    for source in sources:
        qtype = types[source.name]
        if source.name in copies:
            tensors.append(_copied(source, qtype, copies[source.name]))
        else:
            tensors.append(_quantised(source, qtype, importance))
    metadata = {"general.architecture": architecture, **metadata}
    groups = [tensors] if split is None else _groups(tensors, split)
    files = [NewFile(path, metadata, tensors)] if len(groups) == 1 else gguf_parts.in_parts(path, metadata, groups)
    try:
        write_files(files, resume, progress)
    except Refused as error:
        raise Refused(f"{path}: cannot be written: {error}") from error
    return [file.path for file in files]


def _groups(tensors: Sequence[NewTensor], split: int | Sequence[int]) -> list[list[NewTensor]]:
    """The tensors of each part, as `split` of `write_model` says."""
    return gguf_parts.by_size(tensors, split) if isinstance(split, int) else gguf_parts.by_counts(tensors, split)


def _copied(source: Source, qtype: int, pieces: Pieces) -> NewTensor:
    return NewTensor(source.name, source.shape, qtype, partial(_checked, source, qtype, pieces))


def _quantised(source: Source, qtype: int, importance: "Importance | None") -> NewTensor:
    return NewTensor(
        source.name, source.shape, qtype, partial(_within_matrices, source), _Encoder(source, qtype, importance)
    )


def _within_matrices(source: Source) -> Iterator[np.ndarray]:
    """The rows of a tensor, in pieces none of which belongs to two matrices."""
    height = source.shape[-2] if len(source.shape) > 1 else 1
    done = 0
    for rows in source.rows():
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + height - done % height)
            yield rows[start:stop]
            start, done = stop, done + stop - start


class _Encoder:
    """Makes the bytes of a tensor of its rows, piece by piece in their order."""

    def __init__(self, source: Source, qtype: int, importance: "Importance | None"):
        self._name, self._shape, self._qtype, self._importance = source.name, source.shape, qtype, importance
        self._done = 0  # rows
        self._columns: np.ndarray | None = None  # importance, float32 (matrices, K)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if rows.dtype != np.float32 or rows.shape[1:] != self._shape[-1:]:
            raise ValueError(f"{self._name}: pieces of {rows.dtype} {rows.shape} for {self._shape}")
        rows = np.ascontiguousarray(rows)
        largest = largest_magnitude(rows.reshape(-1).view(np.uint32))
        if largest >= _INFINITY:
            raise _not_finite(self._name, self._shape, self._done * rows.shape[1], np.isfinite(rows.reshape(-1)))
        blocks = quantise(rows, self._qtype, self._importance_of_row())
        if largest > _HALF_MAX:
            self._check_range(rows, blocks)
        self._done += len(rows)
        return blocks

    def _importance_of_row(self) -> np.ndarray | None:
        """The importance of the columns of the matrix that the next row is in."""
        if self._importance is None or self._qtype in ggml.FLOATS:
            return None
        if self._done == 0:
            self._columns = self._importance.columns(self._name, self._shape)
        if self._columns is None:
            return None
        return self._columns[self._done // (self._shape[-2] if len(self._shape) > 1 else 1)]

    def _check_range(self, rows: np.ndarray, blocks: np.ndarray) -> None:
        """Raise Refused where the largest weight is too large for the type. Only scales limit it, so nothing else of
        the rows can be too large."""
        row, column = np.unravel_index(np.abs(rows).argmax(), rows.shape)
        weight = rows[row, column]
        with np.errstate(all="ignore"):
            found = dequantise_rows(blocks[row : row + 1], self._qtype, rows.shape[1])[0, column]
            held = np.isfinite(found) and abs(found - weight) <= abs(weight) / 2
        if not held:
            place = _place(self._shape, (self._done + int(row)) * rows.shape[1] + int(column))
            wider = "F32" if self._qtype == ggml.BF16 else "BF16"
            raise Refused(
                f"tensor {self._name} holds {weight:g} in {place}, too large for {ggml.NAME[self._qtype]}; give it "
                f"another type, such as {wider}"
            )


def _checked(source: Source, qtype: int, pieces: Pieces) -> Iterator[np.ndarray]:
    """The bytes of a tensor, whose weights are finite."""
    done = 0  # bytes
    for piece in pieces():
        data = piece.reshape(-1)
        if qtype in _FLOAT_WORDS:
            dtype, infinity = _FLOAT_WORDS[qtype]
            words = data.view(dtype)
            if largest_magnitude(words, alone=True) >= infinity:
                finite = words & np.iinfo(words.dtype).max >> 1 < infinity
                raise _not_finite(source.name, source.shape, done // words.itemsize, finite)
        else:
            _check_scales(source, qtype, data, done)
        done += data.nbytes
        yield data


def _check_scales(source: Source, qtype: int, data: np.ndarray, done: int) -> None:
    """Raise Refused for a scale that is not finite in bytes of a quantised tensor, from byte `done` on."""
    found = values.scan(TensorInfo(source.name, qtype, (1, source.shape[-1]), data, Path()))
    if found.first_not_finite is not None:
        block = done // ggml.unit_bytes(qtype, source.shape[-1]) + found.first_not_finite
        raise Refused(f"tensor {source.name} has a scale that is infinite or NaN in block {block}; make it again")


def _not_finite(name: str, shape: tuple[int, ...], start: int, finite: np.ndarray) -> Refused:
    """The error for a piece of a tensor, from weight `start` on, of which not all weights are finite."""
    place = _place(shape, start + int(np.argmin(finite)))
    return Refused(f"tensor {name} holds infinity or NaN in {place}; make or download it again")


def _place(shape: tuple[int, ...], index: int) -> str:
    """Where a weight is, for people."""
    *matrix, column = (int(each) for each in np.unravel_index(index, shape))
    names = ["row"] if len(matrix) == 1 else ["matrix", "row"] if len(matrix) == 2 else ["row"] * len(matrix)
    where = [f"{name} {number}" for name, number in zip(names, matrix, strict=True)]
    return ", ".join([*where, f"column {column}"])
