"""NumPy versions of every operation: obviously right, float32 or float64, the oracle of both fast backends.

This backend (`pymla.models.placement`) computes in the dtype of the arrays that it is given, so that a whole model can
run in float64.
"""

from pymla.reference import attention, limits, memory, moe, norm, quant, rope
from pymla.reference.graph import Graph
from pymla.scratch import SLICE
from pymla.text import sampling

NAME = "reference"

__all__ = [
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


def compile_for(model, progress=None, warn=None):
    """Nothing is compiled here."""


def thread_count() -> int:
    """NumPy computes in the caller's thread, but for products of matrices, whose threads are its BLAS library's."""
    return 1
