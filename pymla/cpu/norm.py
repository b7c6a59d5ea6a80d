"""Normalisation and the residual sum. Twin of `pymla.reference.norm`.

>>> import numpy as np
>>> from pymla.cpu import norm
>>> x = np.ones((2, 64), np.float32)
>>> float(norm.rms_norm(x, np.full(64, 3, np.float32), 0.0, np.empty_like(x))[1, 5])
3.0
"""

import numpy as np
from numba import types

from pymla.cpu.contract import check
from pymla.cpu.machine.simd import add as plus
from pymla.cpu.machine.simd import address, fma, load_f32, load_f32x8, mul, splat_f32, store_f32x8, sub, total
from pymla.cpu.matmul.activations import Activation
from pymla.cpu.runtime.array_types import A2, F2, WEIGHTS_F1
from pymla.cpu.runtime.jit import Kernel, helper, kernel


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> np.ndarray:
    """``out = x / sqrt(mean(x²) + eps) * weight`` along the last axis; float32 (T, K), `weight` float32 (K,).

    `x` and `out` may be columns of wider arrays.
    """
    check.rms_norm(x, weight, eps, out)
    _rms_norm[len(x)](x, weight, eps, out)
    return out


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray) -> np.ndarray:
    """``out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` along the last axis; float32 (T, K), `weight` and
    `bias` float32 (K,).

    `x` may be columns of a wider array.
    """
    check.layer_norm(x, weight, bias, eps, out)
    _layer_norm[len(x)](x, weight, bias, eps, out)
    return out


def normed(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, y: np.ndarray | None = None) -> Activation:
    """``x += y``, then ``out = rms_norm(x)`` as an `Activation`, which is quantised where it is read: for rows or for
    panels. All float32 (T, K), `weight` float32 (K,)."""
    check.normed(x, weight, eps, out, y)
    if y is not None:
        add(x, y)
    return Activation(rms_norm(x, weight, eps, out))


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``x += y``, both float32 (T, K)."""
    check.add(x, y)
    _add[len(x)](x, y)
    return x


def kernels() -> list[Kernel]:
    """The kernels that every model launches here."""
    return [_rms_norm, _add]


def layer_norm_kernels() -> list[Kernel]:
    """The kernels of `layer_norm`."""
    return [_layer_norm]


@kernel(A2, WEIGHTS_F1, types.float64, A2)
def _rms_norm(first, last, x, weight, eps, out):
    columns = x.shape[1]
    whole = columns // 8 * 8
    for t in range(first, last):
        row, result, factors = address(x[t]), address(out[t]), address(weight)
        squares = splat_f32(np.float32(0))
        for i in range(0, 4 * whole, 32):
            values = load_f32x8(row + i)
            squares = fma(values, values, squares)
        square = np.float64(total(squares))
        for i in range(whole, columns):
            square += x[t, i] * x[t, i]
        scale = np.float32(1 / np.sqrt(square / columns + eps))
        scales = splat_f32(scale)
        for i in range(0, 4 * whole, 32):
            store_f32x8(result + i, mul(mul(load_f32x8(row + i), scales), load_f32x8(factors + i)))
        for i in range(whole, columns):
            out[t, i] = x[t, i] * scale * weight[i]


@kernel(A2, WEIGHTS_F1, WEIGHTS_F1, types.float64, F2)
def _layer_norm(first, last, x, weight, bias, eps, out):
    columns = x.shape[1]
    whole = columns // 8 * 8
    for t in range(first, last):
        row, result, factors, offsets = address(x[t]), address(out[t]), address(weight), address(bias)
        mean = _mean(row, columns)
        scale = np.float32(1 / np.sqrt(_variance(row, columns, mean) + eps))
        means, scales = splat_f32(mean), splat_f32(scale)
        for i in range(0, 4 * whole, 32):
            values = mul(sub(load_f32x8(row + i), means), scales)
            store_f32x8(result + i, fma(values, load_f32x8(factors + i), load_f32x8(offsets + i)))
        for i in range(whole, columns):
            out[t, i] = (x[t, i] - mean) * scale * weight[i] + bias[i]


@helper
def _mean(row, columns):
    """The mean of float32 at an address."""
    whole, sums = columns // 8 * 8, splat_f32(np.float32(0))
    for i in range(0, 4 * whole, 32):
        sums = plus(sums, load_f32x8(row + i))
    summed = np.float64(total(sums))
    for i in range(4 * whole, 4 * columns, 4):
        summed += load_f32(row + i)
    return np.float32(summed / columns)


@helper
def _variance(row, columns, mean):
    """The mean square of float32 at an address, less their mean."""
    whole, means, squares = columns // 8 * 8, splat_f32(mean), splat_f32(np.float32(0))
    for i in range(0, 4 * whole, 32):
        values = sub(load_f32x8(row + i), means)
        squares = fma(values, values, squares)
    square = np.float64(total(squares))
    for i in range(4 * whole, 4 * columns, 4):
        value = load_f32(row + i) - mean
        square += value * value
    return square / columns


@kernel(F2, F2)
def _add(first, last, x, y):
    columns = x.shape[1]
    whole = columns // 8 * 8
    for t in range(first, last):
        a, b = address(x[t]), address(y[t])
        for i in range(0, 4 * whole, 32):
            store_f32x8(a + i, plus(load_f32x8(a + i), load_f32x8(b + i)))
        for i in range(whole, columns):
            x[t, i] += y[t, i]
