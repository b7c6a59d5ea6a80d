"""Matrices of weights as kernels read them, and what is done with rows of float32."""

from typing import NamedTuple

from numba import types

from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import fma, load_f32, load_f32x8, load_f32xL, splat_f32, store_f32, store_f32x8, store_f32xL
from pymla.cpu.runtime.compiling import helper
from pymla.tensor import QTensor


class Matrices(NamedTuple):
    """One or several matrices of a QTensor for a kernel: rows of a matrix are contiguous, matrices may lie apart."""

    address: int
    matrix_stride: int  # bytes
    row_stride: int  # bytes
    count: int
    rows: int

    @classmethod
    def of(cls, w: QTensor) -> "Matrices":
        """The view of a QTensor with two- or three-dimensional data."""
        data = w.data if w.data.ndim == 3 else w.data[None]
        return cls(data.__array_interface__["data"][0], *data.strides[:2], *data.shape[:2])


MATRICES = types.NamedUniTuple(types.int64, 5, Matrices)


@helper
def row_at(w, matrix, row):
    """The address of a row of one of the matrices."""
    return w.address + matrix * w.matrix_stride + row * w.row_stride


@helper
def copy(source, target, count):
    """Copy `count` float32 from one address to another."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_f32xL(target + 4 * i, load_f32xL(source + 4 * i))
    for i in range(whole, count):
        store_f32(target + 4 * i, load_f32(source + 4 * i))


@helper
def add_scaled(weight, x, out, columns):
    """``out += weight * x`` at addresses of float32."""
    factor = splat_f32(weight)
    whole = columns // 8 * 8
    for i in range(0, 4 * whole, 32):
        store_f32x8(out + i, fma(factor, load_f32x8(x + i), load_f32x8(out + i)))
    for i in range(4 * whole, 4 * columns, 4):
        store_f32(out + i, load_f32(out + i) + weight * load_f32(x + i))
