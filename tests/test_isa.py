"""Levels of vector instructions: the same results on all that the processor has, and machine code as it was meant."""

import os
import subprocess
import sys
from pathlib import Path

import assembly
import pytest
import side_by_side
from cases import QUANTISED_REPRESENTATIVES

from pymla import ggml
from pymla.cpu.attention import (
    absorbed_form_int8,
    expanded_form_int8,
    index_scores_int8,
    key_value_panels,
    sparse_form_int8,
)
from pymla.cpu.cache_types import Q8_PAGES
from pymla.cpu.matmul import kernels
from pymla.cpu.moe import by_rows, grouped
from pymla.cpu.runtime import isa

HERE = Path(__file__).parent
KERNELS = (
    *map(kernels.matmul_rows, QUANTISED_REPRESENTATIVES),
    *map(kernels.matmul_panels, QUANTISED_REPRESENTATIVES),
    *map(grouped.down_panels, QUANTISED_REPRESENTATIVES),
    by_rows.gate_up_rows(ggml.Q4_0, ggml.Q8_0),
    grouped.gate_up_panels(ggml.Q4_0),
    grouped.gate_up_panels(ggml.Q6_K),
    by_rows.down_rows(ggml.Q4_1),
    key_value_panels.expand_panels(ggml.Q4_0, ggml.Q8_0),
    expanded_form_int8.expanded_panels,
    absorbed_form_int8.absorbed_pages(Q8_PAGES),
    sparse_form_int8.sparse_pages(Q8_PAGES),
    index_scores_int8.score_pages,
)
#: Tests of operations on registers, of the functions of every type, and of all operations against Python, bit by bit.
PARTS = (
    "test_simd.py",
    "test_simd_levels.py",
    "test_cpu_formats.py",
    "test_gemv.py",
    "test_gemm.py",
    "test_faults.py",
    "test_python_level.py::test_python_computes_the_bits_of_machine_code",
)
#: Tests of operations, which compare with the reference, at extreme codes as well.
OPERATIONS = (
    "test_matrices.py",
    "test_experts.py",
    "test_attention.py",
    "test_cpu_attention.py",
    "test_sparse.py",
    "test_formats.py",
)


def run(level):
    # Portable kernels are those of AVX2 over other operations on registers.
    tests = PARTS if level == "portable" and "avx2" in isa.levels() else PARTS + OPERATIONS
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not reference]", *tests]
    return side_by_side.run(command, cwd=HERE, env=os.environ | {"PYMLA_ISA": level})


@pytest.mark.parametrize("level", [level for level in isa.levels() if level != isa.ISA])
@pytest.mark.side_by_side(run=run)
def test_other_levels(level, beside):
    assert beside.returncode == 0, beside.stdout[-3000:]


def test_inner_loops_are_found():
    text = ".LBB0_1:\n\tnop\n\tjne\t.LBB0_1\n.LBB0_2:\n\tret\n.LBB0_3:\n\tadd\n\tjmp\t.LBB0_2\n"
    assert list(assembly.inner_loops(text)) == [["\tnop", "\tjne\t.LBB0_1"]]


@pytest.mark.skipif(isa.ISA not in assembly.DOTS, reason="the portable level leaves the choice of instructions to LLVM")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_dot_instructions_without_spills(kernel):
    assembly.check_dot_loops(kernel.assembly, assembly.share_moved(kernel.compiled.origin[2] or ()))


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
