"""Importance matrices in llama.cpp's older format, ``.dat``, which ik_llama.cpp still writes.

Little-endian: a number of entries, int32; for each a name (int32 length, bytes), the number of calls, int32, the number
of values, int32, and float32 values: mean squared inputs times the number of calls. Behind them, in all but the oldest
files, the number of pieces of text, int32, and the name of the text (int32 length, bytes). Experts have no counts of
their own. llama.cpp: ``save_imatrix_legacy`` of ``tools/imatrix/imatrix.cpp``, ``common/imatrix-loader.cpp``.
"""

import struct
from pathlib import Path

import numpy as np

from pymla.errors import PymlaError
from pymla.files.imatrix_entries import MOST, Entry, ImatrixData, checked
from pymla.printable import shown

_INT32 = struct.Struct("<i")


class _Reader:
    """The bytes of a file, from the first to the last."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes = path.read_bytes()
        except OSError as error:
            raise PymlaError(f"{path}: cannot be opened: {error.strerror or error}") from error
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._bytes) - self._at

    def take(self, nbytes: int, what: str) -> int:
        """Where the next bytes begin; they are checked to be in the file, and passed."""
        if not 0 <= nbytes <= self.left:
            raise PymlaError(
                f"{self.path}: no importance matrix, or a damaged one: {nbytes} bytes for {what} do not fit the "
                f"{self.left} that are left"
            )
        self._at += nbytes
        return self._at - nbytes

    def int32(self, what: str) -> int:
        start = self.take(_INT32.size, what)
        return _INT32.unpack_from(self._bytes, start)[0]

    def text(self, nbytes: int, what: str) -> str:
        """A name, which a zero byte may end early."""
        start = self.take(nbytes, what)
        raw = self._bytes[start : start + nbytes].split(b"\0")[0]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise PymlaError(f"{self.path}: {what}, {shown(raw)}, is not valid UTF-8") from None

    def floats(self, count: int, what: str) -> np.ndarray:
        return np.frombuffer(self._bytes, "<f4", count, self.take(4 * count, what))


def read(path: Path) -> ImatrixData:
    """Read a file. Its entries count calls, not tokens: `ImatrixData.chunk_size` is 0.

    Raises
    ------
    PymlaError
        The file cannot be read, or is none of this format.
    """
    reader = _Reader(path)
    count = reader.int32("the number of entries")
    if count < 1:
        raise PymlaError(f"{path}: neither a GGUF file nor an importance matrix: it begins with {count} entries")
    entries: dict[str, Entry] = {}
    for number in range(1, count + 1):
        name = reader.text(reader.int32(f"entry {number}"), f"the name of entry {number}")
        if name in entries:
            raise PymlaError(f"{path}: {shown(name)} occurs twice; the file is damaged")
        calls, size = reader.int32(f"calls of {shown(name)}"), reader.int32(f"the size of {shown(name)}")
        if size < 1:
            raise PymlaError(f"{path}: {shown(name)} has {size} values; the file is damaged")
        values = reader.floats(size, f"values of {shown(name)}")
        # Values without calls are means, as llama-quantize takes them.
        entries[name] = checked(path, name, values, np.array([max(calls, 1)], np.int64))
    chunks, datasets = _trailer(reader)
    return ImatrixData(entries, datasets, chunks, 0)


def _trailer(reader: _Reader) -> tuple[int, tuple[str, ...]]:
    """The number of pieces of text and the name of the text, as far as they are there."""
    if reader.left < _INT32.size:
        return 0, ()
    chunks = max(0, reader.int32("the number of chunks"))
    if reader.left < _INT32.size:
        return chunks, ()
    nbytes = reader.int32("the name of the text")
    if not 0 < nbytes <= reader.left:
        return chunks, ()
    return chunks, (reader.text(nbytes, "the name of the text"),)


def write(path: Path, data: ImatrixData) -> None:
    """Write a file, over an older one, as llama.cpp does: entries without any input are left out, and columns of an
    expert that was never chosen are 1.

    Parameters
    ----------
    data : ImatrixData
        With a `chunk_size`, as counts are tokens.
    """
    entries = {name: entry for name, entry in sorted(data.entries.items()) if entry.counts.any()}
    with path.open("wb") as file:
        file.write(_INT32.pack(len(entries)))
        for name, entry in entries.items():
            calls = min(-(-int(entry.counts.max()) // max(1, data.chunk_size)), MOST)
            seen = entry.counts[:, None] > 0
            means = np.where(seen, entry.sums / np.maximum(entry.counts[:, None], 1), 1.0)
            values = (means * calls).astype("<f4")
            raw = name.encode()
            file.write(_INT32.pack(len(raw)) + raw + _INT32.pack(calls) + _INT32.pack(values.size))
            file.write(values.data)
        dataset = (data.datasets[-1] if data.datasets else "").encode(errors="replace")
        file.write(_INT32.pack(data.chunks) + _INT32.pack(len(dataset)) + dataset)
