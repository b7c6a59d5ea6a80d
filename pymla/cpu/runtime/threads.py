"""Launches of kernels over threads.

An operation is a kernel, its arguments and a number of items. Threads take ranges of items from a shared counter until
none is left, so that a thread that the system stopped holds up no more than the range it has, and meet at a barrier
after every operation. A waiting thread polls the barrier for some microseconds, then offers its core to other programs
between polls; after some milliseconds without work a thread sleeps (`pymla.cpu.runtime.polling`). A barrier that only
polls starves where another program holds a core, and one that sleeps at once wakes up too late: GNU OpenMP, with
either, ran at a tenth to a half of this speed.
"""

import contextlib
import os
import threading

from pymla.cpu.runtime.pool import LOCK, Pool
from pymla.host.cores import usable_cores

#: The smallest range that a thread takes, as a part of its share of an operation.
SMALLEST = 16


def set_threads(count):
    """Run kernels on `count` threads, or on as many of them as the system lets this process start: see
    `thread_count`."""
    global _pool
    with LOCK:
        if count != _pool.threads:
            _pool.stop()
            _pool = Pool(count)
        _pool.start()


def thread_count():
    """Threads that run kernels."""
    return _pool.threads


def recording():
    """Whether the calling thread records a graph (`pymla.cpu.graph`)."""
    return _recording.graph is not None


def launch(address, items, grain, words, keep):
    """Run a kernel over `items`, or record the launch while a graph is being made.

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
    grain = grain or default_grain(items)
    if _recording.graph is not None:
        _recording.graph.add(address, items, grain, words, keep)
    elif items:
        _pool.run_one(address, words, items, grain)


def default_grain(items):
    """Minus the items of the smallest range that a thread takes."""
    return -max(1, items // (SMALLEST * _pool.threads))


def run(operations, count):
    """Run recorded operations (`pymla.cpu.graph`)."""
    _pool.run(operations, count)


class _Recording(threading.local):
    graph = None


_recording = _Recording()


@contextlib.contextmanager
def record(graph):
    """Give launches of the calling thread to ``graph.add`` instead of running them."""
    _recording.graph = graph
    try:
        yield
    finally:
        _recording.graph = None


_pool = Pool(usable_cores())


def _forget_threads():
    """A forked child has only the thread that forked."""
    global _pool
    _pool = Pool(_pool.threads)
    LOCK.release()


if hasattr(os, "register_at_fork"):
    # A fork waits until running operations have ended: in the child's copy of a running operation, items would be taken
    # that no thread computes.
    os.register_at_fork(
        before=lambda: LOCK.acquire(), after_in_parent=lambda: LOCK.release(), after_in_child=_forget_threads
    )
