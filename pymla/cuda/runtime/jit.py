"""Kernels: functions that every thread of a grid runs, launched as ``kernel[blocks, threads](*arguments)``.

A kernel is compiled for one signature, when it is first launched or by `compile_all`, and runs on the backend's
stream. Arguments are integers, floats, device arrays (`pymla.cuda.memory`), and tuples of these. Kernels for ggml types
come from cached factories (``gemv_kernel(qtype)``): a kernel is made for its type when something first asks for it, and
the type's functions are constants of its closure.

In the simulator (``NUMBA_ENABLE_CUDASIM=1``) the same function runs as Python (`pymla.cuda.runtime.simulator`).
"""

import functools
import operator
import struct
import threading

import numpy as np
from numba import cuda, types
from numba.np import numpy_support

from pymla.cuda.runtime import driver
from pymla.cuda.runtime.driver import SIMULATED
from pymla.errors import PymlaError
from pymla.host.arguments import ArgumentWriter
from pymla.host.kernel_cache import take_warnings
from pymla.host.kernel_signature import kernel_signature

if SIMULATED:
    from pymla.cuda.runtime import simulated_memory, simulator

__all__ = ["KERNELS", "Kernel", "compile_all", "device", "folded", "kernel", "unrolled", "zipped"]

#: Every kernel that was made so far, by name.
KERNELS: dict[str, "Kernel"] = {}


def kernel(*signature, variant=None, max_threads=None, min_blocks=None, max_registers=None, hot=True):
    """Mark a function as a kernel with arguments of the Numba types `signature`.

    Parameters
    ----------
    variant : str, optional
        What tells the kernel from others of its factory: ``gemv[q4_0]``.
    max_threads : int, optional
        The largest block that it is launched with: with it the compiler knows how many registers a thread can have.
    min_blocks : int, optional
        Blocks of `max_threads` that a multiprocessor shall hold, at the cost of registers.
    max_registers : int, optional
        Registers of a thread.
    hot : bool
        Whether it may neither spill registers nor compute in float64 (tests/test_cuda_compile.py).
    """
    return lambda function: Kernel(function, signature, variant, max_threads, min_blocks, max_registers, hot)


def device(function):
    """Mark a function that kernels call; it is inlined."""
    if SIMULATED:
        simulator.register(function)
        return function
    return cuda.jit(device=True, forceinline=True)(function)


# Loops over registers: a tuple's elements stay in registers where the index is a constant, so these are unrolled.


@functools.cache
def unrolled(function, count):
    """A device function (first, items, fixed): the tuple of ``function(items[i], first + i, fixed)``, i < `count`."""
    if count == 1:

        @device
        def one(first, items, fixed):
            return (function(items[0], first, fixed),)

        return one
    half = count // 2
    left, right = unrolled(function, half), unrolled(function, count - half)

    @device
    def both(first, items, fixed):
        return left(first, items[:half], fixed) + right(first + half, items[half:], fixed)

    return both


@functools.cache
def folded(function, count):
    """A device function (first, items, state, fixed): the last ``state = function(items[i], first + i, state, fixed)``,
    i < `count`."""
    if count == 1:

        @device
        def one(first, items, state, fixed):
            return function(items[0], first, state, fixed)

        return one
    half = count // 2
    left, right = folded(function, half), folded(function, count - half)

    @device
    def both(first, items, state, fixed):
        return right(first + half, items[half:], left(first, items[:half], state, fixed), fixed)

    return both


@functools.cache
def zipped(count):
    """A device function (first, second): the tuple of pairs ``(first[i], second[i])``, i < `count`, as items that
    `unrolled` and `folded` take."""
    if count == 1:

        @device
        def one(first, second):
            return ((first[0], second[0]),)

        return one
    half = count // 2
    left, right = zipped(half), zipped(count - half)

    @device
    def both(first, second):
        return left(first[:half], second[:half]) + right(first[half:], second[half:])

    return both


