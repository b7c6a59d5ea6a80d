"""Compiled kernels: kept as long as their sources stay the same, and compiled again where what was kept is damaged."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pymla import ggml
from pymla.cpu import norm, quant, rope
from pymla.cpu.matmul import activations
from pymla.cpu.runtime import compiling, compiling_workers
from pymla.host import kernel_cache

SOURCE = """
from pymla.cpu.runtime.array_types import F1
from pymla.cpu.runtime.jit import kernel


@kernel(F1)
def fill(first, last, out):
    for i in range(first, last):
        out[i] = {value}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, for kernels that are made in the test."""
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "COMPILED", [])
    monkeypatch.setattr(kernel_cache, "_known", set())
    monkeypatch.setattr(kernel_cache, "_waiting", [])
    return tmp_path / "cache"


def filled(path, value):
    """What a user's kernel gives, in a module with this value."""
    path.write_text(SOURCE.format(value=value))
    spec = importlib.util.spec_from_file_location("users_kernels", path)
    module = importlib.util.module_from_spec(spec)
    # Without bytecode of an older text, whose time may be the same.
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    out = np.zeros(3, np.float32)
    module.fill[3](out)
    return out.tolist()


def fresh():
    """A kernel of the package as a new process has it: neither compiled nor loaded."""
    kernel = activations.quantise_activations
    return compiling.Compiled(kernel.py_func, kernel._build)


def test_a_kernel_that_was_edited_is_compiled_again(cache, tmp_path):
    assert filled(tmp_path / "users_kernels.py", 1) == [1, 1, 1]
    assert filled(tmp_path / "users_kernels.py", 2) == [2, 2, 2]
    assert not list(cache.rglob("*users_kernels*"))


def test_every_function_has_a_file_of_its_own():
    names = [each.name for each in compiling.COMPILED]
    assert len({kernel_cache._file_name(name) for name in names}) == len(names)


def test_kernels_of_the_package_are_kept(cache):
    kernel = fresh()
    assert not kernel.is_ready
    assert kernel.result.address
    assert kernel.result.cache_hits == 0
    (path,) = cache.glob("*/*")
    assert path.name == "pymla.cpu.matmul.activations.quantise_activations.kernel"
    again = fresh()
    assert again.is_ready
    assert again.result.cache_hits == 1


def test_damaged_files_are_compiled_again(cache):
    assert fresh().result.cache_hits == 0
    (path,) = cache.glob("*/*")
    content = path.read_bytes()
    for damage in (
        b"",
        content[: len(content) // 2],
        content[:-1],
        content[:40] + bytes([content[40] ^ 1]) + content[41:],
    ):
        path.write_bytes(damage)
        assert fresh().result.cache_hits == 0
        # What was damaged is replaced.
        assert fresh().result.cache_hits == 1


def test_progress_from_the_first_kernel_that_is_missing(cache):
    """A file that is damaged is missing, too."""
    told = []

    def compile_again():
        told.clear()
        compiling.compile_all([fresh()], progress=lambda done, total, name: told.append((done, total)))
        return told

    assert compile_again() == [(0, 1), (1, 1)]
    assert compile_again() == []
    (path,) = cache.glob("*/*")
    os.truncate(path, 100)
    assert compile_again() == [(0, 1), (1, 1)]


def test_a_cache_that_cannot_be_written_is_a_warning(cache, tmp_path):
    (tmp_path / "cache").touch()
    warnings = []
    for _ in range(2):
        compiling.compile_all([fresh()], warn=warnings.append)
    (message,) = warnings
    assert str(tmp_path / "cache") in message


def small_kernels():
    """Kernels as if nothing had been compiled: (kernel, Compiled)."""
    kernels = [*norm.kernels(), *rope.kernels(None), activations.quantise_activations]
    kernels += quant.embedding_rows_kernels(ggml.Q4_0)
    for kernel in kernels:
        made = compiling.Compiled(kernel.py_func, kernel._build)
        made.__name__, made.origin = kernel.compiled.__name__, kernel.compiled.origin
        yield made


@pytest.mark.parametrize("python", ["this", "none", "one that ends at once", "one that says nothing"])
def test_several_processes_compile(cache, tmp_path, monkeypatch, python):
    """Whatever becomes of the processes, everything is compiled."""
    monkeypatch.setattr(compiling_workers, "usable_cores", lambda: 2)
    monkeypatch.setattr(compiling_workers, "WORTH_A_PROCESS", 2)
    if python == "one that says nothing":
        (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 100\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(compiling_workers, "PATIENCE", 0.5)
    others = {"none": "/nowhere/python", "one that ends at once": shutil.which("true")}
    if python != "this":
        monkeypatch.setattr(sys, "executable", others.get(python, str(tmp_path / "python")))
    wanted, told = list(small_kernels()), []
    compiling.compile_all(wanted, progress=lambda *each: told.append(each))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[0][:2] == (0, len(wanted))
    assert told[-1][:2] == (len(wanted), len(wanted))
    assert len(list(cache.glob("*/*.kernel"))) == len(wanted)
    for each in wanted:
        assert each.result.address
        # What another process compiled comes from its file.
        assert each.result.cache_hits == (python == "this"), each.name


def test_another_process_ends_with_its_input():
    command = [sys.executable, "-c", "from pymla.cpu.runtime import compiling_workers; compiling_workers.serve()"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=False).returncode == 0


PROGRAM = """
from numba.core.caching import NullCache
from pymla.cpu.matmul import activations
kernel = activations.quantise_activations
print(*kernel._build(NullCache())._library._codegen._engine._defined_symbols, sep="\\n")
"""


def test_processes_give_their_functions_different_names():
    """A kernel that is compiled beside kernels of another process must not be linked with their functions."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    theirs = {name for name in result.stdout.split() if "pymla" in name}
    assert theirs
    scope = {}
    exec(PROGRAM.replace("print(*", "names = set(").replace(', sep="\\n")', ")"), scope)
    assert not theirs & scope["names"]


def test_the_key_knows_what_changes_machine_code(cache):
    program = "from pymla.cpu.runtime.compiling import CACHE; print(CACHE.folder)"
    folders = set()
    for variables in ({}, {"NUMBA_CPU_NAME": "generic"}, {"NUMBA_OPT": "1"}, {"NUMBA_BOUNDSCHECK": "1"}):
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
        folders.add(result.stdout)
    assert len(folders) == 4
