"""Numba kernels for the processor: the twins of `pymla.reference`, with the same names and contracts."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from pymla.host import numba_check  # noqa: F401 - before Numba

# isort: split
from pymla.cpu import attention, memory, moe, norm, quant, rope, sampling
from pymla.cpu.graph import Graph
from pymla.cpu.needed import compile_for
from pymla.cpu.runtime.isa import ISA
from pymla.cpu.runtime.threads import set_threads, thread_count
from pymla.host.cores import usable_cores
from pymla.scratch import HOST

if TYPE_CHECKING:
    from pymla.cpu import limits

NAME = "cpu"
IN_HOST_MEMORY = True
SLICE = HOST.tokens

__all__ = [
    "IN_HOST_MEMORY",
    "ISA",
    "NAME",
    "SLICE",
    "Graph",
    "attention",
    "compile_for",
    "limits",
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


def __getattr__(name: str) -> ModuleType:
    # Kernels of this module serve nothing but measurements.
    if name == "limits":
        return importlib.import_module("pymla.cpu.limits")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
