"""GGUF files of several parts: names and metadata as llama.cpp's ``gguf-split`` gives them (``tools/gguf-split``)."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_writer import Metadata, NewTensor, Value, encoded

#: What the format's number of parts, uint16, and the five digits of their names can hold.
MOST_PARTS = 65535


class NewFile(NamedTuple):
    """A GGUF file to write, or a part of one."""

    path: Path
    metadata: Metadata
    tensors: Sequence[NewTensor]
    alignment: int = GGUF_DEFAULT_ALIGNMENT

    def header(self) -> bytes:
        """All bytes in front of the tensors."""
        return gguf_writer.header(self.metadata, self.tensors, self.alignment)


def part_path(path: Path, number: int, count: int) -> Path:
    """The path of a part, counted from 0, of the model that `path` names with or without ``.gguf``."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number + 1:05}-of-{count:05}.gguf")


def in_parts(
    path: Path, metadata: Metadata, groups: Sequence[Sequence[NewTensor]], alignment: int = GGUF_DEFAULT_ALIGNMENT
) -> list[NewFile]:
    """A model in several files. The first has all metadata, the others only which part they are.

    Parameters
    ----------
    path : of the model, with or without ``.gguf``; those of its parts have numbers added
    metadata : its keys of a split model are replaced
    groups : the tensors of each part
    alignment : of the first part's tensors, which ``general.alignment`` may change; the others have the default

    Raises
    ------
    PymlaError
        There are more parts than the format can count.
    """
    count, tensors = len(groups), sum(map(len, groups))
    if count > MOST_PARTS:
        raise PymlaError(f"{path}: {count} parts, the format can count {MOST_PARTS}; allow larger ones")
    files = []
    for number, group in enumerate(groups):
        keys: dict[str, Value] = {
            "split.no": encoded(GGUFValueType.UINT16, number),
            "split.tensors.count": encoded(GGUFValueType.INT32, tensors),
            "split.count": encoded(GGUFValueType.UINT16, count),
        }
        # As ggml does it: a key that is set again moves to the end.
        own = {} if number else {key: value for key, value in metadata.items() if key not in keys}
        aligned = GGUF_DEFAULT_ALIGNMENT if number else alignment
        files.append(NewFile(part_path(path, number, count), {**own, **keys}, group, aligned))
    return files


def by_size(tensors: Sequence[NewTensor], most: int) -> list[list[NewTensor]]:
    """Tensors in groups of at most `most` bytes, in their order. A tensor that is larger has a group of its own."""
    groups: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = gguf_writer.padded(tensor.nbytes, GGUF_DEFAULT_ALIGNMENT)
        if groups[-1] and size + nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    return groups


def by_number(tensors: Sequence[NewTensor], most: int) -> list[list[NewTensor]]:
    """Tensors in groups of `most`, in their order."""
    return [list(tensors[i : i + most]) for i in range(0, len(tensors), most)] or [[]]


def by_counts(tensors: Sequence[NewTensor], counts: Iterable[int]) -> list[list[NewTensor]]:
    """Tensors in groups of so many each, in their order."""
    following = iter(tensors)
    return [list(islice(following, count)) for count in counts]
