"""The CUDA backend as the module that a model takes. `pymla.cuda.check` tells whether it can be imported."""

from pymla.costs import DEVICE_SLICE as SLICE
from pymla.cuda import NAME, attention, memory, moe, norm, quant, rope, sampling
from pymla.cuda.graph import Graph
from pymla.cuda.jit import compile_all

__all__ = [
    "NAME",
    "SLICE",
    "Graph",
    "attention",
    "compile_all",
    "memory",
    "moe",
    "norm",
    "quant",
    "rope",
    "sampling",
]
