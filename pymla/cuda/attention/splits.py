"""Split-kv and combine: several blocks share the positions of a token, and another launch combines their results.

A token's tiles of 32 positions are dealt out to blocks, whose number is fixed at launch; blocks for which there are no
tiles have nothing to do. Each block leaves unnormalised values with their softmax's maximum and sum (Dao et al.,
"Flash-Decoding", 2023).
"""

from typing import NamedTuple

import numpy as np
from numba import cuda

from pymla.cuda.attention.softmax import INFINITY, ZERO
from pymla.cuda.attention.steps import PLACE, STEP, seen_by
from pymla.cuda.attention.tiles import THREADS, TILE, WARPS
from pymla.cuda.machine import ptx
from pymla.cuda.memory import DeviceArray, empty
from pymla.cuda.runtime.array_types import I32, addresses
from pymla.cuda.runtime.driver import multiprocessors
from pymla.cuda.runtime.jit import device, kernel

#: Tiles that are worth a block of their own, whose result has to be combined with others.
LEAST_TILES = 4
#: Columns that a block takes to combine.
COMBINED_COLUMNS = 128


class Partial(NamedTuple):
    """Memory for the results of up to `splits` blocks for each of T tokens and H heads."""

    splits: int
    values: DeviceArray  # float32 (T, splits, H, v), unnormalised
    sums: DeviceArray  # float32 (T, splits, H, 2): the maximum, and the sum of exponentials

    @classmethod
    def empty(cls, out, longest, blocks, splits=None):
        """For results `out` (T, H, v).

        Parameters
        ----------
        longest : int
            Positions that a token attends to, at most.
        blocks : int
            Blocks of a launch that splits nothing.
        splits : int, optional
            By default as many as fill the device twice.
        """
        if splits is None:
            most = longest // TILE // LEAST_TILES
            splits = max(1, min(most, 2 * multiprocessors() // max(1, blocks)))
        tokens, heads, v = out.shape
        # The result of a single block goes to `out` at once.
        values = empty((tokens, splits, heads, v) if splits > 1 else 0, np.float32)
        return cls(splits, values, empty((tokens, splits, heads, 2) if splits > 1 else 0, np.float32))

    @property
    def addresses(self):
        """The addresses of values and sums, as kernels take them."""
        return self.values.address, self.sums.address


def combine(partial, step, shape, out):
    """Combine partial results; `out` is the `place` of results of `shape` (T, H, v)."""
    _, heads, v = shape
    if partial.splits > 1:
        _combine_splits[combining_blocks(shape), THREADS](step, heads, v, partial.splits, partial.addresses, out)


def combining_blocks(shape):
    """The grid that combines results of `shape` (T, H, v)."""
    tokens, heads, v = shape
    return -(-v // COMBINED_COLUMNS), heads, tokens


def combining_kernels():
    """The kernels that combine."""
    return [_combine_splits]


@device
def shares_of(length, splits):
    """Tiles of a token that sees `length` positions, and the number of blocks that share them."""
    tiles = length + TILE - 1 >> 5
    return tiles, max(1, min(splits, tiles >> 2))


@device
def boundary(tiles, shares, share):
    """The first tile of a share; all blocks compute it alike. Shares differ by one tile at most."""
    return ptx.nearest_int(ptx.to_f32(tiles * share) * ptx.rcp(ptx.to_f32(shares)))


@device
def combine_shares(length, heads, v, splits, partial, out):
    """Combine the results of the shares of a token that attends to `length` positions, and a head: values weighted by
    ``2 ** (their maximum - the largest)``. Each warp takes some of the shares, a lane four columns.

    Grid: groups of `COMBINED_COLUMNS` columns, heads, tokens.
    """
    maxima = cuda.shared.array(WARPS, np.float32)
    sums = cuda.shared.array(WARPS, np.float32)
    values = cuda.shared.array((WARPS, COMBINED_COLUMNS), np.float32, alignment=16)
    head, t = cuda.blockIdx.y, cuda.blockIdx.z
    _, shares = shares_of(length, splits)
    if shares == 1:
        return
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    column = COMBINED_COLUMNS * cuda.blockIdx.x + 4 * lane
    largest, total = -INFINITY, ZERO
    v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
    for share in range(warp, shares, WARPS):
        row = (t * splits + share) * heads + head
        m, l = ptx.load_f32x2(partial[1] + 8 * row)  # noqa: E741
        x0, x1, x2, x3 = ZERO, ZERO, ZERO, ZERO
        if column < v:
            x0, x1, x2, x3 = ptx.load_f32x4(partial[0] + 4 * (row * v + column))
        new = ptx.fmax(m, largest)
        old, weight = ptx.exp2(largest - new), ptx.exp2(m - new)
        largest, total = new, ptx.fma(total, old, l * weight)
        v0, v1 = ptx.fma(v0, old, x0 * weight), ptx.fma(v1, old, x1 * weight)
        v2, v3 = ptx.fma(v2, old, x2 * weight), ptx.fma(v3, old, x3 * weight)
    if lane == 0:
        maxima[warp], sums[warp] = largest, total
    ptx.store_shared_f32x4(ptx.shared_address(values) + 4 * (COMBINED_COLUMNS * warp + 4 * lane), v0, v1, v2, v3)
    cuda.syncthreads()
    column = COMBINED_COLUMNS * cuda.blockIdx.x + cuda.threadIdx.x
    largest = maxima[0]
    for other in range(1, WARPS):
        largest = ptx.fmax(largest, maxima[other])
    total, value = ZERO, ZERO
    for other in range(WARPS):
        weight = ptx.exp2(maxima[other] - largest)
        total = ptx.fma(sums[other], weight, total)
        value = ptx.fma(values[other, cuda.threadIdx.x], weight, value)
    if column < v:
        ptx.store_f32(out[0] + t * out[1] + head * out[2] + 4 * column, value * ptx.rcp(total))


@kernel(STEP, I32, I32, I32, addresses(2), PLACE, max_threads=THREADS)
def _combine_splits(step, heads, v, splits, partial, out):
    """Combine the results of the shares of a token and head.

    Grid: groups of `COMBINED_COLUMNS` columns, heads, tokens.
    """
    combine_shares(seen_by(step, cuda.blockIdx.z), heads, v, splits, partial, out)
