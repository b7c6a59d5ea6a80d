"""Normalisation and the residual sum. Twin of `pymla.reference.norm`.

`normed` does all work between two products in one launch: the residual sum, the norm, and quantising.
"""

from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla.cuda.contract import check
from pymla.cuda.machine.ptx import (
    WARP,
    div,
    fma,
    fresh_f32x4,
    lane,
    load_f32x4,
    load_shared_f32x4,
    shared_address,
    sqrt,
    store_f32x4,
    store_shared_f32x4,
    to_f32,
    warp_sum,
)
from pymla.cuda.matmul.activations import quantise_four
from pymla.cuda.quant import Activation
from pymla.cuda.runtime.array_types import F1, F2, STRIDED2
from pymla.cuda.runtime.jit import device, kernel

THREADS = 256
_WARPS = THREADS // WARP


def rms_norm(x, weight, eps, out):
    """``out = x / sqrt(mean(x²) + eps) * weight`` along the last axis; float32 (T, K), `weight` float32 (K,).

    `x` and `out` may be columns of wider arrays.
    """
    check.rms_norm(x, weight, eps, out)
    _rms_norm[len(x), THREADS](x, weight, eps, out)
    return out


def layer_norm(x, weight, bias, eps, out):
    """``out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` along the last axis; float32 (T, K), `weight` and
    `bias` float32 (K,).

    `x` may be columns of a wider array.
    """
    check.layer_norm(x, weight, bias, eps, out)
    _layer_norm[len(x), THREADS](x, weight, bias, eps, out)
    return out


def normed(x, weight, eps, out, y=None):
    """``x += y``, then ``out = rms_norm(x)`` as an `Activation`, quantised where its length permits: all float32
    (T, K), contiguous, `weight` float32 (K,)."""
    check.normed(x, weight, eps, out, y)
    tokens, columns = x.shape
    if columns % 32:
        if y is not None:
            add(x, y)
        return Activation(rms_norm(x, weight, eps, out))
    result = Activation(out).quantised()
    written = out.address, result.codes.address, result.scales.address
    rows = Rows(x.address, 0 if y is None else y.address, weight.address, *written)
    _normed[tokens, THREADS, 4 * columns](rows, columns, eps)
    return result


def add(x, y):
    """``x += y``, both float32 (T, K), contiguous."""
    check.add(x, y)
    _add[-(-x.size // THREADS), THREADS](x.reshape(-1), y.reshape(-1))
    return x


def kernels():
    """The kernels of every model's norms and residual sums."""
    return [_rms_norm, _normed, _add]


def layer_norm_kernels():
    """The kernels of `layer_norm`."""
    return [_layer_norm]


@device
def scale_of(square, columns, eps, partial):
    """The factor that normalises a row, from every thread's part of its sum of squares."""
    return div(np.float32(1), sqrt(div(_block_sum(square, partial), to_f32(columns)) + eps))


@device
def _block_sum(x, partial):
    """The sum over the block, for all threads. Each of a kernel's sums has an array `partial` of its own, because no
    thread waits until the others have read it."""
    x = warp_sum(x)
    if lane() == 0:
        partial[cuda.threadIdx.x // WARP] = x
    cuda.syncthreads()
    total = np.float32(0)
    for warp in range(_WARPS):
        total += partial[warp]
    return total


@kernel(STRIDED2, F1, types.float32, STRIDED2, max_threads=THREADS)
def _rms_norm(x, weight, eps, out):
    """A block takes a token."""
    partial = cuda.shared.array(_WARPS, np.float32)
    t, i = cuda.blockIdx.x, cuda.threadIdx.x
    columns = x.shape[1]
    square = np.float32(0)
    for k in range(i, columns, THREADS):
        square = fma(x[t, k], x[t, k], square)
    scale = scale_of(square, columns, eps, partial)
    for k in range(i, columns, THREADS):
        out[t, k] = x[t, k] * scale * weight[k]


@kernel(STRIDED2, F1, F1, types.float32, F2, max_threads=THREADS)
def _layer_norm(x, weight, bias, eps, out):
    """A block takes a token."""
    sums = cuda.shared.array(_WARPS, np.float32)
    squares = cuda.shared.array(_WARPS, np.float32)
    t, i = cuda.blockIdx.x, cuda.threadIdx.x
    columns = x.shape[1]
    total, square = np.float32(0), np.float32(0)
    for k in range(i, columns, THREADS):
        total += x[t, k]
    mean = div(_block_sum(total, sums), to_f32(columns))
    for k in range(i, columns, THREADS):
        square = fma(x[t, k] - mean, x[t, k] - mean, square)
    scale = scale_of(square, columns, eps, squares)
    for k in range(i, columns, THREADS):
        out[t, k] = fma((x[t, k] - mean) * scale, weight[k], bias[k])


class Rows(NamedTuple):
    """Addresses of the arrays that `normed` reads and writes."""

    x: int  # float32 (T, K)
    y: int  # the same, added to x; or 0
    weight: int  # float32 (K,)
    out: int  # float32 (T, K)
    codes: int  # int8 (T, K)
    scales: int  # float32 (T, K // 32, 2)


@kernel(types.NamedUniTuple(types.int64, 6, Rows), types.int64, types.float32, max_threads=THREADS)
def _normed(rows, columns, eps):
    """A block takes a token, whose row waits in shared memory for its scale; a thread takes four columns at a time."""
    row = shared_address(cuda.shared.array(0, np.float32, alignment=16))
    partial = cuda.shared.array(_WARPS, np.float32)
    i, start, square = cuda.threadIdx.x, columns * cuda.blockIdx.x, np.float32(0)
    for k in range(4 * i, columns, 4 * THREADS):
        at = rows.x + 4 * (start + k)
        x0, x1, x2, x3 = fresh_f32x4(at)
        if rows.y:
            y0, y1, y2, y3 = load_f32x4(rows.y + 4 * (start + k))
            x0, x1, x2, x3 = x0 + y0, x1 + y1, x2 + y2, x3 + y3
            store_f32x4(at, x0, x1, x2, x3)
        store_shared_f32x4(row + 4 * k, x0, x1, x2, x3)
        square = fma(x0, x0, fma(x1, x1, fma(x2, x2, fma(x3, x3, square))))
    scale = scale_of(square, columns, eps, partial)
    # The lanes of a warp stay together, as they need each other for the maximum of 32 columns.
    for first in range(4 * (i - lane()), columns, 4 * THREADS):
        inside = first + 4 * lane() < columns
        k = first + 4 * lane() if inside else 4 * (i & 7)
        x0, x1, x2, x3 = load_shared_f32x4(row + 4 * k)
        w0, w1, w2, w3 = load_f32x4(rows.weight + 4 * k)
        x0, x1, x2, x3 = x0 * scale * w0, x1 * scale * w1, x2 * scale * w2, x3 * scale * w3
        at = start + k
        if inside:
            store_f32x4(rows.out + 4 * at, x0, x1, x2, x3)
        quantise_four(x0, x1, x2, x3, rows.codes + at, rows.scales + 8 * (at >> 5), i & 7, inside)


@kernel(F1, F1, max_threads=THREADS)
def _add(x, y):
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < len(x):
        x[i] += y[i]
