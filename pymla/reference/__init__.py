"""NumPy versions of every operation: obviously right, float32 or float64, the oracle of both fast backends.

A backend is a module with the submodules ``quant``, ``norm``, ``rope``, ``attention`` and ``moe``. This one computes in
the dtype of the arrays it is given, so that a whole model can run in float64.
"""

from pymla.reference import attention, moe, norm, quant, rope
from pymla.reference.graph import Graph

NAME = "reference"

__all__ = ["NAME", "Graph", "attention", "moe", "norm", "quant", "rope"]
