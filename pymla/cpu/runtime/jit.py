"""Kernels: plain functions over a range of their parallel axis, ``kernel(first, last, *arguments)``.

A kernel is compiled for one signature. It is launched over `items` of its axis as ``kernel[items](*arguments)``:
threads take ranges from a shared counter until none is left (`pymla.cpu.runtime.threads`). Called with a range it runs
on the calling thread, and its source, `Kernel.py_func`, runs as Python.

>>> import numpy as np
>>> from numba import types
>>> from pymla.cpu.runtime.jit import kernel
>>> F1 = types.Array(types.float32, 1, "C")
>>> @kernel(F1, types.float64)
... def scale(first, last, x, factor):
...     for i in range(first, last):
...         x[i] *= factor
>>> x = np.ones(4, np.float32)
>>> scale[4](x, 2)
>>> scale(0, 2, x, 3)
>>> scale.py_func(3, 4, x, 4)
>>> x
array([6., 6., 2., 8.], dtype=float32)
>>> scale
<kernel pymla.cpu.runtime.jit.scale(first: int, last: int, x: float32 (n,), factor: float)>
"""

import functools
from types import FunctionType

import numpy as np
from numba import types
from numba.core.caching import NullCache

from pymla import ggml
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.arguments import Packer, unpacker
from pymla.cpu.runtime.compiling import Compiled, c_function, helper
from pymla.cpu.runtime.isa import PYTHON
from pymla.host.kernel_signature import kernel_signature

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
        made.__doc__ = made.__doc__ or factory.__doc__
        made.compiled.origin = factory.__module__, factory.__name__, types
        return made

    return make


class Kernel:
    """A function ``(first, last, *arguments)``, compiled when it is first launched or by `compile_all`.

    Where kernels run as Python (``PYMLA_ISA=python``) nothing is compiled, and launches run on the calling thread.

    Attributes
    ----------
    py_func : function
        Its source.
    signature : tuple of Numba types
        Of the arguments after `first` and `last`.
    """

    def __init__(self, python_function, signature):
        self.__name__, self.__qualname__ = python_function.__name__, python_function.__qualname__
        self.__doc__, self.__module__ = python_function.__doc__, python_function.__module__
        self.__wrapped__ = self.py_func = python_function
        self.__signature__ = kernel_signature(python_function, (types.int64, types.int64, *signature), self.__name__)
        self.signature = signature
        self._pack = Packer(signature, self.__name__)
        self.compiled = Compiled(python_function, self._build)

    def name(self, name):
        """Give it a name of its own among those that were made by one function."""
        self.__name__ = self.__qualname__ = self.compiled.__name__ = name

    def __repr__(self):
        return f"<kernel {self.__module__}.{self.__name__}{self.__signature__}>"

    def __get__(self, instance, owner=None):
        # `help` takes objects with this method for routines, and shows their signature and docstring.
        return self

    def __getitem__(self, items):
        """The kernel over `items`, dealt out in ranges of a suitable size, or of a given one: ``[items, grain]``."""
        items, grain = items if isinstance(items, tuple) else (items, None)

        def launch(*arguments):
            words = self._pack(arguments)
            if PYTHON:
                for first in range(0, items, grain or items or 1):
                    self._interpret(first, min(first + (grain or items), items), arguments)
            else:
                threads.launch(self.compiled.result.address, items, grain, words, arguments)

        return launch

    def __call__(self, first, last, *arguments):
        """Run the items from `first` to `last`, without the latter, on the calling thread."""
        words = self._pack(arguments)
        if PYTHON:
            self._interpret(first, last, arguments)
        else:
            self.compiled.result.ctypes(words.ctypes.data, first, last)

    def _interpret(self, first, last, arguments):
        # Machine code does not warn of infinite results and NaN.
        with np.errstate(all="ignore"):
            self.py_func(first, last, *arguments)

    @property
    def assembly(self):
        """The machine code as text; of a new compilation where the cache has it, which keeps no text."""
        is_new = not self.compiled.is_ready
        compiled = self.compiled.result if is_new else self._build(NullCache())
        return compiled._library.get_asm_str()

    def _build(self, cache):
        # Machine code is named after its function: each kernel has a copy of `_enter`, whose globals are the function
        # and the reader of its arguments.
        scope = {"inner": helper(self.py_func), "unpack": unpacker(self.signature), "__name__": __name__}
        entry = FunctionType(_enter.__code__, scope, self.__name__)
        entry.__qualname__ = f"{self.py_func.__module__}.{self.__name__}"
        return c_function(entry, _ENTRY, cache)


def _enter(arguments, first, last):
    inner(first, last, *unpack(arguments))  # noqa: F821
