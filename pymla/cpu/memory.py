"""Where arrays lie, in the host's memory as for `pymla.reference.memory`, and scratch that begins at a cache line: a
vector load that reaches over two lines takes twice as long."""

import numpy as np

from pymla.cpu.compiling import inline
from pymla.reference.memory import empty, release, take, to_device, to_host, write

__all__ = [
    "aligned",
    "allocate",
    "allocate_f32",
    "empty",
    "release",
    "take",
    "to_device",
    "to_host",
    "write",
]

LINE = 64


def aligned(shape, dtype):
    """An uninitialised array, for Python."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + LINE, np.uint8)
    skip = -memory.__array_interface__["data"][0] % LINE
    return memory[skip : skip + nbytes].view(dtype).reshape(shape)


@inline
def allocate(nbytes):
    """Uninitialised bytes, uint8, for kernels."""
    memory = np.empty(nbytes + LINE, np.uint8)
    skip = -np.int64(memory.ctypes.data) % LINE
    return memory[skip : skip + nbytes]


@inline
def allocate_f32(rows, columns):
    """Uninitialised float32 (rows, columns), for kernels."""
    return allocate(4 * rows * columns).view(np.float32).reshape(rows, columns)
