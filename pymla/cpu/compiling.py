"""Compiled functions with one explicit signature each, kept on disk as long as their sources stay the same.

Numba keys its own cache by the file of the cached function alone, so editing `simd.py` would leave stale kernels of
`quant.py` behind, and it loads damaged files. `pymla.kernel_cache` has neither fault: its key is a digest of all that
kernels are made of, of the tools' versions and of the processor that they are compiled for.
"""

import functools
import itertools
import os
import pickle
import sys
from pathlib import Path

import llvmlite
import numba
from numba.core import bytecode, config
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from pymla.cpu.isa import ISA
from pymla.kernel_cache import KernelCache, take_warnings
from pymla.source_key import is_part_of, source_key

#: Everything that `compile_all` compiles.
COMPILED = []
_SOURCES = Path(__file__).resolve().parent

#: A function that kernels call. Sums are taken in the order that is written, so that a result does not depend on the
#: kernel around it: vector registers (`simd.py`) take the place of fast-math.
inline = numba.njit(error_model="numpy", nogil=True)

#: A step of a loop that is written out: a real call would pass its registers through memory.
unrolled = numba.njit(error_model="numpy", nogil=True, forceinline=True)

#: What of Numba's configuration changes machine code, besides the processor's name and features.
_CONFIGURATION = (
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "DEBUG_NRT",
    "DISABLE_INTEL_SVML",
    "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS",
    "LOOP_VECTORIZE",
    "NRT_STATS",
    "OPT",
    "SLP_VECTORIZE",
)

# Helper functions are weak symbols of every kernel that calls them, named by their place in the source, their
# arguments' types and a number that Numba counts. The linker takes the first of a name, so that two functions of one
# factory (`panels.product_for`) may not share one, even where kernels of one process were compiled by several.
bytecode.FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(6), "little"))


class Compiled:
    """A function that is compiled by `compile_all` or when first used.

    Parameters
    ----------
    python_function : function
    build : callable(cache) -> object
        Compiles it with Numba, which takes machine code from `cache` or gives it there.
    """

    def __init__(self, python_function, build):
        self.__name__ = python_function.__name__
        self.name = f"{python_function.__module__}.{python_function.__qualname__}"
        self._keep = is_part_of(_SOURCES, python_function)
        self._build = build
        self._result = None
        COMPILED.append(self)

    @property
    def result(self):
        """What `build` gave."""
        if self._result is None:
            self._result = self._build(_Kept(self.name) if self._keep else NullCache())
        return self._result

    @property
    def is_ready(self):
        """Whether `result` takes no long time: it is there, or in a file."""
        return self._result is not None or (self._keep and self.name in CACHE)


class _Kept(NullCache):
    """A function's machine code on disk, as Numba asks for it."""

    def __init__(self, name):
        self._name = name

    def load_overload(self, sig, target_context):
        data = CACHE.read(self._name)
        if data is None:
            return None
        target_context.refresh()
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig, data):
        # Addresses of this process, as of ctypes functions, mean nothing to another one.
        if not data.library.has_dynamic_globals:
            CACHE.write(self._name, dumps(data._reduce()))


def function(signature):
    """Mark a function that Python calls, with a Numba signature; it runs without the interpreter's lock."""

    def decorate(python_function):
        def build(cache):
            dispatcher = numba.njit(nogil=True, error_model="numpy")(python_function)
            dispatcher._cache = cache
            dispatcher.compile(signature)
            dispatcher.disable_compile()
            return dispatcher

        compiled = Compiled(python_function, build)
        return lambda *arguments: compiled.result(*arguments)

    return decorate


def c_function(python_function, signature, cache):
    """Compile a function that machine code calls, with a Numba signature (`numba.core.ccallback.CFunc`)."""
    compiled = CFunc(python_function, normalize_signature(signature), {}, {"error_model": "numpy"})
    compiled._cache = cache
    compiled.compile()
    return compiled


def compile_all(progress=None, warn=None):
    """Compile everything, or load it from the cache.

    Parameters
    ----------
    progress : callable(done, total, name), optional
        Told of each function from the first one on that has to be compiled.
    warn : callable(message), optional
        Told once what is wrong with the cache.
    """
    compiling = False
    for done, each in enumerate(COMPILED):
        compiling = compiling or not each.is_ready
        if progress and compiling:
            progress(done, len(COMPILED), each.__name__)
        _ = each.result
        if warn:
            for message in take_warnings():
                warn(message)
    if progress and compiling:
        progress(len(COMPILED), len(COMPILED), "")


@functools.cache
def _key():
    target = cpu_target.target_context.codegen().magic_tuple()
    options = [(name, getattr(config, name, None)) for name in _CONFIGURATION]
    return source_key(_SOURCES, (sys.version, numba.__version__, llvmlite.__version__, target, options, ISA))


#: Machine code for this processor.
CACHE = KernelCache(_key)
