"""Importance matrices as GGUF files, as llama.cpp reads and writes them since July 2025.

For a tensor NAME there are two tensors of type F32: ``NAME.in_sum2``, (n, columns), sums of squared inputs, and
``NAME.counts``, (n, 1), how many inputs there were. llama.cpp: ``tools/imatrix/imatrix.cpp``,
``common/imatrix-loader.cpp``.
"""

from functools import partial
from pathlib import Path

import numpy as np

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_reader import REQUIRED, ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.files.imatrix_entries import LONGEST_CHUNK, MOST, Entry, ImatrixData, checked
from pymla.printable import shown

SUMS, COUNTS = ".in_sum2", ".counts"

_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


def read(path: Path) -> ImatrixData:
    """Read a file. Sums are views of the mapped file.

    Raises
    ------
    PymlaError
        The file is no GGUF file, holds no importance matrix, or holds values that none has.
    """
    file = ModelFile.open(path)
    sums, counts = _floats(file, SUMS), _floats(file, COUNTS)
    if not sums:
        raise PymlaError(f"{path}: holds no importance matrix, as no tensor has a name that ends in {SUMS}")
    for name in sorted(sums.keys() ^ counts.keys()):
        missing = COUNTS if name in sums else SUMS
        raise PymlaError(f"{path}: tensor {shown(name + missing)} is missing; the file is damaged")
    entries = {name: checked(path, name, values, _whole(path, name, counts[name])) for name, values in sums.items()}
    datasets = file.get(_DATASETS, list, [])
    if not all(isinstance(each, str) for each in datasets):
        raise PymlaError(f"{path}: metadata {_DATASETS} is {shown(datasets)}, but an array of strings is expected")
    chunks = _number(file, _CHUNKS, 0, MOST, default=0)
    return ImatrixData(entries, tuple(datasets), chunks, _number(file, _CHUNK_SIZE, 1, LONGEST_CHUNK))


def write(path: Path, data: ImatrixData) -> None:
    """Write a file, over an older one, of sums that float32 holds. It always has a name of a dataset, without which
    llama-quantize refuses it."""
    metadata: gguf_writer.Metadata = {
        "general.type": "imatrix",
        _DATASETS: data.datasets or ("",),
        _CHUNKS: data.chunks,
        _CHUNK_SIZE: data.chunk_size,
    }
    tensors = []
    for name, entry in sorted(data.entries.items()):
        tensors.append(NewTensor(name + SUMS, entry.sums.shape, ggml.F32, partial(_sums, entry)))
        tensors.append(NewTensor(name + COUNTS, (entry.counts.size, 1), ggml.F32, partial(_counts, entry)))
    # llama.cpp's own files have no architecture, and its programs do not look for one.
    gguf_writer.write(path, "imatrix", metadata, tensors)


def _floats(file: ModelFile, suffix: str) -> dict[str, np.ndarray]:
    """The tensors whose names end in a suffix, by the rest of the name."""
    found = {}
    for name, info in file.tensors.items():
        if name.endswith(suffix):
            if info.qtype != ggml.F32:
                raise PymlaError(f"{file.path}: tensor {name} has type {ggml.NAME[info.qtype]}, expected F32")
            found[name.removesuffix(suffix)] = info.data.view("<f4")
    return found


def _whole(path: Path, name: str, counts: np.ndarray) -> np.ndarray:
    """Counts as integers: float32 (n,) to int64."""
    good = np.isfinite(counts) & (counts >= 0) & (counts <= MOST)
    if not good.all():
        raise PymlaError(
            f"{path}: a count of {shown(name)} is {counts[~good][0]:g}; numbers from 0 to {MOST} are expected"
        )
    return np.rint(counts).astype(np.int64)


def _number(file: ModelFile, key: str, least: int, most: int, default: object = REQUIRED) -> int:
    """A number of the metadata."""
    value = file.get(key, int, default)
    if not least <= value <= most:
        raise PymlaError(f"{file.path}: metadata {key} is {value}; a number from {least} to {most} is expected")
    return value


def _sums(entry: Entry) -> list[np.ndarray]:
    return [entry.sums.astype("<f4")]


def _counts(entry: Entry) -> list[np.ndarray]:
    return [entry.counts.astype("<f4")]
