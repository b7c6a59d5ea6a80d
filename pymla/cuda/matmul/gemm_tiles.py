"""Tiles: products of 128 rows of a quantised matrix and 64 or 128 activations, on int8 tensor cores.

`gemm` multiplies whole matrices with them, `pymla.cuda.moe.grouped` the rows of an expert with the tokens that chose
it. Where rows and activations lie and where results go is the kernel's: every thread names a row and an activation, and
stores its results through a function of the kernel.

A tile goes through its columns in slices of 64. Two slices are on their way to shared memory while one is multiplied
(`pymla.cuda.matmul.gemm_stages`). When a slice has come, each thread unpacks a row of it to codes of a byte; then every
warp multiplies 32 or 64 rows with 64 activations (`pymla.cuda.matmul.gemm_products`).

The cost, counted in the machine code of q4_0 for compute capability 9.0: in a slice of a wide tile a warp executes 64
``mma`` of 16 × 8 × 32 among 920 instructions. 512 of these are multiply-adds for scales, two for each of a lane's four
results, as every 32 columns have a scale in either factor; 48 are ``ldmatrix``, loads of scales and fences, 70 unpack,
140 copy. A multiprocessor of an H100 issues 4 in a cycle, so that an ``mma`` takes 3.6 cycles where the tensor cores
would need one: 28 % of their dense rate, 530 TOP/s at 1.755 GHz, is the bound (the multiply-adds alone allow 50 %). On
an H200 245 TOP/s were measured, 20 % of its rate. Shared memory needs 2.7 cycles per ``mma``: 1.25 for fragments and
scales, 0.5 for arriving bytes and 0.9 to unpack. 31 KB are on their way for a block, of which a multiprocessor holds
two.
"""

import functools
from typing import NamedTuple

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.machine.ptx import WARP, cp_async_commit, cp_async_wait, lane, shared_address
from pymla.cuda.matmul.gemm_layout import SLICE, STAGES, layout_of
from pymla.cuda.matmul.gemm_products import products_of, row_scaling_of
from pymla.cuda.matmul.gemm_stages import stages_of
from pymla.cuda.runtime.jit import device, unrolled

__all__ = ["Tile", "tile_of"]

#: Groups of copies that may be on their way when a slice is multiplied.
UNDER_WAY = STAGES - 2


class Tile(NamedTuple):
    """Products of a type in tiles, as a kernel's factory takes them.

    The kernel is launched with `THREADS` threads and `shared_bytes` of dynamic shared memory.
    """

    #: (row, token, input) -> sums, by all threads of a block: with ``i`` the thread, `row` is the address of row i of
    #: the tile, and `token` the row of the `quant.Input` that is activation i (where there is one).
    #: Every named row is read: a thread without one names another that is there.
    product: object
    #: (function) -> device function (sums, more): calls ``function(upper, lower, row, activation, more)`` for every two
    #: of the thread's results: of an activation, and of a row and the one 8 rows further, by their numbers in the tile.
    storing: object
    shared_bytes: int


@functools.cache
def tile_of(qtype, activations):
    """Tiles of a type with `NARROW` or `WIDE` activations."""
    layout = layout_of(qtype, activations)
    name, copy, unpack = stages_of(qtype, activations)
    own_places, add_half, no_sums = products_of(qtype, activations)
    scale_rows = row_scaling_of(qtype, activations)
    inputs, header = layout.inputs, ggml.ROW_HEADER[qtype]

    @device
    def product(row, token, x):
        """`Tile.product`."""
        base = shared_address(cuda.shared.array(0, np.uint8))
        warp, me, blocks = cuda.threadIdx.x // WARP, lane(), x.columns >> 5
        row += header
        name(base, row, token, x)
        cuda.syncthreads()
        own = own_places(warp, me)
        sums, slices = no_sums, blocks + 1 >> 1
        for part in range(STAGES - 1):
            copy(base, x, part, part)
            cp_async_commit()
        stage, ahead = 0, STAGES - 1
        for part in range(slices):
            # The slice has come, and no thread multiplies the one whose stage is filled next.
            cp_async_wait(UNDER_WAY)
            cuda.syncthreads()
            copy(base, x, part + STAGES - 1, ahead)
            cp_async_commit()
            unpack(base, row, blocks, part, stage)
            cuda.syncthreads()
            at = inputs + SLICE * activations * stage, 8 * activations * stage
            for half in range(2):
                sums = add_half(sums, half, (base, own, at))
            ahead, stage = stage, stage + 1 if stage + 1 < STAGES else 0
        return scale_rows(sums, base, warp, me, row)

    return Tile(product, storing_of(layout), layout.nbytes)


def storing_of(layout):
    """`Tile.storing`."""
    strips, warps_along_rows = layout.strips, layout.warps_along_rows

    def storing(function):
        @device
        def store_strip(sums, i, fixed):
            row, activation, more = fixed
            function(sums[0], sums[2], row + 16 * i, activation, more)
            function(sums[1], sums[3], row + 16 * i, activation + 1, more)
            return 0

        store_strips = unrolled(store_strip, strips)

        @device
        def store_activations(sums, i, fixed):
            row, activation, more = fixed
            store_strips(0, sums[0], (row, activation + 16 * i, more))
            store_strips(0, sums[1], (row, activation + 16 * i + 8, more))
            return 0

        store_all_activations = unrolled(store_activations, 4)

        @device
        def store(sums, more):
            warp, me = cuda.threadIdx.x // WARP, lane()
            row = 16 * strips * (warp % warps_along_rows) + (me >> 2)
            activation = 64 * (warp // warps_along_rows) + 2 * (me & 3)
            store_all_activations(0, sums, (row, activation, more))

        return store

    return storing
