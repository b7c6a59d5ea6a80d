"""What the benchmarks share: the machine's limits, a gate before every measurement, a table at the end.

``python -m pytest bench`` runs them; ``-k`` selects. A benchmark passes a function, the array it fills, and what the
reference says about a slice of that array: nothing is timed that is wrong.
"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tools")]

from compare import assert_close  # noqa: E402
from shares import Passes, round_count  # noqa: E402

from pymla.cpu import limits as machine  # noqa: E402
from pymla.measure.facts import describe, gather  # noqa: E402

_state = {"rows": []}


@pytest.fixture(scope="session")
def limits():
    _state["limits"], _state["packed"] = machine.measure(), machine.packed_rate()
    return _state["limits"]


@pytest.fixture(scope="session")
def stream():
    return machine.Stream()


@pytest.fixture
def measure(benchmark, limits, stream, request):
    """Check a function, then time it.

    Arguments of the fixture: ``run``, a function without arguments; ``checks``, pairs of what it computed and what is
    expected; ``rtol_max`` and ``reason``, as for `assert_close`; ``macs`` and ``nbytes``, what it costs. The checks are
    a function, which is called after a first run. ``streamed``: the bytes come from memory, as every run takes others.
    What rates and shares are stands in `shares`.
    """

    def call(run, checks, *, rtol_max, reason, macs=0, nbytes=0, streamed=False):
        run()
        for actual, expected in checks():
            assert_close(actual, expected, rtol_max=rtol_max, reason=reason)
        rounds, passes = round_count(run), Passes(stream, run)
        benchmark.pedantic(run, setup=passes.before_round if streamed else None, rounds=rounds, iterations=1)
        # Packed is the rate of products whose weights are unpacked already.
        fastest = benchmark.stats.stats.min
        rates = {
            "GMAC/s": macs / fastest / 1e9,
            "int8 share": macs / fastest / limits.int8,
            "packed share": macs / fastest / _state["packed"],
            "GB/s": nbytes / fastest / 1e9,
            "read share": nbytes / fastest / limits.read,
        }
        if streamed:
            rates["read share"] = passes.share(nbytes, benchmark.stats.stats.data)
        benchmark.extra_info.update({name: value for name, value in rates.items() if value})
        times = {"median ms": benchmark.stats.stats.median * 1e3, "fastest ms": fastest * 1e3}
        _state["rows"].append((request.node.name, times | rates))

    return call


def pytest_terminal_summary(terminalreporter):
    if not _state["rows"]:
        return
    terminalreporter.section("shares of the machine's limits")
    terminalreporter.write_line(describe(gather(_state["limits"])))
    terminalreporter.write_line(f"products with packed panels: {_state['packed'] / 1e9:.0f} GMAC/s")
    width = max(len(name) for name, _ in _state["rows"])
    columns = list(_state["rows"][0][1])
    terminalreporter.write_line(f"{'':{width}}" + "".join(f"{name:>13}" for name in columns))
    for name, values in _state["rows"]:
        cells = (_cell(column, values[column]) for column in columns)
        terminalreporter.write_line(f"{name:{width}}" + "".join(f"{cell:>13}" for cell in cells))


def _cell(column, value):
    if not value:
        return "-"
    return f"{value:.1%}" if "share" in column else f"{value:.3f}" if "ms" in column else f"{value:.1f}"
