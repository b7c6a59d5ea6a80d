"""Memory of the device: arrays, and copies to and from them.

A freed array's memory is kept for another one of about its size: all work runs on one stream, so what still reads the
old array runs before what writes the new one. In the simulator an array lies in the host's memory; slices, shapes,
strides and addresses behave alike, as the same code computes them.
"""

import bisect
import ctypes
import functools
import itertools
import math
import threading

import numpy as np
from cuda.bindings import driver as api

from pymla.cuda.runtime.driver import (
    SIMULATED,
    call,
    describe,
    device,
    recording,
    refuse_while_recording,
    stream,
    synchronise,
)
from pymla.errors import PymlaError
from pymla.host.memory import available_memory, size_text

if SIMULATED:
    from pymla.cuda.machine import simulator

#: Bytes of a staging buffer for copies from the host; there are two.
STAGING = 32 << 20


#: Types of what indexes a device array.
_INDICES = slice, int, np.integer, type(None), type(Ellipsis)


class DeviceArray:
    """An array in the device's memory, or a view of one.

    It has NumPy's `shape`, `strides` (bytes), `dtype`, `ndim`, `size`, `nbytes` and `len`. Indices are integers,
    slices, None and Ellipsis; the result is always a view. It is made by this module's functions.

    Attributes
    ----------
    address : int
        Of the first element.
    """

    __slots__ = ("_view", "address")

    def __init__(self, view, address=None):
        # A NumPy array at the device's addresses: NumPy computes shapes, strides and addresses of views, and keeps the
        # memory alive. Its elements are never touched.
        self._view = view
        self.address = view.__array_interface__["data"][0] if address is None else address

    shape = property(lambda self: self._view.shape)
    strides = property(lambda self: self._view.strides)
    dtype = property(lambda self: self._view.dtype)
    ndim = property(lambda self: self._view.ndim)
    size = property(lambda self: self._view.size)
    nbytes = property(lambda self: self._view.nbytes)

    @property
    def contiguous(self):
        """Whether elements follow each other in C's order."""
        return self._view.flags.c_contiguous

    def __len__(self):
        return len(self._view)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        for each in index:
            if not isinstance(each, _INDICES):
                raise TypeError(f"device arrays have no index of type {type(each).__name__}")
        # With an ellipsis NumPy makes a view even of a single element, where it would read the value otherwise.
        return DeviceArray(self._view[index if Ellipsis in index else (*index, Ellipsis)])

    def reshape(self, *shape):
        """The same elements in another shape; of a contiguous array."""
        if not self.contiguous:
            raise ValueError(f"a device array of strides {self.strides} cannot be reshaped")
        return DeviceArray(self._view.reshape(*shape))

    def swapaxes(self, first, second):
        """The same elements with two dimensions in each other's place."""
        return DeviceArray(self._view.swapaxes(first, second))

    def view(self, dtype):
        """The same bytes as another type."""
        return DeviceArray(self._view.view(dtype))

    def __array__(self, *arguments, **options):
        raise TypeError("NumPy cannot read a device array; use pymla.cuda.memory.to_host")

    def __repr__(self):
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, strides={self.strides})"


class _Memory:
    """Bytes of the device, in the form that NumPy makes an array of."""

    __slots__ = ("__array_interface__", "_pool", "_size", "address")

    def __init__(self, nbytes, shape, dtype):
        # What a graph uses must not be given to anything else while the graph may be replayed.
        self._pool = recording().pool if recording() else _pool
        self.address, self._size = self._pool.take(nbytes)
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (self.address, False), "version": 3}

    def __del__(self):
        if hasattr(self, "address"):
            self._pool.give(self.address, self._size)


