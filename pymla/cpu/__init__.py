"""Numba kernels for the processor: the twins of `pymla.reference`, with the same names and contracts."""

import numba

from pymla.cpu import attention, moe, norm, quant, rope
from pymla.cpu.jit import cache_dir_warning, compile_kernels, needs_compiling
from pymla.cpu.simd import ISA

NAME = "cpu"

__all__ = [
    "ISA",
    "NAME",
    "attention",
    "cache_dir_warning",
    "compile_kernels",
    "moe",
    "needs_compiling",
    "norm",
    "quant",
    "rope",
    "set_threads",
    "threading_layer",
    "usable_cores",
]


def usable_cores():
    """Cores that this process may run on."""
    return numba.config.NUMBA_NUM_THREADS


def set_threads(count):
    """Run kernels on `count` threads, from 1 to `usable_cores()`."""
    numba.set_num_threads(count)


def threading_layer():
    """Name of the library that runs the threads; known after the first kernel has run.

    ``omp`` and ``tbb`` start a parallel loop in 1 to 2 µs. ``workqueue`` takes 40 to 55 µs, and a step has hundreds.
    """
    return numba.threading_layer()
