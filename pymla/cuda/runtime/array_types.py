"""Numba types of kernels' arguments, by short names: a letter for the elements, and the number of dimensions."""

from numba import types

I32, I64, F32 = types.int32, types.int64, types.float32

#: Contiguous arrays of float32, float64, int32 and int64.
F1, F2, F3 = (types.Array(F32, dimensions, "C") for dimensions in (1, 2, 3))
D1 = types.Array(types.float64, 1, "C")
I1, I2 = (types.Array(I32, dimensions, "C") for dimensions in (1, 2))
L2 = types.Array(I64, 2, "C")
#: Arrays of float32 that may be part of wider ones.
STRIDED2, STRIDED3 = (types.Array(F32, dimensions, "A") for dimensions in (2, 3))


def addresses(count: int) -> types.UniTuple:
    """Several addresses, or other integers of 64 bits."""
    return types.UniTuple(I64, count)
