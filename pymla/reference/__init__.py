"""NumPy versions of every operation: obviously right, float32 or float64, the oracle of both fast backends.

This backend (`pymla.models.placement`) computes in the dtype of the arrays that it is given, so that a whole model can
run in float64.
"""

from pymla.reference import attention, memory, moe, norm, quant, rope
from pymla.reference.graph import Graph
from pymla.reference.needed import compile_for
from pymla.scratch import SLICE
from pymla.text import sampling

NAME = "reference"

__all__ = ["NAME", "SLICE", "Graph", "attention", "compile_for", "memory", "moe", "norm", "quant", "rope", "sampling"]
