"""GGUF files, written piece by piece, so that memory need not hold a tensor.

The format, version 3, is described in ggml's ``docs/gguf.md``; the numbers of its types come from the gguf package.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType

from pymla import ggml

_FORMATS = {
    GGUFValueType.UINT16: "<H",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

#: Bytes that are written at a time. More take Linux five times as long where memory is in pieces: ext4 and xfs ask for
#: folios as large as what is written.
WRITE_BYTES = 128 << 10


class Encoded(NamedTuple):
    """A value as a GGUF file has it: the number of its type, uint32, and its bytes."""

    raw: bytes


#: A value of the metadata. An int is written as uint32, a NumPy int32 as that, a float as float32, arrays of numbers as
#: int32 or float32.
Value = bool | int | np.int32 | float | str | Sequence[str] | Sequence[bool] | np.ndarray | Encoded
Metadata = Mapping[str, Value]


class NewTensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    qtype: int  # ggml type id
    pieces: Callable[[], Iterable[np.ndarray]] = tuple  # what is to be written, in order, in contiguous arrays
    #: Makes the tensor's bytes of a piece; it is called once for each, in order. None: the pieces are its bytes.
    encode: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        return ggml.tensor_bytes(self.qtype, self.shape)


def encoded(kind: GGUFValueType, value: int | float | bool | str) -> Encoded:
    """A number or a text as a value of a type of GGUF."""
    if kind == GGUFValueType.STRING:
        return Encoded(_U32.pack(kind) + _text(str(value)))
    return Encoded(_U32.pack(kind) + struct.pack(_FORMATS[kind], value))


def header(metadata: Metadata, tensors: Sequence[NewTensor], alignment: int = GGUF_DEFAULT_ALIGNMENT) -> bytes:
    """All bytes of a file in front of its tensors, which lie in their order, each at a multiple of the alignment.

    Parameters
    ----------
    metadata : keys in their order; an empty text or array is left out, as the gguf package does
    tensors : may be none
    alignment : of the tensors; a power of two, the value of ``general.alignment`` where the metadata has it
    """
    values = [(key, _value(value)) for key, value in metadata.items()]
    entries = [_text(key) + value for key, value in values if value is not None]
    offset = 0
    infos = []
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        infos.append(_text(tensor.name) + dims + struct.pack("<IQ", tensor.qtype, offset))
        offset += padded(tensor.nbytes, alignment)
    counts = struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(infos), len(entries))
    found = b"".join([counts, *entries, *infos])
    return found + bytes(padded(len(found), alignment) - len(found))


def padded(nbytes: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def write(
    path: Path,
    architecture: str,
    metadata: Metadata,
    tensors: Sequence[NewTensor],
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write a file, over an older one.

    Parameters
    ----------
    architecture : ``general.architecture``
    metadata : the other keys, in their order; an empty text or array is left out
    tensors : may be none
    progress : called with (bytes of tensors written, bytes in all) after each piece
    """
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    with path.open("wb", buffering=0) as file:
        write_all(file.write, header({"general.architecture": architecture, **metadata}, tensors))
        for tensor in tensors:
            for piece in tensor.pieces():
                data = piece if tensor.encode is None else tensor.encode(piece)
                write_all(file.write, data)
                done += data.nbytes
                if progress is not None:
                    progress(done, total)
            write_all(file.write, bytes(padded(tensor.nbytes, GGUF_DEFAULT_ALIGNMENT) - tensor.nbytes))


def write_all(write: Callable[[memoryview], int | None], data: bytes | np.ndarray) -> None:
    """Write all of some data to an unbuffered file, which may take a part of it at a time.

    Raises
    ------
    OSError
        The disk is full, for example.
    """
    view = memoryview(data if isinstance(data, bytes) else data.data).cast("B") if len(data) else memoryview(b"")
    while view:
        view = view[write(view[:WRITE_BYTES]) :]


def _text(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _value(value: Value) -> bytes | None:
    """A value as it is written: its type, and its bytes. None: it is left out."""
    if isinstance(value, Encoded):
        return value.raw
    if isinstance(value, bool):
        return encoded(GGUFValueType.BOOL, value).raw
    if isinstance(value, int):
        return encoded(GGUFValueType.UINT32, value).raw
    if isinstance(value, np.int32):
        return encoded(GGUFValueType.INT32, int(value)).raw
    if isinstance(value, float):
        return encoded(GGUFValueType.FLOAT32, value).raw
    if not len(value):
        return None
    if isinstance(value, str):
        return encoded(GGUFValueType.STRING, value).raw
    if isinstance(value, np.ndarray):
        kind, dtype = (GGUFValueType.FLOAT32, "<f4") if value.dtype.kind == "f" else (GGUFValueType.INT32, "<i4")
        return _array(kind, value.size, value.astype(dtype).tobytes())
    if isinstance(value[0], bool):
        return _array(GGUFValueType.BOOL, len(value), np.array(value, np.bool_).tobytes())
    return _array(GGUFValueType.STRING, len(value), b"".join(_text(str(each)) for each in value))


def _array(kind: GGUFValueType, count: int, raw: bytes) -> bytes:
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, count) + raw
