"""Levels of vector instructions: the same results on all that the processor has, and machine code as it was meant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import side_by_side

from pymla import ggml
from pymla.cpu.attention import absorbed_form_int8, expanded_form_int8, key_value_panels
from pymla.cpu.cache_types import Q8_PAGES
from pymla.cpu.matmul import kernels
from pymla.cpu.moe import by_rows, grouped
from pymla.cpu.runtime import isa

HERE = Path(__file__).parent
KERNELS = (
    *map(kernels.matmul_rows, ggml.QUANTISED),
    *map(kernels.matmul_panels, ggml.QUANTISED),
    *map(grouped.down_panels, ggml.QUANTISED),
    by_rows.gate_up_rows(ggml.Q4_0, ggml.Q8_0),
    grouped.gate_up_panels(ggml.Q4_0),
    grouped.gate_up_panels(ggml.Q6_K),
    by_rows.down_rows(ggml.Q4_1),
    key_value_panels.expand_panels(ggml.Q4_0, ggml.Q8_0),
    expanded_form_int8.expanded_panels,
    absorbed_form_int8.absorbed_pages(Q8_PAGES),
)
#: What multiplies bytes, or in attention without VNNI words.
DOTS = {"amx": "(vpdpbusd|tdpbssd|tdpbusd)", "avx512vnni": "vpdpbusd", "avxvnni": "vpdpbusd", "avx2": "vpmadd(ubsw|wd)"}


#: The tests of operations and of kernels, which compare with the reference at extreme codes as well and with Python.
FILES = (
    "test_matrices.py",
    "test_experts.py",
    "test_attention.py",
    "test_cpu_attention.py",
    "test_faults.py",
    "test_formats.py",
    "test_gemv.py",
    "test_gemm.py",
    "test_simd.py",
    "test_python_level.py",
)


def run(level):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not reference]", *FILES]
    environment = os.environ | {"PYMLA_ISA": level}
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(request):
    with side_by_side.started(request, "test_other_levels", run) as found:
        yield found


@pytest.mark.parametrize("level", [level for level in isa.levels() if level != isa.ISA])
def test_other_levels(level, runs):
    result = runs[level].result()
    assert result.returncode == 0, result.stdout[-3000:]


def inner_loops(assembly):
    """Bodies of loops without a label in them."""
    for label, body in re.findall(r"^(\.LBB\w+):[^\n]*\n((?:(?!\.LBB\w+:).*\n)*)", assembly, re.MULTILINE):
        lines = body.splitlines()
        jumps = [i for i, line in enumerate(lines) if re.search(rf"\sj\w+\s+{re.escape(label)}$", line)]
        if jumps:
            yield lines[: jumps[-1] + 1]


def test_inner_loops_are_found():
    text = ".LBB0_1:\n\tnop\n\tjne\t.LBB0_1\n.LBB0_2:\n\tret\n.LBB0_3:\n\tadd\n\tjmp\t.LBB0_2\n"
    assert list(inner_loops(text)) == [["\tnop", "\tjne\t.LBB0_1"]]


@pytest.mark.skipif(isa.ISA not in DOTS, reason="the portable level leaves the choice of instructions to LLVM")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_dot_instructions_without_spills(kernel):
    dot = re.compile(rf"\s{DOTS[isa.ISA]}\s")
    loops = [lines for lines in inner_loops(kernel.assembly) if sum(bool(dot.search(line)) for line in lines) >= 4]
    assert loops, "no loop has the dot instruction"
    for lines in loops:
        # A vector register that goes to the stack or comes from it. (%rbp is a register as any other here.)
        spills = [line for line in lines if re.search(r"\svmov\w+\s.*\(%rsp\)", line)]
        assert not spills, "\n".join(lines)


LEVEL = "import numpy as np; from pymla import cpu; print(cpu.ISA, cpu.norm.add(*np.ones((2, 1, 8), np.float32)))"


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({"NUMBA_CPU_NAME": "generic"}, "portable"),
        ({"NUMBA_CPU_FEATURES": ""}, "portable"),
        ({"NUMBA_CPU_FEATURES": "+avx2,+fma"}, "avx2" if "avx2" in isa.levels() else None),
        ({"NUMBA_CPU_FEATURES": "+avx2,+fma,-fma"}, "portable" if "avx2" in isa.levels() else None),
        ({"NUMBA_ENABLE_AVX": "0"}, "portable"),
        ({"NUMBA_CPU_NAME": "x86-64-v3"}, isa.levels()[0]),
    ],
)
def test_level_that_numba_compiles_for(variables, level, tmp_path):
    """Kernels with instructions that LLVM was not allowed would end the process."""
    if level is None:
        pytest.skip("this processor has no AVX2")
    environment = {name: value for name, value in os.environ.items() if name != "PYMLA_ISA"}
    environment |= variables | {"PYMLA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", LEVEL], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split()[0] == level
