"""The CUDA backend as the module that a model takes. `pymla.cuda.check` tells whether it can be imported."""

from pymla.cuda import NAME, attention, memory, moe, norm, quant, rope, sampling
from pymla.cuda.graph import Graph
from pymla.cuda.needed import compile_for
from pymla.scratch import DEVICE_SLICE as SLICE

__all__ = [
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
]
