"""NumPy versions of every operation: obviously right, float32 or float64, the oracle of both fast backends.

This backend (`pymla.backend`) computes in the dtype of the arrays that it is given, so that a whole model can run in
float64.
"""

from pymla.reference import attention, limits, memory, moe, norm, quant, rope, sampling
from pymla.reference.graph import Graph
from pymla.reference.needed import compile_for
from pymla.scratch import HOST

NAME = "reference"
IN_HOST_MEMORY = True
SLICE = HOST.tokens

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
    """NumPy computes in the caller's thread, but for products of matrices, whose threads are its BLAS library's."""
    return 1
