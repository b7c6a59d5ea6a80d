"""Processes that compile functions, and leave them in the cache for the process that needs them.

Numba compiles on one core, and holds the interpreter's lock meanwhile; so several cores take several processes.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time

from pymla.host.cores import usable_cores

#: Fewer functions are compiled faster than another process starts.
WORTH_A_PROCESS = 4
#: Seconds until the first of the processes has imported the package, or never will.
PATIENCE = 30.0


def compile_in_processes(wanted, tell):
    """Have functions compiled by other processes, where several cores make that faster.

    Functions that are not compiled there, as where the system refuses a process, are left to the caller.

    Parameters
    ----------
    wanted : list of `pymla.cpu.runtime.compiling.Compiled`
    tell : callable(done, name)
        Told of each function that was compiled, and first of none.
    """
    count = min(usable_cores(), len(wanted) // WORTH_A_PROCESS)
    if count < 2:
        return
    tasks, done = queue.SimpleQueue(), queue.SimpleQueue()
    for each in wanted:
        tasks.put(each)
    workers = [worker for worker in (_Worker.started(tasks, done) for _ in range(count)) if worker]
    try:
        tell(0, wanted[0].__name__)
        _wait_for(workers, done, tell)
    finally:
        for worker in workers:
            worker.end()


def _wait_for(workers, done, tell):
    """Tell of functions as they are compiled, until no worker is left or none has ever answered."""
    finished, began, answered = 0, time.monotonic(), False
    while any(worker.is_alive() for worker in workers) or not done.empty():
        try:
            name = done.get(timeout=0.1)
        except queue.Empty:
            if answered or time.monotonic() - began < PATIENCE:
                continue
            return  # the program that runs this one is no Python interpreter that can run another one
        answered = True
        if name:
            finished += 1
            tell(finished, name)


class _Worker(threading.Thread):
    """Gives functions to a process, one after the other."""

    @classmethod
    def started(cls, tasks, done):
        """A worker that runs, or None where there can be no process or thread."""
        command = [sys.executable, "-c", "from pymla.cpu.runtime import compiling_workers; compiling_workers.serve()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the process that the user sees
                text=True,
            )
        except (OSError, TypeError):
            return None
        worker = cls(process, tasks, done)
        try:
            worker.start()
        except RuntimeError:
            worker.end()
            return None
        return worker

    def __init__(self, process, tasks, done):
        super().__init__(daemon=True)
        self._process, self._tasks, self._done = process, tasks, done

    def run(self):
        with contextlib.suppress(OSError, ValueError):
            if not self._process.stdout.readline():
                return
            self._done.put(None)
            while True:
                try:
                    each = self._tasks.get_nowait()
                except queue.Empty:
                    return
                print(json.dumps(each.origin), file=self._process.stdin, flush=True)
                if not self._process.stdout.readline():
                    return
                self._done.put(each.__name__)

    def end(self):
        """End the process, whether it still compiles or not."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a pipe whose other end is closed
                stream.close()


def serve():
    """Compile the functions that standard input names, and leave them in the cache. The process ends with its input,
    also in the middle of a function: then the process that wants it is gone."""
    tasks = queue.SimpleQueue()

    def read():
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    print("ready", flush=True)
    while True:
        module, name, types = json.loads(tasks.get())
        made = getattr(importlib.import_module(module), name)
        _ = (made if types is None else made(*types)).compiled.result
        print(name, flush=True)
