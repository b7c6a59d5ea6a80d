"""``pymla perplexity`` as a user meets it, and interrupted."""

import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import question_files
from test_cli import refused, run  # noqa: F401
from test_interrupts import started

import pymla
from pymla.engine.model import Model
from pymla.files import kl_base
from pymla.make import perplexity

MODEL = Path(__file__).parent / "golden" / "v3.gguf"
TEXT = question_files.TEXT
OPTIONS = "-m", MODEL, "--device", "cpu", "--cache-type", "f32"
WINDOWS = "-f", TEXT, "--ctx", 64, "--chunks", 4


def result(run, *options):  # noqa: F811
    code, out, _ = run("perplexity", *OPTIONS, *options, "--json")
    assert code == 0
    return json.loads(out)


def test_perplexity(run):  # noqa: F811
    code, out, err = run("perplexity", *OPTIONS, *WINDOWS)
    assert code == 0
    assert re.fullmatch(r"PPL = \d+\.\d{4} ± \d+\.\d{5}\n", out)
    assert re.search(r"4 windows of 64 tokens in [\d.]+ s, [\d,.]+ tokens/s\n", err)
    found = result(run, *WINDOWS)
    with pymla.load(MODEL, device="cpu", cache_type="f32", ctx=64) as loaded:
        windows = perplexity.cut(loaded.tokenize(TEXT.read_text()), 64, loaded.tokenizer, 4)
        losses = list(perplexity.window_losses(loaded.model, windows))
    expected = perplexity.perplexity(losses)
    assert found["perplexity"]["value"] == pytest.approx(expected.value, rel=1e-5)
    assert found["perplexity"]["error"] == pytest.approx(expected.error, rel=1e-4)
    assert f"{expected.value:.2f}" in out
    assert (found["windows"], found["of_windows"], found["tokens"], found["ctx"]) == (4, 4, 4 * 31, 64)
    np.testing.assert_allclose(found["window_losses"], [each.mean() for each in losses], atol=1e-5)
    assert found["interrupted"] is False
    assert found["device"] == "cpu"


def test_stride(run):  # noqa: F811
    found = result(run, "-f", TEXT, "--ctx", 64, "--chunks", 3, "--stride", 16)
    assert (found["windows"], found["tokens"]) == (3, 48)


