"""Numba kernels for the processor: the twins of `pymla.reference`, with the same names and contracts."""

from pymla import sampling
from pymla.costs import SLICE
from pymla.cpu import attention, memory, moe, norm, quant, rope
from pymla.cpu.compiling import cache_dir_warning, compile_all, needs_compiling
from pymla.cpu.isa import ISA
from pymla.cpu.threads import Graph, set_threads, thread_count, usable_cores

NAME = "cpu"

__all__ = [
    "ISA",
    "NAME",
    "SLICE",
    "Graph",
    "attention",
    "cache_dir_warning",
    "compile_all",
    "memory",
    "moe",
    "needs_compiling",
    "norm",
    "quant",
    "rope",
    "sampling",
    "set_threads",
    "thread_count",
    "usable_cores",
]
