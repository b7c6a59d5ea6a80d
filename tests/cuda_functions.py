"""All functions of a quantised type on the GPU (`pymla.cuda.formats.Format`) in one kernel, as `cpu_functions` has them
for the CPU: small enough to be simulated, and compiled, for every type."""

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda import memory
from pymla.cuda.formats import FORMATS
from pymla.cuda.formats.runs import Run, copying
from pymla.cuda.machine.ptx import cp_async_commit, cp_async_wait, fma, load_f32x2, load_u32x4, shared_address
from pymla.cuda.runtime.array_types import F2, addresses
from pymla.cuda.runtime.jit import KERNELS, Kernel, kernel

#: Blocks of 32 weights of a row: two super-blocks.
BLOCKS = 16
#: A thread for each piece.
THREADS = 4 * BLOCKS


class Results(NamedTuple):
    """What the functions of a type make of rows (N, 32 * BLOCKS) and an activation."""

    weights: np.ndarray  # float32 (N, 32 * BLOCKS), by `piece` and `weights`
    products: np.ndarray  # float32 (N, BLOCKS), by `block`, `dot` and `row_scale`


@functools.cache
def functions(qtype: int) -> Kernel:
    """A kernel that calls every function of a type once."""
    form, header = FORMATS[qtype], ggml.ROW_HEADER[qtype]
    piece, weights, block, dot, row_scale = form.piece, form.weights, form.block, form.dot, form.row_scale
    run = Run.of(qtype, BLOCKS)
    copy, shared_bytes = copying(run, THREADS), 16 * run.pieces

    @kernel(addresses(4), F2, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def functions(given, out, products):
        """A block takes a row, and every thread a piece of it; then some threads take a block of 32 weights each.
        `given`: the address of the rows, the bytes from row to row, and the addresses of the activation's codes and of
        its scales and sums."""
        rows, stride, codes, scales = given
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
            x = load_u32x4(codes + 32 * t) + load_u32x4(codes + 32 * t + 16)
            scale, total = load_f32x2(scales + 8 * t)
            number = np.float32(i)
            product = dot(block(at + (row + header & 15), t), x, scale, total, number)
            products[i, t] = fma(row_scale(row), product - number, number) if row_scale else product

    del KERNELS[functions.__name__]  # it is no kernel of the package
    return functions


def starts(qtype: int) -> int:
    """At how many places of 16 bytes rows of a type begin."""
    return 16 // math.gcd(16, ggml.BLOCK_BYTES[qtype], ggml.ROW_HEADER[qtype])


def call(qtype: int, data: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> Results:
    """All functions of a type with rows (N, bytes), which begin at each of their places, and an activation: int8
    (32 * BLOCKS,) and float32 (BLOCKS,). A row's product with every block has the row's number added."""
    stride = data.shape[1] + (16 // starts(qtype) - data.shape[1]) % 16
    rows = np.full((len(data), stride), 0xFF, np.uint8)
    rows[:, : data.shape[1]] = data
    totals = scale * codes.reshape(BLOCKS, 32).sum(axis=1, dtype=np.int32)
    there = [memory.to_device(x) for x in (rows, codes, np.stack([scale, totals], axis=1).astype(np.float32))]
    out = Results(*(memory.empty((len(data), count), np.float32) for count in (32 * BLOCKS, BLOCKS)))
    functions(qtype)[len(data), THREADS]((there[0].address, stride, there[1].address, there[2].address), *out)
    return Results(*map(memory.to_host, out))
