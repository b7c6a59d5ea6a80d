"""All functions of a quantised type on the GPU (`pymla.cuda.formats.Format`) in one kernel, as `cpu_functions` has them
for the CPU: small enough to be simulated, and compiled, for every type."""

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda import memory
from pymla.cuda.formats import FORMATS
from pymla.cuda.formats.runs import Run, copying
from pymla.cuda.machine.ptx import as_f32, cp_async_commit, cp_async_wait, load_f32x2, load_u32x4, shared_address
from pymla.cuda.runtime.jit import KERNELS, Kernel, device, kernel

#: Blocks of 32 weights of a row: two super-blocks.
BLOCKS = 16
#: A thread for each piece.
THREADS = 4 * BLOCKS

F2, F3 = (types.Array(types.float32, dimensions, "C") for dimensions in (2, 3))
I3 = types.Array(types.int32, 3, "C")


class Results(NamedTuple):
    """What the functions of a type make of rows (N, 32 * BLOCKS) and an activation."""

    weights: np.ndarray  # float32 (N, 32 * BLOCKS), by `piece` and `weights`
    codes: np.ndarray  # int32 (N, BLOCKS, 8), by `block`
    numbers: np.ndarray  # float32 (N, BLOCKS, 2), by `block` and, where there is a header, `row_scale`
    products: np.ndarray  # float32 (N, BLOCKS), by `dot`


def numbers_of(qtype):
    """A device function (row, scale, other): a block's numbers, times the scale of the row, as two float32."""
    row_scale = FORMATS[qtype].row_scale

    @device
    def scaled(row, scale, other):
        factor = row_scale(row)
        return factor * scale, factor * other

    @device
    def bits(row, scale, other):
        return scale, as_f32(other)

    @device
    def floats(row, scale, other):
        return scale, other

    return scaled if row_scale else bits if FORMATS[qtype].minima else floats


def dot_of(qtype):
    """`Format.dot` (row, …), the row's scale included."""
    dot, row_scale = FORMATS[qtype].dot, FORMATS[qtype].row_scale

    @device
    def scaled(row, block, x, scale, total, sum):
        return row_scale(row) * dot(block, x, scale, total, np.float32(0)) + sum

    @device
    def as_it_is(row, block, x, scale, total, sum):
        return dot(block, x, scale, total, sum)

    return scaled if row_scale else as_it_is


@functools.cache
def functions(qtype: int) -> Kernel:
    """A kernel that calls every function of a type once."""
    piece, weights, block, dot, of_numbers = *FORMATS[qtype][:3], dot_of(qtype), numbers_of(qtype)
    run, header = Run.of(qtype, BLOCKS), ggml.ROW_HEADER[qtype]
    copy, shared_bytes = copying(run, THREADS), 16 * run.pieces
    signature = types.int64, types.int64, types.int64, types.int64, F2, I3, F3, F2

    @kernel(*signature, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def functions(rows, stride, activation, scales, out, codes, numbers, products):
        """A block takes a row, and every thread a piece of it; then each of some threads a block of 32 weights.
        Addresses, bytes from row to row, and results."""
        i, t = cuda.blockIdx.x, cuda.threadIdx.x
        row = rows + stride * i
        k = 32 * (t >> 2) + 4 * (t & 3)
        w0, w1, w2, w3, w4, w5, w6, w7 = weights(piece(row, t >> 2, t & 3))
        out[i, k], out[i, k + 1], out[i, k + 2], out[i, k + 3] = w0, w1, w2, w3
        k += 16
        out[i, k], out[i, k + 1], out[i, k + 2], out[i, k + 3] = w4, w5, w6, w7
        at = shared_address(cuda.shared.array(shared_bytes, np.uint8, alignment=16))
        copy(at, row + header, run.nbytes, t)
        cp_async_commit()
        cp_async_wait(0)
        cuda.syncthreads()
        if t < BLOCKS:
            made = block(at + (row + header & 15), t)
            (c0, c1, c2, c3, c4, c5, c6, c7), first, second = made
            first, second = of_numbers(row, first, second)
            codes[i, t, 0], codes[i, t, 1], codes[i, t, 2], codes[i, t, 3] = c0, c1, c2, c3
            codes[i, t, 4], codes[i, t, 5], codes[i, t, 6], codes[i, t, 7] = c4, c5, c6, c7
            numbers[i, t, 0], numbers[i, t, 1] = first, second
            x = load_u32x4(activation + 32 * t) + load_u32x4(activation + 32 * t + 16)
            scale, total = load_f32x2(scales + 8 * t)
            products[i, t] = dot(row, made, x, scale, total, np.float32(i))

    del KERNELS[functions.__name__]  # it is no kernel of the package
    return functions


def starts(qtype: int) -> int:
    """At how many places of 16 bytes rows of a type begin."""
    return 16 // math.gcd(16, ggml.BLOCK_BYTES[qtype], ggml.ROW_HEADER[qtype])


def call(qtype: int, data: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> Results:
    """All functions of a type with rows (N, bytes), which begin at each of their places, and an activation: int8
    (32 * BLOCKS,) and float32 (BLOCKS,). A row's product with every block has the row's number added."""
    step = 16 // starts(qtype)
    stride = data.shape[1] + (step - data.shape[1]) % 16
    rows = np.full((len(data), stride), 0xFF, np.uint8)
    rows[:, : data.shape[1]] = data
    n, totals = len(data), scale * codes.reshape(BLOCKS, 32).sum(axis=1, dtype=np.int32)
    shapes = (n, 32 * BLOCKS), (n, BLOCKS, 8), (n, BLOCKS, 2), (n, BLOCKS)
    dtypes = np.float32, np.int32, np.float32, np.float32
    there = [memory.to_device(x) for x in (rows, codes, np.stack([scale, totals], axis=1).astype(np.float32))]
    out = [memory.empty(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    functions(qtype)[n, THREADS](there[0].address, stride, there[1].address, there[2].address, *out)
    return Results(*map(memory.to_host, out))


def block_weights(qtype: int, results: Results) -> np.ndarray:
    """The weights (N, 32 * BLOCKS) that blocks stand for, float64, as products take them."""
    form = FORMATS[qtype]
    codes = np.ascontiguousarray(results.codes).view(np.int8).reshape(-1, BLOCKS, 2, 16).astype(np.float64)
    first, second = results.numbers[..., 0], results.numbers[..., 1]
    weights = codes * np.stack([first, second if form.halves else first], axis=-1)[..., None]
    if form.minimum:
        weights += second[..., None, None]
    if form.minima:
        low, step = second.view(np.uint32), (second.view(np.uint32) >> 16).astype(np.uint16).view(np.float16)
        minima = np.stack([low & 255, low >> 8 & 255], axis=-1) * step.astype(np.float64)[..., None]
        weights += minima[..., None]
    return weights.reshape(len(codes), -1)
