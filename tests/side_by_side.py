"""Tests that wait for a process of its own, as one in which kernels are simulated: they are marked
``side_by_side(run=…)`` and take what it returned from the fixture `beside`::

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.side_by_side(run=lambda name: side_by_side.run([sys.executable, name]))
    def test_runs(beside):
        assert beside.returncode == 0

Where all tests run, the process takes its turn in the lane of the test (`lanes.py`). Elsewhere most tests keep one core
busy, and the processes take the cores that are left: they begin with the session, as many at a time as there are cores,
each on one of them, at a low priority, so that tests of time do not notice them; and the marked tests come last.
"""

import os
import queue
import subprocess
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lanes
import pytest

from pymla.host.cores import usable_cores

#: Of `run`: what ``nice`` adds by default.
NICENESS = 10

#: Processes that `run` waits for.
_RUNNING: set[subprocess.Popen] = set()


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` with its output as text, at a low priority where the system has priorities."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options) as process:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        _RUNNING.add(process)
        out, err = process.communicate()
        _RUNNING.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _stay_on_a_core(cores: queue.SimpleQueue[int]) -> None:
    """Keep the calling thread, and the processes that it starts, on a core of its own: threads of kernels that wait for
    each other would spend a third of the time on waiting for a core."""
    os.sched_setaffinity(0, {cores.get()})


class SideBySide:
    """A plugin: starts what selected tests wait for."""

    def __init__(self) -> None:
        count = usable_cores()
        if hasattr(os, "sched_setaffinity") and count == len(os.sched_getaffinity(0)):
            cores: queue.SimpleQueue[int] = queue.SimpleQueue()
            for core in sorted(os.sched_getaffinity(0)):
                cores.put(core)
            self._pool = ThreadPoolExecutor(count, initializer=_stay_on_a_core, initargs=(cores,))
        else:  # a quota in place of cores, or no such call
            self._pool = ThreadPoolExecutor(count)
        self._futures: dict[Hashable, Future] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "side_by_side(run): run(*parameters) begins with the session")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not lanes.is_lane(config):
            items.sort(key=lambda item: item.get_closest_marker("side_by_side") is not None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly or lanes.is_lane(session.config):
            return
        for item in session.items:
            is_skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
            if item.get_closest_marker("side_by_side") and not is_skipped:
                self._begun(item)

    def pytest_unconfigure(self) -> None:
        for process in tuple(_RUNNING):  # where the session was interrupted
            process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _begun(self, item: pytest.Item) -> Future:
        """The result of a test's process, which begins now if no other test has it."""
        callspec = getattr(item, "callspec", None)
        run, arguments = (
            item.get_closest_marker("side_by_side").kwargs["run"],
            callspec.params.values() if callspec else (),
        )
        work = (run, *arguments)
        if work not in self._futures:
            self._futures[work] = self._pool.submit(*work)
        return self._futures[work]

    @pytest.fixture
    def beside(self, request: pytest.FixtureRequest) -> Any:
        """What the function of the test's mark ``side_by_side`` returned."""
        return self._begun(request.node).result()
