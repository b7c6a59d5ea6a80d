"""Pools of the device's memory: a freed array's memory is kept for another one of about its size.

All work runs on one stream, so that launches which still read the old array run before those that write the new one.
"""

from __future__ import annotations

import bisect
import threading

import numpy as np
from cuda.bindings import driver as api

from pymla.cuda.runtime.driver import SIMULATED, call, describe, device, recording, synchronise
from pymla.errors import PymlaError
from pymla.host.memory import available_memory, size_text


class Pool:
    """Memory that was allocated before and waits for another use.

    Parameters
    ----------
    heir : Pool, optional
        Gets the waiting memory when this pool and all its arrays are gone.

    Attributes
    ----------
    kept : int
        Bytes that wait.
    """

    def __init__(self, heir: Pool | None = None) -> None:
        self._heir = heir
        self._free: list[tuple[int, int]] = []  # (bytes, address), ascending
        # The collector may give memory back while this thread takes some.
        self._lock = threading.RLock()
        self.kept = 0

    def take(self, nbytes: int) -> tuple[int, int]:
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
                size, kept = self._free.pop(at)
                self.kept -= size
                return kept, size
        address = _allocate(size)
        if address is None and not recording():
            release()
            address = _allocate(size)
        if address is None:
            raise out_of_memory(nbytes)
        return address, size

    def give(self, address: int, size: int) -> None:
        """Memory that is no longer used."""
        with self._lock:
            bisect.insort(self._free, (size, address))
            self.kept += size

    def release(self) -> None:
        """Give all that waits back to the driver."""
        with self._lock:
            for _, address in self._free:
                call(api.cuMemFree, address)
            self._free, self.kept = [], 0

    def __del__(self) -> None:
        if self._heir is not None:
            for size, address in self._free:
                self._heir.give(address, size)


#: Memory outside of graphs.
POOL = Pool()


class Memory:
    """Bytes of the device, in the form that NumPy makes an array of."""

    __slots__ = ("__array_interface__", "_pool", "_size", "address")

    address: int
    _size: int

    def __init__(self, nbytes: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        # Memory of a graph must not be given to anything else while the graph may be replayed.
        graph = recording()
        self._pool = graph.pool if graph else POOL
        self.address, self._size = self._pool.take(nbytes)
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._pool.give(self.address, self._size)


def pool_of_graph() -> Pool:
    """A pool for the arrays of one graph."""
    return Pool(POOL)


def _allocate(nbytes: int) -> int | None:
    """The address of new memory, or None where the device is full."""
    device()
    error, address = api.cuMemAlloc(nbytes)
    if error == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return None
    if error != api.CUresult.CUDA_SUCCESS:
        raise PymlaError(f"allocation of memory: {describe(error)}")
    return int(address)


def out_of_memory(nbytes: int) -> PymlaError:
    """The error for an array that does not fit."""
    free = "" if SIMULATED else f"; {size_text(free_bytes())} of {size_text(device_bytes())} are free"
    return PymlaError(
        f"the device has no {size_text(nbytes)} for another array{free}; lower `ctx` or choose a smaller `cache_type`"
    )


def free_bytes() -> int:
    """Bytes that can be allocated: those that the driver has, and those that freed arrays left."""
    if SIMULATED:
        return available_memory()
    device()
    return call(api.cuMemGetInfo)[0] + POOL.kept


def device_bytes() -> int:
    """Bytes of the device."""
    if SIMULATED:
        return available_memory()
    device()
    return call(api.cuMemGetInfo)[1]


def release() -> None:
    """Give the memory of freed arrays back to the driver. Waits for all work, which may still use it."""
    if not SIMULATED:
        synchronise()
        POOL.release()