class Kernel:
    """A function of a grid's threads; made by `kernel`.

    Attributes
    ----------
    py_func : function
        Its source.
    parameter_sizes : list of int
        Bytes of the compiled function's parameters.
    """

    def __init__(self, function, signature, variant, max_threads, min_blocks, max_registers, hot):
        self.__name__ = function.__name__.lstrip("_") + (f"[{variant}]" if variant is not None else "")
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.__signature__ = kernel_signature(function, signature, self.__name__)
        if self.__name__ in KERNELS:
            raise ValueError(f"there are two kernels {self.__name__}; give them variants")
        if min_blocks and not max_threads:
            raise ValueError(f"kernel {self.__name__}: min_blocks needs max_threads")
        self.py_func, self.signature, self.hot = function, signature, hot
        self.max_threads, self.max_registers = max_threads, max_registers
        self.launch_bounds = (max_threads, min_blocks) if min_blocks else max_threads
        self._write = _writer(self.__name__, signature)
        self.parameter_sizes = [size for kind in signature for size in _sizes(kind)]
        # A launch takes the addresses of its parameters, of which each has a word here.
        self._form = struct.Struct("<" + "".join(map(_form, signature)))
        self._words = np.zeros(len(self.parameter_sizes), np.uint64)
        addresses = self._words.ctypes.data + 8 * np.arange(len(self._words), dtype=np.uint64)
        self._parameters, self._parameters_at = addresses, addresses.ctypes.data
        self._lock = threading.Lock()
        self._function = None
        self._shared_bytes = 0
        KERNELS[self.__name__] = self
        if SIMULATED:
            simulator.register(function)

    def __repr__(self):
        return f"<kernel {self.__module__}.{self.__name__}{self.__signature__}>"

    def __call__(self, *arguments):
        raise TypeError(f"kernel {self.__name__} needs a grid: {self.__name__}[blocks, threads](*arguments)")

    def __get__(self, instance, owner=None):
        # `help` takes objects with this method for routines, and shows their signature and docstring.
        return self

    def __getitem__(self, configuration):
        """The kernel for ``[blocks, threads]`` or ``[blocks, threads, shared_bytes]``: numbers or tuples of up to
        three, and bytes of dynamic shared memory. Without blocks nothing is launched."""
        blocks, threads, *rest = configuration
        shared_bytes = rest[0] if rest else 0
        grid, block = _three(blocks), _three(threads)

        def launch(*arguments):
            self._launch(grid, block, shared_bytes, arguments)

        return launch

    def compiled(self, capability=None):
        """The machine code for a compute capability, the device's by default (`pymla.cuda.runtime.compiling.Code`)."""
        from pymla.cuda.runtime.compiling import compile_kernel

        return compile_kernel(self, capability or driver.compute_capability())

    @property
    def is_ready(self):
        """Whether `load` takes no long time: the kernel is loaded, or in a file."""
        from pymla.cuda.runtime.compiling import CACHE, entry_name

        return SIMULATED or self._function is not None or entry_name(self, driver.compute_capability()) in CACHE

    def load(self):
        """Make it ready to be launched."""
        if self._function is None and not SIMULATED:
            code = self.compiled()
            driver.device()
            module = driver.call(driver.api.cuModuleLoadData, code.cubin)
            self._function = driver.call(driver.api.cuModuleGetFunction, module, code.entry.encode())

    def _launch(self, grid, block, shared_bytes, arguments):
        values = self._write(arguments)
        threads = block[0] * block[1] * block[2]
        if self.max_threads and threads > self.max_threads:
            raise ValueError(f"kernel {self.__name__} takes {self.max_threads} threads at most, not {threads}")
        # The driver has read the words when the call returns.
        with self._lock:
            try:
                self._form.pack_into(self._words, 0, *values)
            except (struct.error, OverflowError):
                self._refuse(arguments)
                raise
            if 0 in grid:
                return
            try:
                if SIMULATED:
                    inside = tuple(map(_inside, self.signature, arguments))
                    simulator.launch(self.py_func, grid, block, shared_bytes, inside)
                    return
                self.load()
                if shared_bytes > self._shared_bytes:
                    attribute = driver.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.call(driver.api.cuFuncSetAttribute, self._function, attribute, shared_bytes)
                    self._shared_bytes = shared_bytes
                driver.call(
                    driver.api.cuLaunchKernel,
                    self._function,
                    *grid,
                    *block,
                    shared_bytes,
                    driver.stream(),
                    self._parameters_at,
                    0,
                )
            except PymlaError as error:
                shape = f"{grid} blocks of {block} threads, {shared_bytes} bytes of shared memory"
                raise PymlaError(f"kernel {self.__name__}, {shape}: {error}") from None
        driver.launched(self.__name__)

    def _refuse(self, arguments):
        """Say which argument does not fit its type."""
        for position, (kind, value) in enumerate(zip(self.signature, arguments, strict=True)):
            try:
                struct.pack("<" + _form(kind), *_writer(self.__name__, [kind])([value]))
            except (struct.error, OverflowError):
                raise TypeError(f"argument {position} of kernel {self.__name__}: {value} is no {kind}") from None


