"""The examples in docstrings, in the README, in docs/kernels.md and in examples/."""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pymla
from pymla.cpu.runtime import isa
from pymla.engine.loading import demo_path

ROOT = Path(__file__).parents[1]
README, KERNELS = ROOT / "README.md", ROOT / "docs" / "kernels.md"


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


def blocks(path, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_session_in_kernels():
    parser, scope = doctest.DocTestParser(), {}
    text = "\n".join(blocks(KERNELS, "pycon"))
    runner = doctest.DocTestRunner()
    runner.run(parser.get_doctest(text, scope, KERNELS.name, str(KERNELS), 0))
    assert runner.summarize().attempted > 10
    assert runner.summarize().failed == 0


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with the scripts of docs/kernels.md, which begin with their name, and examples/."""
    folder = tmp_path_factory.mktemp("scripts")
    for code in blocks(KERNELS, "python"):
        name = re.match(r"# (\w+\.py)\n", code)[1]
        (folder / name).write_text(code, encoding="utf-8")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.mark.parametrize("transcript", blocks(KERNELS, "console"))
def test_commands_in_kernels(scripts, transcript):
    """Commands give the output that is shown, if one is; lines at a debugger's prompt are what a person types."""
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", transcript, re.MULTILINE):
        *variables, _ = command.split(" python ")
        if "CUDASIM" in command and importlib.util.find_spec("numba_cuda") is None:
            pytest.skip('needs numba-cuda: pip install ".[test,cuda]"')
        typed = "".join(re.findall(r"^\(Pdb\) (.*\n)", shown, re.MULTILINE))
        environment = os.environ | dict(each.split("=") for each in variables if each)
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONIOENCODING": "utf-8"}
        arguments = [sys.executable, *command.rpartition("python ")[2].split()]
        result = subprocess.run(
            arguments, input=typed, cwd=scripts, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]
        found = result.stdout.replace(f"{scripts}{os.sep}", "")
        for line in shown.splitlines():
            if not line.startswith("(Pdb)"):
                _, line_found, found = found.partition(line)
                assert line_found, (line, result.stdout)


def test_scripts_in_kernels(scripts, capfd):
    for path in scripts.glob("*.py"):
        runpy.run_path(str(path), run_name="__main__") if path.name != "compare_levels.py" else None
    assert "[8.  8.5 9.  9.5]" in capfd.readouterr().out
    subprocess.run([sys.executable, scripts / "compare_levels.py"], check=True)
    sums = re.findall(r"sum (\S+)", capfd.readouterr().out)
    assert len(sums) == len(isa.levels()) + 1
    assert max(map(float, sums)) - min(map(float, sums)) <= 1e-3


def test_examples_are_short():
    paths = sorted((ROOT / "examples").glob("*.py"))
    assert [path.stem for path in paths] == ["dot_q4_0", "many_texts", "window_attention", "window_attention_gpu"]
    for path in paths:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path


def test_the_example_of_many_texts(capsys):
    path = ROOT / "examples" / "many_texts.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 22
    runpy.run_path(str(path), run_name="__main__")
    shown = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    with pymla.load(ctx=256) as model:
        prompts = ["def __init__(self", "import os\n", "class Error(", "for i in range("]
        assert sorted(shown) == sorted(each + model.generate(each, max_tokens=24, temperature=0) for each in prompts)


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="needs numba-cuda")
def test_the_example_for_the_gpu_compiles(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    figures = importlib.import_module("window_attention_gpu").attend.compiled((9, 0)).figures
    assert (figures.spills, figures.stack, figures.float64) == (0, 0, 0)
