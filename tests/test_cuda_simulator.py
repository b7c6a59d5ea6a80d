"""Runs the files of tests that import `simulated`, and those of all backends' operations (`tested`), in the CUDA
simulator, each in a process of its own, as many at a time as there are cores."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import side_by_side

HERE = Path(__file__).parent
SIMULATED = re.compile(r"^(import simulated\b|pytestmark = .*\beach_backend\b)", re.MULTILINE)
FILES = sorted(path.name for path in HERE.glob("test_*.py") if SIMULATED.search(path.read_text(encoding="utf-8")))

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="needs numba-cuda"),
    pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="runs in the simulator already"),
]


def run(name):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / name)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent, check=False)


@pytest.fixture(scope="module")
def runs(request):
    with side_by_side.started(request, "test_in_simulator", run) as found:
        yield found


@pytest.mark.parametrize("name", FILES)
def test_in_simulator(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
