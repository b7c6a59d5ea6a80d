"""What this machine can do at best, measured with the threads and the instructions that kernels use.

Generation reads every weight once and is bounded by `Limits.read`; a prompt multiplies and is bounded by `Limits.int8`.

>>> from pymla.cpu import limits
>>> limits.int8_rate() > 1e9
True
"""

import time
from typing import NamedTuple

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.machine.simd import add, address, load_f32x8, load_i8xL, splat_f32, splat_f32xL, store_f32x8, store_f32xL
from pymla.cpu.machine.simd_amx import (
    BLOCK,
    SUMS,
    add_sums,
    configure,
    dot_tiles,
    load_tile,
    release,
    store_four,
    zero_four,
    zero_rows,
)
from pymla.cpu.machine.simd_panels import broadcast_i8xL, dot4, finish4, zero4
from pymla.cpu.matmul.activations import INPUT, Activation, counting
from pymla.cpu.matmul.gemm import tile_for
from pymla.cpu.matmul.gemm_amx import SPARE_COLUMNS
from pymla.cpu.matmul.unpacked import CHUNK, PAIR_ROWS, SCRATCH, Chunk
from pymla.cpu.memory import AHEAD, allocate, allocate_f32, fetch_ahead
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.array_types import F1, F2, I1
from pymla.cpu.runtime.isa import AMX, LANES
from pymla.cpu.runtime.jit import helper, kernel

#: Bytes that are streamed: more than any cache holds.
STREAM_BYTES = 512 << 20
#: Seconds of each measurement, whose fastest pass counts: other programs can only slow one down.
SECONDS = 0.5

#: Float32 of an item of `_read`, 256 KiB.
_BLOCK = 1 << 16
#: Columns of K of the panels and activations of `_multiply`: together they stay in the first-level cache.
_DEPTH = 512
#: Times that an item of `_multiply` goes through its panels.
_TIMES = 64
#: Multiply-adds of an item of `_multiply`: two panels of `LANES` rows and three columns.
_ITEM_MACS = 2 * LANES * 3 * _DEPTH * _TIMES
#: The same of an item by tiles, which multiply sixteen columns at a time.
TILE_TIMES = _ITEM_MACS // (2 * LANES * 2 * 16 * _DEPTH)
#: Columns of activations of `_multiply_packed`, and their length.
_TOKENS, _LENGTH = 512, 2048

CODES = types.Array(types.int8, 1, "C")
BYTES = types.Array(types.uint8, 1, "C")

_sources, _add_columns, _widest = tile_for(FORMATS[ggml.Q4_0])


class Limits(NamedTuple):
    """The machine's limits, all threads of `pymla.cpu` together."""

    read: float  # bytes per second, streamed from memory
    int8: float  # multiply-adds per second, of int8 activations with packed codes


def measure() -> Limits:
    """Measure both limits, in some seconds.

    Returns
    -------
    Limits
    """
    return Limits(read_rate(), int8_rate())


def read_rate(nbytes: int = STREAM_BYTES) -> float:
    """Bytes per second of a sum over an array of `nbytes`, which was written before."""
    stream = Stream(nbytes)
    return stream.nbytes / _fastest(stream.read)


class Stream:
    """An array of about `nbytes` that is read from memory, by all threads."""

    def __init__(self, nbytes: int = STREAM_BYTES):
        blocks = max(1, nbytes // (4 * _BLOCK))
        self._data, self._sums = np.ones(blocks * _BLOCK, np.float32), np.empty((blocks, 8), np.float32)
        self.nbytes = self._data.nbytes

    def read(self) -> None:
        """Sum all of it."""
        _read[len(self._sums)](self._data, self._sums)


def int8_rate() -> float:
    """Multiply-adds per second of the panels' dot instruction on codes and activations in the first-level cache."""
    items = 128 * threads.thread_count()
    codes = np.arange(2 * LANES * _DEPTH, dtype=np.int64).astype(np.int8) & 15
    activations = np.arange(3 * _DEPTH, dtype=np.int64).astype(np.int8)
    sums = np.empty((items, 2 * LANES), np.float32)
    return items * _ITEM_MACS / _fastest(lambda: _multiply[items](codes, activations, sums))


def packed_rate() -> float:
    """Multiply-adds per second of products with 4-bit codes that lie in panels already: those of `gemm.product`, with
    scales and results, but without reading and unpacking weights. Bounds what a product of many columns can reach."""
    items = 64 * threads.thread_count()
    x = Activation(np.ones((_TOKENS, _LENGTH), np.float32)).panels(ggml.Q4_0)
    panels, out = np.zeros(SCRATCH, np.uint8), np.empty((items, PAIR_ROWS), np.float32)
    macs = items * PAIR_ROWS * _TOKENS * _LENGTH
    return macs / _fastest(lambda: _multiply_packed[items, 1](panels, x, counting(_TOKENS), out))


def _fastest(run):
    """Seconds of the fastest run, after one that compiles and wakes the threads."""
    run()
    best, start = np.inf, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


@kernel(F1, F2)
def _read(first, last, data, sums):
    """Sums of blocks of the array, in eight registers, so that additions never wait for each other."""
    for item in range(first, last):
        at = address(data) + 4 * _BLOCK * item
        zero = splat_f32(np.float32(0))
        a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
        for i in range(0, 4 * _BLOCK, 256):
            # Twice as far as rows of weights, whose streams are short: from there on it gains nothing.
            fetch_ahead(at + i + AHEAD, 256)
            a, b = add(a, load_f32x8(at + i)), add(b, load_f32x8(at + i + 32))
            c, d = add(c, load_f32x8(at + i + 64)), add(d, load_f32x8(at + i + 96))
            e, f = add(e, load_f32x8(at + i + 128)), add(f, load_f32x8(at + i + 160))
            g, h = add(g, load_f32x8(at + i + 192)), add(h, load_f32x8(at + i + 224))
        total = add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h)))
        store_f32x8(address(sums[item]), total)


