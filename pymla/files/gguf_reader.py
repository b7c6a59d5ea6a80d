"""GGUF files: metadata and tensors, without a copy of either's bytes.

The format is described in ggml's ``docs/gguf.md``; the numbers of its types come from the gguf package. That package's
own reader is not used: it takes the vocabulary apart element by element (10 s for 100,000 tokens) and believes every
size a file claims. Here each size is compared with what is left of the file before anything is read or allocated.
"""

import contextlib
import errno
import hashlib
import itertools
import mmap
import os
import re
import struct
import sys
import weakref
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUFValueType

from pymla import ggml
from pymla.errors import PymlaError
from pymla.printable import shown

#: Default of `ModelFile.get` that makes a key mandatory.
REQUIRED = object()

VERSIONS = (2, 3)
MAX_DIMS = 4

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_MADV_POPULATE_READ = 22  # <linux/mman.h> since 5.14; the mmap module has no name for it
_PREFAULT_SLICE = 256 << 20

# What a file is recognised by where only its modification time is another one: so many pieces, spread over its length.
_PIECES = 16
_PIECE_BYTES = 4096

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_DTYPES = {int(value_type): np.dtype(code) for value_type, code in _SCALARS.items()}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# The least a key with its value, and a tensor's entry, can take: they bound the counts in the header.
_MIN_ENTRY = 8 + 4 + 1
_MIN_TENSOR_INFO = 8 + 4 + 8 + 4 + 8

_KINDS = {
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a string", (str,)),
    list: ("an array", (list, np.ndarray)),
}


