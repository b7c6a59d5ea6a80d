"""GGUF files of one or several parts: metadata and tensors, without a copy of the bytes of either."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import mapped_file
from pymla.files.gguf_header import REQUIRED, Part, TensorInfo, typed
from pymla.files.gguf_writer import Encoded
from pymla.files.mapped_file import MappedFile
from pymla.files.overrides import checked

__all__ = ["REQUIRED", "ModelFile", "TensorInfo"]

#: Bytes of a tensor that `ModelFile.read` gives at a time, at most.
READ_BYTES = 16 << 20

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class ModelFile:
    """A GGUF file, mapped read-only, or all parts of a split one.

    Attributes
    ----------
    path : Path
        The path it was opened by.
    parts : list[Path]
        All its files, in order. A single file is its only part.
    version : int
        GGUF version of the first part, 2 or 3.
    nbytes : int
        Size of all parts.
    metadata : dict[str, Any]
        Keys and values of the first part. Numbers are Python's, strings `str`, arrays `list[str]` or `np.ndarray`.
    overridden : dict[str, Any]
        For each key whose value in `metadata` is not the file's, the file's own value; None where it has none.
    tensors : dict[str, TensorInfo]
        Tensors of all parts by name, in the order of the file.
    """

    def __init__(self, path: Path, parts: list[Part], overrides: Mapping[str, Any]):
        self.path = path
        self.parts = [part.path for part in parts]
        self.version = parts[0].version
        self.nbytes = sum(part.nbytes for part in parts)
        self.metadata = {**parts[0].metadata, **overrides}
        self.overridden = {key: parts[0].metadata.get(key) for key in overrides}
        self.tensors: dict[str, TensorInfo] = {}
        self._first = parts[0]
        self._sources = [part.source for part in parts]
        for part in parts:
            for tensor in part.tensors:
                if tensor.name in self.tensors:
                    raise PymlaError(
                        f"{part.path}: tensor {tensor.name} is also in {self.tensors[tensor.name].path}; "
                        "a name may occur once"
                    )
                self.tensors[tensor.name] = tensor

    @classmethod
    def open(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "ModelFile":
        """Map a file and read its header. Any part's path opens all parts of a split file.

        Parameters
        ----------
        path : str or Path
        overrides : dict of str and int, float, bool or str, optional
            Metadata that counts in place of the file's own. Where the tensors lie and which parts there are is read
            from the file.

        Raises
        ------
        PymlaError
            The file cannot be read, is no GGUF file of version 2 or 3, is truncated or otherwise inconsistent, a part
            of it is missing, or an override is none.
        """
        overrides = checked(overrides)
        path = Path(path)
        first = Part(path)
        split = _SPLIT_NAME.fullmatch(path.name)
        count = first.split_count
        named_count = int(split["count"]) if split else 1
        if count != named_count:
            raise PymlaError(
                f"{path}: metadata split.count says {count} part{'s' * (count != 1)}, the file's name {named_count}; "
                "give the parts the names they were published with"
            )
        if split is None or count == 1:
            return cls(path, [first], overrides)
        parts = _all_parts(path, first, split)
        file = cls(path, parts, overrides)
        expected = parts[0].get("split.tensors.count", int, len(file.tensors))
        if len(file.tensors) != expected:
            raise PymlaError(
                f"{path}: its {count} parts hold {len(file.tensors)} tensors, but split.tensors.count says {expected}; "
                "the parts do not belong together, download them again"
            )
        return file

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The metadata value of a key.

        Parameters
        ----------
        key : name of the key
        kind : int, float (an integer will do), bool, str, or list (which stands for np.ndarray, too)
        default : returned where the key is absent; without a default the key must be there

        Raises
        ------
        PymlaError
            The key is absent and has no default, or its value is of another type.
        """
        return typed(self.path, self.metadata, key, kind, default)

    @property
    def alignment(self) -> int:
        """Bytes of which tensors of the first part begin at a multiple."""
        return self._first.get("general.alignment", int, GGUF_DEFAULT_ALIGNMENT)

    def encoded_metadata(self) -> dict[str, Encoded]:
        """The metadata of the first part for another file, as it stands there: overrides do not count."""
        return {key: Encoded(raw) for key, raw in self._first.encoded().items()}

    def read(self, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """The bytes of a tensor, read and not mapped, so that they do not count as memory of this process.

        Yields
        ------
        uint8 array (n,)
            Whole rows, of an interleaved type as many as lie together: up to `READ_BYTES`, or one row.

        Raises
        ------
        PymlaError
            The file cannot be read, or has become shorter.
        """
        source = next(source for source in self._sources if source.path == tensor.path)
        rows = ggml.ROWS_TOGETHER[tensor.qtype] * ggml.row_bytes(tensor.qtype, tensor.shape[-1])
        step = max(1, READ_BYTES // rows) * rows
        for start in range(0, tensor.data.size, step):
            yield source.read(tensor.data[start : start + step])

    def check_unchanged(self) -> None:
        """Raise PymlaError if something wrote to the file since it was opened.

        This is called before the weights are used: it takes a microsecond for each part
        (`pymla.files.mapped_file.MappedFile.check_unchanged`).

        Raises
        ------
        PymlaError
            A part has another size, or other contents.
        """
        for source in self._sources:
            source.check_unchanged()

    def fetch_ahead(self, tensor: TensorInfo, pieces: Iterable[tuple[int, int]]) -> None:
        """Have pieces of a tensor read from disk, without waiting: from byte, to byte.

        Pages that are read one by one, each when it is needed, take a disk a hundred times as long.
        """
        source = next(source for source in self._sources if source.path == tensor.path)
        source.fetch_ahead(tensor.data, pieces)

    def prefault(
        self, progress: Callable[[int, int], object] | None = None, names: Collection[str] | None = None
    ) -> None:
        """Make every page of the file present, so that later reads do not stop for page faults.

        Parameters
        ----------
        progress : called with (bytes done, bytes in all) after each 256 MiB
        names : of tensors, to make only their pages present

        Raises
        ------
        PymlaError
            The file cannot be read, or was changed meanwhile.
        """
        spans = [(source, *span) for source in self._sources for span in self._spans(source, names)]
        mapped_file.prefault(spans, progress)

    def _spans(self, source: MappedFile, names: Collection[str] | None) -> list[tuple[int, int]]:
        """Bytes of a part, in whole pages, that hold tensors: from, to."""
        if names is None:
            return [(0, source.nbytes)]
        return source.pages_of(self.tensors[name].data for name in names if self.tensors[name].path == source.path)


def _all_parts(path: Path, first: Part, split: re.Match[str]) -> list[Part]:
    """The parts of a split file, of which `first` was opened by the path."""
    count = first.split_count
    names = [f"{split['stem']}-{number:05}-of-{split['count']}.gguf" for number in range(1, count + 1)]
    first.check_split(int(split["number"]) - 1, count)
    paths = [path.with_name(name) for name in names]
    missing = [part for part in paths if not part.exists()]
    if missing:
        raise PymlaError(
            f"{missing[0]}: this part of {path.name} is missing ({len(missing)} of {count} are); "
            "put all parts into one folder"
        )
    parts = [first if part == path else Part(part) for part in paths]
    for number, part in enumerate(parts):
        part.check_split(number, count)
    return parts
