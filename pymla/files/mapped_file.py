"""A file mapped into memory: checks that it is unchanged, read-ahead, and making all of its pages present.

A mapped file that becomes shorter kills the process at the next access, and one that is overwritten changes the weights
of a model that runs: hence the checks.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from pymla.errors import PymlaError

MADV_POPULATE_READ = 22  # <linux/mman.h> since 5.14; the mmap module has no name for it

#: Bytes that `prefault` makes present at a time.
PREFAULT_SLICE = 256 << 20

# If the modification time of a file changes, so many pieces of it, spread over its length, are compared with their
# contents when the file was opened.
_PIECES = 16
_PIECE_BYTES = 4096


class MappedFile:
    """An open file, mapped read-only.

    Attributes
    ----------
    path : Path
    map : mmap
    nbytes : int
    begin : int
        Address of the first byte.

    Raises
    ------
    PymlaError
        The file cannot be opened, or is empty.
    """

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
        """Raise PymlaError if something wrote to the file since it was opened, in a microsecond.

        A file that was replaced or deleted is fine, for its contents stay mapped; so is one whose modification time
        alone changed.

        Raises
        ------
        PymlaError
            The file has another size or other contents; 16 pieces are compared if the modification time changed.
        """
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

    def fetch_ahead(self, data: np.ndarray, pieces: Iterable[tuple[int, int]]) -> None:
        """Have pieces of `data`, a view of the map, read from disk, without waiting: from byte, to byte."""
        begin = data.ctypes.data - self.begin
        for first, stop in pieces:
            start = (begin + first) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # it is only advice
                self.map.madvise(mmap.MADV_WILLNEED, start, begin + stop - start)

    def read(self, data: np.ndarray) -> np.ndarray:
        """The bytes of `data`, a view of the map, from the disk instead of the map: uint8 (n,)."""
        begin, found = data.ctypes.data - self.begin, np.empty(data.nbytes, np.uint8)
        view = found.data
        try:
            while view and (count := os.preadv(self._descriptor, [view], begin + data.nbytes - len(view))):
                view = view[count:]
        except OSError as error:
            raise PymlaError(f"{self.path}: cannot be read ({error.strerror})") from error
        if view:
            self._refuse("the file has become shorter")
        return found

    def pages_of(self, views: Iterable[np.ndarray]) -> list[tuple[int, int]]:
        """The whole pages that hold some views of the map: from byte, to byte, without gaps between neighbours."""
        spans: list[tuple[int, int]] = []
        for offset, nbytes in sorted((data.ctypes.data - self.begin, data.nbytes) for data in views):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            stop = min(-(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE, self.nbytes)
            if spans and start <= spans[-1][1]:
                start, stop = spans[-1][0], max(stop, spans.pop()[1])
            spans.append((start, stop))
        return spans

    def _refuse(self, reason: str) -> NoReturn:
        raise PymlaError(f"{self.path}: {reason}: it was changed in place. Load the model again once it is complete")

    def _read_digest(self) -> bytes:
        """Digest of pieces spread over the file, its first and its last bytes among them. They are not read through
        the map, so that a file that was cut gives other pieces instead of a signal."""
        digest = hashlib.blake2b()
        for number in range(_PIECES):
            start = max(0, self.nbytes - _PIECE_BYTES) * number // (_PIECES - 1)
            digest.update(os.pread(self._descriptor, _PIECE_BYTES, start))
        return digest.digest()


def prefault(
    spans: Sequence[tuple[MappedFile, int, int]], progress: Callable[[int, int], object] | None = None
) -> None:
    """Make pages of files present, so that later reads do not stop for page faults.

    ``madvise(MADV_POPULATE_READ)`` (Linux 5.14) does it in 0.05 s per GiB of cached file; where it is not available,
    one byte of each page is read.

    Parameters
    ----------
    spans : file, from byte, to byte; they begin with a page
    progress : called with (bytes done, bytes in all) after each 256 MiB

    Raises
    ------
    PymlaError
        A file cannot be read, or was changed meanwhile.
    """
    done, total = 0, sum(stop - start for _, start, stop in spans)
    make_present = populate if sys.platform == "linux" else _touch
    for file, first, last in spans:
        for start in range(first, last, PREFAULT_SLICE):
            length = min(PREFAULT_SLICE, last - start)
            file.check_unchanged()
            try:
                make_present(file.map, start, length)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    file.check_unchanged()  # the pages are missing because the file was cut
                    raise PymlaError(f"{file.path}: cannot be read: {error.strerror}") from error
                make_present = _touch  # the kernel is older than the advice
                make_present(file.map, start, length)
            done += length
            if progress is not None:
                progress(done, total)


def populate(mapped: mmap.mmap, start: int, length: int) -> None:
    """Make pages present by the system's advice, or raise OSError."""
    mapped.madvise(MADV_POPULATE_READ, start, length)


def _touch(mapped: mmap.mmap, start: int, length: int) -> None:
    np.frombuffer(mapped, np.uint8, length, start)[:: mmap.PAGESIZE].max()
