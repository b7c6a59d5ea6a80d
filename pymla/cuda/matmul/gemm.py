"""Products of a quantised matrix with many tokens, on int8 tensor cores."""

import functools

from numba import cuda, types

from pymla import ggml
from pymla.cuda.machine.ptx import global_address, store_f32
from pymla.cuda.matmul.gemm_layout import TILE_ROWS, WIDE, has_two_products
from pymla.cuda.matmul.gemm_tiles import tile_of
from pymla.cuda.matmul.operands import INPUT, MATRICES, THREADS, input_row, row_address
from pymla.cuda.runtime.array_types import F2
from pymla.cuda.runtime.jit import device, kernel


@functools.cache
def gemm_kernel(qtype, activations):
    """A product with many tokens, on int8 tensor cores."""
    tile = tile_of(qtype, activations)
    product = tile.product

    @device
    def store(upper, lower, row, t, to):
        """Results of two rows and a token, if they are there. `to`: the address of the first results of the tile, bytes
        from token to token, and how many rows and tokens are left."""
        address, stride, rows, tokens = to
        at = address + stride * t + 4 * row
        if t < tokens and row < rows:
            store_f32(at, upper)
        if t < tokens and row + 8 < rows:
            store_f32(at + 32, lower)

    store_all = tile.storing(store)

    @kernel(
        MATRICES,
        INPUT,
        types.int64,
        F2,
        variant=f"{ggml.NAME[qtype].lower()},{activations}",
        max_threads=THREADS,
        min_blocks=2 if activations == WIDE or has_two_products(qtype) else 3,
    )
    def gemm(w, x, heads, out):
        """A block takes a tile: `TILE_ROWS` rows (y) of matrix z and as many tokens (x) as it has activations."""
        thread, matrix = cuda.threadIdx.x, cuda.blockIdx.z
        first, t = TILE_ROWS * cuda.blockIdx.y, activations * cuda.blockIdx.x
        sums = product(row_address(w, matrix, first + thread), input_row(x, heads, matrix, t + thread), x)
        stride = 4 * out.shape[1]
        address = global_address(out) + stride * t + 4 * (matrix * w.rows + first)
        store_all(sums, (address, stride, w.rows - first, len(out) - t))

    return gemm
