"""Where all tests run, they run in lanes: as many processes as there are cores, each on a core of its own.

Threads of kernels wait for each other after every operation. Where processes share their cores, a thread often waits
for one whose core another process holds, and tests take three to six times as long. So each lane stays on its core. Its
kernels run on `THREADS` threads nevertheless, which take turns on that core: operations are split, and their parts
combined, as on several cores.

pytest-xdist runs the lanes. A unit, mostly a file of tests, runs in one lane, so that what its tests share is made
once. Lanes take units from a queue, the longest ones first (`SECONDS`): what is left at the end is short, and no lane
waits long for another one.

``python -m pytest`` without a file runs all tests in lanes; ``-n`` says how many there are, 0 for none, and
``--durations=1`` shows how long each unit took. Named files run in one process as usual, on all cores.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

from pymla.host.cores import usable_cores

#: Threads of a lane's kernels.
THREADS = 2

#: In a lane: the cores of all lanes.
_CORES: set[int] = set()

#: Seconds that files, or tests, take on a core where no kernel has been compiled yet, if they are more than ten. Each
#: of them is a unit, and so is any other file.
SECONDS = {
    "test_isa.py::test_other_levels[avx512vnni]": 230,
    "test_isa.py::test_other_levels[avxvnni]": 230,
    "test_isa.py::test_other_levels[avx2]": 230,
    "test_cuda_compile.py": 220,
    "test_isa.py::test_other_levels[portable]": 150,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_model.py]": 130,
    "test_cuda_simulator.py::test_in_simulator[test_experts.py]": 100,
    "test_cpu_formats.py": 90,
    "test_bench_gpu.py": 80,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_quant.py]": 80,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_loading.py]": 70,
    "test_isa.py": 60,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_bench.py]": 60,
    "test_cli.py": 60,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_indices.py]": 55,
    "test_cuda_simulator.py::test_in_simulator[test_matrices.py]": 50,
    "test_cuda_simulator.py::test_in_simulator[test_attention.py]": 45,
    "test_experts.py": 45,
    "test_attention_edges.py": 45,
    "test_attention.py": 40,
    "test_transformers.py": 40,
    "test_sparse_models.py": 40,
    "test_quantise_codebooks.py": 40,
    "test_golden.py": 35,
    "test_sharing.py": 35,
    "test_matrices.py": 30,
    "test_filecheck.py": 30,
    "test_quantised_models.py": 30,
    "test_contract.py": 30,
    "test_cpu_attention.py": 30,
    "test_interrupts.py": 25,
    "test_needed.py": 25,
    "test_convert_fuzz.py": 25,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_attention.py]": 25,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_sparse.py]": 25,
    "test_cuda_simulator.py::test_in_simulator[test_sparse.py]": 25,
    "test_cpu_compiling.py": 25,
    "test_sparse.py": 20,
    "test_families.py": 20,
    "test_convert_models.py": 20,
    "test_tokenizer_patterns.py": 20,
    "test_quantise_k.py": 20,
    "test_examples.py": 20,
    "test_cuda_simulator.py::test_in_simulator[test_cuda_needed.py]": 15,
    "test_simd.py": 15,
    "test_bench.py": 15,
    "test_arguments.py": 15,
    "test_imatrix.py": 15,
    "test_compositions.py": 15,
}


#: Files that are of another file's unit: they compile the same functions of tests, which no cache keeps.
TOGETHER = {"test_python_level.py": "test_cpu_formats.py"}


def unit_of(nodeid: str) -> str:
    """The unit of a test: the entry of `SECONDS` that names it best, or its file."""
    file, _, test = nodeid.removeprefix("tests/").partition("::")
    file = TOGETHER.get(file, file)
    return max((entry for entry in SECONDS if f"{file}::{test}".startswith(entry)), key=len, default=file)


class Lanes(LoadScopeScheduling):
    """Deals out units in the order in which their tests are collected."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def is_lane(config: pytest.Config) -> bool:
    """Whether this process is a lane."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Where all tests run, let pytest-xdist, which looks at its options next, start a lane for each core."""
    if is_lane(config) or not config.pluginmanager.hasplugin("xdist"):
        return
    options = config.option
    runs_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if runs_all and options.numprocesses is None and not options.usepdb:
        options.numprocesses = usable_cores()
    options.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable) -> Lanes:
    config.pluginmanager.register(Durations())
    return Lanes(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Keep a lane, and the processes that it starts, on its core."""
    if not is_lane(config) or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if usable_cores() < len(cores):
        return  # a quota in place of cores
    _CORES.update(cores)
    lane = int(config.workerinput["workerid"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[lane % len(cores)]})
    from pymla import cpu

    cpu.usable_cores = lambda: THREADS
    cpu.set_threads(THREADS)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Lets threads and processes that a test starts run at the same time, in a lane as well."""
    if not _CORES:
        yield
        return
    core = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES)
    yield
    os.sched_setaffinity(0, core)
    from pymla import cpu

    cpu.set_threads(1)  # ends threads that run on any core
    cpu.set_threads(THREADS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_lane(config):
        items.sort(key=lambda item: -SECONDS.get(unit_of(item.nodeid), 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-xdist interrupts a lane that has ended, which would show on the terminal."""
    if is_lane(session.config):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Durations:
    """A plugin: shows how long units took, where ``--durations`` asks for it."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[unit_of(report.nodeid)] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if config.option.durations is None:
            return
        terminalreporter.section("units that took more than ten seconds, and `SECONDS` of tests/lanes.py")
        for unit, seconds in self._seconds.most_common():
            if seconds > 10 or unit in SECONDS:
                terminalreporter.write_line(f"{seconds:6.0f} s  {SECONDS.get(unit, 0):6} s  {unit}")
