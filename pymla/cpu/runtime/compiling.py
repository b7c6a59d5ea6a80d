"""Functions that kernels are made of, and machine code that is kept on disk as long as its sources stay the same.

Numba keys its own cache by the file of the cached function alone, so editing `simd_floats.py` would leave stale kernels
of `quant.py` behind, and it loads damaged files. `pymla.host.kernel_cache` has neither fault: its key is a digest of
all sources of kernels, of the tools' versions and of the processor that they are compiled for.
"""

import functools
import inspect
import itertools
import os
import pickle
import threading
from pathlib import Path

import numba
from numba.core import bytecode, config
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompilerBase, CompileResult, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature
from numba.core.typed_passes import NativeLowering

from pymla.cpu.runtime.compiling_workers import compile_in_processes
from pymla.cpu.runtime.isa import ISA, PYTHON
from pymla.host.kernel_cache import KernelCache, take_warnings
from pymla.host.source_key import is_part_of, source_key

#: Every `Compiled` that modules have made so far.
COMPILED: list["Compiled"] = []
_SOURCES = Path(__file__).resolve().parents[1]
#: Held while a function is compiled or loaded: Numba does not expect two threads that load at a time.
_BUILDING = threading.RLock()


@register_pass(mutates_CFG=True, analysis_only=False)
class _WithoutMachineCode(NativeLowering):
    """Lowers a function that only other compiled functions call, whose code goes into theirs: Numba's own pass makes
    machine code of it alone, too, which takes a third of the time that a kernel takes to compile."""

    _name = "lowering_without_machine_code"

    def run_pass(self, state):
        state.flags.no_compile = True
        super().run_pass(state)
        # Numba finds a compiled function by the object that Python would call.
        lowered, found_by = state["cr"], _OnlyCompiled(state.func_id.func_name)
        state["cr"] = lowered._replace(cfunc=found_by)
        state.targetctx.insert_user_function(found_by, lowered.fndesc, [state.library])
        state.reload_init.extend(state.library._reload_init)
        return True


class _OnlyCompiled:
    """Stands for the machine code of a function that is only a part of others."""

    def __init__(self, name):
        self._name = name

    def __call__(self, *arguments):
        raise TypeError(f"{self._name} is a part of kernels and has no machine code of its own")


class _HelperCompiler(CompilerBase):
    def define_pipelines(self):
        usual = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline = PassManager("helper")
        for each, description in usual.passes:
            pipeline.add_pass(_WithoutMachineCode if each is NativeLowering else each, description)
        pipeline.finalize()
        return [pipeline]


class Helper(CPUDispatcher):
    """A function that kernels call, made by `helper` or `inlined`. From Python its source runs, as Python."""

    def __call__(self, *arguments):
        return self.py_func(*arguments)

    def add_overload(self, compiled):
        """Keep what was compiled for types of arguments; Numba would also make it callable from Python."""
        self.overloads[compiled.signature.args] = compiled

    def __repr__(self):
        return f"<helper {self.__module__}.{self.__qualname__}{inspect.signature(self.py_func)}>"


def helper(python_function, **options):
    """Mark a function that kernels call. Sums are taken in the order that is written, so that a result does not depend
    on the kernel around it: vector registers (`simd.py`) take the place of fast-math."""
    options |= {"nopython": True, "boundscheck": None, "error_model": "numpy", "nogil": True}
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return Helper(python_function, targetoptions=options, pipeline_class=_HelperCompiler)


def inlined(python_function):
    """Mark a helper whose code stands where it is called: a real call would pass its registers through memory."""
    return helper(python_function, forceinline=True)


#: Numba's settings that change machine code, besides the processor's name and features.
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
# factory (`gemm.product_for`) may not share one, even where kernels of one process were compiled by several.
bytecode.FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(6), "little"))


class Compiled:
    """A function that is compiled by `compile_all` or when first used.

    Parameters
    ----------
    python_function : function
    build : callable(cache) -> object
        Compiles it with Numba, which takes machine code from `cache` or gives it there.

    Attributes
    ----------
    is_kept : bool
        Whether its machine code goes to the cache.
    origin : (str, str, tuple or None)
        Module, function and arguments that make it in another process; None: the function is it.
    """

    def __init__(self, python_function, build):
        self.__name__, self._module = python_function.__name__, python_function.__module__
        self.origin = python_function.__module__, python_function.__name__, None
        self.is_kept = is_part_of(_SOURCES, python_function)
        self._build = build
        self._result = None
        COMPILED.append(self)

    @property
    def name(self):
        """The name of its machine code in the cache."""
        return f"{self._module}.{self.__name__}"

    @property
    def result(self):
        """The object that `build` returned: a Numba dispatcher or C function."""
        if self._result is None:
            with _BUILDING:
                if self._result is None:
                    self._result = self._build(_Kept(self.name) if self.is_kept else NullCache())
        return self._result

    @property
    def is_ready(self):
        """Whether `result` takes no long time: it has been built, or its machine code is in the cache."""
        return self._result is not None or (self.is_kept and self.name in CACHE)


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

        @functools.wraps(python_function)
        def call(*arguments):
            return compiled.result(*arguments)

        call.compiled = compiled
        return call

    return decorate


def c_function(python_function, signature, cache):
    """Compile a function that machine code calls, with a Numba signature (`numba.core.ccallback.CFunc`)."""
    compiled = CFunc(python_function, normalize_signature(signature), {}, {"error_model": "numpy"})
    compiled._cache = cache
    compiled.compile()
    return compiled


def compile_all(wanted=None, progress=None, warn=None):
    """Compile functions, in several processes where there are several cores, or load them from the cache.

    Parameters
    ----------
    wanted : list of Compiled, optional
        By default everything that modules have made so far.
    progress : callable(done, total, name), optional
        Told of each function that has to be compiled.
    warn : callable(message), optional
        Told once what is wrong with the cache.

    Where kernels run as Python (`isa.PYTHON`) nothing is compiled.
    """
    if PYTHON:
        return
    wanted = COMPILED if wanted is None else wanted
    missing = [each for each in wanted if not each.is_ready]
    elsewhere = [each for each in missing if each.is_kept]
    if elsewhere and CACHE.folder:
        compile_in_processes(elsewhere, lambda done, name: progress and progress(done, len(missing), name))
    for done, each in enumerate(missing):
        if not each.is_ready:
            if progress:
                progress(done, len(missing), each.__name__)
            _ = each.result
    if progress and missing:
        progress(len(missing), len(missing), "")
    for each in wanted:
        _ = each.result
    if warn:
        for message in take_warnings():
            warn(message)


@functools.cache
def _key():
    target = cpu_target.target_context.codegen().magic_tuple()
    options = [(name, getattr(config, name, None)) for name in _CONFIGURATION]
    return source_key(_SOURCES, (target, options, ISA))


#: Machine code for this processor.
CACHE = KernelCache(_key)
