"""Output files: complete under their names or absent, and never written over the files that they are made from.

A file is written beside its place, as ``NAME.part``, and takes its name when it is complete, so that an
older file of that name survives every failure. A partial file that a killed process leaves is overwritten by the next
process that writes the file, or continued by one that knows what is in it (`pymla.files.gguf_output`).

Files that belong together, as the parts of a split model, take their names together, when all are complete.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    with replacing_all([path]) as parts:
        os.truncate(parts.paths[0], 0)
        yield parts.paths[0]


class Parts:
    """The partial files of outputs that are being written.

    Attributes
    ----------
    paths : list of Path
        In the order of the outputs.
    keep : bool
        Whether they stay if the block raises.
    """

    def __init__(self, outputs: Iterable[Path]):
        self.paths = [_part(path) for path in outputs]
        self.keep = False


@contextmanager
def replacing_all(outputs: Sequence[Path]) -> Iterator[Parts]:
    """Write files that take their names together, when all of them are complete, as `replacing`.

    Yields
    ------
    Parts
        The files to write, with the contents that an earlier process left. They are removed if the block raises, unless
        it has set `Parts.keep`.

    Raises
    ------
    PymlaError
        A file cannot be written, or another process is writing it.
    """
    for path in outputs:
        _check_place(path, devices=False)
    parts = Parts(outputs)
    try:
        with ExitStack() as locks:
            ours: list[Callable[[], bool]] = []
            try:
                for path, part in zip(outputs, parts.paths, strict=True):
                    ours.append(locks.enter_context(_locked(path, part)))
                yield parts
                for part in parts.paths:
                    with part.open("rb+") as file:
                        os.fsync(file)  # a disk may say only now that it is full
                _give_names(outputs, parts.paths)
            except BaseException:
                for is_still_ours, part in zip(ours, parts.paths, strict=False):
                    if not parts.keep and is_still_ours():
                        part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _cannot_write(outputs[0], error) from error


def _give_names(outputs: Sequence[Path], parts: Sequence[Path]) -> None:
    """Give partial files their names. Of several, the first comes last, and an older first one goes before: whoever
    opens the set meanwhile finds it incomplete, and never a mixture of old and new."""
    targets = [Path(os.path.realpath(path)) for path in outputs]
    for target, part in zip(targets, parts, strict=True):
        if target.exists():
            shutil.copymode(target, part)
    if len(targets) > 1:
        targets[0].unlink(missing_ok=True)
    for target, part in reversed(list(zip(targets, parts, strict=True))):
        part.replace(target)


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
    """Lock a partial file for this process, a new one if there is none. Yields a function that tells whether it still
    has its name."""
    if fcntl is None:
        # Windows neither replaces nor removes a file that another process has open: no lock is needed.
        part.touch()
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
