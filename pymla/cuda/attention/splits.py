"""Positions of a token that several blocks share, and the merging of what they find.

A token's tiles of 32 positions are dealt out to blocks, whose number is fixed at launch; those for which there are no
tiles have nothing to do. Each leaves unnormalised values with their softmax's maximum and sum (Dao et al.,
"Flash-Decoding", 2023). Kernels read lengths on the device, so that a recorded step can be replayed.
"""

from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla.cuda.attention.tiles import INFINITY, THREADS, TILE, WARPS, ZERO
from pymla.cuda.machine import ptx
from pymla.cuda.memory import DeviceArray, empty
from pymla.cuda.runtime.driver import multiprocessors
from pymla.cuda.runtime.jit import device, kernel
from pymla.pages import PAGE

I1 = types.Array(types.int32, 1, "C")
#: A step as kernels of attention take it: positions, sequences of the tokens, block tables.
STEP = types.Tuple((I1, I1, types.Array(types.int32, 2, "C")))

#: Tiles that are worth a block of their own, whose result is to be merged.
LEAST_TILES = 4
#: Columns that a block of the merging kernel takes.
COLUMNS = 128


class Shares(NamedTuple):
    """Memory for the shares of T tokens and H heads, of which there are up to `splits`."""

    splits: int
    values: DeviceArray  # float32 (T, splits, H, v), unnormalised
    sums: DeviceArray  # float32 (T, splits, H, 2): the maximum, and the sum of exponentials

    @classmethod
    def empty(cls, out, step, blocks, splits):
        """For results `out` (T, H, v).

        Parameters
        ----------
        blocks : int
            Blocks of a launch that splits nothing.
        splits : int or None
            None: as many as fill the device twice.
        """
        if splits is None:
            most = step.block_tables.shape[1] * (PAGE // TILE) // LEAST_TILES
            splits = max(1, min(most, 2 * multiprocessors() // max(1, blocks)))
        tokens, heads, v = out.shape
        # A single share goes to `out` at once.
        values = empty((tokens, splits, heads, v) if splits > 1 else 0, np.float32)
        return cls(splits, values, empty((tokens, splits, heads, 2) if splits > 1 else 0, np.float32))

    @property
    def addresses(self):
        """What kernels take."""
        return self.values.address, self.sums.address


def merge(shares, positions, shape, out):
    """Bring shares together; `out` is the `place` of results of `shape` (T, H, v)."""
    tokens, heads, v = shape
    if shares.splits > 1:
        blocks = -(-v // COLUMNS), heads, tokens
        _merge[blocks, THREADS](positions, heads, v, shares.splits, shares.addresses, out)


@device
def shares_of(length, splits):
    """Tiles of a token that sees `length` positions, and the blocks that share them: all that are worth it."""
    tiles = length + TILE - 1 >> 5
    return tiles, max(1, min(splits, tiles >> 2))


@device
def boundary(tiles, shares, share):
    """The first tile of a share; all blocks compute it alike. Shares differ by one tile at most."""
    return ptx.nearest_int(ptx.to_f32(tiles * share) * ptx.rcp(ptx.to_f32(shares)))


@kernel(
    I1, types.int32, types.int32, types.int32, types.UniTuple(types.int64, 2), types.UniTuple(types.int64, 3),
    max_threads=THREADS,
)  # fmt: skip
def _merge(positions, heads, rank, splits, partial, out):
    """Bring the shares of a token and head together: values weighted by ``2 ** (their maximum - the largest)``. Each
    warp takes some of the shares, a lane four columns.

    Grid: groups of `COLUMNS` columns, heads, tokens.
    """
    maxima = cuda.shared.array(WARPS, np.float32)
    sums = cuda.shared.array(WARPS, np.float32)
    values = cuda.shared.array((WARPS, COLUMNS), np.float32, alignment=16)
    head, t = cuda.blockIdx.y, cuda.blockIdx.z
    _, shares = shares_of(positions[t] + 1, splits)
    if shares == 1:
        return
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    column = COLUMNS * cuda.blockIdx.x + 4 * lane
    largest, total = -INFINITY, ZERO
    v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
    for share in range(warp, shares, WARPS):
        row = (t * splits + share) * heads + head
        m, l = ptx.load_f32x2(partial[1] + 8 * row)  # noqa: E741
        x0, x1, x2, x3 = ZERO, ZERO, ZERO, ZERO
        if column < rank:
            x0, x1, x2, x3 = ptx.load_f32x4(partial[0] + 4 * (row * rank + column))
        new = ptx.fmax(m, largest)
        old, weight = ptx.exp2(largest - new), ptx.exp2(m - new)
        largest, total = new, ptx.fma(total, old, l * weight)
        v0, v1 = ptx.fma(v0, old, x0 * weight), ptx.fma(v1, old, x1 * weight)
        v2, v3 = ptx.fma(v2, old, x2 * weight), ptx.fma(v3, old, x3 * weight)
    if lane == 0:
        maxima[warp], sums[warp] = largest, total
    ptx.store_shared_f32x4(ptx.shared_address(values) + 4 * (COLUMNS * warp + 4 * lane), v0, v1, v2, v3)
    cuda.syncthreads()
    column = COLUMNS * cuda.blockIdx.x + cuda.threadIdx.x
    largest = maxima[0]
    for other in range(1, WARPS):
        largest = ptx.fmax(largest, maxima[other])
    total, value = ZERO, ZERO
    for other in range(WARPS):
        weight = ptx.exp2(maxima[other] - largest)
        total = ptx.fma(sums[other], weight, total)
        value = ptx.fma(values[other, cuda.threadIdx.x], weight, value)
    if column < rank:
        ptx.store_f32(out[0] + t * out[1] + head * out[2] + 4 * column, value * ptx.rcp(total))
