"""The CUDA backend as the module that a model takes. `pymla.cuda.check` tells whether it can be imported."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from pymla.cuda import NAME, attention, memory, moe, norm, quant, rope, sampling
from pymla.cuda.graph import Graph
from pymla.cuda.needed import compile_for
from pymla.scratch import DEVICE

if TYPE_CHECKING:
    from pymla.cuda import limits

IN_HOST_MEMORY = False
SLICE = DEVICE.tokens

__all__ = [
    "IN_HOST_MEMORY",
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
    "thread_count",
]


def thread_count() -> int:
    """Threads of the host that launch kernels."""
    return 1


def __getattr__(name: str) -> ModuleType:
    # Kernels of this module serve nothing but measurements.
    if name == "limits":
        return importlib.import_module("pymla.cuda.limits")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
