"""Hugging Face checkpoints: the tensors of a folder of safetensors files, read piece by piece.

The format is eight bytes with the size of a JSON header, the header, then the tensors' bytes (Hugging Face's
``safetensors`` README). It is read here and not by the safetensors package, whose NumPy interface has no bfloat16.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.textfile import decode

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SCALE = "_scale_inv"
_MAX_HEADER = 100 << 20  # the safetensors package's own limit
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
}


class _Entry(NamedTuple):
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # its bytes in the file
    stop: int


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. A byte order mark, as some editors write it, is ignored.

    Raises
    ------
    PymlaError
        The file cannot be read or holds something else.
    """
    try:
        value = json.loads(decode(path.read_bytes(), path))
    except OSError as error:
        raise PymlaError(f"{path}: cannot be read ({error.strerror}); give a Hugging Face model folder") from error
    except ValueError as error:
        raise PymlaError(f"{path}: not valid JSON ({error}); download it again") from error
    except RecursionError as error:
        raise PymlaError(f"{path}: its JSON is nested too deeply; download it again") from error
    if not isinstance(value, dict):
        raise PymlaError(f"{path}: holds a JSON {type(value).__name__}, an object is expected")
    return value


class Checkpoint:
    """Tensors of a folder by name. Only headers are read when it is made.

    Parameters
    ----------
    folder : one with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files it names
    fp8_block : rows and columns that share a scale where weights are stored as float8, as DeepSeek V3's are; the
        scales of tensor ``x`` are in ``x_scale_inv``

    Attributes
    ----------
    names : set[str]
        Of all tensors, scales of float8 tensors excepted.

    Raises
    ------
    PymlaError
        A file is missing or damaged.
    """

    def __init__(self, folder: str | Path, fp8_block: tuple[int, int] = (128, 128)):
        self.folder = Path(folder)
        self._fp8_block = fp8_block
        self._entries: dict[str, _Entry] = {}
        for path in self._files():
            self._read_header(path)
        self.names = {
            name for name in self._entries if not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._entries)
        }

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there, readable and of a shape.

        Raises
        ------
        PymlaError
            It is not; the message says what is there instead.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise PymlaError(f"{self.folder}: tensor {name} is missing; config.json and weights do not belong together")
        if entry.shape != shape:
            raise PymlaError(f"{entry.path}: tensor {name} has shape {entry.shape}; config.json asks for {shape}")
        if entry.dtype not in _DTYPES:
            raise PymlaError(f"{entry.path}: tensor {name} is of type {entry.dtype}; {', '.join(_DTYPES)} are read")
        itemsize = _DTYPES[entry.dtype].itemsize
        if entry.stop - entry.start != math.prod(shape) * itemsize or entry.stop > entry.path.stat().st_size:
            raise PymlaError(f"{entry.path}: tensor {name} does not fit the file; it is truncated, download it again")
        if entry.dtype == "F8_E4M3":
            if len(shape) != 2:
                raise PymlaError(f"{entry.path}: tensor {name} is float8 of shape {shape}; only matrices are read")
            blocks = zip(shape, self._fp8_block, strict=True)
            self.expect(name + _SCALE, tuple(-(-size // block) for size, block in blocks))

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, float32, in its shape."""
        shape = self._entries[name].shape
        return self.rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor seen as a matrix, all leading dimensions as one: float32 (stop - start, columns).

        Raises
        ------
        PymlaError
            The file cannot be read, or a value is infinite or not a number.
        """
        entry = self._entries[name]
        columns = entry.shape[-1]
        dtype = _DTYPES[entry.dtype]
        try:
            raw = np.fromfile(
                entry.path, dtype, (stop - start) * columns, offset=entry.start + start * columns * dtype.itemsize
            )
        except OSError as error:
            raise PymlaError(f"{entry.path}: cannot be read ({error.strerror})") from error
        raw = raw.reshape(stop - start, columns)
        if entry.dtype == "BF16":
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        elif entry.dtype == "F8_E4M3":
            rows, columns = np.arange(start, stop) // self._fp8_block[0], np.arange(columns) // self._fp8_block[1]
            values = _E4M3[raw] * self.read(name + _SCALE)[rows[:, None], columns]
        else:
            values = raw.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise PymlaError(f"{entry.path}: tensor {name} holds infinity or NaN; download it again")
        return values

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.exists():
            single = self.folder / SINGLE
            if not single.exists():
                raise PymlaError(f"{self.folder}: neither {SINGLE} nor {INDEX} is there; other formats are not read")
            return [single]
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise PymlaError(f"{index}: no weight_map of tensors to files; download it again")
        paths = [self.folder / name for name in sorted(set(names.values()))]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise PymlaError(f"{missing[0]}: {len(missing)} of the {len(paths)} files that {INDEX} names are missing")
        return paths

    def _read_header(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= min(_MAX_HEADER, size - 8):
                    raise PymlaError(f"{path}: not a safetensors file, or truncated: its header takes {length} bytes")
                header = json.loads(file.read(length))
        except OSError as error:
            raise PymlaError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise PymlaError(f"{path}: its header is not valid JSON ({error}); download it again") from error
        if not isinstance(header, dict):
            raise PymlaError(f"{path}: its header holds a JSON {type(header).__name__}, an object is expected")
        header.pop("__metadata__", None)
        for name, fields in header.items():
            self._entries[name] = _entry(path, name, fields, 8 + length)


def _entry(path: Path, name: str, fields: Any, data_start: int) -> _Entry:
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise PymlaError(f"{path}: tensor {name} has a damaged header entry; download it again") from error
    numbers_fit = all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop))
    if not (numbers_fit and isinstance(dtype, str)):
        raise PymlaError(f"{path}: tensor {name} has a damaged header entry; download it again")
    return _Entry(path, dtype, shape, data_start + start, data_start + stop)


def _e4m3() -> np.ndarray:
    """Values of the 256 float8 codes of one sign, four exponent and three mantissa bits; 127 and 255 are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(code & 127) == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)


_E4M3 = _e4m3()
