"""GGUF files that are written whole or not at all, and that go on where an interrupted run stopped.

Each file is written beside its place, and all take their names together at the end (`pymla.files.outputs`). Every
`RECORD_BYTES` or more, what is written so far is forced to the disk and recorded in a journal beside the first partial
file, both in a thread. If the run is interrupted or killed, or the disk is full, partial files and journal stay, and a
run that would write the same bytes starts with the first tensor that is not recorded: one whose inputs have the same
sizes and times, that would write the same metadata, tensors and types, and is of the same version of pymla. Any other
run begins anew. Nothing stays where less than that was written, or where the input was refused (`Refused`).
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.files.gguf_parts import NewFile
from pymla.files.gguf_writer import NewTensor, padded, write_all
from pymla.files.journal import Journal
from pymla.host.read_ahead import read_ahead

#: Bytes that are written between two records in the journal, at least.
RECORD_BYTES = 256 << 20

#: Told of (bytes written, bytes in all, the tensor that is being written): once before the first, and after each piece.
Progress = Callable[[int, int, str], object]


class Refused(PymlaError):
    """The input holds what must not be written: another run of the same input would not get further."""


class Resume(NamedTuple):
    """What a run that may be interrupted, and go on later, knows of its inputs and its result."""

    #: Files that are read. None of them is written over, and a run begins anew where one of them has changed.
    inputs: Sequence[Path]
    #: Told, in one line each, what becomes of an interrupted run.
    note: Callable[[str], object] = lambda text: None
    #: Told of the files when they are complete. If it raises PymlaError, none of them takes its name.
    check: Callable[[Sequence[Path]], object] = lambda files: None


def write_files(files: Sequence[NewFile], resume: Resume | None = None, progress: Progress | None = None) -> None:
    """Write GGUF files, which appear under their names when all are complete.

    Pieces are made in a thread while earlier ones are encoded and written. Memory holds a few of them.

    Parameters
    ----------
    files : one, or the parts of a split model
    resume : None: the run begins anew, and leaves nothing if it is interrupted
    progress : a `Progress`

    Raises
    ------
    PymlaError
        A file cannot be written or is an input, another process is writing it, or the disk has not enough room.
    """
    paths = [file.path for file in files]
    names = ["the output"] if len(files) == 1 else [f"part {number + 1}" for number in range(len(files))]
    outputs.check(dict(zip(names, paths, strict=True)), resume.inputs if resume else ())
    run = _Run(files)
    journal: Journal | None = None
    try:
        with outputs.replacing_all(paths) as parts, ExitStack() as stack:
            start = 0
            if resume is not None:
                first = parts.paths[0]
                journal = Journal(first.with_name(f"{first.name}.journal"), run.key(resume.inputs))
                start = _resumed(run, journal, parts.paths, resume.note)
            try:
                opened = run.open(parts.paths, start, stack)
                outputs.check_space(paths[0], run.total - run.ends[start])
                _Writing(run, opened, journal, progress).write(start)
                if resume is not None:
                    _check(parts.paths, resume)
            except Refused:
                if journal is not None:
                    journal.remove()
                raise
            finally:
                parts.keep = journal is not None and journal.exists
    except BaseException:
        if resume is not None and journal is not None and journal.exists:
            resume.note(f"{paths[0]}: interrupted; the same command goes on where it stopped")
        raise
    if journal is not None:
        journal.remove()


@functools.cache
def _program() -> bytes:
    """A digest of this package's sources, which is the version of the program that writes, also between releases."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.blake2b()
    for source in sorted(package.rglob("*.py")):
        digest.update(f"{source.relative_to(package)}\0".encode() + source.read_bytes())
    return digest.digest()


def _check(paths: Sequence[Path], resume: Resume) -> None:
    try:
        resume.check(paths)
    except PymlaError as error:
        raise Refused(str(error)) from error