class TensorInfo(NamedTuple):
    """A tensor of the file, as it lies there."""

    name: str
    qtype: int  # ggml type id, see pymla.ggml
    shape: tuple[int, ...]  # NumPy order: rows first, columns last
    data: np.ndarray  # uint8, one-dimensional, read-only view of the mapped file, exactly the tensor's bytes
    path: Path  # the part it lies in


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
    tensors : dict[str, TensorInfo]
        Tensors of all parts by name, in the order of the file.
    """

    def __init__(self, path: Path, parts: list["_Part"]):
        self.path = path
        self.parts = [part.path for part in parts]
        self.version = parts[0].version
        self.nbytes = sum(part.nbytes for part in parts)
        self.metadata = parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
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
    def open(cls, path: str | Path) -> "ModelFile":
        """Map a file and read its header. Any part's path opens all parts of a split file.

        Raises
        ------
        PymlaError
            The file cannot be read, is no GGUF file of version 2 or 3, is truncated or otherwise inconsistent, or a
            part of it is missing.
        """
        path = Path(path)
        first = _Part(path)
        split = _SPLIT_NAME.fullmatch(path.name)
        count = first.split_count
        named_count = int(split["count"]) if split else 1
        if count != named_count:
            raise PymlaError(
                f"{path}: metadata split.count says {count} part{'s' * (count != 1)}, the file's name {named_count}; "
                "give the parts the names they were published with"
            )
        if count == 1:
            return cls(path, [first])
        names = [f"{split['stem']}-{number:05}-of-{split['count']}.gguf" for number in range(1, count + 1)]
        first.check_split(int(split["number"]) - 1, count)
        paths = [path.with_name(name) for name in names]
        missing = [part for part in paths if not part.exists()]
        if missing:
            raise PymlaError(
                f"{missing[0]}: this part of {path.name} is missing ({len(missing)} of {count} are); "
                "put all parts into one folder"
            )
        parts = [first if part == path else _Part(part) for part in paths]
        for number, part in enumerate(parts):
            part.check_split(number, count)
        file = cls(path, parts)
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
        default : what to return where the key is absent; without it the key must be there

        Raises
        ------
        PymlaError
            The key is absent and has no default, or its value is of another type.
        """
        return _typed(self.path, self.metadata, key, kind, default)

    def check_unchanged(self) -> None:
        """Raise PymlaError if something wrote to the file since it was opened.

        A mapped file that becomes shorter kills the process at the next access, and one that is overwritten changes
        the weights of a model that runs. So this is called before the weights are used: it takes a microsecond for
        each part. A file that was replaced or deleted is fine, for its contents stay mapped; so is one whose
        modification time alone changed.

        Raises
        ------
        PymlaError
            A part has another size, or other contents (16 pieces of it are compared if its modification time changed).
        """
        for source in self._sources:
            source.check_unchanged()

    def fetch_ahead(self, tensor: TensorInfo, pieces: Iterable[tuple[int, int]]) -> None:
        """Have pieces of a tensor read from disk, without waiting: from byte, to byte.

        Pages that are read one by one, each when it is needed, take a disk a hundred times as long.
        """
        source = next(source for source in self._sources if source.path == tensor.path)
        begin = tensor.data.ctypes.data - source.begin
        for first, stop in pieces:
            start = (begin + first) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # it is only advice
                source.map.madvise(mmap.MADV_WILLNEED, start, begin + stop - start)

    def prefault(
        self, progress: Callable[[int, int], None] | None = None, names: Collection[str] | None = None
    ) -> None:
        """Make every page of the file present, so that later reads do not stop for page faults.

        ``madvise(MADV_POPULATE_READ)`` (Linux 5.14) does it in 0.05 s per GiB of cached file; where it is not
        available, one byte of each page is read.

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
        done, total = 0, sum(stop - start for _, start, stop in spans)
        populate = _populate if sys.platform == "linux" else _touch
        for source, first, last in spans:
            for start in range(first, last, _PREFAULT_SLICE):
                length = min(_PREFAULT_SLICE, last - start)
                source.check_unchanged()
                try:
                    populate(source.map, start, length)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        source.check_unchanged()  # the pages are missing because the file was cut
                        raise PymlaError(f"{source.path}: cannot be read: {error.strerror}") from error
                    populate = _touch  # the kernel is older than the advice
                    populate(source.map, start, length)
                done += length
                if progress is not None:
                    progress(done, total)

    def _spans(self, source: "_Source", names: Collection[str] | None) -> list[tuple[int, int]]:
        """Bytes of a part, in whole pages, that hold tensors: from, to."""
        if names is None:
            return [(0, source.nbytes)]
        spans: list[tuple[int, int]] = []
        tensors = (self.tensors[name].data for name in names if self.tensors[name].path == source.path)
        places = sorted((data.ctypes.data - source.begin, data.nbytes) for data in tensors)
        for offset, nbytes in places:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            stop = min(-(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE, source.nbytes)
            if spans and start <= spans[-1][1]:
                start, stop = spans[-1][0], max(stop, spans.pop()[1])
            spans.append((start, stop))
        return spans


def _populate(mapped: mmap.mmap, start: int, length: int) -> None:
    mapped.madvise(_MADV_POPULATE_READ, start, length)


def _touch(mapped: mmap.mmap, start: int, length: int) -> None:
    np.frombuffer(mapped, np.uint8, length, start)[:: mmap.PAGESIZE].max()


class _Source:
    """An open file: its map, and what shows that the file is still what was mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
            self.nbytes = len(self.map)
            self.begin = np.frombuffer(self.map, np.uint8).ctypes.data  # its address
            self._modified = os.fstat(self._descriptor).st_mtime_ns
            self._digest = self._read_digest()
        except OSError as error:
            raise PymlaError(f"{path}: cannot be opened: {error.strerror or error}") from error
        except ValueError as error:  # mmap's answer to an empty file
            raise PymlaError(f"{path}: not a GGUF file: it is empty") from error

    def check_unchanged(self) -> None:
        """See `ModelFile.check_unchanged`."""
        try:
            found = os.fstat(self._descriptor)
            if found.st_size != self.nbytes:
                self._refuse(f"the file has {found.st_size} bytes and had {self.nbytes} when it was opened")
            if found.st_mtime_ns != self._modified:
                if self._read_digest() != self._digest:
                    self._refuse(f"the contents of the file, {self.nbytes} bytes then and now, are no longer the same")
                self._modified = found.st_mtime_ns
        except OSError as error:
            self._refuse(f"the file cannot be read any more ({error.strerror})")

    def _refuse(self, what: str):
        raise PymlaError(f"{self.path}: {what}: it was changed in place. Load the model again once it is complete")

    def _read_digest(self) -> bytes:
        """Of pieces spread over the file, the first and the last of its bytes among them. They are not read through
        the map, so that a file that was cut gives other pieces instead of a signal."""
        digest = hashlib.blake2b()
        for number in range(_PIECES):
            start = max(0, self.nbytes - _PIECE_BYTES) * number // (_PIECES - 1)
            digest.update(os.pread(self._descriptor, _PIECE_BYTES, start))
        return digest.digest()


