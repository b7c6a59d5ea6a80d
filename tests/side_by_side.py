"""Tests that wait for a process of its own: the process begins with the session, beside the other tests.

Most tests keep one core busy. Processes of tests marked ``side_by_side(run=…)`` take the cores that are left: as many
run at a time as there are cores, each on one of them, at a low priority, so that tests of time do not notice them. The
marked tests come last and take their results from the fixture `beside`::

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.side_by_side(run=lambda name: side_by_side.run([sys.executable, name]))
    def test_runs(beside):
        assert beside.returncode == 0
"""

import os
import queue
import subprocess
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pymla.host.cores import usable_cores

#: Files of tests that take long: where all tests run, each has a process of its own (`test_files_beside.py`). On a core
#: of its own it takes a third to a sixth of the time that it takes beside other processes with threads on all cores.
FILES = (
    "test_transformers.py",
    "test_golden.py",
    "test_sparse_models.py",
    "test_quantised_models.py",
    "test_needed.py",
    "test_contract.py",
    "test_filecheck.py",
    "test_families.py",
    "test_compositions.py",
    "test_imatrix.py",
    "test_choices.py",
)

#: Of `run`: what ``nice`` adds by default.
NICENESS = 10


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` with its output as text, at a low priority where the system has priorities."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options) as process:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        out, err = process.communicate()
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

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        """Where all tests run, `FILES` are not collected, and elsewhere the tests that run them are not."""
        runs_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        ignored = FILES if runs_all else ("test_files_beside.py",)
        return True if collection_path.name in ignored else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("side_by_side") is not None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        for item in session.items:
            is_skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
            if item.get_closest_marker("side_by_side") and not is_skipped:
                work = self._work(item)
                if work not in self._futures:
                    self._futures[work] = self._pool.submit(work[0], *work[1:])

    def pytest_unconfigure(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _work(item: pytest.Item) -> tuple:
        """A function and its arguments."""
        callspec = getattr(item, "callspec", None)
        return (item.get_closest_marker("side_by_side").kwargs["run"], *(callspec.params.values() if callspec else ()))

    @pytest.fixture
    def beside(self, request: pytest.FixtureRequest) -> Any:
        """What the function of the test's mark ``side_by_side`` returned."""
        return self._futures[self._work(request.node)].result()
