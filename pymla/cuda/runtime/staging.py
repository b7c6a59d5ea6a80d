"""Copies from the host through pinned memory, which the device reads by itself: a slice is read while one is sent."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator

import numpy as np
from cuda.bindings import driver as api

from pymla.cuda.runtime.driver import call, device, stream

#: Bytes of a staging buffer for copies from the host; there are two.
STAGING = 32 << 20


class _Staging:
    """Pinned memory, which the device reads by itself."""

    def __init__(self) -> None:
        device()
        address = call(api.cuMemHostAlloc, STAGING, 0)
        self._memory = np.frombuffer(memoryview((ctypes.c_uint8 * STAGING).from_address(int(address))), np.uint8)
        self._sent = call(api.cuEventCreate, api.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def send(self, part: np.ndarray, address: int) -> None:
        """Copy bytes to an address, behind the buffer's last use."""
        call(api.cuEventSynchronize, self._sent)
        self._memory[: len(part)] = part
        call(api.cuMemcpyHtoDAsync, address, self._memory.ctypes.data, len(part), stream())
        call(api.cuEventRecord, self._sent, stream())


_sending = threading.Lock()


@functools.cache
def _stagings() -> Iterator[_Staging]:
    """The buffers, in turn for ever; they stay for the life of the process."""
    return itertools.cycle([_Staging(), _Staging()])


def send(array: np.ndarray, address: int, progress: Callable[[int, int], object] | None = None) -> None:
    """Copy a contiguous NumPy array to an address of the device. Its bytes have been read when this returns, though not
    all of them have arrived. `progress` gets bytes: done, and in all."""
    source: np.ndarray = array.reshape(-1).view(np.uint8)
    total = array.nbytes
    for start in range(0, total, STAGING):
        with _sending:
            next(_stagings()).send(source[start : start + STAGING], address + start)
        if progress:
            progress(start, total)