class Pool:
    """Memory that was allocated before and waits for another use.

    Parameters
    ----------
    heir : Pool, optional
        Gets what is left when this one and all arrays of it are gone.

    Attributes
    ----------
    kept : int
        Bytes that wait.
    """

    def __init__(self, heir=None):
        self._heir = heir
        self._free = []  # (bytes, address), ascending
        # The collector may give memory back while this thread takes some.
        self._lock = threading.RLock()
        self.kept = 0

    def take(self, nbytes):
        """Memory of at least `nbytes`: its address and its bytes.

        Raises
        ------
        PymlaError
            There is none.
        """
        size = max(512, -(-nbytes // 512) * 512)
        with self._lock:
            at = bisect.bisect_left(self._free, (size, 0))
            # Memory that is too large for an array would be missed by a larger one.
            if at < len(self._free) and self._free[at][0] <= size + max(size // 8, 4096):
                size, address = self._free.pop(at)
                self.kept -= size
                return address, size
        address = _allocate(size)
        if address is None and not recording():
            release()
            address = _allocate(size)
        if address is None:
            raise _out_of_memory(nbytes)
        return address, size

    def give(self, address, size):
        """Memory that is no longer used."""
        with self._lock:
            bisect.insort(self._free, (size, address))
            self.kept += size

    def release(self):
        """Give all that waits back to the driver."""
        with self._lock:
            for _, address in self._free:
                call(api.cuMemFree, address)
            self._free, self.kept = [], 0

    def __del__(self):
        if self._heir is not None:
            for size, address in self._free:
                self._heir.give(address, size)


def _allocate(nbytes):
    """The address of new memory, or None where the device is full."""
    device()
    error, address = api.cuMemAlloc(nbytes)
    if error == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return None
    if error != api.CUresult.CUDA_SUCCESS:
        raise PymlaError(f"allocation of memory: {describe(error)}")
    return int(address)


#: Memory outside of graphs.
_pool = Pool()


def pool_of_graph():
    """A pool of its own for what a graph uses."""
    return Pool(_pool)


def empty(shape, dtype):
    """An array whose elements are not set; in the simulator they are NaN or −1."""
    shape = tuple(map(int, shape)) if isinstance(shape, (tuple, list)) else (int(shape),)
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if SIMULATED:
        try:
            return DeviceArray(simulator.buffer(nbytes).view(dtype).reshape(shape))
        except MemoryError:
            raise _out_of_memory(nbytes) from None
    memory = _Memory(nbytes, shape, dtype)
    return DeviceArray(np.asarray(memory), memory.address)


def zeros(shape, dtype):
    """An array of zeros."""
    array = empty(shape, dtype)
    fill(array, 0)
    return array


def fill(array, byte):
    """Set every byte of a contiguous array."""
    _need_contiguous(array)
    if SIMULATED:
        array._view.reshape(-1).view(np.uint8)[:] = byte
    elif array.nbytes:
        call(api.cuMemsetD8Async, array.address, byte, array.nbytes, stream())


def to_device(array, progress=None):
    """A copy of a NumPy array, such as part of a mapped file: one slice is read while another one is sent.

    Parameters
    ----------
    array : NumPy array
    progress : callable(done, total), optional
        Bytes.
    """
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    result = empty(array.shape, array.dtype)
    _send(array, result, progress)
    return result


def write(target, array):
    """Copy a NumPy array into a contiguous device array of its shape and type. The array may change afterwards, and
    nothing is waited for."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    _need_contiguous(target)
    if (target.shape, target.dtype) != (array.shape, array.dtype):
        raise ValueError(f"an array of {array.dtype} {array.shape} does not fit one of {target.dtype} {target.shape}")
    _send(array, target)


def to_host(array):
    """A copy as a NumPy array. Waits for all work."""
    refuse_while_recording("copied to the host")
    if SIMULATED:
        return array._view.copy()
    if not array.size:
        return np.empty(array.shape, array.dtype)
    if any(stride < 0 for stride in array.strides):
        raise ValueError(f"a device array of strides {array.strides} cannot be copied")
    span = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.dtype.itemsize
    raw = np.empty(span, np.uint8)
    call(api.cuMemcpyDtoHAsync, raw.ctypes.data, array.address, span, stream())
    synchronise()
    return np.ndarray(array.shape, array.dtype, raw, strides=array.strides).copy()


def copy(source, target):
    """Copy a contiguous device array into another one of its size."""
    for each in (source, target):
        _need_contiguous(each)
    if source.nbytes != target.nbytes:
        raise ValueError(f"{source.nbytes} bytes do not fit {target.nbytes}")
    if SIMULATED:
        target._view.reshape(-1).view(np.uint8)[:] = source._view.reshape(-1).view(np.uint8)
    elif source.nbytes:
        call(api.cuMemcpyDtoDAsync, target.address, source.address, source.nbytes, stream())


def take(array, rows):
    """Some rows, a NumPy array of int (n,), of a contiguous array (T, ...), copied: an array (n, ...)."""
    out = empty((len(rows), *array.shape[1:]), array.dtype)
    for i, row in enumerate(rows):
        copy(array[row : row + 1], out[i : i + 1])
    return out


def _send(array, target, progress=None):
    """Copy a contiguous NumPy array to a device array through pinned memory. Its bytes have been read when this
    returns, though not all of them have arrived."""
    refuse_while_recording("copied from the host")
    source, total = array.reshape(-1).view(np.uint8), array.nbytes
    if SIMULATED:
        target._view[...] = array
    else:
        for start in range(0, total, STAGING):
            with _sending:
                next(_stagings()).send(source[start : start + STAGING], target.address + start)
            if progress:
                progress(start, total)
    if progress:
        progress(total, total)


class _Staging:
    """Pinned memory, which the device reads by itself."""

    def __init__(self):
        device()
        address = call(api.cuMemHostAlloc, STAGING, 0)
        self._memory = np.frombuffer((ctypes.c_uint8 * STAGING).from_address(int(address)), np.uint8)
        self._sent = call(api.cuEventCreate, api.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def send(self, part, address):
        """Copy bytes to an address, behind the buffer's last use."""
        call(api.cuEventSynchronize, self._sent)
        self._memory[: len(part)] = part
        call(api.cuMemcpyHtoDAsync, address, self._memory.ctypes.data, len(part), stream())
        call(api.cuEventRecord, self._sent, stream())


_sending = threading.Lock()


@functools.cache
def _stagings():
    """The buffers, in turn for ever; they stay for the life of the process."""
    return itertools.cycle([_Staging(), _Staging()])


def address(array):
    """The address of a device array's first element, as kernels take it (int64)."""
    return array.address


def free_memory():
    """Bytes that can be allocated: what the driver has, and what freed arrays left."""
    if SIMULATED:
        return available_memory()
    device()
    return call(api.cuMemGetInfo)[0] + _pool.kept


def total_memory():
    """Bytes of the device."""
    if SIMULATED:
        return available_memory()
    device()
    return call(api.cuMemGetInfo)[1]


def release():
    """Give the memory of freed arrays back to the driver. Waits for all work, which may still use it."""
    if not SIMULATED:
        synchronise()
        _pool.release()


def _need_contiguous(array):
    if not array.contiguous:
        raise ValueError(f"a device array of strides {array.strides} is not contiguous")


def _out_of_memory(nbytes):
    free = "" if SIMULATED else f"; {size_text(free_memory())} of {size_text(total_memory())} are free"
    return PymlaError(
        f"the device has no {size_text(nbytes)} for another array{free}; lower `ctx` or choose a smaller `cache_type`"
    )
