"""The cache of compiled kernels."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pymla.cpu import compiling, quant

SOURCE = """
from pymla.cpu.jit import kernel
from pymla.cpu.quant import F1


@kernel(F1)
def fill(first, last, out):
    for i in range(first, last):
        out[i] = {value}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, for kernels that are made in the test."""
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling.cache_dir, "known", None)
    monkeypatch.setattr(compiling, "COMPILED", [])
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


def test_a_kernel_that_was_edited_is_compiled_again(cache, tmp_path):
    assert filled(tmp_path / "users_kernels.py", 1) == [1, 1, 1]
    assert filled(tmp_path / "users_kernels.py", 2) == [2, 2, 2]
    assert not list(cache.rglob("*users_kernels*"))


def test_kernels_of_the_package_are_kept(cache):
    kernel = compiling.Compiled(quant._quantise_activations._function, quant._quantise_activations._build)
    assert kernel.result.address
    assert [path for path in cache.rglob("*_quantise_activations*") if path.suffix == ".nbc"]
    assert Path(quant.__file__).parent == compiling._SOURCES
