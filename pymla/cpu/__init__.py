"""Numba kernels for the processor: the twins of `pymla.reference`, with the same names and contracts."""

from pymla.host import numba_check  # noqa: F401 - before Numba

# isort: split
from pymla.cpu import attention, memory, moe, norm, quant, rope
from pymla.cpu.graph import Graph
from pymla.cpu.machine.isa import ISA
from pymla.cpu.needed import compile_for
from pymla.cpu.runtime.threads import set_threads, thread_count
from pymla.host.cores import usable_cores
from pymla.scratch import SLICE
from pymla.text import sampling

NAME = "cpu"

__all__ = [
    "ISA",
    "NAME",
    "SLICE",
    "Graph",
    "attention",
    "compile_for",
    "memory",
    "moe",
    "norm",
    "quant",
    "rope",
    "sampling",
    "set_threads",
    "thread_count",
    "usable_cores",
]
