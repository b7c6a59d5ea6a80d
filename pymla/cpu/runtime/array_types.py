"""Numba types of the arrays and named tuples that kernels take.

A name has the element and the number of dimensions: F float32, D float64, I int32. Their rows are contiguous (C); A
stands for float32 with any strides.
"""

from numba import types

from pymla.pages import Step
from pymla.tensor import QTensor

F1, F2, F3 = (types.Array(types.float32, dimensions, "C") for dimensions in (1, 2, 3))
A2, A3 = (types.Array(types.float32, dimensions, "A") for dimensions in (2, 3))
D1 = types.Array(types.float64, 1, "C")
I1, I2 = (types.Array(types.int32, dimensions, "C") for dimensions in (1, 2))
INT8_2, INT16_2 = (types.Array(each, 2, "C") for each in (types.int8, types.int16))
INT8_3 = types.Array(types.int8, 3, "C")
#: Weights, which may lie in a file.
WEIGHTS_F1 = types.Array(types.float32, 1, "C", readonly=True)
WEIGHTS_BYTES = types.Array(types.uint8, 2, "C", readonly=True)

#: Rows of a cache, as a QTensor, and a `pymla.pages.Step`.
CACHE = types.NamedTuple((types.int64, types.Array(types.uint8, 2, "C")), QTensor)
STEP = types.NamedTuple((I1, I1, I1, I1, I2), Step)
