"""The threads of a process that run kernels, of which the caller's is the first."""

import threading

import numpy as np

from pymla.cpu.memory import empty
from pymla.cpu.runtime.polling import (
    AWAKE,
    BUSY,
    LINE,
    OPERATION_WORDS,
    STOP,
    THREADS,
    keep_awake,
    post_and_run,
    run_alone,
    serve,
)

#: Held while operations run, and while a process forks.
LOCK = threading.RLock()


def zeros(words):
    """Zeroed int64 memory that begins at a cache line."""
    memory = empty(words, np.int64)
    memory[:] = 0
    return memory


class Pool:
    """Sleeping or polling threads, of which the caller's is the first."""

    def __init__(self, threads):
        self.threads = threads
        self._state = zeros((AWAKE // 8) + LINE // 8 * threads)
        self._state[THREADS // 8] = threads
        self._wake = [threading.Semaphore(0) for _ in range(threads)]
        self._taken = [threading.Lock() for _ in range(threads)]  # held by the thread that has this number
        self._single = zeros(OPERATION_WORDS)
        self._started = False

    def run_one(self, address, words, items, grain):
        """Run one operation; on the caller's thread alone where there is one range only."""
        with LOCK:
            self._single[:5] = address, words.ctypes.data, items, grain, 0
            self._run(self._single, 1, items > abs(grain))

    def run(self, operations, count):
        """Run operations."""
        with LOCK:
            self._run(operations, count, True)

    def _run(self, operations, count, parallel):
        address = operations.ctypes.data
        if parallel and self.threads > 1 and not self._started:
            self.start()
        if not parallel or self.threads == 1:
            run_alone(address, count)
            return
        # An interrupt may come between these calls, and must leave nobody waiting: while `BUSY` is set no thread
        # goes to sleep, and work is posted and done in one call.
        state = self._state.ctypes.data
        try:
            sleeping = keep_awake(state)
            for thread in range(1, self.threads):
                if sleeping >> thread & 1:
                    self._wake[thread].release()
            post_and_run(state, address, count)
        finally:
            self._state[BUSY // 8] = 0

    def stop(self):
        """End the threads."""
        self._state[STOP // 8] = 1
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
                    self.threads = self._state[THREADS // 8] = thread
                    break
                began.wait()
            if self.threads == thread:
                break
        self._started = True

    def _work(self, thread, began):
        state, ticket = self._state, 0
        first = self._taken[thread].acquire(blocking=False)
        began.set()
        while first and not state[STOP // 8]:
            self._wake[thread].acquire()
            ticket = serve(state.ctypes.data, thread, ticket)