def compile_all(wanted, progress=None, warn=None):
    """Compile kernels for the device, or load them from the cache.

    Parameters
    ----------
    wanted : list of Kernel
    progress : callable(done, total, name), optional
        Told of each kernel that has to be compiled.
    warn : callable(message), optional
        Told once what is wrong with the cache.
    """
    missing = [each for each in wanted if not each.is_ready]
    for done, each in enumerate(missing):
        if progress:
            progress(done, len(missing), each.__name__)
        each.load()
    if progress and missing:
        progress(len(missing), len(missing), "")
    for each in wanted:
        each.load()
    if warn:
        for message in take_warnings():
            warn(message)


def _three(shape):
    """A grid's or block's shape in three dimensions."""
    shape = tuple(map(operator.index, shape)) if isinstance(shape, tuple) else (operator.index(shape),)
    return shape + (1,) * (3 - len(shape))


def _sizes(kind):
    """Bytes of the parameters that a value of a Numba type becomes."""
    if isinstance(kind, types.Array):
        return [8] * (5 + 2 * kind.ndim)
    if isinstance(kind, types.BaseTuple):
        return [size for each in kind for size in _sizes(each)]
    return [1 if isinstance(kind, types.Boolean) else kind.bitwidth // 8]


def _form(kind):
    """A word for each of these parameters, in the language of `struct`, which also says what does not fit."""
    if isinstance(kind, types.Array):
        return "q" * len(_sizes(kind))
    if isinstance(kind, types.BaseTuple):
        return "".join(map(_form, kind))
    if isinstance(kind, types.Float):
        return "d" if kind.bitwidth == 64 else "f4x"
    if isinstance(kind, types.Boolean):
        return "?7x"
    if isinstance(kind, types.Integer):
        letter = {8: "b7x", 16: "h6x", 32: "i4x", 64: "q"}[kind.bitwidth]
        return letter if kind.signed else letter.upper().replace("X", "x")
    raise TypeError(f"kernels take no argument of type {kind}")


def _writer(name, signature):
    """Writes the values of a kernel's parameters; `struct` refuses numbers that do not fit."""
    return ArgumentWriter(name, signature, _array, lambda value: value.contiguous, lambda kind: lambda value: value)


def _array(value):
    """The parameters of an array: two words for what Numba knows about its memory, its elements and the bytes of one,
    its address, shape and strides."""
    return (0, 0, value.size, value.dtype.itemsize, value.address, *value.shape, *value.strides)


def _inside(kind, value):
    """An argument as a simulated kernel sees it."""
    if isinstance(kind, types.Array):
        return simulated_memory.inside(value._view)
    if isinstance(kind, types.BaseTuple):
        parts = map(_inside, kind, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(kind, types.Float):
        return numpy_support.as_dtype(kind).type(value)
    return operator.index(value)
