"""Kernels: plain functions over a range of their parallel axis, ``kernel(first, last, *arguments)``.

A kernel is compiled for one signature and launched over `items` of that axis, as ``kernel[items](*arguments)``: threads
take ranges from each other until none is left (`pymla.cpu.runtime.threads`).
"""

import functools
from types import FunctionType

from numba import types
from numba.core.caching import NullCache

from pymla import ggml
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.arguments import Packer, unpacker
from pymla.cpu.runtime.compiling import Compiled, c_function, helper

__all__ = ["Kernel", "helper", "kernel", "variants"]

_ENTRY = types.void(types.int64, types.int64, types.int64)


def kernel(*signature):
    """Mark a function over a range of items as a kernel, whose further arguments have the Numba types `signature`."""
    return lambda python_function: Kernel(python_function, signature)


def variants(factory):
    """Mark a function that makes a kernel for some types of rows. It is called once for each of their combinations, and
    the kernel is named after them."""

    @functools.cache
    @functools.wraps(factory)
    def make(*types):
        made = factory(*types)
        made.name(f"{factory.__name__}[{','.join(ggml.NAME.get(each, str(each)) for each in types)}]")
        made.compiled.origin = factory.__module__, factory.__name__, types
        return made

    return make


class Kernel:
    """A function ``(first, last, *arguments)``, compiled when it is first launched or by `compile_all`."""

    def __init__(self, python_function, signature):
        self.__name__ = python_function.__name__
        self.__doc__ = python_function.__doc__
        self._function = python_function
        self._signature = signature
        self._pack = Packer(signature, self.__name__)
        self.compiled = Compiled(python_function, self._build)

    def name(self, name):
        """Give it a name of its own among those that were made by one function."""
        self.__name__ = self.compiled.__name__ = name

    def __getitem__(self, items):
        """The kernel over `items`, dealt out in ranges of a suitable size, or of a given one: ``[items, grain]``."""
        items, grain = items if isinstance(items, tuple) else (items, None)

        def launch(*arguments):
            threads.launch(self.compiled.result.address, items, grain, self._pack(arguments), arguments)

        return launch

    @property
    def assembly(self):
        """The machine code as text, of a new compilation: what comes from the cache has none."""
        return self._build(NullCache())._library.get_asm_str()

    def _build(self, cache):
        # Machine code is named after its function: each kernel has a copy of `_enter`, whose globals are the function
        # and the reader of its arguments.
        scope = {"inner": helper(self._function), "unpack": unpacker(self._signature), "__name__": __name__}
        entry = FunctionType(_enter.__code__, scope, self.__name__)
        entry.__qualname__ = f"{self._function.__module__}.{self.__name__}"
        return c_function(entry, _ENTRY, cache)


def _enter(arguments, first, last):
    inner(first, last, *unpack(arguments))  # noqa: F821
