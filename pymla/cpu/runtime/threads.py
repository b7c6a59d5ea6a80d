"""Threads that run kernels: single launches, and whole recorded steps (`Graph`) without a return to Python.

An operation is a kernel, its arguments and a number of items. Threads take ranges of items from a common counter until
none is left, so one that the system stopped holds up no more than the range it has, and meet at a barrier behind every
operation. Who waits spins for some microseconds, then lets other programs have the core between looks; after some
milliseconds without work a thread sleeps. A spinning barrier alone starves where another program holds a core, and one
that sleeps at once wakes up too late: GNU OpenMP, with either, ran at a tenth to a half of this speed.

`Graph` is the twin of a CUDA graph: the launches of a function are recorded once, with the addresses of their arrays,
and replayed as often as wanted on what the arrays then hold.
"""

import contextlib
import ctypes
import os
import sys
import threading

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.memory import empty
from pymla.cpu.runtime.compiling import function, helper
from pymla.host.cores import usable_cores

#: Looks at a barrier before a thread offers its core to others, some microseconds: if another program has the other
#: thread's core, waiting longer takes from both.
SPINS = 50
#: Such offers before an idle thread goes to sleep, some milliseconds.
YIELDS = 5000
#: The smallest range that a thread takes, as a part of its share of an operation.
SMALLEST = 16

# Words of an operation, which has a cache line of its own: kernel, address of arguments, items, items of a range, or
# minus those of the smallest one, and the first item that nobody has taken yet.
_OPERATION = 8
# Addresses in the common state, in bytes; each word has a cache line of its own, as threads poll them.
_TICKET, _OPERATIONS, _COUNT, _THREADS, _ARRIVED, _PHASE, _BUSY, _STOP, _AWAKE = (64 * i for i in range(9))

_WORD = ir.IntType(64)


def set_threads(count):
    """Run kernels on `count` threads, or on as many of them as the system lets this process start: see
    `thread_count`."""
    global _pool
    with _lock:
        if count != _pool.threads:
            _pool.stop()
            _pool = _Pool(count)
        _pool.start()


def thread_count():
    """Threads that run kernels."""
    return _pool.threads


def recording():
    """Whether the calling thread records a `Graph`."""
    return _recording.graph is not None


