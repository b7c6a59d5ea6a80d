"""Kernels: functions that every thread of a grid runs, launched as ``kernel[blocks, threads](*arguments)``.

A kernel is compiled for one signature, when it is first launched or by `compile_all`, and runs on the backend's
stream. Arguments are integers, floats, device arrays (`pymla.cuda.memory`), and tuples of these. Kernels for each ggml
type come from factories: ``qtype`` is a constant of the closure, so that a kernel holds its own type's branches only.

In the simulator (``NUMBA_ENABLE_CUDASIM=1``) the same function runs as Python (`pymla.cuda.simulator`).
"""

import functools
import operator
import struct

import numpy as np
from numba import cuda, types
from numba.np import numpy_support

from pymla.cuda import driver
from pymla.cuda.driver import SIMULATED
from pymla.errors import PymlaError

if SIMULATED:
    from pymla.cuda import simulator

__all__ = ["KERNELS", "Kernel", "compile_all", "device", "folded", "kernel", "needs_compiling", "unrolled"]

#: Every kernel, by name.
KERNELS = {}


def kernel(*signature, variant=None, max_threads=None, min_blocks=None, max_registers=None, hot=True):
    """Mark a function as a kernel with arguments of the Numba types `signature`.

    Parameters
    ----------
    variant : str, optional
        What tells the kernel from others of its factory: ``matvec[q4_0]``.
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


class Kernel:
    """A function of a grid's threads; made by `kernel`.

    Attributes
    ----------
    parameter_sizes : list of int
        Bytes of the compiled function's parameters.
    """

    def __init__(self, function, signature, variant, max_threads, min_blocks, max_registers, hot):
        self.__name__ = function.__name__.lstrip("_") + (f"[{variant}]" if variant is not None else "")
        self.__doc__ = function.__doc__
        if self.__name__ in KERNELS:
            raise ValueError(f"there are two kernels {self.__name__}; give them variants")
        if min_blocks and not max_threads:
            raise ValueError(f"kernel {self.__name__}: min_blocks needs max_threads")
        self.function, self.signature, self.hot = function, signature, hot
        self.max_threads, self.max_registers = max_threads, max_registers
        self.launch_bounds = (max_threads, min_blocks) if min_blocks else max_threads
        self._writers = [_writer(kind) for kind in signature]
        self.parameter_sizes = [size for kind in signature for size in _sizes(kind)]
        self._function = None
        self._shared_bytes = 0
        KERNELS[self.__name__] = self
        if SIMULATED:
            simulator.register(function)

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
        """The machine code for a compute capability, the device's by default (`pymla.cuda.compiling.Code`)."""
        from pymla.cuda.compiling import compile_kernel

        return compile_kernel(self, capability or driver.compute_capability())

    def load(self):
        """Make it ready to be launched."""
        if self._function is None and not SIMULATED:
            code = self.compiled()
            driver.device()
            module = driver.call(driver.api.cuModuleLoadData, code.cubin)
            self._function = driver.call(driver.api.cuModuleGetFunction, module, code.entry.encode())

    def _launch(self, grid, block, shared_bytes, arguments):
        words = self._pack(arguments)
        threads = block[0] * block[1] * block[2]
        if self.max_threads and threads > self.max_threads:
            raise ValueError(f"kernel {self.__name__} takes {self.max_threads} threads at most, not {threads}")
        if 0 in grid:
            return
        try:
            if SIMULATED:
                values = tuple(map(_inside, self.signature, arguments))
                simulator.launch(self.function, grid, block, shared_bytes, values)
                return
            self.load()
            if shared_bytes > self._shared_bytes:
                attribute = driver.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.call(driver.api.cuFuncSetAttribute, self._function, attribute, shared_bytes)
                self._shared_bytes = shared_bytes
            # A word for each parameter, little-endian, and the words' addresses.
            parameters = words.ctypes.data + 8 * np.arange(len(words), dtype=np.uint64)
            driver.call(
                driver.api.cuLaunchKernel,
                self._function,
                *grid,
                *block,
                shared_bytes,
                driver.stream(),
                parameters.ctypes.data,
                0,
            )
        except PymlaError as error:
            shape = f"{grid} blocks of {block} threads, {shared_bytes} bytes of shared memory"
            raise PymlaError(f"kernel {self.__name__}, {shape}: {error}") from None
        driver.launched(self.__name__)

    def _pack(self, arguments):
        """The parameters' words: uint64 (n,).

        Raises
        ------
        TypeError
            An argument does not have the type that the signature says.
        """
        if len(arguments) != len(self._writers):
            raise TypeError(f"kernel {self.__name__} takes {len(self._writers)} arguments, not {len(arguments)}")
        words = []
        for position, (write, value) in enumerate(zip(self._writers, arguments, strict=True)):
            try:
                write(value, words)
            except (TypeError, ValueError, AttributeError, struct.error) as error:
                raise TypeError(f"argument {position} of kernel {self.__name__}: {error}") from None
        return np.array(words, np.uint64)


