"""The tool that compares engines on files of every type, and the wider demo model that it takes."""

import sys
from pathlib import Path

import click
import compare_engines
import numpy as np
import pytest
import widen_demo
from compare_engines import HERE, IK, LLAMA, Engines

import pymla
from pymla.engine.loading import demo_path
from pymla.files.gguf_reader import ModelFile


def test_the_wider_model_computes_the_same(tmp_path):
    path = tmp_path / "wide.gguf"
    widen_demo.write(path, demo_path())
    matrices = [each for each in ModelFile.open(path).tensors.values() if len(each.shape) > 1]
    assert {each.shape[-1] % 256 for each in matrices} == {0}
    tokens, logits = np.arange(3, 40, dtype=np.int32), []
    for each in (demo_path(), path):
        with pymla.load(each, device="reference", ctx=64) as model:
            logits.append(model.logits(tokens))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4 * np.abs(logits[0]).max())


def test_who_makes_and_who_runs_a_file():
    both = Engines(Path("llama"), Path("ik"), 1)
    assert list(compare_engines.runs(["Q4_K", "IQ4_K"], both)) == [
        (HERE, "Q4_K", [HERE, LLAMA, IK]),
        (LLAMA, "Q4_K", [HERE, LLAMA, IK]),
        (HERE, "IQ4_K", [HERE, IK]),
        (IK, "IQ4_K", [HERE, IK]),
    ]
    assert list(compare_engines.runs(["Q4_K"], Engines(None, None, 1))) == [(HERE, "Q4_K", [HERE])]


PROGRAM = """#!{python}
import pathlib, sys
first = pathlib.Path(__file__ + ".first")
if not first.exists():
    first.touch()
    sys.exit(0)
print('''Mean PPL(Q)                   :  10.308068 ±   0.616094
Mean PPL(base)                :  10.307703 ±   0.616067
Mean ln(PPL(Q)/PPL(base))     :   0.000035 ±   0.000023
Mean    KLD:   0.000002 ±   0.000001''')
"""


@pytest.fixture
def program(tmp_path):
    """A llama-perplexity whose first run ends before it has printed anything."""
    path = tmp_path / "llama-perplexity"
    path.write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    return path


def test_figures_of_llama_perplexity(program, tmp_path):
    engines = Engines(tmp_path, None, 1)
    found = compare_engines.compare(LLAMA, tmp_path / "m.gguf", tmp_path / "base", engines)
    assert found == {"ppl": [10.308068, 0.616094], "log_ratio": [0.000035, 0.000023], "kld": [0.000002, 0.000001]}
    program.write_text("#!/bin/sh\necho 'unknown type' >&2\nexit 1\n", encoding="utf-8")
    with pytest.raises(click.ClickException, match="llama-perplexity: unknown type"):
        compare_engines.compare(LLAMA, tmp_path / "m.gguf", tmp_path / "base", engines)


def test_table():
    record = {"maker": HERE, "type": "Q4_K", "exact": [8.7171, 0.1], HERE: {"log_ratio": [0.00083, 0.0003]}}
    record[IK] = {"refused": "no"}
    assert compare_engines.table([record]).splitlines()[2:] == [
        "| Q4_K | pymla | 8.717 | +0.083% ± 0.030% |  | refused |"
    ]
