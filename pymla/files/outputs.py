"""Output files: complete under their names or absent, and never written over the files that they are made from.

A file is written beside its place, as ``NAME.part``, and takes its name when it is complete, so that an
older file of that name survives every failure. A partial file that a killed process leaves is overwritten by the next
process that writes the file.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pymla.errors import PymlaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check(outputs: Mapping[str, Path], inputs: Iterable[Path] = (), devices: bool = False) -> None:
    """Fail early where a file could not be written, or would be written over something that is needed.

    Parameters
    ----------
    outputs : paths by the names that the user knows, such as ``--csv``
    inputs : files that are read meanwhile
    devices : whether a device or a pipe will do as well, such as ``/dev/stdout``

    Raises
    ------
    PymlaError
        Two outputs are one file, an output is an input or the file that standard output goes to, or it is no file in a
        folder that can be written.
    """
    inputs = list(inputs)
    names: dict[str, str] = {}
    for name, path in outputs.items():
        _check_place(path, devices)
        for each in inputs:
            if _is_same(path, each) or _is_same(_part(path), each):
                raise PymlaError(f"{path}: cannot be written, because {each} is read; choose another file for {name}")
        if _is_standard_stream(path):
            raise PymlaError(f"{path}: cannot be written, standard output goes there; choose another file for {name}")
        other = names.setdefault(os.path.realpath(path), name)
        if other != name:
            raise PymlaError(f"{path}: {other} and {name} are one file; give each its own")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file that takes its name only when it is complete.

    A symbolic link stays one: the file that it names is replaced.

    Yields
    ------
    Path
        The file to write, empty at first. It takes the name when the block ends, and is removed if the block raises.

    Raises
    ------
    PymlaError
        The file cannot be written, or another process is writing it.
    """
    _check_place(path, devices=False)
    target, part = Path(os.path.realpath(path)), _part(path)
    try:
        with _locked(path, part) as is_still_ours:
            try:
                yield part
                with part.open("rb+") as file:
                    os.fsync(file)  # a disk may say only now that it is full
                if target.exists():
                    shutil.copymode(target, part)
                part.replace(target)
            except BaseException:
                if is_still_ours():
                    part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_space(path: Path, needed: int) -> None:
    """Raise PymlaError where the disk has not `needed` bytes free for a file."""
    try:
        free = shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free
    except OSError as error:
        raise _cannot_write(path, error) from error
    if needed > free:
        raise PymlaError(f"{path}: needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free")


def write(path: Path, data: bytes) -> None:
    """Write a small file: `replacing` an older one, or straight to a device or a pipe.

    Raises
    ------
    PymlaError
        It cannot be written.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise _cannot_write(path, error) from error
        return
    with replacing(path) as part:
        part.write_bytes(data)


def _part(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(target.name + ".part")


def _cannot_write(path: Path, error: Exception) -> PymlaError:
    return PymlaError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def _check_place(path: Path, devices: bool) -> None:
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise PymlaError(f"{path}: cannot be written, it is a folder; name a file in it")
    if mode is not None and not stat.S_ISREG(mode):
        if not devices:
            raise PymlaError(f"{path}: cannot be written, it is a device or a pipe; choose a file")
        return
    part = _part(path)
    if not part.parent.is_dir():
        raise PymlaError(f"{path}: cannot be written; choose a file in a folder that exists")
    if not os.access(part.parent, os.W_OK | os.X_OK) or (mode is not None and not os.access(path, os.W_OK)):
        raise PymlaError(f"{path}: cannot be written, it or its folder is read-only; choose another place")
    mode = _mode(part)
    if mode is not None and not stat.S_ISREG(mode):
        raise PymlaError(f"{path}: cannot be written while {part} is there, which is no file; move it away")


def _mode(path: Path) -> int | None:
    """Type and permissions of the file or folder at a path; None where there is none."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # too long, under a file, or with a character that no path can have
        raise _cannot_write(path, error) from error


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths name one file."""
    try:
        return path.samefile(other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)


def _is_standard_stream(path: Path) -> bool:
    """Whether the program's own output goes to this file. A terminal or a pipe takes several outputs in turn."""
    for descriptor in (1, 2):
        try:
            stream, file = os.fstat(descriptor), path.stat()
        except OSError:
            continue
        if stat.S_ISREG(stream.st_mode) and os.path.samestat(stream, file):
            return True
    return False


@contextmanager
def _locked(path: Path, part: Path) -> Iterator[Callable[[], bool]]:
    """Lock an empty partial file for this process. Yields a function that tells whether it still has its name."""
    if fcntl is None:
        # Windows neither replaces nor removes a file that another process has open: no lock is needed.
        part.write_bytes(b"")
        yield lambda: True
        return
    descriptor = _open_locked(path, part)
    try:
        yield lambda: _is_open_as(descriptor, part)
    finally:
        os.close(descriptor)


def _open_locked(path: Path, part: Path) -> int:
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(path, descriptor)
            # Between opening and locking, another process may have given the file its final name, or removed it.
            if _is_open_as(descriptor, part):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PymlaError(f"{path}: another process is writing it; wait for that, or choose another name") from None
    except OSError:
        # The file system has no locks: there, nothing keeps two processes from writing one file at a time.
        pass


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
