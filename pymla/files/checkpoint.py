"""Hugging Face checkpoints: the tensors of a folder of safetensors files, read piece by piece as they are stored.

The format is eight bytes with the size of a JSON header, the header, then the tensors' bytes (Hugging Face's
``safetensors`` README). It is read here and not by the safetensors package, whose NumPy interface has no bfloat16.
Numbers are made of what is stored in `pymla.make.hub_weights`.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.files import int4_columns
from pymla.files.checkpoint_encodings import DTYPES, Encoding, Entry, Quantisation, encoding, weights
from pymla.files.textfile import decode

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# One of several files of a checkpoint, as it is named where there is no index.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors", re.ASCII)
_MAX_JSON = 1 << 30
_MAX_HEADER = 100 << 20  # the safetensors package's own limit
_MAX_NAME = 200
_MAX_DIMS = 8


class StoredRows(NamedTuple):
    """Rows of a weight, seen as a matrix, as they are stored."""

    encoding: Encoding
    codes: np.ndarray  # (rows, ...), of the type of `DTYPES`
    scales: np.ndarray | None = None  # those of the blocks that hold the rows: (block rows, block columns)
    first: int = 0  # rows of the first block that lie before them
    zeros: np.ndarray | None = None  # the codes that stand for 0, uint8 like `scales`; None: 8
    factor: float = 1.0  # of all scales


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. A byte order mark, as some editors write it, is ignored.

    Raises
    ------
    PymlaError
        The file cannot be read or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise PymlaError(f"{path}: larger than any JSON file of a model; download it again")
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
    folder : one with ``model.safetensors.index.json`` and the files that it names in the folder, with
        ``model.safetensors``, with all of ``NAME-00001-of-00003.safetensors`` and so on, or with one other file
    quantisation : what config.json says of quantised weights

    Attributes
    ----------
    names : set[str]
        Of all weights. Scales, and what else belongs to the weights beside them, have no name here.
    files : list[Path]
        All files that are read.

    Raises
    ------
    PymlaError
        A file is missing or damaged, a tensor is in two of them or not where the index says, or it is not clear which
        files belong together.
    """

    def __init__(self, folder: str | Path, quantisation: Quantisation | None = None):
        self.folder = Path(folder)
        self._quantisation = quantisation or Quantisation()
        self._entries: dict[str, Entry] = {}
        self._encodings: dict[str, Encoding] = {}
        present = _names_in(self.folder)
        places = _read_index(self.folder / INDEX, present) if INDEX in present else {}
        names = sorted(set(places.values())) or _without_index(self.folder, present)
        paths = [self.folder / name for name in names]
        self.files = [*paths, self.folder / INDEX] if places else paths
        for path in paths:
            self._add(path)
        self._check_places(places)
        self.names = weights(self._entries)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a weight is there, readable and of a shape.

        Raises
        ------
        PymlaError
            The weight or its scales are missing, of another shape or type, or truncated; the message says which.
        """
        found = self.encoding(name)
        if found.shape != shape:
            path = found.codes.path
            raise PymlaError(f"{path}: tensor {name} has shape {found.shape}; config.json asks for {shape}")

    def encoding(self, name: str) -> Encoding:
        """How a weight is stored; see `expect` for what it raises."""
        found = self._encodings.get(name)
        if found is None:
            found = self._encodings[name] = encoding(self._entries, name, self.folder, self._quantisation)
        return found

    def stored(self, name: str, start: int, stop: int) -> StoredRows:
        """Rows of a weight seen as a matrix, all leading dimensions as one.

        Raises
        ------
        PymlaError
            The file cannot be read, or `encoding` raises.
        """
        found = self.encoding(name)
        if found.zeros is not None:
            codes, scales, zeros = int4_columns.read_rows(found, start, stop)
            return StoredRows(found, codes, scales, zeros=zeros)
        codes = _read_rows(found.codes, start, stop)
        if found.scales is None:
            return StoredRows(found, codes)
        block = found.block[0]
        columns = -(-found.shape[-1] // found.block[1])
        scales = _read_rows(found.scales, start // block, -(-stop // block), columns)
        factor = 1.0 if found.factor is None else float(_read_rows(found.factor, 0, 1, 1)[0, 0])
        return StoredRows(found, codes, scales, start % block, factor=factor)

    def _add(self, path: Path) -> None:
        """Take in the tensors of a file."""
        for name, entry in _read_header(path).items():
            other = self._entries.setdefault(name, entry)
            if other is not entry:
                raise PymlaError(
                    f"{path}: tensor {name} is also in {other.path.name}; keep the files of one model only"
                )

    def _check_places(self, places: dict[str, str]) -> None:
        """Raise PymlaError unless each tensor that the index names is in the file that it names."""
        for name, file in places.items():
            entry = self._entries.get(name)
            if entry is None:
                raise PymlaError(f"{self.folder / file}: lacks tensor {name}, which {INDEX} says it has")
            if entry.path.name != file:
                raise PymlaError(f"{entry.path}: has tensor {name}, which {INDEX} says is in {file}")


def _names_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise PymlaError(f"{folder}: cannot be read ({error.strerror}); give a Hugging Face model folder") from error
    except ValueError as error:  # a character that no path can have
        raise PymlaError(f"{str(folder)!r}: {error}; give a Hugging Face model folder") from error


def _read_index(path: Path, present: set[str]) -> dict[str, str]:
    """Names of tensors and of the files that hold them."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise PymlaError(f"{path}: no weight_map of tensors to files; download it again")
    for name in places:
        _check_tensor_name(path, name)
    files = sorted(set(places.values()))
    for file in files:
        # A downloaded index must not make this program read files outside the folder.
        if not _is_fit_to_print(file) or {"/", "\\"} & set(file) or file in ("", ".", ".."):
            raise PymlaError(f"{path}: weight_map names {ascii(file)[:100]}; the name of a file beside it is expected")
    missing = [file for file in files if file not in present]
    if missing:
        raise PymlaError(
            f"{path.with_name(missing[0])}: {len(missing)} of the {len(files)} files that {INDEX} names are missing"
        )
    return places


