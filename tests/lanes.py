"""Where all tests run, they run in lanes: as many processes as there are cores, each on a core of its own.

Threads of kernels wait for each other after every operation. Where processes share their cores, a thread that waits for
one whose core another process holds waits for a time slice, and tests take three to six times as long. So each lane
stays on its core. Its kernels run on `THREADS` threads nevertheless, which take turns on that core: operations are
split, and their parts combined, as on several cores.

pytest-xdist runs the lanes. A unit, mostly a file of tests, runs in one lane, so that what its tests share is made
once. Lanes take units from a queue, the longest ones first, as `LONGEST` lists them: what is left at the end is short,
and no lane waits long for another one.

``python -m pytest`` without a file or folder runs all tests, and ``-n`` says how many lanes there are, 0 for none. With
files, tests run in one process as usual, on all cores.
"""

import os
import signal
from collections.abc import Callable

import pytest
from xdist.scheduler import LoadScopeScheduling

from pymla.host.cores import usable_cores

#: Threads of a lane's kernels.
THREADS = 2

#: Files and tests that take more than some seconds, longest first: the units of their own of which the queue begins.
#: All else is a unit per file, in the order of names.
LONGEST = (
    "test_isa.py::test_other_levels[portable]",
    "test_isa.py::test_other_levels[avx2]",
    "test_isa.py::test_other_levels",
)


def unit_of(nodeid: str) -> str:
    """The unit of a test: an entry of `LONGEST`, of several the one that names it best, or its file."""
    name = nodeid.rpartition("tests/")[2]
    return max((entry for entry in LONGEST if name.startswith(entry)), key=len, default=name.partition("::")[0])


def place_of(item: pytest.Item) -> int:
    """The place in the queue of a test's unit."""
    unit = unit_of(item.nodeid)
    return LONGEST.index(unit) if unit in LONGEST else len(LONGEST)


class Lanes(LoadScopeScheduling):
    """Deals out units in the order in which their tests are collected."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def is_lane(config: pytest.Config) -> bool:
    """Whether this process is a lane."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let pytest-xdist start a lane for each core where all tests run, before it looks at its options."""
    if is_lane(config) or not config.pluginmanager.hasplugin("xdist"):
        return
    options = config.option
    runs_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if runs_all and options.numprocesses is None and not options.usepdb:
        options.numprocesses = usable_cores()
    options.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable) -> Lanes:
    return Lanes(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Keep a lane, and the processes that it starts, on its core."""
    if not is_lane(config) or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if usable_cores() < len(cores):
        return  # a quota in place of cores
    lane = int(config.workerinput["workerid"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[lane % len(cores)]})
    from pymla import cpu

    cpu.usable_cores = lambda: THREADS
    cpu.set_threads(THREADS)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A lane that has ended is interrupted by pytest-xdist, and would show where."""
    if is_lane(session.config):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_lane(config):
        items.sort(key=place_of)