def launch(address, items, grain, words, keep):
    """Run a kernel over `items`, or record it while a `Graph` is being made.

    Parameters
    ----------
    address : int
        Of a C function ``void(int64 arguments, int64 first, int64 last)``.
    items : int
    grain : int or None
        Items that a thread takes at a time; None: most of its share of what is left, so that it reads long stretches
        of memory and yet all end at the same time.
    words : int64 array
        The kernel's arguments.
    keep : object
        What the words point to.
    """
    grain = grain or -max(1, items // (SMALLEST * _pool.threads))
    if _recording.graph is not None:
        _recording.graph.add(address, items, grain, words, keep)
    elif items:
        _pool.run_one(address, words, items, grain)


class Graph:
    """The launches of a function, recorded by calling it once, and run by `replay`.

    Everything that changes from replay to replay must lie in arrays that the function was recorded with: whatever it
    computes in Python is computed once.

    Parameters
    ----------
    function : callable()

    Attributes
    ----------
    result
        What the function returned; arrays are filled by `replay`.
    """

    def __init__(self, function):
        self._launches = []
        self._keep = []
        with _record(self):
            self.result = function()
        self._operations = _zeros(_OPERATION * max(1, len(self._launches)))
        table = self._operations.reshape(-1, _OPERATION)
        for row, each in zip(table, self._launches, strict=False):
            row[:5] = *each, 0

    @staticmethod
    def size(sequences):
        """Sequences of the recorded step of which a step of some sequences is part; None: it is not recorded. A step
        keeps the arrays of all its launches, and of more sequences Python's part is small."""
        return sequences if sequences <= 8 else None

    def add(self, address, items, grain, words, keep):
        """Record a launch."""
        if items:
            self._launches.append((address, words.ctypes.data, items, grain))
            self._keep.append((words, keep))

    def replay(self):
        """Run it."""
        if self._launches:
            _pool.run(self._operations, len(self._launches))
        return self.result


class _Recording(threading.local):
    graph = None


_recording = _Recording()


@contextlib.contextmanager
def _record(graph):
    _recording.graph = graph
    try:
        yield
    finally:
        _recording.graph = None


def _zeros(words):
    """Zeroed int64 memory that begins at a cache line."""
    memory = empty(words, np.int64)
    memory[:] = 0
    return memory


class _Pool:
    """Sleeping or polling threads, of which the caller's is the first."""

    def __init__(self, threads):
        self.threads = threads
        self._state = _zeros((_AWAKE // 8) + 8 * threads)
        self._state[_THREADS // 8] = threads
        self._wake = [threading.Semaphore(0) for _ in range(threads)]
        self._taken = [threading.Lock() for _ in range(threads)]  # held by the thread that has this number
        self._single = _zeros(_OPERATION)
        self._started = False

    def run_one(self, address, words, items, grain):
        """Run one operation; on the caller's thread alone where there is one range only."""
        with _lock:
            self._single[:5] = address, words.ctypes.data, items, grain, 0
            self._run(self._single, 1, items > abs(grain))

    def run(self, operations, count):
        """Run operations."""
        with _lock:
            self._run(operations, count, True)

    def _run(self, operations, count, parallel):
        address = operations.ctypes.data
        if parallel and self.threads > 1 and not self._started:
            self.start()
        if not parallel or self.threads == 1:
            _run_alone(address, count)
            return
        # An interrupt may come between these calls, and must leave nobody waiting: while `_BUSY` is set no thread
        # goes to sleep, and work is posted and done in one call.
        state = self._state.ctypes.data
        try:
            sleeping = _keep_awake(state)
            for thread in range(1, self.threads):
                if sleeping >> thread & 1:
                    self._wake[thread].release()
            _post_and_run(state, address, count)
        finally:
            self._state[_BUSY // 8] = 0

    def stop(self):
        """End the threads."""
        self._state[_STOP // 8] = 1
        for semaphore in self._wake:
            semaphore.release()

    def start(self):
        """Start the threads that do not run yet. Where the system refuses one, the pool stays as large as it is then.

        An interrupt may come at any point. So a number counts as started when a thread has taken it, not when one was
        told to, and a second thread for a number ends by itself.
        """
        for thread in range(1, self.threads):
            while not self._taken[thread].locked():
                began = threading.Event()
                worker = threading.Thread(target=self._work, args=(thread, began), daemon=True, name=f"pymla-{thread}")
                try:
                    worker.start()
                except (RuntimeError, MemoryError):  # a limit on processes, or on memory
                    self.threads = self._state[_THREADS // 8] = thread
                    break
                began.wait()
            if self.threads == thread:
                break
        self._started = True

    def _work(self, thread, began):
        state, ticket = self._state, 0
        first = self._taken[thread].acquire(blocking=False)
        began.set()
        while first and not state[_STOP // 8]:
            self._wake[thread].acquire()
            ticket = _serve(state.ctypes.data, thread, ticket)


@intrinsic
def _get(typingctx, address):
    """The word at an address, as all threads see it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], _WORD.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _set(typingctx, address, value):
    """Write a word for all threads."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], _WORD.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typingctx, address, value):
    """Add to a word that others add to as well; returns what it was."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _replace(typingctx, address, old, new):
    """Write a word where it is still what it was; returns whether it was."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _WORD.as_pointer())
        result = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that the thread polls."""

    def codegen(context, builder, signature, args):
        if llvm.get_process_triple().startswith(("x86_64", "i686", "amd64")):
            name = "llvm.x86.sse2.pause"
            module = builder.module
            pause = module.globals.get(name) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), codegen


if sys.platform == "win32":
    _yield_address = ctypes.cast(ctypes.windll.kernel32.SwitchToThread, ctypes.c_void_p).value
else:
    _yield_address = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
llvm.add_symbol("pymla_sched_yield", _yield_address)


@intrinsic
def _offer(typingctx):
    """Let another program have the core."""

    def codegen(context, builder, signature, args):
        module, name = builder.module, "pymla_sched_yield"
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx, function, arguments, first, last):
    """Call a kernel at an address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_WORD] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@helper
def _wait(spins):
    """One look's pause; returns how many there have been."""
    if spins < SPINS:
        _pause()
    else:
        _offer()
    return spins + 1


@helper
def _range(grain, left, threads):
    """Items that a thread takes of those that are left."""
    return grain if grain > 0 else max(-grain, 7 * left // (8 * threads))


@helper
def _run(state, operations, count):
    """A thread's part of all operations."""
    threads = _get(state + _THREADS)
    for i in range(count):
        operation = operations + 64 * i
        items = _get(operation + 16)
        first = _get(operation + 32)
        while first < items:
            end = min(first + _range(_get(operation + 24), items - first, threads), items)
            if _replace(operation + 32, first, end):
                _call(_get(operation), _get(operation + 8), first, end)
            first = _get(operation + 32)
        phase = _get(state + _PHASE)
        if _add(state + _ARRIVED, 1) == threads - 1:
            _set(state + _ARRIVED, 0)
            _set(operation + 32, 0)
            _set(state + _PHASE, phase + 1)
        else:
            spins = 0
            while _get(state + _PHASE) == phase:
                spins = _wait(spins)


@function(types.void(types.int64, types.int64))
def _run_alone(operations, count):
    """All operations, on one thread."""
    for i in range(count):
        operation = operations + 64 * i
        _call(_get(operation), _get(operation + 8), 0, _get(operation + 16))


@function(types.int64(types.int64))
def _keep_awake(state):
    """Let no thread fall asleep. Returns a bit for each one that sleeps already."""
    _set(state + _BUSY, 1)
    sleeping = 0
    for thread in range(1, _get(state + _THREADS)):
        if _get(state + _AWAKE + 64 * thread) == 0:
            sleeping |= 1 << thread
    return sleeping


@function(types.void(types.int64, types.int64, types.int64))
def _post_and_run(state, operations, count):
    """Run operations on all threads."""
    _set(state + _OPERATIONS, operations)
    _set(state + _COUNT, count)
    _add(state + _TICKET, 1)
    _run(state, operations, count)


@function(types.int64(types.int64, types.int64, types.int64))
def _serve(state, thread, ticket):
    """Run what is posted behind `ticket`, until nothing has come for a while. Returns the last ticket."""
    awake = state + _AWAKE + 64 * thread
    _set(awake, 1)
    spins = 0
    while _get(state + _STOP) == 0:
        if _get(state + _TICKET) != ticket:
            ticket += 1
            _run(state, _get(state + _OPERATIONS), _get(state + _COUNT))
            spins = 0
        elif spins < SPINS + YIELDS:
            spins = _wait(spins)
        else:
            # Either this thread sees that there is work, or who brings it sees that this thread sleeps.
            _set(awake, 0)
            if _get(state + _BUSY) == 0:
                return ticket
            _set(awake, 1)
            spins = SPINS
    return ticket


#: What Python calls here, for `needed`.
FUNCTIONS = [_run_alone, _keep_awake, _post_and_run, _serve]

_lock = threading.RLock()
_pool = _Pool(usable_cores())


def _forget_threads():
    """A forked child has only the thread that forked."""
    global _pool
    _pool = _Pool(_pool.threads)
    _lock.release()


if hasattr(os, "register_at_fork"):
    # A fork waits for the operation or the recorded step that runs: the child's copy of one that was under way would
    # have items that are taken, and computed by nobody.
    os.register_at_fork(
        before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_forget_threads
    )
