"""Files of machine code: one for each kernel, which begins with a digest and is used only if that is right.

Machine code that was cut short, changed or exchanged must not be run, nor even be unpickled: a kernel whose file is
missing or wrong is compiled again. What cannot be kept is a warning, and kernels are compiled in every run.
"""

import contextlib
import hashlib
import os
import re
import threading
from pathlib import Path

#: Messages that `take_warnings` has not given yet, and all that there were.
_waiting, _known = [], set()


class KernelCache:
    """The files of one state of sources and tools, in a folder of their own.

    The folder is below ``PYMLA_CACHE_DIR``, or ``pymla`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Parameters
    ----------
    key : callable() -> str
        The folder's name: a digest of all that machine code is made from (`pymla.host.source_key`).
    """

    def __init__(self, key):
        self._key = key
        #: Contents of files that `__contains__` has read and `read` has not been asked for yet.
        self._checked = {}

    @property
    def folder(self):
        """The folder, which need not exist; None: there is none that can be used, and a warning says why."""
        root = _root()
        folder = root and root / self._key()
        if folder is None or not _is_trusted(folder):
            return None
        return folder

    def __contains__(self, name):
        """Whether there is a file for a kernel, and it is not damaged. `read` then gives its bytes without another
        look."""
        data = self._read(name)
        if data is not None:
            self._checked[name] = data
        return data is not None

    def read(self, name):
        """The bytes that were written for a kernel; None where there is no file, or a damaged one."""
        data = self._checked.pop(name, None)
        return self._read(name) if data is None else data

    def _read(self, name):
        folder = self.folder
        if folder is None:
            return None
        try:
            content = (folder / _file_name(name)).read_bytes()
        except OSError:
            return None
        digest, data = content[: hashlib.sha256().digest_size], content[hashlib.sha256().digest_size :]
        return data if digest == self._digest(name, data) else None

    def write(self, name, data):
        """Keep the bytes of a kernel. Other processes see the whole file or none; a failure is a warning."""
        self._checked.pop(name, None)
        folder = self.folder
        if folder is None:
            return
        temporary = folder / f".{_file_name(name)}-{os.getpid()}-{threading.get_ident()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(self._digest(name, data) + data)
                os.replace(temporary, folder / _file_name(name))
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        except OSError as error:
            _warn_of(folder, error.strerror or str(error))

    def _digest(self, name, data):
        """Of the bytes, and of what they are for: a file in another's place is as wrong as a damaged one."""
        return hashlib.sha256(f"{self._key()}\0{name}\0".encode() + data).digest()


def take_warnings():
    """What is wrong with the cache; every message is given once in a process."""
    messages = _waiting[:]
    _waiting.clear()
    return messages


def _root():
    given = os.environ.get("PYMLA_CACHE_DIR")
    if given:
        return Path(given)
    above = os.environ.get("XDG_CACHE_HOME")
    try:
        root = (Path(above) if above else Path.home() / ".cache") / "pymla"
    except RuntimeError:
        _warn(
            "compiled kernels cannot be cached (this user has no home folder): they are compiled again in every run. "
            "Set PYMLA_CACHE_DIR to a folder that can be written."
        )
        return None
    if given is not None:
        _warn(f"PYMLA_CACHE_DIR is empty; compiled kernels are cached in {root}")
    return root


def _is_trusted(folder):
    """Whether nobody else can have put machine code into a folder for this user to run."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return True
    try:
        status = folder.stat()
    except OSError:
        return True  # nothing to read there, and `write` will say what is wrong
    if status.st_uid not in (0, os.geteuid()):
        _warn_of(folder, f"it belongs to another user, number {status.st_uid}")
        return False
    if status.st_mode & 0o002:
        _warn_of(folder, "every user can write there")
        return False
    return True


def _warn_of(folder, reason):
    _warn(
        f"compiled kernels cannot be cached in {folder} ({reason}): they are compiled again in every run. "
        "Set PYMLA_CACHE_DIR to a folder of yours that can be written and has room."
    )


def _warn(message):
    if message not in _known:
        _known.add(message)
        _waiting.append(message)


def _file_name(name):
    return re.sub(r"[^\w.-]", "_", name) + ".kernel"
