"""The examples in docstrings and in the README."""

import doctest
import importlib
import pkgutil
import re
import shutil
from pathlib import Path

import pytest

import pymla
from pymla.engine.loading import demo_path

README = Path(__file__).parents[1] / "README.md"


def modules():
    names = [m.name for m in pkgutil.walk_packages(pymla.__path__, "pymla.") if not m.name.endswith("__main__")]
    return [name for name in names if ">>>" in Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")]


def test_kernel_modules_have_examples():
    assert {"pymla.cpu.attention", "pymla.cpu.moe", "pymla.cpu.quant"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
def test_readme(code, tmp_path, monkeypatch):
    shutil.copy(demo_path(), tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
