"""Compiled functions with one explicit signature each, kept on disk as long as their sources stay the same.

Numba keys its own cache by the file of the cached function alone, so editing `simd.py` would leave stale kernels of
`quant.py` behind, and it loads damaged files. `pymla.host.kernel_cache` has neither fault: its key is a digest of all
that kernels are made of, of the tools' versions and of the processor that they are compiled for.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import llvmlite
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

from pymla.cpu.machine.isa import ISA
from pymla.host.cores import usable_cores
from pymla.host.kernel_cache import KernelCache, take_warnings
from pymla.host.source_key import is_part_of, source_key

#: All that modules have made so far.
COMPILED = []
_SOURCES = Path(__file__).resolve().parents[1]


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
        """What its machine code is called in the cache."""
        return f"{self._module}.{self.__name__}"

    @property
    def result(self):
        """What `build` gave."""
        if self._result is None:
            self._result = self._build(_Kept(self.name) if self.is_kept else NullCache())
        return self._result

    @property
    def is_ready(self):
        """Whether `result` takes no long time: it is there, or in a file."""
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
    """
    wanted = COMPILED if wanted is None else wanted
    missing = [each for each in wanted if not each.is_ready]
    count = min(usable_cores(), len(missing) // _WORTH_A_PROCESS)
    elsewhere = [each for each in missing if each.is_kept]
    if count > 1 and elsewhere and CACHE.folder:
        _compile_in_processes(elsewhere, count, lambda done, name: progress and progress(done, len(missing), name))
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


#: Fewer functions are compiled faster than another process starts.
_WORTH_A_PROCESS = 4
#: Seconds until the first of the processes has imported the package, or never will.
PATIENCE = 30.0


def _compile_in_processes(wanted, count, tell):
    """Have functions compiled by other processes, which leave them in the cache. ``tell(done, name)`` hears of each.

    What goes wrong there, as where the system refuses a process, is left to be compiled by the caller.
    """
    tasks, done = queue.SimpleQueue(), queue.SimpleQueue()
    for each in wanted:
        tasks.put(each)
    workers = [worker for worker in (_Worker.started(tasks, done) for _ in range(count)) if worker]
    finished, began, answered = 0, time.monotonic(), False
    try:
        tell(0, wanted[0].__name__)
        while any(worker.is_alive() for worker in workers) or not done.empty():
            try:
                name = done.get(timeout=0.1)
            except queue.Empty:
                if answered or time.monotonic() - began < PATIENCE:
                    continue
                break  # what runs this program is no Python interpreter that can run another one
            answered = True
            if name:
                finished += 1
                tell(finished, name)
    finally:
        for worker in workers:
            worker.end()


class _Worker(threading.Thread):
    """Gives functions to a process, one after the other."""

    @classmethod
    def started(cls, tasks, done):
        """A worker that runs, or None where there can be no process or thread."""
        command = [sys.executable, "-c", "from pymla.cpu.runtime import compiling; compiling.serve()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the process that the user sees
                text=True,
            )
        except (OSError, TypeError):
            return None
        worker = cls(process, tasks, done)
        try:
            worker.start()
        except RuntimeError:
            worker.end()
            return None
        return worker

    def __init__(self, process, tasks, done):
        super().__init__(daemon=True)
        self._process, self._tasks, self._done = process, tasks, done

    def run(self):
        with contextlib.suppress(OSError, ValueError):
            if not self._process.stdout.readline():
                return
            self._done.put(None)
            while True:
                try:
                    each = self._tasks.get_nowait()
                except queue.Empty:
                    return
                print(json.dumps(each.origin), file=self._process.stdin, flush=True)
                if not self._process.stdout.readline():
                    return
                self._done.put(each.__name__)

    def end(self):
        """End the process: it has nothing more to do, or nobody waits for it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not read yet has no reader any more
                stream.close()


def serve():
    """Compile the functions that standard input names, and leave them in the cache. Ends with its input, also in the
    middle of a function: then the process that wants it is gone."""
    tasks = queue.SimpleQueue()

    def read():
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    print("ready", flush=True)
    while True:
        module, name, types = json.loads(tasks.get())
        made = getattr(importlib.import_module(module), name)
        _ = (made if types is None else made(*types)).compiled.result
        print(name, flush=True)


@functools.cache
def _key():
    target = cpu_target.target_context.codegen().magic_tuple()
    options = [(name, getattr(config, name, None)) for name in _CONFIGURATION]
    return source_key(_SOURCES, (sys.version, numba.__version__, llvmlite.__version__, target, options, ISA))


#: Machine code for this processor.
CACHE = KernelCache(_key)
