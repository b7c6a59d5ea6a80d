"""GGUF files, written piece by piece, so that memory need not hold a tensor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from pymla import ggml

#: A value of the metadata. An int is written as uint32, a NumPy int32 as that, a float as float32, arrays of numbers as
#: int32 or float32.
Value = bool | int | np.int32 | float | str | Sequence[str] | Sequence[bool] | np.ndarray
Metadata = Mapping[str, Value]


class NewTensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    qtype: int  # ggml type id
    pieces: Callable[[], Iterable[np.ndarray]]  # its bytes in order, in arrays of any shape and dtype

    @property
    def nbytes(self) -> int:
        return ggml.tensor_bytes(self.qtype, self.shape)


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
    metadata : the other keys, in their order; an empty text or array, which GGUF cannot hold, is left out
    tensors : may be none
    progress : called with (bytes of tensors written, bytes in all) after each piece
    """
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in tensors:
            kind = cast(GGMLQuantizationType, tensor.qtype)  # numbers of ik_llama.cpp's types, too
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, tensors, progress)
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, np.int32):
        writer.add_int32(key, int(value))
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        kind = GGUFValueType.FLOAT32 if value.dtype.kind == "f" else GGUFValueType.INT32
        writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, kind)
    else:
        writer.add_array(key, value)


def _write_tensors(
    writer: gguf.GGUFWriter, tensors: Sequence[NewTensor], progress: Callable[[int, int], object] | None
) -> None:
    assert writer.fout is not None  # the header was written
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    for tensor in tensors:
        for piece in tensor.pieces():
            file.write(piece.data)
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
        writer.write_padding(file, tensor.nbytes)
