"""Kernels without a GPU: blocks run one after another, the threads of a block take turns in Python.

numba-cuda's simulator gives the names of `cuda` a meaning on the host. It has no operations of warps, though, and polls
threads of the host. Here a thread is a coroutine (greenlet), which runs until it has to wait for others, so that a run
always repeats; the order of the threads alternates from block to block, so that a result that depends on it shows.
Where no thread can go on, the error says which threads wait where. The memory is in
`pymla.cuda.runtime.simulated_memory`.
"""

import sys
import threading
from collections import deque
from contextvars import copy_context

import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.cuda import types
from numba.cuda.np import numpy_support
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule

from pymla.cuda.runtime.simulated_memory import Memory, buffer, inside
from pymla.errors import PymlaError

WARP = 32

#: Globals of the modules whose kernels and device functions say `cuda`.
_scopes = {}
#: Locks are fair between the threads of a block, not between launches.
_one_launch = threading.Lock()


def register(function):
    """Let a kernel's or device function's module have the simulated `cuda` during launches."""
    _scopes[id(function.__globals__)] = function.__globals__


class _Shared:
    """Shared memory of a block. An array belongs to the place in the source that asks for it, and where a factory made
    functions for several sizes, to its size."""

    def __init__(self, dynamic_bytes):
        self._dynamic_bytes, self._arrays = dynamic_bytes, {}
        self.memory = Memory("shared")
        # 16 bytes is what the hardware promises for dynamic shared memory.
        self._dynamic = buffer(dynamic_bytes, 16, self.memory)

    def array(self, shape, dtype, alignment=None):
        dtype = _dtype(dtype)
        if shape == 0:
            return inside(self._dynamic[: len(self._dynamic) // dtype.itemsize * dtype.itemsize].view(dtype))
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lasti, shape, dtype
        if place not in self._arrays:
            raw = buffer(int(np.prod(shape)) * dtype.itemsize, alignment or dtype.itemsize, self.memory)
            self._arrays[place] = inside(raw.view(dtype).reshape(shape))
        return self._arrays[place]


class _Local:
    """Memory of a thread."""

    def array(self, shape, dtype, alignment=None):
        dtype = _dtype(dtype)
        return inside(np.full(int(np.prod(shape)) * dtype.itemsize, 255, np.uint8).view(dtype).reshape(shape))


def _dtype(dtype):
    return numpy_support.as_dtype(dtype) if isinstance(dtype, types.Type) else np.dtype(dtype)


class _Cuda(FakeCUDAModule):
    """What `cuda` is inside a kernel."""

    def __init__(self, grid, block):
        super().__init__(grid, block, 0)
        self.local_memory = _Local()

    threadIdx = property(lambda self: _running.thread_index)
    blockIdx = property(lambda self: _running.block.index)
    laneid = property(lambda self: _running.lane)
    shared = property(lambda self: _running.block.shared)
    local = property(lambda self: self.local_memory)

    def syncthreads(self):
        _running.block.synchronise()

    def _gather(self, value):
        thread = _running
        thread.value = value
        thread.block.synchronise()
        values = [each.value for each in thread.block.threads]
        thread.block.synchronise()
        return values

    def syncthreads_count(self, value):
        return sum(map(bool, self._gather(value)))

    def syncthreads_and(self, value):
        return int(all(self._gather(value)))

    def syncthreads_or(self, value):
        return int(any(self._gather(value)))


class _Stop(BaseException):
    """Unwinds a thread after another one has failed."""


class _Thread:
    """A simulated thread.

    Attributes
    ----------
    waits : str
        What it waits for; "" while it can run.
    warp : _Warp
    """

    def __init__(self, block, number):
        shape = block.block_shape
        self.block, self.number, self.lane = block, number, number % WARP
        self.thread_index = Dim3(number % shape[0], number // shape[0] % shape[1], number // (shape[0] * shape[1]))
        self.waits, self.done, self.value = "", False, None
        self.copies, self.groups = [], []  # `ptx.cp_async_16`: pairs of addresses that are not committed, and groups

    def start(self, function, arguments):
        """Prepare to run a kernel for the current coroutine."""
        self._scheduler, self._coroutine = getcurrent(), greenlet(lambda: self._run(function, arguments))
        self._coroutine.gr_context = copy_context()  # NumPy's settings

    def resume(self):
        """Run until it waits or ends."""
        global _running
        _running = self
        self._coroutine.switch()

    def pause(self, reason):
        """Let others run until one of them says that this thread can go on."""
        self.waits = reason
        self._scheduler.switch()
        if self.block.error:
            raise _Stop

    def _run(self, function, arguments):
        try:
            if not self.block.error:
                function(*arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.block.fail(error, self)
        self.done = True
        self.block.leave()


_running = None


def running():
    """The simulated thread that runs."""
    if _running is None:
        raise RuntimeError("this function works inside kernels only")
    return _running


class _Block:
    def __init__(self, index, block_shape, shared_bytes, backwards):
        self.index, self.block_shape = Dim3(*index), block_shape
        self.shared = _Shared(shared_bytes)
        self.threads = [_Thread(self, i) for i in range(int(np.prod(block_shape)))]
        for first in range(0, len(self.threads), WARP):
            warp = _Warp(self, self.threads[first : first + WARP])
            for thread in self.threads[first : first + WARP]:
                thread.warp = warp
        self.error = None
        self._living = len(self.threads)
        self._arrived = []
        self._ready = deque(reversed(self.threads) if backwards else self.threads)

    def run(self, function, arguments):
        for thread in self.threads:
            thread.start(function, arguments)
        self._resume()
        if not all(thread.done for thread in self.threads):
            self.fail(RuntimeError(self._stuck()))
            self._resume()
        if self.error:
            raise self.error

    def _resume(self):
        """Run threads until none can go on."""
        while self._ready:
            self._ready.popleft().resume()

    def wake(self, threads):
        """Let threads go on that wait."""
        for thread in threads:
            thread.waits = ""
        self._ready.extend(threads)

    def fail(self, error, thread=None):
        """End the block."""
        if self.error is None:
            where = f"block {tuple(self.index)}" + (f", thread {tuple(thread.thread_index)}" if thread else "")
            if hasattr(error, "add_note"):
                error.add_note(where)
            self.error = error
        self._arrived = []
        self.wake([each for each in self.threads if each.waits])

    def leave(self):
        """A thread has ended."""
        self._living -= 1
        self._barrier()

    def synchronise(self):
        """Wait for all threads of the block that have not ended."""
        thread = running()
        self._arrived.append(thread)
        if not self._barrier(thread):
            thread.pause("syncthreads")

    def _barrier(self, last=None):
        """Open the barrier where all that live have come to it."""
        if not self._arrived or len(self._arrived) < self._living:
            return False
        self.wake([thread for thread in self._arrived if thread is not last])
        self._arrived = []
        return True

    def _stuck(self):
        places = {}
        for thread in self.threads:
            places.setdefault("have ended" if thread.done else f"wait in {thread.waits}", []).append(thread.number)
        return "threads wait for each other: " + "; ".join(f"{_ranges(who)} {what}" for what, who in places.items())


class _Warp:
    """Threads that operate together."""

    def __init__(self, block, threads):
        self._block, self._threads, self._values = block, threads, {}
        self._operation = None

    def meet(self, thread, operation, value, combine):
        """Wait for the other lanes, which must come to the same operation; returns this lane's result.

        Parameters
        ----------
        thread : _Thread
            The lane that runs.
        operation : str
        value : object
            This lane's.
        combine : callable(list of 32 values)
            Results of the 32 lanes.
        """
        values = self._values
        if not values:
            if len(self._threads) < WARP:
                raise RuntimeError(f"{operation} needs whole warps; the block has {len(self._block.threads)} threads")
            self._operation = operation
        elif operation != self._operation:
            raise RuntimeError(
                f"lane {thread.lane} comes to {operation}, and lanes {_ranges(sorted(values))} of its warp wait in "
                f"{self._operation}"
            )
        values[thread.lane] = value
        if len(values) < WARP:
            thread.pause(operation)
            return thread.value
        self._values = {}
        for each, result in zip(self._threads, combine([values[lane] for lane in range(WARP)]), strict=True):
            each.value = result
        self._block.wake([each for each in self._threads if each is not thread])
        return thread.value


def meet(operation, value, combine):
    """`_Warp.meet` of the warp whose lane runs."""
    thread = running()
    return thread.warp.meet(thread, operation, value, combine)


def _ranges(numbers):
    """Numbers as text, neighbours drawn together."""
    parts, first = [], None
    for i, number in enumerate(numbers):
        first = number if first is None else first
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            parts.append(str(first) if first == number else f"{first}–{number}")
            first = None
    return ", ".join(parts)


def launch(function, grid, block, shared_bytes, arguments):
    """Run a kernel.

    Parameters
    ----------
    function : callable
        Python's.
    grid, block : tuple of three int
    shared_bytes : int
        Dynamic shared memory.
    arguments : tuple
        With NumPy arrays (`inside`).
    """
    global _running
    if int(np.prod(block)) > 1024:
        raise PymlaError(f"a block has {int(np.prod(block))} threads, and at most 1024 are possible")
    module = _Cuda(grid, block)
    with _one_launch:
        swapped = [(scope, name) for scope in _scopes.values() for name, value in scope.items() if value is cuda]
        for scope, name in swapped:
            scope[name] = module
        try:
            with np.errstate(all="ignore"):
                for number, index in enumerate(np.ndindex(*reversed(grid))):
                    _Block(index[::-1], block, shared_bytes, number % 2).run(function, arguments)
        finally:
            _running = None
            for scope, name in swapped:
                scope[name] = cuda
