"""`bench/gpu.py` itself: its sections at toy sizes in the simulator, and what it says of failures."""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_records
import numpy as np
import pytest
import side_by_side

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="needs numba-cuda"),
    pytest.mark.skipif(
        os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="runs processes with the simulator itself"
    ),
]


def run(*arguments):
    return side_by_side.run([sys.executable, str(gpu.HERE / "gpu.py"), *map(str, arguments)])


def simulate():
    with tempfile.TemporaryDirectory() as folder:
        done = run("--simulate", "-o", Path(folder) / "gpu.json")
        return done, json.loads((Path(folder) / "gpu.json").read_text()) if done.returncode == 0 else None


@pytest.mark.side_by_side(run=simulate)
def test_every_check_passes_in_the_simulator(beside):
    done, report = beside
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["passed"]
    assert report["simulated"]
    assert {each["section"] for each in report["checks"]} == set(gpu.SIMULATED) - {"device"}
    assert f"{len(report['checks'])} of {len(report['checks'])} checks passed" in done.stdout


@pytest.mark.side_by_side(run=lambda: run("--analytic", "--bandwidth", 4, "--gap", 2))
def test_the_analytic_table(beside):
    assert beside.returncode == 0, beside.stdout + beside.stderr
    rows = [line.split("|") for line in beside.stdout.splitlines() if "given" in line]
    assert [row[2].strip() for row in rows] == ["generation"] * 3 + ["prompt 1024"] * 3
    launches, least, graph = int(rows[0][6]), float(rows[0][7]), float(rows[0][8])
    assert launches > 27 * 20
    assert graph == pytest.approx(least + launches * 2e-3, abs=0.02)


def test_sections_that_do_not_end_well_are_told():
    assert gpu.in_process("nonsense", "nowhere", False, True, 60) == "ended with exit code 1"
    assert gpu.in_process("products", "nowhere", False, True, 0.01) == "not done within 0.01 s"


def test_unknown_sections_are_refused():
    done = run("--sections", "layers,nonsense")
    assert done.returncode == 2
    assert "nonsense; choose among device" in done.stderr


def test_failures_are_records(tmp_path, capsys):
    records = gpu_records.Records(tmp_path / "records", "section")
    tolerance = {"rtol_max": 1e-3, "reason": "none"}
    records.check("right", lambda: [(np.ones(3), np.ones(3))], **tolerance)
    records.check("wrong", lambda: [(np.ones(3), np.ones(3)), (np.ones(3), np.full(3, 1.5))], **tolerance)
    records.check("not a number", lambda: [(np.array([1, np.nan]), np.ones(2))], **tolerance)
    records.check("broken", lambda: [1 / 0], **tolerance)
    records.time("fast", lambda: 1e-6, amount=1e6, unit="TB/s", limit=4e12)
    records.time("no time", lambda: [][0], amount=1, unit="TB/s")
    found = gpu_records.read(tmp_path / "records")
    assert [gpu.failed(each) for each in found] == [False, True, True, True, False, True]
    assert found[4]["share"] == pytest.approx(0.25)
    assert "FAILED: ZeroDivisionError" in capsys.readouterr().out
    with open(tmp_path / "records", "a") as file:
        file.write('{"kind": "che')
    assert len(gpu_records.read(tmp_path / "records")) == 6
    assert gpu_records.read(tmp_path / "missing") == []


def test_the_table_has_every_bar():
    times = [{"section": "kernels", "name": "matvec Q4_0 102400 × 2048", "share": 0.8125, "failure": None}]
    bad = {"section": "sampling", "name": "greedy", "passed": False, "error": 0.5, "allowed": 0.1, "failure": None}
    report = {"checks": [bad], "times": times, "sweeps": [], "facts": [], "simulated": False, "seconds": 1}
    lines = list(gpu.table({**report, "sections": {"sweep": {"problem": "not done within 240 s"}}}))
    assert "0 of 1 checks passed" in lines[0]
    assert lines[1] == "FAILED sampling: greedy: 0.5, allowed 0.1"
    assert lines[2] == "FAILED section sweep: not done within 240 s"
    assert "81.2 %" in lines[5]
    assert len(lines) == 5 + len(gpu.BARS)


def test_every_bar_is_measured(monkeypatch):
    import gpu_models
    import gpu_times

    from pymla.cuda import limits

    monkeypatch.setattr(limits, "measure", lambda: limits.Limits(1e12, 1e12))
    names = []
    records = SimpleNamespace(time=lambda name, measure, **about: names.append(name))
    gpu_times.kernels(records, quick=True)
    assert {name for _, kind, name, *_ in gpu.BARS if kind == "time"} <= set(names)
    assert len(names) == len(set(names))
    assert {name for _, kind, name, *_ in gpu.BARS if kind == "sweep"} == {
        f"graph on, N_KV {depth}" for depth in (0, 32768 - gpu_models.PROMPT)
    }
