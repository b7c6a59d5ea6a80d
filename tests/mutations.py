"""Damaged model files, drawn at random from sound ones: bytes of the header, metadata, tensors and their values."""

import math
import struct
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from pymla import ggml
from pymla.files.gguf_reader import ModelFile, TensorInfo

_ALIGNMENT = 32
_NUMBERS = (0, 1, 2, 3, -1, 7, 64, 255, 4096, 2**31 - 1, 2**32 - 1, 2**63 - 1, 0.5, -2.0, 1e30, math.nan, math.inf)
_STRINGS = ("", "deepseek2", "llama", "\x1b[31m", "yarn", "none", "gpt2", "x" * 3000)


def write(path: Path, metadata: dict, tensors: list[TensorInfo]) -> Path:
    """A GGUF file with any metadata and any tensors, sound or not. Faster than gguf-py, which refuses half of them."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _value(value)]
    at = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        head += [_string(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.qtype, at)]
        at += _padded(tensor.data.nbytes)
    header = b"".join(head)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for tensor in tensors:
            file.write(tensor.data.tobytes().ljust(_padded(tensor.data.nbytes), b"\0"))
    return path


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<Iq", GGUFValueType.INT64, value)
    if isinstance(value, float):
        return struct.pack("<Id", GGUFValueType.FLOAT64, value)
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value))
        return head + b"".join(map(_string, value))
    kind = GGUFValueType.FLOAT32 if value.dtype.kind == "f" else GGUFValueType.INT32
    data = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + data.tobytes()


class Mutator:
    """Damaged copies of a file, each from a seed of its own."""

    def __init__(self, path: Path):
        self._contents = path.read_bytes()
        file = ModelFile.open(path)
        self._metadata, self._tensors = file.metadata, list(file.tensors.values())
        self._header = len(self._contents) - sum(_padded(each.data.nbytes) for each in self._tensors)

    def write(self, path: Path, seed: int) -> str:
        """Write the copy; returns what was done to it."""
        rng = np.random.default_rng(seed)
        kinds = (self._bytes, self._cut, self._entry, self._entry, self._tensor, self._tensor, self._values)
        return kinds[seed % len(kinds)](path, rng)

    def _bytes(self, path, rng):
        """Bytes of the header, tensors' entries more often than the long vocabulary."""
        contents = bytearray(self._contents)
        entries = self._contents.index(self._tensors[0].name.encode())
        count = int(rng.integers(1, 4))
        places = rng.integers(entries if rng.random() < 0.7 else 0, self._header, count)
        for at in places.tolist():
            contents[at] = contents[at] ^ (1 << int(rng.integers(8))) if rng.random() < 0.5 else int(rng.integers(256))
        path.write_bytes(contents)
        return f"bytes {places.tolist()}"

    def _cut(self, path, rng):
        """Cut, or zero from some place to the end, or for some length."""
        how, at = ("cut", "no end", "a hole")[int(rng.integers(3))], int(rng.integers(len(self._contents)))
        stop = min(len(self._contents), at + int(rng.integers(1, 20_000))) if how == "a hole" else len(self._contents)
        tail = b"" if how == "cut" else bytes(stop - at) + self._contents[stop:]
        path.write_bytes(self._contents[:at] + tail)
        return f"{how} at {at} of {len(self._contents)}"

    def _entry(self, path, rng):
        """A key with another value, or without."""
        key = str(rng.choice(list(self._metadata)))
        metadata, old = dict(self._metadata), self._metadata[key]
        choices = [*_NUMBERS, *_STRINGS, True, False, [], ["a", "b"], np.arange(3), np.ones(2, np.float32), None]
        if isinstance(old, int | float) and rng.random() < 0.6:
            choices = [old + 1, old - 1, old * 2, old / 2, -old, int(old) // 2, 0, 1]
        value = choices[int(rng.integers(len(choices)))]
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value
        write(path, metadata, self._tensors)
        return f"{key} = {str(value)[:40]}"

    def _tensor(self, path, rng):
        """A tensor left out, named like another, or of another type or shape."""
        tensors = list(self._tensors)
        i, other = int(rng.integers(len(tensors))), tensors[int(rng.integers(len(tensors)))]
        old, how = tensors[i], int(rng.integers(6))
        if how == 0:
            del tensors[i]
        elif how == 1:
            tensors[i] = old._replace(name=old.name.replace("blk.", "blk.1") if rng.random() < 0.5 else old.name + "x")
        elif how == 2:
            tensors[i] = old._replace(shape=tuple(int(n) for n in rng.permutation(old.shape)))
        elif how == 3:
            tensors[i] = _sized(old, other.qtype, other.shape)
        elif how == 4:
            qtype = int(rng.choice([each for each in ggml.NAME if each >= 0]))
            tensors[i] = _sized(old, qtype, old.shape)
        else:
            tensors.append(old._replace(name=f"blk.{int(rng.integers(9))}.{old.name.split('.', 2)[-1]}"))
        write(path, self._metadata, tensors)
        return f"tensor {old.name} {('dropped', 'renamed', 'turned', 'replaced', 'retyped', 'repeated')[how]}"

    def _values(self, path, rng):
        """Bytes of a tensor: a single one, or a run of zeros or of ones, which are NaN."""
        tensors = list(self._tensors)
        i = int(rng.integers(len(tensors)))
        data = tensors[i].data.copy()
        at, how = int(rng.integers(data.size)), int(rng.integers(4))
        stop = (at + 1, at + int(rng.integers(1, 3000)), data.size, data.size)[how]
        at = 0 if how == 3 else at
        data[at:stop] = rng.choice([0, 255])
        tensors[i] = tensors[i]._replace(data=data)
        write(path, self._metadata, tensors)
        return f"tensor {tensors[i].name} {at} to {stop} of {data.size}"


def _sized(tensor: TensorInfo, qtype: int, shape: tuple[int, ...]) -> TensorInfo:
    """A tensor with another type and shape, and as many bytes as they need."""
    row = ggml.ROW_HEADER[qtype] + -(-shape[-1] // ggml.BLOCK_SIZE[qtype]) * ggml.BLOCK_BYTES[qtype]
    nbytes = row * math.prod(shape[:-1])
    return tensor._replace(qtype=qtype, shape=shape, data=np.resize(tensor.data, nbytes))
