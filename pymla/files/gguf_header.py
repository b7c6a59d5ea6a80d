"""The header of a GGUF file: its metadata, and where its tensors lie.

The format is described in ggml's ``docs/gguf.md``; the numbers of its types come from the gguf package. That package's
own reader is not used: it takes the vocabulary apart element by element (10 s for 100,000 tokens) and believes every
size a file claims. Here each size is compared with the rest of the file before anything is read or allocated.
"""

import itertools
import struct
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUFValueType

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.mapped_file import MappedFile
from pymla.printable import shown

#: Default of `typed` that makes a key mandatory.
REQUIRED = object()

VERSIONS = (2, 3)
MAX_DIMS = 4

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


class _Entry(NamedTuple):
    """A tensor as the header lists it."""

    name: str
    shape: tuple[int, ...]
    qtype: int
    offset: int  # bytes from where the header ends


class Part:
    """A GGUF file, or one of several: its map, and its header.

    Attributes
    ----------
    path, version, metadata, nbytes
        As of `pymla.files.gguf_reader.ModelFile`.
    tensors : list of TensorInfo
        In the order of the file.
    source : MappedFile

    Raises
    ------
    PymlaError
        The file cannot be read, is no GGUF file of version 2 or 3, or is truncated or otherwise inconsistent.
    """

    def __init__(self, path: Path):
        self.path = path
        self.source = MappedFile(path)
        self.map = self.source.map
        self.nbytes = len(self.map)
        self._at = 0
        self._reading = "the header"
        self._read_magic()
        self.version = self._read_version()
        tensor_count = self._count("tensors", _MIN_TENSOR_INFO)
        entry_count = self._count("metadata entries", _MIN_ENTRY)
        self.metadata: dict[str, Any] = {}
        self._values: dict[str, tuple[int, int]] = {}  # bytes of a key's value with its type: from, to
        for _ in range(entry_count):
            self._read_entry()
        infos = [self._read_tensor_info(number) for number in range(tensor_count)]
        self.tensors = self._views(infos)

    @property
    def split_count(self) -> int:
        """How many files there are, by the metadata of this one."""
        return self.get("split.count", int, 0) or 1

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value of the metadata, as `typed`."""
        return typed(self.path, self.metadata, key, kind, default)

    def encoded(self) -> dict[str, bytes]:
        """The metadata as the bytes that stand in the file: of each value the number of its type, uint32, and what
        follows."""
        return {key: self.map[start:stop] for key, (start, stop) in self._values.items()}

    def check_split(self, number: int, count: int) -> None:
        """Raise PymlaError unless the metadata says that this is part `number`, from 0, of `count`."""
        actual = self.get("split.no", int, None)
        if self.split_count != count or actual != number:
            raise PymlaError(
                f"{self.path}: metadata says part {'?' if actual is None else actual + 1} of {self.split_count}, "
                f"the file's name part {number + 1} of {count}; give the parts the names they were published with"
            )

    def _fail(self, message: str) -> NoReturn:
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

    def _count(self, things: str, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self._u64()
        if count * least > self.nbytes - self._at:
            self._fail(f"{count} {things} do not fit a file of {self.nbytes} bytes; it is truncated or damaged")
        return count

    def _read_entry(self) -> None:
        self._reading = f"metadata entry {len(self.metadata) + 1}"
        key = self._name()
        self._reading = f"metadata {key}"
        if key in self.metadata:
            self._fail(f"{self._reading} occurs twice; the file is damaged")
        start = self._at
        value_type = self._u32()
        if value_type == GGUFValueType.STRING:
            self.metadata[key] = self._string()
        elif value_type == GGUFValueType.ARRAY:
            self.metadata[key] = self._array()
        else:
            self.metadata[key] = self._numbers(value_type, 1).item()
        self._values[key] = start, self._at

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
                self._string()  # reads the same string, and fails with a message
            pieces.append(mapped[start:end])
            at = end
        self._at = at
        return [self._decode(piece) for piece in pieces]

    def _read_tensor_info(self, number: int) -> _Entry:
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
            self._fail(
                f"tensor {name} has the unknown type {qtype}; pymla knows those of ggml and ik_llama.cpp, take another "
                "file of the model"
            )
        return _Entry(name, tuple(reversed(dims)), qtype, self._u64())

    def _views(self, infos: list[_Entry]) -> list[TensorInfo]:
        """The tensors of the file as views of its map."""
        alignment = self.get("general.alignment", int, GGUF_DEFAULT_ALIGNMENT)
        if alignment <= 0 or alignment & (alignment - 1):
            self._fail(f"metadata general.alignment is {alignment}, which is no power of two")
        data_start = -(-self._at // alignment) * alignment
        contents = np.frombuffer(self.map, np.uint8)
        seen: set[str] = set()
        tensors: list[TensorInfo] = []
        places: list[tuple[int, int, str]] = []
        for entry in infos:
            if entry.name in seen:
                self._fail(f"tensor {entry.name} occurs twice; the file is damaged")
            seen.add(entry.name)
            start, stop = self._place(entry, data_start, alignment)
            tensors.append(TensorInfo(entry.name, entry.qtype, entry.shape, contents[start:stop], self.path))
            places.append((start, stop, entry.name))
        self._check_overlaps(places)
        return tensors

    def _place(self, entry: _Entry, data_start: int, alignment: int) -> tuple[int, int]:
        """Bytes of a tensor in the file: from, to."""
        name, shape, qtype, offset = entry
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
        return start, start + nbytes

    def _check_overlaps(self, places: list[tuple[int, int, str]]) -> None:
        for (first, end, name), (start, stop, other) in itertools.pairwise(sorted(places)):
            if start < end:
                self._fail(
                    f"tensor {other} lies in the bytes from {start} to {stop}, of which tensor {name} takes those from "
                    f"{first} to {end}; the file is damaged, download or convert it again"
                )


def typed(path: Path, metadata: dict[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    """A value of a file's metadata (`pymla.files.gguf_reader.ModelFile.get`)."""
    if key not in metadata:
        if default is REQUIRED:
            raise PymlaError(f"{path}: metadata {key} is missing; convert the model again or take another file")
        return default
    value = metadata[key]
    expected, types = _KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise PymlaError(f"{path}: metadata {key} is {shown(value)}, but {expected} is expected")
    if kind is float and isinstance(value, int | float):
        return float(value)
    return value
