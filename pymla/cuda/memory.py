"""Memory of the device: arrays, and copies to and from them.

A freed array's memory is kept for the next one of its size: all work runs on one stream, so what still reads the old
array runs before what writes the new one. In the simulator an array lies in the host's memory; slices, shapes, strides
and addresses behave alike, as the same code computes them.
"""

import ctypes
import functools
import threading
from collections import defaultdict

import numpy as np
from cuda.bindings import driver as api

from pymla.cuda.driver import SIMULATED, call, describe, device, recording, refuse_while_recording, stream, synchronise
from pymla.errors import PymlaError

if SIMULATED:
    from pymla.cuda import simulator
    from pymla.memory import available_memory

#: Bytes of a staging buffer of `upload`; there are two.
STAGING = 32 << 20


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

    def __init__(self, view):
        # A NumPy array at the device's addresses: NumPy computes shapes, strides and addresses of views, and keeps the
        # memory alive. Its elements are never touched.
        self._view = view
        self.address = view.__array_interface__["data"][0]

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
            if not (each is None or each is Ellipsis or isinstance(each, (slice, int, np.integer))):
                raise TypeError(f"device arrays have no index of type {type(each).__name__}")
        # With an ellipsis NumPy makes a view even of a single element, where it would read the value otherwise.
        return DeviceArray(self._view[index if Ellipsis in index else (*index, Ellipsis)])

    def reshape(self, *shape):
        """The same elements in another shape; of a contiguous array."""
        if not self.contiguous:
            raise ValueError(f"a device array of strides {self.strides} cannot be reshaped")
        return DeviceArray(self._view.reshape(*shape))

    def view(self, dtype):
        """The same bytes as another type."""
        return DeviceArray(self._view.view(dtype))

    def __array__(self, *arguments, **options):
        raise TypeError("NumPy cannot read a device array; use pymla.cuda.memory.to_host")

    def __repr__(self):
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, strides={self.strides})"


class _Memory:
    """Bytes of the device, in the form that NumPy makes an array of."""

    def __init__(self, nbytes, shape, dtype):
        self._nbytes = nbytes
        self._address = _pool.take(nbytes)
        kind = np.dtype(dtype).str
        self.__array_interface__ = {"shape": shape, "typestr": kind, "data": (self._address, False), "version": 3}

    def __del__(self):
        if hasattr(self, "_address"):
            _pool.give(self._address, self._nbytes)


class _Pool:
    """Memory that was allocated before, by size."""

    def __init__(self):
        self._free = defaultdict(list)
        # The collector may give memory back while this thread takes some.
        self._lock = threading.RLock()
        self.kept = 0  # bytes that wait for another use

    def take(self, nbytes):
        size = self._size(nbytes)
        with self._lock:
            if self._free[size]:
                self.kept -= size
                return self._free[size].pop()
        device()
        error, address = api.cuMemAlloc(size)
        if error == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY and not recording():
            self.release()
            error, address = api.cuMemAlloc(size)
        if error != api.CUresult.CUDA_SUCCESS:
            full = error == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            raise _out_of_memory(nbytes) if full else PymlaError(f"allocation of memory: {describe(error)}")
        return int(address)

    def give(self, address, nbytes):
        size = self._size(nbytes)
        with self._lock:
            self._free[size].append(address)
            self.kept += size

    def release(self):
        """Give memory that nobody uses back to the driver."""
        synchronise()
        with self._lock:
            for address in (each for size in self._free.values() for each in size):
                call(api.cuMemFree, address)
            self._free.clear()
            self.kept = 0

    @staticmethod
    def _size(nbytes):
        """A size that suits several: at most an eighth above what is needed, at least 512 bytes."""
        step = max(512, 1 << max(0, nbytes.bit_length() - 4))
        return max(1, -(-nbytes // step)) * step


_pool = _Pool()


def empty(shape, dtype):
    """An array whose elements are not set; in the simulator they are NaN or −1."""
    shape = tuple(map(int, shape)) if isinstance(shape, (tuple, list)) else (int(shape),)
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if SIMULATED:
        try:
            array = DeviceArray(simulator.buffer(nbytes).view(dtype).reshape(shape))
        except MemoryError:
            raise _out_of_memory(nbytes) from None
    else:
        array = DeviceArray(np.asarray(_Memory(nbytes, shape, dtype)))
    if recording():
        recording().keep(array)
    return array


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


def to_device(array):
    """A copy of a NumPy array."""
    array = np.asarray(array, order="C")
    result = empty(array.shape, array.dtype)
    write(result, array)
    return result


def write(target, array):
    """Copy a NumPy array into a contiguous device array of its shape and type. The array may change afterwards."""
    refuse_while_recording("copied from the host")
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    _need_contiguous(target)
    if (target.shape, target.dtype) != (array.shape, array.dtype):
        raise ValueError(f"an array of {array.dtype} {array.shape} does not fit one of {target.dtype} {target.shape}")
    if SIMULATED:
        target._view[...] = array
    elif array.nbytes:
        call(api.cuMemcpyHtoDAsync, target.address, array.__array_interface__["data"][0], array.nbytes, stream())
        synchronise()


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


def upload(array, progress=None):
    """A copy of a large NumPy array, such as part of a mapped file: one slice is read while another one is sent.

    Parameters
    ----------
    array : contiguous array
    progress : callable(done, total), optional
        Bytes.
    """
    if not array.flags.c_contiguous:
        raise ValueError("upload takes contiguous arrays")
    result, source, total = empty(array.shape, array.dtype), array.reshape(-1).view(np.uint8), array.nbytes
    if SIMULATED:
        result._view[...] = array
    else:
        refuse_while_recording("copied from the host")
        for turn, start in enumerate(range(0, total, STAGING)):
            staging = _staging(turn % 2)
            part = source[start : start + STAGING]
            staging.send(part, result.address + start)
            if progress:
                progress(start, total)
        synchronise()
    if progress:
        progress(total, total)
    return result


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


@functools.cache
def _staging(number):
    """One of the two buffers; they stay for the life of the process."""
    return _Staging()


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
    """Give the memory of freed arrays back to the driver."""
    if not SIMULATED:
        _pool.release()


def _need_contiguous(array):
    if not array.contiguous:
        raise ValueError(f"a device array of strides {array.strides} is not contiguous")


def _out_of_memory(nbytes):
    free = "" if SIMULATED else f"; {free_memory() / 2**30:.2f} of {total_memory() / 2**30:.2f} GiB are free"
    return PymlaError(
        f"the device has no {nbytes / 2**30:.2f} GiB for another array{free}; "
        "lower --ctx or choose a smaller --cache-type"
    )