class _Run:
    """The files of a run, and where each tensor ends in them.

    Attributes
    ----------
    tensors : list of (int, NewTensor, int)
        The number of the file of each tensor, the tensor, and the bytes that follow it.
    ends : list of int
        Bytes of all files, headers included, before the first tensor, after the first, and so on.
    total : int
        Bytes of all files.
    """

    def __init__(self, files: Sequence[NewFile]):
        self.headers = [file.header() for file in files]
        self.tensors: list[tuple[int, NewTensor, int]] = []
        self.ends = [sum(map(len, self.headers))]
        for number, file in enumerate(files):
            for tensor in file.tensors:
                size = padded(tensor.nbytes, file.alignment)
                self.tensors.append((number, tensor, size - tensor.nbytes))
                self.ends.append(self.ends[-1] + size)
        self.total = self.ends[-1]

    def key(self, inputs: Iterable[Path]) -> str:
        """A digest that two runs share only if they write the same bytes."""
        digest = hashlib.blake2b(_program(), digest_size=32)
        for header in self.headers:
            digest.update(len(header).to_bytes(8, "little") + header)
        for path in inputs:
            try:
                found = path.stat()
            except OSError as error:
                raise PymlaError(f"{path}: cannot be read ({error.strerror})") from error
            digest.update(f"{os.path.realpath(path)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="replace"))
        return digest.hexdigest()

    def sizes(self, start: int) -> list[int]:
        """Bytes of each file when `start` tensors are complete."""
        found = list(map(len, self.headers))
        for number, tensor, padding in self.tensors[:start]:
            found[number] += tensor.nbytes + padding
        return found

    def open(self, paths: Sequence[Path], start: int, stack: ExitStack) -> list[FileIO]:
        """The files, with their headers, positioned behind what is complete."""
        opened = []
        for path, header, size in zip(paths, self.headers, self.sizes(start), strict=True):
            file = stack.enter_context(FileIO(path, "r+"))
            # Of an interrupted run only what is recorded is certainly on the disk: not the headers of later files.
            write_all(file.write, header)
            file.truncate(size)
            file.seek(size)
            opened.append(file)
        return opened


def _resumed(run: _Run, journal: Journal, paths: Sequence[Path], note: Callable[[str], object]) -> int:
    """Tensors that an interrupted run has completed."""
    complete = journal.read()
    if complete is None:
        note(f"{paths[0]}: of an interrupted run with other inputs, options or version; it begins anew")
        journal.remove()
        return 0
    if not 0 < complete <= len(run.tensors):
        return 0
    if any(path.stat().st_size < size for path, size in zip(paths, run.sizes(complete), strict=True)):
        note(f"{paths[0]}: has become shorter since it was interrupted; it begins anew")
        journal.remove()
        return 0
    share = 100 * run.ends[complete] / run.total
    note(f"{paths[0]}: {share:.0f} % are there from an interrupted run, which goes on")
    return complete


class _Writing:
    """Writes the tensors of a run to files that are open."""

    def __init__(self, run: _Run, files: Sequence[FileIO], journal: Journal | None, progress: Progress | None):
        self._run, self._files, self._journal = run, files, journal
        self._progress = progress or (lambda done, total, name: None)

    def write(self, start: int) -> None:
        """Write the tensors from `start` on."""
        tensors = self._run.tensors
        if start < len(tensors):
            self._progress(self._run.ends[start], self._run.total, tensors[start][1].name)
        with ExitStack() as stack:
            records = None
            if self._journal is not None:
                records = stack.enter_context(closing(_Records(self._journal, self._files, self._run.ends[start])))
            pieces = stack.enter_context(closing(read_ahead(self._pieces(start))))
            complete = self._write_pieces(pieces, start, records)
            if complete < len(tensors):
                raise ValueError(f"{tensors[complete][1].name}: its pieces are fewer than its bytes")
            if records is not None:
                records.wait()

    def _pieces(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """The pieces of the tensors from `start` on, with the number of their tensor."""
        for number, (_, tensor, _) in enumerate(self._run.tensors[start:], start):
            for piece in tensor.pieces():
                yield number, piece

    def _write_pieces(self, pieces: Iterator[tuple[int, np.ndarray]], complete: int, records: "_Records | None") -> int:
        """Write pieces; `complete` tensors are. Returns how many are complete in the end."""
        run, written = self._run, 0
        for number, piece in pieces:
            file, tensor, padding = run.tensors[number]
            data = piece if tensor.encode is None else tensor.encode(piece)
            written += data.nbytes
            if number != complete or written > tensor.nbytes:
                name = run.tensors[min(number, complete)][1].name
                raise ValueError(f"{name}: its pieces are not its bytes")
            write_all(self._files[file].write, data)
            self._progress(run.ends[number] + written, run.total, tensor.name)
            if written == tensor.nbytes:
                write_all(self._files[file].write, bytes(padding))
                complete, written = complete + 1, 0
                if records is not None:
                    records.completed(complete, run.ends[complete], file)
        return complete


class _Records:
    """Forces files to the disk and records in the journal what is complete, in a thread.

    Parameters
    ----------
    journal : Journal
    files : open for writing
    nbytes : of all files, that are complete at first
    """

    def __init__(self, journal: Journal, files: Sequence[FileIO], nbytes: int):
        self._journal, self._files, self._recorded = journal, files, nbytes
        self._thread = ThreadPoolExecutor(1, "pymla-journal")
        self._running: Future[None] | None = None
        self._first = 0  # the first file of which not all is on the disk

    def completed(self, count: int, nbytes: int, file: int) -> None:
        """Take note that `count` tensors are complete, which are `nbytes` bytes of all files, the last in `file`."""
        if nbytes - self._recorded < RECORD_BYTES or (self._running and not self._running.done()):
            return
        self.wait()
        files = self._files[self._first : file + 1]
        self._recorded, self._first = nbytes, file
        try:
            self._running = self._thread.submit(self._record, files, count)
        except RuntimeError:  # a limit on processes
            self._record(files, count)

    def wait(self) -> None:
        """Wait for the record that is being made, and raise what went wrong with it."""
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        """End the thread, with the record that it is making."""
        self._thread.shutdown()

    def _record(self, files: Sequence[FileIO], count: int) -> None:
        for file in files:
            os.fsync(file.fileno())
        self._journal.record(count)
