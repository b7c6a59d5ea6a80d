"""Models in several GGUF files from one, and one from several, as llama.cpp's ``gguf-split`` makes them: the same bytes
of every tensor and of the metadata, but for the keys that tell which part a file is."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gguf.constants import GGUFValueType

from pymla.errors import PymlaError
from pymla.files import gguf_parts
from pymla.files.gguf_output import Progress, Resume, write_files
from pymla.files.gguf_parts import NewFile
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor, encoded


def split(
    source: Path,
    prefix: Path,
    *,
    max_size: int | None = None,
    max_tensors: int | None = None,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a model as several files, ``PREFIX-00001-of-0000N.gguf``.

    Parameters
    ----------
    source : a GGUF file, or any part of one
    prefix : of the names, with or without ``.gguf``
    max_size : bytes of the tensors of a part; a larger tensor has a part of its own
    max_tensors : tensors of a part; one of the two limits is given
    note : told, in one line each, what becomes of an interrupted run
    progress : called with (bytes written, bytes in all, the tensor that is being written)

    Returns
    -------
    list of Path
        The parts.

    Raises
    ------
    PymlaError
        `source` cannot be read, or the parts cannot be written.
    """
    if (max_size is None) == (max_tensors is None):
        raise PymlaError("give `max_size` or `max_tensors`")
    for name, limit in (("max_size", max_size), ("max_tensors", max_tensors)):
        if limit is not None and limit < 1:
            raise PymlaError(f"`{name}` is {limit}; a number from 1 on is expected")
    file = ModelFile.open(source)
    tensors = _tensors(file)
    groups = gguf_parts.by_size(tensors, max_size) if max_size else gguf_parts.by_number(tensors, max_tensors or 1)
    files = gguf_parts.in_parts(prefix, file.encoded_metadata(), groups, file.alignment)
    write_files(files, Resume(file.parts, note), progress)
    return [each.path for each in files]


def merge(
    first: Path,
    path: Path,
    *,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress | None = None,
) -> Path:
    """Write a model of several files as one.

    Parameters
    ----------
    first : any part of the model
    path : of the file
    note : told, in one line each, what becomes of an interrupted run
    progress : called with (bytes written, bytes in all, the tensor that is being written)

    Returns
    -------
    Path
        The file.

    Raises
    ------
    PymlaError
        A part is missing or damaged, `first` is no part, or the file cannot be written.
    """
    file = ModelFile.open(first)
    metadata = file.encoded_metadata()
    if "split.count" not in metadata or not file.get("split.count", int):
        raise PymlaError(f"{first}: it is not a part of a split model; give one that is named NAME-00001-of-0000N.gguf")
    # As gguf-split does it: a count of 0 says that the file is whole.
    del metadata["split.count"]
    metadata["split.count"] = encoded(GGUFValueType.UINT16, 0)
    write_files([NewFile(path, metadata, _tensors(file), file.alignment)], Resume(file.parts, note), progress)
    return path


def _tensors(file: ModelFile) -> list[NewTensor]:
    return [NewTensor(each.name, each.shape, each.qtype, partial(file.read, each)) for each in file.tensors.values()]
