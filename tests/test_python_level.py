"""Kernels as Python: the bits of machine code, at every level, and what a person does with them."""

import os
import subprocess
import sys
from pathlib import Path

import levels
import numpy as np
import pytest
from compare import assert_close

import pymla
from pymla.cpu.runtime import isa

HERE = Path(__file__).parent
#: Operations that call exp, exp2, sine or cosine of the library: NumPy's and Numba's may differ in the last place.
BY_LIBRARY = "router", "experts", "ffn", "absorbed", "absorbed_materialised", "sparse", "angles"


@pytest.fixture(scope="module")
def compiled():
    """Results of machine code."""
    return levels.results()


def as_python(level, *program, text=None):
    """What a program prints that runs the kernels of a level as Python."""
    environment = os.environ | {"PYMLA_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, program)]
    result = subprocess.run(command, env=environment, input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def results_as_python(level, path):
    as_python(level, HERE / "levels.py", path)
    return np.load(path)


def test_python_computes_the_bits_of_machine_code(compiled, tmp_path):
    found = results_as_python(f"python-{isa.ISA}", tmp_path / "results.npz")
    assert set(found) == set(compiled)
    for name, expected in compiled.items():
        if found[name].tobytes() != expected.tobytes():
            assert any(name.split(".")[-1].split()[0] == each for each in BY_LIBRARY), name
            assert_close(found[name], expected, rtol_max=1e-6, reason="exp, exp2, sine and cosine of two libraries")


def test_the_level_with_tiles_runs_anywhere(compiled, tmp_path):
    """Kernels of AMX, whose instructions few processors have."""
    found = results_as_python("python-amx", tmp_path / "results.npz")
    assert set(found) == set(compiled)
    for name, expected in compiled.items():
        if ".expand " not in name or isa.LANES == 16:  # expanded keys and values lie in panels of the level's lanes
            assert_close(found[name], expected, rtol_max=2e-6, reason="order of summation; integers are the same")


SESSION = """
import numpy as np
from pymla.cpu import norm
from pymla.cpu.runtime.isa import ISA, PYTHON
assert (ISA, PYTHON) == ("portable", True)
x, weight, out = np.ones((2, 8), np.float32), np.full(8, 3, np.float32), np.empty((2, 8), np.float32)
breakpoint()
norm.rms_norm(x, weight, 0.0, out)
print(out[1, :2].tolist())
"""


def test_kernels_are_stepped_through_by_pdb():
    commands = "break norm._rms_norm.py_func\ncontinue\np type(x), first, last\nup\np self\nclear 1\ncontinue\n"
    shown = as_python("python", "-c", SESSION, text=commands)
    assert "(<class 'numpy.ndarray'>, 0, 2)" in shown
    assert "<kernel pymla.cpu.norm._rms_norm(" in shown
    assert shown.splitlines()[-1].endswith("[3.0, 3.0]")


GRAPH = """
import numpy as np
from pymla import cpu
x, y = np.ones((2, 1, 4), np.float32)
graph = cpu.Graph(lambda: cpu.norm.add(x, y))
print(x[0, 0])
for _ in range(2):
    print(graph.replay()[0, 0])

"""


def test_graphs_call_their_function():
    assert as_python("python", "-c", GRAPH).split() == ["1.0", "2.0", "3.0"]


TEXT = """
import sys
import pymla
with pymla.load(sys.argv[1], device="cpu", ctx=64) as model:
    print(repr(model.generate("a b", max_tokens=2, temperature=0)))
"""


def test_a_model_writes_the_same_text():
    path = HERE / "golden" / "v2-lite.gguf"
    with pymla.load(path, device="cpu", ctx=64) as model:
        expected = model.generate("a b", max_tokens=2, temperature=0)
    assert as_python("python", "-c", TEXT, path).strip() == repr(expected)
