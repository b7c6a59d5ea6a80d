"""Numba kernels for the processor: the twins of `pymla.reference`, with the same names and contracts."""

from pymla.cpu import attention, moe, norm, quant, rope
from pymla.cpu.compiling import cache_dir_warning, compile_all, needs_compiling
from pymla.cpu.simd import ISA
from pymla.cpu.threads import Graph, set_threads, thread_count, usable_cores

NAME = "cpu"

__all__ = [
    "ISA",
    "NAME",
    "Graph",
    "attention",
    "cache_dir_warning",
    "compile_all",
    "moe",
    "needs_compiling",
    "norm",
    "quant",
    "rope",
    "set_threads",
    "thread_count",
    "usable_cores",
]
