"""The limits of the GPU, and how long launches take. Twin of `pymla.cpu.limits`.

Generation reads every weight once and is bounded by `Limits.read`; a prompt multiplies and is bounded by `Limits.int8`.
The simulator's figures mean nothing.
"""

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from cuda.bindings import driver as api
from numba import cuda, types

from pymla.cuda import memory
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.driver import SIMULATED, call, multiprocessors, stream
from pymla.cuda.runtime.jit import Kernel, device, kernel

__all__ = ["Limits", "int8_rate", "measure", "read_rate", "seconds"]

#: Bytes that are copied: more than any cache holds.
STREAM_BYTES = 1 << 16 if SIMULATED else 1 << 30
#: Runs of each measurement, whose fastest counts.
RUNS = 1 if SIMULATED else 8

#: Warps of a block of `_multiply`, blocks on a multiprocessor, and times that a warp goes through its products.
_WARPS, _BLOCKS, _TIMES = 8, 2, 1 if SIMULATED else 4096
#: Products of a warp that do not wait for each other, and multiply-adds of one.
_PRODUCTS, _MACS = 8, 16 * 8 * 32


class Limits(NamedTuple):
    """The device's limits."""

    read: float  # bytes per second that a copy in the device's memory moves, read and written together
    int8: float  # multiply-adds per second of int8 on the tensor cores, from registers; a TOP/s counts two for each


def measure() -> Limits:
    """Measure both limits, in less than a second."""
    return Limits(read_rate(), int8_rate())


def kernels() -> list[Kernel]:
    """The kernels of this module."""
    return [_multiply]


def read_rate(nbytes: int = STREAM_BYTES) -> float:
    """Bytes per second, read and written, of a copy of `nbytes`."""
    source, target = memory.zeros(nbytes, np.uint8), memory.zeros(nbytes, np.uint8)
    return 2 * nbytes / min(seconds(lambda: memory.copy(source, target)))


def int8_rate() -> float:
    """Multiply-adds per second of ``mma.sync m16n8k32`` on operands in registers."""
    blocks = _BLOCKS * multiprocessors()
    out = memory.empty(blocks * _WARPS * ptx.WARP, np.int32)
    macs = blocks * _WARPS * _TIMES * _PRODUCTS * _MACS
    return macs / min(seconds(lambda: _multiply[blocks, _WARPS * ptx.WARP](_TIMES, out)))


def seconds(run: Callable[[], object], runs: int = RUNS) -> list[float]:
    """Seconds on the device of each of several runs of a function's launches, after one that is not counted.

    Parameters
    ----------
    run : callable()
        Where its launches are short, the host is slower than the device: then it replays a `Graph` of many.
    """
    run()
    if SIMULATED:
        times = [time.perf_counter()]
        for _ in range(runs):
            run()
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]
    events = [call(api.cuEventCreate, 0) for _ in range(runs + 1)]
    try:
        call(api.cuEventRecord, events[0], stream())
        for event in events[1:]:
            run()
            call(api.cuEventRecord, event, stream())
        call(api.cuEventSynchronize, events[-1])
        return [call(api.cuEventElapsedTime, *pair) / 1e3 for pair in itertools.pairwise(events)]
    finally:
        for event in events:
            call(api.cuEventDestroy, event)


@device
def add_product(a, b, sums):
    """`sums` and a product of 16 × 32 and 32 × 8 bytes, all words of which are `a` and `b`."""
    return ptx.mma_s8(a, a, a, a, b, b, sums[0], sums[1], sums[2], sums[3])


@kernel(types.int32, types.Array(types.int32, 1, "C"), max_threads=_WARPS * ptx.WARP)
def _multiply(times, out):
    """Eight sums of products, each over and over; they wrap. A lane's words are its number."""
    word, zero = ptx.lane(), (np.int32(0), np.int32(0), np.int32(0), np.int32(0))
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
    for _ in range(times):
        s0, s1 = add_product(word, word, s0), add_product(word, word + 1, s1)
        s2, s3 = add_product(word, word + 2, s2), add_product(word, word + 3, s3)
        s4, s5 = add_product(word, word + 4, s4), add_product(word, word + 5, s5)
        s6, s7 = add_product(word, word + 6, s6), add_product(word, word + 7, s7)
    total = s0[0] + s1[0] + s2[0] + s3[0] + s4[0] + s5[0] + s6[0] + s7[0]
    out[cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x] = total