def test_a_base_and_a_comparison(run, tmp_path):  # noqa: F811
    base = tmp_path / "base.kld"
    own = result(run, *WINDOWS, "--kl-base", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base.kld"]
    assert base.stat().st_size == kl_base.file_bytes(4, 64, 288)
    code, out, _ = run("perplexity", *OPTIONS, "--kl", base)
    assert code == 0
    lines = dict(re.findall(r"^(\S.*?) *: +(.+)$", out, re.MULTILINE))
    for name in ("Mean PPL(Q)", "Mean PPL(base)", "Mean KLD", "Maximum KLD", "99.9% KLD", "Median KLD", "RMS Δp"):
        assert name in lines
    assert lines["Same top p"] == "100.000 ± 0.000 %"
    assert lines["Mean PPL(Q)"].startswith(f"{own['perplexity']['value']:.3f}")
    found = result(run, "--kl", base, "-f", TEXT, "--ctx", 64, "--chunks", 2)
    assert (found["windows"], found["of_windows"], found["tokens"], found["base"]) == (2, 2, 62, str(base))
    assert found["same_top"] == {"value": 1, "error": 0}
    assert abs(found["divergence"]["mean"]["value"]) < 1e-5
    assert found["divergence"]["percentiles"].keys() == {
        "99.9",
        "99",
        "95",
        "90",
        "75",
        "50",
        "25",
        "10",
        "5",
        "1",
        "0.1",
    }


@pytest.mark.parametrize(
    ("option", "data", "name"),
    [
        ("--hellaswag", question_files.hellaswag, "HellaSwag"),
        ("--multiple-choice", question_files.multiple_choice, "Multiple choice"),
        ("--winogrande", lambda made: question_files.winogrande(), "Winogrande"),
    ],
)
def test_questions(run, tmp_path, option, data, name):  # noqa: F811
    short = [(context[:20], [ending[:20] for ending in endings], right) for context, endings, right in made()]
    path = tmp_path / "tasks"
    path.write_bytes(data(short))
    code, out, err = run("perplexity", *OPTIONS, option, path)
    assert code == 0
    assert re.fullmatch(
        rf"{name}: \d+\.\d\d% ± \d+\.\d\d% of 8 tasks, with 95 % from [\d.]+% to [\d.]+%; by chance [\d.]+%\n", out
    )
    assert "8 tasks in" in err
    found = result(run, option, path, "--tasks", 3)
    assert (found["tasks"], found["of_tasks"], len(found["choices"])) == (3, 3, 3)
    assert found["share"] == pytest.approx(found["right"] / 3)


def made():
    return question_files.questions(TEXT.read_text(), 8)


def test_what_does_not_go_together(refused, tmp_path):  # noqa: F811
    x = tmp_path / "x"
    for options, parts in (
        ((), ["give a text with -f"]),
        (("--kl-base", x), ["give a text with -f"]),
        (("--kl", x, "--kl-base", x), ["--kl and --kl-base"]),
        (("--hellaswag", x, "--winogrande", x), ["--hellaswag and --winogrande"]),
        (("--hellaswag", x, "-f", TEXT), ["-f is for windows"]),
        (("--hellaswag", x, "--ctx", 9), ["--ctx is for windows"]),
        (("--tasks", 3, "-f", TEXT), ["--tasks is for --hellaswag, --winogrande, --multiple-choice"]),
        (("--kl", x, "--stride", 3), ["--stride is for the perplexity alone"]),
        (("-f", TEXT, "--ctx", 2), ["--ctx is 2"]),
        (("-f", TEXT, "--ctx", 64, "--stride", 64), ["--stride is 64"]),
        (("-f", TEXT, "--ctx", 129), ["--ctx is 129", "from 1 to 128"]),
        (("-f", x), ["x: No such file"]),
        (("--kl", x), ["x: No such file"]),
        (("--hellaswag", x), ["x: No such file"]),
    ):
        refused("perplexity", *OPTIONS, *options, parts=parts)


def test_files_that_cannot_be_used(refused, run, tmp_path):  # noqa: F811
    base, text = tmp_path / "base", tmp_path / "text"
    text.write_text("def x\n" * 3)
    refused("perplexity", *OPTIONS, "-f", text, parts=["the text has", "a window has 512", "lower --ctx"])
    refused(
        "perplexity", *OPTIONS, *WINDOWS, "--kl-base", TEXT, parts=[TEXT, "is read; choose another file for --kl-base"]
    )
    refused("perplexity", *OPTIONS, *WINDOWS, "--kl-base", tmp_path / "no" / "x", parts=["a folder that exists"])
    refused("perplexity", *OPTIONS, "--kl", TEXT, parts=[TEXT, "is no file of log-probabilities"])
    assert run("perplexity", *OPTIONS, *WINDOWS, "--kl-base", base)[0] == 0
    refused("perplexity", *OPTIONS, "--kl", base, "--ctx", 32, parts=[base, "windows of 64 tokens", "--ctx is 32"])
    refused("perplexity", *OPTIONS, "--kl", base, "-f", text, parts=[base, "it is another"])
    other = tmp_path / "other"
    other.write_text("x" + TEXT.read_text())
    refused("perplexity", *OPTIONS, "--kl", base, "-f", other, parts=[base, "another text"])
    refused("perplexity", "--device", "cpu", "--kl", base, parts=[base, "a vocabulary of 288"])
    data = bytearray(base.read_bytes())
    data[-2 * kl_base.record_words(288) + 3] = 0xFF  # the sign and the exponent of a scale
    base.write_bytes(data)
    refused("perplexity", *OPTIONS, "--kl", base, parts=[base, "record 30 of window 3", "the file is damaged"])
    (tmp_path / "tasks").write_bytes(b"\xff" * 30)
    for option in ("--hellaswag", "--winogrande", "--multiple-choice"):
        refused("perplexity", *OPTIONS, option, tmp_path / "tasks", parts=["tasks: "])


def test_an_interrupt_prints_what_there_is(run, tmp_path, monkeypatch):  # noqa: F811
    """The windows that were read count; a file of all of them is left as it was."""
    base = tmp_path / "base"
    base.write_text("old")
    monkeypatch.setattr(perplexity, "STEP_TOKENS", 64)
    steps, step = [], Model.step

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(Model, "step", interrupted)
    code, out, err = run("perplexity", *OPTIONS, *WINDOWS, "--kl-base", base, "--json")
    assert code == 130
    found = json.loads(out)
    assert (found["windows"], found["of_windows"], found["interrupted"]) == (2, 4, True)
    assert f"warning: {base} is not written" in err
    assert base.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    steps[:] = [1, 1]
    code, out, err = run("perplexity", *OPTIONS, *WINDOWS)
    assert (code, out) == (130, "")
    assert "interrupted before there was a result" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals that a process can send")
def test_ctrl_c(tmp_path):
    """In a process of its own, between windows of a long text."""
    text = tmp_path / "long.txt"
    text.write_text(TEXT.read_text() * 40)
    options = "-m", MODEL, "--device", "cpu", "-f", text, "--ctx", 64
    process = started("-m", "pymla", "perplexity", *map(str, options))
    while not process.stderr.readline().startswith("pymla: tokens"):  # which it has read for a second
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.fullmatch(r"(PPL = [\d.]+ ± [\d.]+\n)?", out)


def test_the_estimate_so_far_is_shown(monkeypatch, run):  # noqa: F811
    monkeypatch.setattr(perplexity, "STEP_TOKENS", 64)
    shown = []
    monkeypatch.setattr(
        "pymla.cli.terminal.Terminal.show",
        lambda self, title, done, total, delay=1.0, figure="": shown.append((title, done, total, figure)),
    )
    assert run("perplexity", *OPTIONS, *WINDOWS)[0] == 0
    shown = [each for each in shown if each[0] == "tokens"]
    assert shown[0][3] == ""
    assert shown[-1][1:3] == (256, 256)
    assert re.fullmatch(r", PPL = [\d.]+ ± [\d.]+", shown[-1][3])
