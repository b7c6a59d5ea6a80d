"""Arrays in the host's memory, and prefetching.

Arrays begin at a cache line, because a vector that reaches over two lines takes twice as long to load; otherwise this
is `pymla.reference.memory`.
"""

import numpy as np

from pymla.cpu.machine.simd import prefetch_l2
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import ASKS_AHEAD
from pymla.host.arrays import CACHE_LINE, copy, release, take, to_device, to_host, write
from pymla.host.arrays import empty_aligned as empty

__all__ = [
    "allocate",
    "allocate_f32",
    "copy",
    "empty",
    "fetch_ahead",
    "release",
    "take",
    "to_device",
    "to_host",
    "write",
]

#: Bytes from the bytes that are read to those that are prefetched meanwhile.
AHEAD = 1152


@helper
def allocate(nbytes):
    """Uninitialised bytes, uint8, for kernels."""
    memory = np.empty(nbytes + CACHE_LINE, np.uint8)
    skip = -np.int64(memory.ctypes.data) % CACHE_LINE
    return memory[skip : skip + nbytes]


@helper
def allocate_f32(rows, columns):
    """Uninitialised float32 (rows, columns), for kernels."""
    return allocate(4 * rows * columns).view(np.float32).reshape(rows, columns)


@inlined
def fetch_ahead(address, nbytes):
    """Prefetch as many bytes of a long row as are read now, `AHEAD` bytes behind them.

    Only where a core does not prefetch enough by itself (`isa.ASKS_AHEAD`). On another it cost up to 4 %.
    """
    if ASKS_AHEAD:
        for at in range(0, nbytes, CACHE_LINE):
            prefetch_l2(address + AHEAD + at)
