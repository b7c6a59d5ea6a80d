"""Memory of the device: arrays, and copies to and from them.

In the simulator an array lies in the memory of the host; slices, shapes, strides and addresses behave alike, as the
same code computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver as api

from pymla.cuda.runtime import pools
from pymla.cuda.runtime.device_array import DeviceArray
from pymla.cuda.runtime.driver import SIMULATED, call, refuse_while_recording, stream, synchronise
from pymla.cuda.runtime.pools import device_bytes as total_memory
from pymla.cuda.runtime.pools import free_bytes as free_memory
from pymla.cuda.runtime.pools import release
from pymla.cuda.runtime.staging import send

if SIMULATED:
    from pymla.cuda.runtime import simulated_memory

__all__ = [
    "DeviceArray",
    "copy",
    "empty",
    "fill",
    "free_memory",
    "release",
    "take",
    "to_device",
    "to_host",
    "total_memory",
    "write",
    "zeros",
]

#: Called with bytes: done, and in all.
Progress = Callable[[int, int], object]


def empty(shape: int | Sequence[int], dtype: Any) -> DeviceArray:
    """An array whose elements are not set; in the simulator they are NaN or −1."""
    shape = tuple(map(int, shape)) if isinstance(shape, Sequence) else (int(shape),)
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if SIMULATED:
        try:
            return DeviceArray(simulated_memory.buffer(nbytes).view(dtype).reshape(shape))
        except MemoryError:
            raise pools.out_of_memory(nbytes) from None
    memory = pools.Memory(nbytes, shape, dtype)
    return DeviceArray(np.asarray(memory), memory.address)


def zeros(shape: int | Sequence[int], dtype: Any) -> DeviceArray:
    """An array of zeros."""
    array = empty(shape, dtype)
    fill(array, 0)
    return array


def fill(array: DeviceArray, byte: int) -> None:
    """Set every byte of a contiguous array."""
    _need_contiguous(array)
    if SIMULATED:
        array._view.reshape(-1).view(np.uint8)[:] = byte
    elif array.nbytes:
        call(api.cuMemsetD8Async, array.address, byte, array.nbytes, stream())


def to_device(array: np.ndarray, progress: Progress | None = None) -> DeviceArray:
    """A copy of a NumPy array, such as part of a mapped file."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    result = empty(array.shape, array.dtype)
    _send(array, result, progress)
    return result


def write(target: DeviceArray, array: np.ndarray) -> None:
    """Copy a NumPy array into a contiguous device array of its shape and type. The array may change afterwards, and
    nothing is waited for."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    _need_contiguous(target)
    if (target.shape, target.dtype) != (array.shape, array.dtype):
        raise ValueError(f"an array of {array.dtype} {array.shape} does not fit one of {target.dtype} {target.shape}")
    _send(array, target)


def to_host(array: DeviceArray) -> np.ndarray:
    """A copy as a NumPy array. Waits for all work."""
    refuse_while_recording("copied to the host")
    if SIMULATED:
        return array._view.copy()
    if not array.size:
        return np.empty(array.shape, array.dtype)
    if any(stride < 0 for stride in array.strides):
        raise ValueError(f"a device array of strides {array.strides} cannot be copied")
    span = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.dtype.itemsize
    raw: np.ndarray = np.empty(span, np.uint8)
    call(api.cuMemcpyDtoHAsync, raw.ctypes.data, array.address, span, stream())
    synchronise()
    return np.ndarray(array.shape, array.dtype, raw, strides=array.strides).copy()


def copy(source: DeviceArray, target: DeviceArray) -> None:
    """Copy a contiguous device array into another one of its size."""
    for each in (source, target):
        _need_contiguous(each)
    if source.nbytes != target.nbytes:
        raise ValueError(f"{source.nbytes} bytes do not fit {target.nbytes}")
    if SIMULATED:
        target._view.reshape(-1).view(np.uint8)[:] = source._view.reshape(-1).view(np.uint8)
    elif source.nbytes:
        call(api.cuMemcpyDtoDAsync, target.address, source.address, source.nbytes, stream())


def take(array: DeviceArray, rows: np.ndarray) -> DeviceArray:
    """Some rows, a NumPy array of int (n,), of a contiguous array (T, ...), copied: an array (n, ...)."""
    out = empty((len(rows), *array.shape[1:]), array.dtype)
    for i, row in enumerate(rows):
        copy(array[row : row + 1], out[i : i + 1])
    return out


def _send(array: np.ndarray, target: DeviceArray, progress: Progress | None = None) -> None:
    """Copy a contiguous NumPy array to a device array."""
    refuse_while_recording("copied from the host")
    if SIMULATED:
        target._view[...] = array
    else:
        send(array, target.address, progress)
    if progress:
        progress(array.nbytes, array.nbytes)


def _need_contiguous(array: DeviceArray) -> None:
    if not array.contiguous:
        raise ValueError(f"a device array of strides {array.strides} is not contiguous")