def needs_compiling():
    """Whether `compile_all` will take long."""
    from pymla.cuda.compiling import cache_dir

    if SIMULATED:
        return False
    folder = cache_dir()
    return folder is None or not (folder / _complete()).exists()


def compile_all(progress=None):
    """Compile every kernel for the device, or load it from the cache.

    Parameters
    ----------
    progress : callable(done, total, name), optional
    """
    from pymla.cuda.compiling import cache_dir

    for done, (name, each) in enumerate(KERNELS.items()):
        if progress:
            progress(done, len(KERNELS), name)
        each.load()
    if progress:
        progress(len(KERNELS), len(KERNELS), "")
    if not SIMULATED and cache_dir():
        (cache_dir() / _complete()).touch()


def _complete():
    return "complete-sm_{}{}".format(*driver.compute_capability())


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


def _writer(kind):
    """A function (value, words) that appends the parameters of a value of a Numba type."""
    if isinstance(kind, types.Array):
        dtype, dimensions, contiguous = numpy_support.as_dtype(kind.dtype), kind.ndim, kind.layout == "C"

        def write(value, words):
            if value.dtype != dtype or value.ndim != dimensions or (contiguous and not value.contiguous):
                found = f"{value.dtype}, {value.ndim} dimensions, strides {value.strides}"
                raise TypeError(f"expected {kind}, got an array of {found}")
            # Two words for what Numba knows about an array's memory, the number of elements and the bytes of one.
            words += 0, 0, value.size, dtype.itemsize, value.address
            words += value.shape
            words += (stride & _MASK for stride in value.strides)

    elif isinstance(kind, types.BaseTuple):
        writers = [_writer(each) for each in kind]

        def write(value, words):
            if len(value) != len(writers):
                raise TypeError(f"expected {len(writers)} values, got {len(value)}")
            for each, part in zip(writers, value, strict=True):
                each(part, words)

    elif isinstance(kind, types.Float):
        form, bits = ("d", "Q") if kind.bitwidth == 64 else ("f", "I")

        def write(value, words):
            words.append(struct.unpack(bits, struct.pack(form, float(value)))[0])

    elif isinstance(kind, (types.Integer, types.Boolean)):
        bits = 1 if isinstance(kind, types.Boolean) else kind.bitwidth
        least = -(1 << bits - 1) if getattr(kind, "signed", False) else 0
        most = least + (1 << bits) - 1

        def write(value, words):
            number = operator.index(value)
            if not least <= number <= most:
                raise ValueError(f"{number} is no {kind}")
            words.append(number & _MASK)

    else:
        raise TypeError(f"kernels take no argument of type {kind}")
    return write


_MASK = (1 << 64) - 1


def _inside(kind, value):
    """An argument as a simulated kernel sees it."""
    if isinstance(kind, types.Array):
        return simulator.inside(value._view)
    if isinstance(kind, types.BaseTuple):
        parts = map(_inside, kind, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(kind, types.Float):
        return numpy_support.as_dtype(kind).type(value)
    return operator.index(value)
