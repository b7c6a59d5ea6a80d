"""NumPy versions of every operation: obviously right, float32 or float64, the oracle of both fast backends.

This backend (`pymla.backends`) computes in the dtype of the arrays that it is given, so that a whole model can run in
float64.
"""

from pymla import sampling
from pymla.costs import SLICE
from pymla.reference import attention, memory, moe, norm, quant, rope
from pymla.reference.graph import Graph

NAME = "reference"

__all__ = ["NAME", "SLICE", "Graph", "attention", "compile_for", "memory", "moe", "norm", "quant", "rope", "sampling"]


def compile_for(model, progress=None, warn=None):
    """Nothing is compiled here."""