class _Part:
    """One file: its map, and what its header says."""

    def __init__(self, path: Path):
        self.path = path
        self.source = _Source(path)
        self.map = self.source.map
        self.nbytes = len(self.map)
        self._at = 0
        self._reading = "the header"
        self._read_magic()
        self.version = self._read_version()
        tensor_count = self._count("tensors", _MIN_TENSOR_INFO)
        entry_count = self._count("metadata entries", _MIN_ENTRY)
        self.metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            self._read_entry()
        infos = [self._read_tensor_info(number) for number in range(tensor_count)]
        self.tensors = self._views(infos)

    @property
    def split_count(self) -> int:
        return self.get("split.count", int, 0) or 1

    def get(self, key, kind, default):
        return _typed(self.path, self.metadata, key, kind, default)

    def check_split(self, number: int, count: int) -> None:
        """Raise PymlaError unless the metadata says that this is part `number`, from 0, of `count`."""
        actual = self.get("split.no", int, None)
        if self.split_count != count or actual != number:
            raise PymlaError(
                f"{self.path}: metadata says part {'?' if actual is None else actual + 1} of {self.split_count}, "
                f"the file's name part {number + 1} of {count}; give the parts the names they were published with"
            )

    def _fail(self, message: str):
        raise PymlaError(f"{self.path}: {message}")

    def _advance(self, nbytes: int) -> int:
        """Where the next `nbytes` start; they are checked to be in the file, and passed."""
        start, self._at = self._at, self._at + nbytes
        if self._at > self.nbytes:
            self._fail(
                f"truncated in {self._reading}: {nbytes} bytes from {start} on do not fit a file of {self.nbytes}; "
                "download or convert it again"
            )
        return start

    def _u32(self) -> int:
        return _U32.unpack_from(self.map, self._advance(4))[0]

    def _u64(self) -> int:
        return _U64.unpack_from(self.map, self._advance(8))[0]

    def _string(self) -> str:
        nbytes = self._u64()
        start = self._advance(nbytes)
        return self._decode(self.map[start : start + nbytes])

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{self._reading}: {shown(raw)} is not valid UTF-8")

    def _name(self) -> str:
        """A key or a tensor's name. They go into messages, so they must be fit to print."""
        name = self._string()
        if not name.isprintable() or len(name) > 0xFFFF:
            self._fail(f"{self._reading}: its name {shown(name)} is not printable; the file is damaged")
        return name

    def _read_magic(self) -> None:
        magic = _U32.pack(GGUF_MAGIC)
        if self.map[:4] != magic[: self.nbytes]:
            self._fail(f"not a GGUF file: it starts with {self.map[:4]!r} instead of {magic!r}")
        self._advance(4)

    def _read_version(self) -> int:
        version = self._u32()
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                self._fail("a big-endian GGUF file; only little-endian ones can be read")
            advice = "convert the model again" if version < VERSIONS[0] else "update pymla"
            self._fail(f"GGUF version {version}, but versions 2 and 3 can be read; {advice}")
        return version

    def _count(self, what: str, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self._u64()
        if count * least > self.nbytes - self._at:
            self._fail(f"{count} {what} do not fit a file of {self.nbytes} bytes; it is truncated or damaged")
        return count

    def _read_entry(self) -> None:
        self._reading = f"metadata entry {len(self.metadata) + 1}"
        key = self._name()
        self._reading = f"metadata {key}"
        if key in self.metadata:
            self._fail(f"{self._reading} occurs twice; the file is damaged")
        value_type = self._u32()
        if value_type == GGUFValueType.STRING:
            self.metadata[key] = self._string()
        elif value_type == GGUFValueType.ARRAY:
            self.metadata[key] = self._array()
        else:
            self.metadata[key] = self._numbers(value_type, 1).item()

    def _array(self) -> list[str] | np.ndarray:
        value_type = self._u32()
        count = self._u64()
        if value_type == GGUFValueType.STRING:
            return self._strings(count)
        if value_type == GGUFValueType.ARRAY:
            self._fail(f"{self._reading}: an array of arrays, which pymla cannot read")
        return self._numbers(value_type, count)

    def _numbers(self, value_type: int, count: int) -> np.ndarray:
        if value_type not in _DTYPES:
            self._fail(f"{self._reading}: unknown value type {value_type}; the file is damaged or newer than pymla")
        dtype = _DTYPES[value_type]
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self.map, dtype, count, start).copy()

    def _strings(self, count: int) -> list[str]:
        """An array of strings. Vocabularies hold hundreds of thousands: the loop does nothing it need not."""
        at = self._at
        self._advance(count * _U64.size)  # an array cannot take less than its strings' lengths
        mapped, length_at, size = self.map, _U64.unpack_from, self.nbytes
        pieces = []
        for _ in range(count):
            start = at + _U64.size
            end = start + length_at(mapped, at)[0] if start <= size else start
            if end > size:
                self._at = at
                self._string()  # reads the same, and says what is missing
            pieces.append(mapped[start:end])
            at = end
        self._at = at
        return [self._decode(piece) for piece in pieces]

    def _read_tensor_info(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        self._reading = f"the entry of tensor {number + 1}"
        name = self._name()
        self._reading = f"tensor {name}"
        n_dims = self._u32()
        if not 1 <= n_dims <= MAX_DIMS:
            self._fail(f"tensor {name} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
        dims = [self._u64() for _ in range(n_dims)]
        if 0 in dims:
            self._fail(f"tensor {name} has a dimension of size 0: {dims}")
        qtype = self._u32()
        if qtype not in ggml.NAME:
            self._fail(f"tensor {name} has the unknown type {qtype}; pymla knows those of ggml and ik_llama.cpp")
        return name, tuple(reversed(dims)), qtype, self._u64()

    def _views(self, infos) -> list[TensorInfo]:
        alignment = self.get("general.alignment", int, GGUF_DEFAULT_ALIGNMENT)
        if alignment <= 0 or alignment & (alignment - 1):
            self._fail(f"metadata general.alignment is {alignment}, which is no power of two")
        data_start = -(-self._at // alignment) * alignment
        contents = np.frombuffer(self.map, np.uint8)
        seen = set()
        tensors, places = [], []
        for name, shape, qtype, offset in infos:
            if name in seen:
                self._fail(f"tensor {name} occurs twice; the file is damaged")
            seen.add(name)
            if offset % alignment:
                self._fail(f"tensor {name} lies at offset {offset}, which is no multiple of {alignment}")
            try:
                nbytes = ggml.tensor_bytes(qtype, shape)
            except PymlaError as error:
                self._fail(f"tensor {name}: {error}")
            start = data_start + offset
            if start + nbytes > self.nbytes:
                self._fail(
                    f"tensor {name} needs the bytes from {start} to {start + nbytes}, but the file has {self.nbytes}: "
                    "it is truncated or damaged, download or convert it again"
                )
            tensors.append(TensorInfo(name, qtype, shape, contents[start : start + nbytes], self.path))
            places.append((start, start + nbytes, name))
        places.sort()
        for (first, end, name), (start, stop, other) in itertools.pairwise(places):
            if start < end:
                self._fail(
                    f"tensor {other} lies in the bytes from {start} to {stop}, of which tensor {name} takes those from "
                    f"{first} to {end}; the file is damaged, download or convert it again"
                )
        return tensors


def _typed(path: Path, metadata: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    if key not in metadata:
        if default is REQUIRED:
            raise PymlaError(f"{path}: metadata {key} is missing; convert the model again or take another file")
        return default
    value = metadata[key]
    expected, types = _KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise PymlaError(f"{path}: metadata {key} is {shown(value)}, but {expected} is expected")
    return float(value) if kind is float else value
