"""Runs the files of tests that import `simulated`, and those of all backends' operations (`tested`), in the CUDA
simulator, each in a process of its own."""

import importlib.util
import os
import re
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
    return side_by_side.run(command, env=environment, cwd=HERE.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.side_by_side(run=run)
def test_in_simulator(name, beside):
    assert beside.returncode == 0, beside.stdout + beside.stderr
    assert " passed" in beside.stdout, beside.stdout
