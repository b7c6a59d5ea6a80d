"""Constant tables in global memory, which kernels contain. Threads look up numbers at places of their own there, where
constant memory is read at one place at a time."""

from collections.abc import Callable

import numpy as np
from llvmlite import ir

from pymla.cuda.machine.ptx.addresses import GLOBAL
from pymla.cuda.machine.ptx.instruction import I64, LLVM, instruction
from pymla.cuda.runtime.driver import SIMULATED

if SIMULATED:
    import functools

    from pymla.cuda.runtime import simulated_memory


def table(name: str, make: Callable[[], np.ndarray]):
    """A device function without arguments: the address of a constant array, a multiple of 16.

    Parameters
    ----------
    name : str
        Which no other table has.
    make : callable
        Gives the array, of integers, when a kernel is compiled that contains it.
    """
    if SIMULATED:

        @functools.cache
        def memory():
            numbers = make()
            found = simulated_memory.buffer(numbers.nbytes)
            found[:] = numbers.reshape(-1).view("u1")
            return found

        return lambda: memory().ctypes.data

    def emit(builder, values):
        found = builder.module.globals.get(name)
        if found is None:
            numbers = make()
            kind = ir.ArrayType(ir.IntType(8 * numbers.itemsize), numbers.size)
            found = ir.GlobalVariable(builder.module, kind, name, addrspace=GLOBAL)
            found.initializer = ir.Constant(kind, numbers.reshape(-1).tolist())
            found.linkage, found.global_constant, found.align = "linkonce_odr", True, 16
        return builder.ptrtoint(found, LLVM[I64])

    @instruction(I64, emit=emit)
    def address():
        """The table's address."""

    return address