@kernel(CODES, CODES, F2)
def _multiply(first, last, codes, activations, sums):
    """A tile, two panels × three columns, as that of `tile_32`, without scales: sums run on and wrap.

    Even and odd groups have sums of their own, so that an instruction that takes several cycles does not wait for
    itself.
    """
    scratch = allocate(4 * SUMS)
    for item in range(first, last):
        if AMX:
            _multiply_tiles(address(codes), address(activations), address(scratch), address(sums[item]))
            continue
        zero = zero4()
        ia, ib, ic, ja, jb, jc = zero, zero, zero, zero, zero, zero
        ka, kb, kc, la, lb, lc = zero, zero, zero, zero, zero, zero
        for _ in range(_TIMES):
            p, q = address(codes), address(codes) + LANES * _DEPTH
            xa = address(activations)
            xb, xc = xa + _DEPTH, xa + 2 * _DEPTH
            for _ in range(_DEPTH // 8):
                u, v = load_i8xL(p), load_i8xL(q)
                y = broadcast_i8xL(xa)
                ia, ja = dot4(ia, u, y), dot4(ja, v, y)
                y = broadcast_i8xL(xb)
                ib, jb = dot4(ib, u, y), dot4(jb, v, y)
                y = broadcast_i8xL(xc)
                ic, jc = dot4(ic, u, y), dot4(jc, v, y)
                u, v = load_i8xL(p + 4 * LANES), load_i8xL(q + 4 * LANES)
                y = broadcast_i8xL(xa + 4)
                ka, la = dot4(ka, u, y), dot4(la, v, y)
                y = broadcast_i8xL(xb + 4)
                kb, lb = dot4(kb, u, y), dot4(lb, v, y)
                y = broadcast_i8xL(xc + 4)
                kc, lc = dot4(kc, u, y), dot4(lc, v, y)
                p, q = p + 8 * LANES, q + 8 * LANES
                xa, xb, xc = xa + 8, xb + 8, xc + 8
        i = add(add(add(finish4(ia), finish4(ib)), finish4(ic)), add(add(finish4(ka), finish4(kb)), finish4(kc)))
        j = add(add(add(finish4(ja), finish4(jb)), finish4(jc)), add(add(finish4(la), finish4(lb)), finish4(lc)))
        store_f32xL(address(sums[item]), i)
        store_f32xL(address(sums[item]) + 4 * LANES, j)


@helper
def _multiply_tiles(codes, activations, scratch, out):
    """As many multiply-adds by tiles of AMX, of two panels with two columns, each of which stands for sixteen. Tiles
    have the shapes that kernels use: blocks have 32 codes, which is half of what a tile could hold."""
    configure()
    zero_four()
    for _ in range(TILE_TIMES):
        for at in range(0, _DEPTH, BLOCK):
            load_tile(4, activations + at, 0)
            load_tile(5, activations + _DEPTH + at, 0)
            load_tile(6, codes + LANES * at, 64)
            load_tile(7, codes + LANES * (_DEPTH + at), 64)
            dot_tiles(0, 4, 6)
            dot_tiles(1, 4, 7)
            dot_tiles(2, 5, 6)
            dot_tiles(3, 5, 7)
    store_four(scratch)
    rows = add_sums(zero_rows(), scratch, splat_f32xL(np.float32(1)))
    store_f32xL(out, rows[0])
    rows = add_sums(zero_rows(), scratch + 3 * SUMS, splat_f32xL(np.float32(1)))
    store_f32xL(out + 4 * LANES, rows[0])
    release()


@kernel(BYTES, INPUT, I1, F2)
def _multiply_packed(first, last, panels, x, index, out):
    """`gemm.product` with the same two panels for every `CHUNK` columns of K; keeps the last token's results."""
    tokens, k = x.x.shape
    results = allocate_f32(tokens + SPARE_COLUMNS, PAIR_ROWS)
    # Tiles of AMX leave their sums behind the panels: each thread has its own.
    own = allocate(SCRATCH)
    own[:] = panels
    for item in range(first, last):
        if AMX:
            configure()
            results[:] = 0
        for start in range(0, k, CHUNK):
            chunk = Chunk(k, start, min(CHUNK, k - start) // 32)
            for i in range(0, tokens, _widest):
                _add_columns(_sources(x), index, i, tokens, chunk, address(own), address(results))
        if AMX:
            release()
        out[item] = results[tokens - 1]