def _without_index(folder: Path, present: set[str]) -> list[str]:
    """The files of a folder that has no index."""
    if SINGLE in present:
        return [SINGLE]
    names = sorted(name for name in present if name.endswith(".safetensors") and name[0] != ".")
    if not names:
        raise PymlaError(f"{folder}: neither {SINGLE} nor {INDEX} is there; other formats are not read")
    shards = [_SHARD.fullmatch(name) for name in names]
    # Files of one set have the same stem and the same count; any other file is a set of its own.
    sets = {(shard["stem"], shard["count"]) if shard else name for name, shard in zip(names, shards, strict=True)}
    if len(sets) > 1:
        raise PymlaError(
            f"{folder}: {len(names)} safetensors files of {len(sets)} sets and neither {SINGLE} nor {INDEX}; "
            "keep the files of one model only, or download its index"
        )
    if shards[0] is None:
        return names
    count, numbers = int(shards[0]["count"]), sorted(int(shard["number"]) for shard in shards if shard)
    if len(numbers) != count or numbers != list(range(1, count + 1)):
        missing = next((number for number in range(1, count + 1) if number not in numbers), "none")
        raise PymlaError(
            f"{folder}: {len(names)} files are there of the {count} of which {names[0]} is one (first that is missing: "
            f"{missing}); download all of them"
        )
    return names


def _read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise PymlaError(f"{path}: not a safetensors file, or truncated: its header takes {length} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise PymlaError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise PymlaError(f"{path}: its header is not valid JSON ({error}); download it again") from error
    except RecursionError as error:
        raise PymlaError(f"{path}: its header is nested too deeply; download it again") from error
    if not isinstance(header, dict):
        raise PymlaError(f"{path}: its header holds a JSON {type(header).__name__}, an object is expected")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    end, last = 0, None
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            raise PymlaError(f"{path}: tensors {last} and {name} overlap; download it again")
        end, last = entry.stop, name
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a header's JSON, in which a name must not occur twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_tensor_name(path: Path, name: str) -> None:
    if not _is_fit_to_print(name):
        raise PymlaError(f"{path}: a tensor's name, {ascii(name)[:100]}, is not printable; download it again")


def _is_fit_to_print(name: str) -> bool:
    """Whether a name from a file can go into a message."""
    return name.isprintable() and len(name) <= _MAX_NAME


def _entry(path: Path, name: str, fields: Any, data_start: int) -> Entry:
    _check_tensor_name(path, name)
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise PymlaError(f"{path}: tensor {name} has a damaged header entry; download it again") from error
    # Later messages quote these values, so they must be short and printable.
    numbers_fit = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, stop))
    names_fit = isinstance(dtype, str) and _is_fit_to_print(dtype)
    if not (numbers_fit and names_fit and start <= stop and len(shape) <= _MAX_DIMS):
        raise PymlaError(f"{path}: tensor {name} has a damaged header entry; download it again")
    return Entry(path, dtype, shape, data_start + start, data_start + stop)


def _read_rows(entry: Entry, start: int, stop: int, columns: int | None = None) -> np.ndarray:
    """Rows of a tensor seen as a matrix, whose columns are those of its last dimension where nothing is said."""
    columns, dtype = entry.shape[-1] if columns is None else columns, DTYPES[entry.dtype]
    count, offset = (stop - start) * columns, entry.start + start * columns * dtype.itemsize
    try:
        raw = np.fromfile(entry.path, dtype, count, offset=offset)
    except OSError as error:
        raise PymlaError(f"{entry.path}: cannot be read ({error.strerror or error})") from error
    if raw.size != count:
        raise PymlaError(f"{entry.path}: has become shorter while it was read; download it again")
    return raw.reshape(stop - start, columns)
