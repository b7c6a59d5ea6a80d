"""Compiling kernels: explicit signatures, an on-disk cache that follows the sources, and progress.

Numba keys its cache by the file of the cached function alone, so editing `simd.py` would leave stale kernels of
`quant.py` behind. Here the cache folder's name is a digest of all of the package's sources and of the tools' versions.
A kernel is compiled for one signature only: another dtype is an error, never a silent second compilation.
"""

import hashlib
import os
import sys
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba

# A thread that waits for the next parallel loop spins for some 10 µs and then sleeps. Spinning for long, as GNU OpenMP does
# by default, starves everything where another program holds a core (measured: 1 token/s where 90 are possible); sleeping at
# once wakes the threads up on one core (measured: no gain from the second). Read when the threads start.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Reassociating sums is what lets LLVM use vector registers. NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz"}

KERNELS = []
_warning = None


def kernel(*signature, parallel=True):
    """Mark a function as a kernel: it is compiled for `signature` (Numba types) by `compile_kernels`, or when called."""

    def decorate(function):
        previous = numba.config.CACHE_DIR
        folder = cache_dir()
        # The folder is fixed when a function is decorated. Other users of Numba in the process keep their own.
        numba.config.CACHE_DIR = folder or previous
        try:
            dispatcher = numba.njit(
                cache=folder is not None, parallel=parallel, nogil=True, fastmath=FASTMATH, error_model="numpy"
            )(function)
        finally:
            numba.config.CACHE_DIR = previous
        compiled = _Kernel(dispatcher, signature)
        KERNELS.append(compiled)
        return compiled

    return decorate


#: A function that kernels call. It becomes part of each kernel that uses it, and sums in the order that is written: with
#: reassociation its result depended on the kernel around it, and a freshly compiled one differed from a cached one.
inline = numba.njit(inline="never", error_model="numpy", nogil=True)


class _Kernel:
    """A dispatcher with exactly one signature, compiled at the first call if nobody did before."""

    def __init__(self, dispatcher, signature):
        self.dispatcher = dispatcher
        self.signature = signature
        self.__name__ = dispatcher.__name__
        self.__doc__ = dispatcher.__doc__
        self._call = self._compile_and_call

    def __call__(self, *args):
        return self._call(*args)

    def _compile_and_call(self, *args):
        self.compile()
        return self._call(*args)

    def compile(self):
        if self._call is not self.dispatcher:
            self.dispatcher.compile(self.signature)
            self.dispatcher.disable_compile()
            self._call = self.dispatcher

    @property
    def assembly(self):
        """The machine code as text."""
        self.compile()
        return next(iter(self.dispatcher.inspect_asm().values()))


def cache_dir():
    """The folder that holds compiled kernels, or None where it cannot be written.

    ``PYMLA_CACHE_DIR``, or ``pymla`` in ``XDG_CACHE_HOME`` or ``~/.cache``; below it a folder for each state of the
    sources, of Numba, of LLVM and of the processor.
    """
    global _warning
    root = os.environ.get("PYMLA_CACHE_DIR")
    if root is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pymla"
    folder = Path(root) / _digest()
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
    return str(folder)


def cache_dir_warning():
    """What is wrong with the cache folder, or None."""
    return _warning


def needs_compiling():
    """Whether `compile_kernels` will take long: nobody has compiled this state of the sources here before."""
    folder = cache_dir()
    return folder is None or not (Path(folder) / "complete").exists()


def compile_kernels(progress=None):
    """Compile every kernel, or load it from the cache.

    Parameters
    ----------
    progress : callable(done, total, name), optional
    """
    for done, each in enumerate(KERNELS):
        if progress:
            progress(done, len(KERNELS), each.__name__)
        each.compile()
    if progress:
        progress(len(KERNELS), len(KERNELS), "")
    folder = cache_dir()
    if folder:
        (Path(folder) / "complete").touch()


def _digest():
    if not hasattr(_digest, "value"):
        digest = hashlib.sha256()
        package = Path(__file__).resolve().parents[1]
        for source in sorted(package.rglob("*.py")):
            digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes())
        features = llvm.get_host_cpu_features().flatten()
        isa = os.environ.get("PYMLA_ISA", "")
        for part in (sys.version, numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name(), features, isa):
            digest.update(part.encode() + b"\0")
        _digest.value = digest.hexdigest()[:16]
    return _digest.value
