"""Compiled functions with one explicit signature each, in an on-disk cache that follows the sources.

Numba keys its cache by the file of the cached function alone, so editing `simd.py` would leave stale kernels of
`quant.py` behind. Here the cache folder's name is a digest of all that kernels are made of and of the tools' versions.
"""

import functools
import os
import sys
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba

from pymla.cpu.isa import ISA
from pymla.source_key import is_part_of, source_key

#: Everything that `compile_all` compiles.
COMPILED = []
_SOURCES = Path(__file__).resolve().parent
_warning = None

#: A function that kernels call. Sums are taken in the order that is written, so that a result does not depend on the
#: kernel around it: vector registers (`simd.py`) take the place of fast-math.
inline = numba.njit(error_model="numpy", nogil=True)

#: A step of a loop that is written out: a real call would pass its registers through memory.
unrolled = numba.njit(error_model="numpy", nogil=True, forceinline=True)


class Compiled:
    """A function that is compiled by `compile_all` or when first used; `build` says how, given keyword options."""

    def __init__(self, python_function, build):
        self.__name__ = python_function.__name__
        self._keep = is_part_of(_SOURCES, python_function)
        self._build = build
        self._result = None
        COMPILED.append(self)

    @property
    def result(self):
        """What `build` gave, with the compiled code in the cache's folder."""
        if self._result is None:
            folder = cache_dir() if self._keep else None
            previous = numba.config.CACHE_DIR
            # The folder is fixed when a function is decorated. Other users of Numba in the process keep their own.
            numba.config.CACHE_DIR = folder or previous
            try:
                self._result = self._build(cache=folder is not None, error_model="numpy")
            finally:
                numba.config.CACHE_DIR = previous
        return self._result


def function(signature):
    """Mark a function that Python calls, with a Numba signature; it runs without the interpreter's lock."""

    def decorate(python_function):
        def build(**options):
            return numba.njit(signature, nogil=True, **options)(python_function)

        compiled = Compiled(python_function, build)
        return lambda *arguments: compiled.result(*arguments)

    return decorate


def cache_dir():
    """The folder that holds compiled kernels, or None where it cannot be written.

    ``PYMLA_CACHE_DIR``, or ``pymla`` in ``XDG_CACHE_HOME`` or ``~/.cache``; below it a folder for each state of the
    sources, of Numba, of LLVM and of the processor.
    """
    global _warning
    root = os.environ.get("PYMLA_CACHE_DIR")
    if root is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pymla"
    folder = Path(root) / _key()
    if cache_dir.known == folder:
        return str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _warning = (
            f"compiled kernels cannot be cached in {folder} ({error.strerror}): they are compiled again in every run. "
            "Set PYMLA_CACHE_DIR to a folder that can be written."
        )
        return None
    cache_dir.known = folder
    return str(folder)


cache_dir.known = None


def cache_dir_warning():
    """What is wrong with the cache folder, or None."""
    cache_dir()
    return _warning


def needs_compiling():
    """Whether `compile_all` will take long: nobody has compiled this state of the sources here before."""
    folder = cache_dir()
    return folder is None or not (Path(folder) / "complete").exists()


def compile_all(progress=None):
    """Compile everything, or load it from the cache.

    Parameters
    ----------
    progress : callable(done, total, name), optional
    """
    for done, each in enumerate(COMPILED):
        if progress:
            progress(done, len(COMPILED), each.__name__)
        _ = each.result
    if progress:
        progress(len(COMPILED), len(COMPILED), "")
    folder = cache_dir()
    if folder:
        (Path(folder) / "complete").touch()


@functools.cache
def _key():
    features = llvm.get_host_cpu_features().flatten()
    tools = sys.version, numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name(), features, ISA
    return source_key(_SOURCES, tools)
