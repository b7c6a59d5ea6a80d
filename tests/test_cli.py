"""The command line as a user meets it: what it prints, and what it says to bad input."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys

import gguf
import gguf_files
import numpy as np
import pytest
import test_interrupts
from make_model import PRESETS, make_model

import pymla
from pymla.cli import main
from pymla.cli.output import write_json
from pymla.cpu.limits import Limits
from pymla.cpu.matmul import activations
from pymla.cpu.runtime import threads
from pymla.engine.model import Model
from pymla.files.gguf_reader import ModelFile
from pymla.host import cores
from pymla.text.sampling import SamplingParams


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, PRESETS["tiny"], qtype="q8_0", seed=1)
    return path


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the console script; returns exit code, standard output, standard error."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["pymla", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return stopped.value.code, out, err

    return call


@pytest.fixture
def refused(run):
    """Call the console script with what it must refuse: code 2, one line that has all of `parts`."""

    def call(*args, parts=()):
        code, out, err = run(*args)
        assert code == 2, (code, out, err)
        lines = [line for line in err.splitlines() if not line.startswith(("pymla: compiling", "pymla: running"))]
        assert len(lines) == 1, err
        assert lines[0].startswith("pymla: error: ")
        for part in parts:
            assert str(part) in lines[0], lines[0]
        return lines[0]

    return call


def test_generate(run, model):
    code, out, err = run("generate", "-m", model, "abc", "-n", 8, "--temperature", 0, "--quiet")
    assert code == 0
    assert err == ""
    with pymla.load(model) as loaded:
        assert out == loaded.generate("abc", max_tokens=8, temperature=0)
    code, again, err = run("generate", "-m", model, "abc", "-n", 8, "--temperature", 0)
    assert again == "abc" + out + "\n"
    assert "tokens/s" in err
    assert "cache" in err


def test_where_it_runs_is_said(run, model, monkeypatch):
    """On standard error, where it was left to pymla and is not asked to be quiet."""
    monkeypatch.setattr("pymla.cuda.available", lambda: (False, "there is no such card; buy one"))
    options = "-m", model, "abc", "-n", 1, "--temperature", 0
    code, out, err = run("generate", *options)
    assert code == 0
    assert err.splitlines()[0] == "pymla: running on the CPU: there is no such card"
    for more in (["--quiet"], ["--device", "cpu"], ["--device", "reference"]):
        assert "running" not in run("generate", *options, *more)[2]
    code, again, err = run("generate", *options, "--json")
    assert (code, json.loads(again)["text"], err.count("running on")) == (0, out[3:-1], 1)


@pytest.mark.parametrize(
    "options", [["--gpu-layers", "some"], ["-ngl", 0], ["--gpu-layers", 2], ["-ngl", "all"], ["--cpu-moe"]]
)
def test_a_gpu_that_is_not_there(refused, model, options):
    refused("generate", "-m", model, "x", *options, parts=["--gpu-layers"])
    if options[-1] not in ("some", 0):
        refused("generate", "-m", model, "x", "--device", "cpu", *options, parts=["--device is cpu"])
    refused("generate", "-m", model, "x", "--device", "cuda", parts=["--device cuda: "])


def test_samplers(run, model):
    """Those of the command line are those of Python, and llama.cpp's names are understood."""
    given = ["--samplers", "dry;typ;temp", "--dry-multiplier", 2, "--typical", 0.9, "--seed", 5, "--temperature", 2]
    given += ["--dry-sequence-breaker", r"\n", "--dry-sequence-breaker", r"a\\b", "--dynatemp-exp", 0.5]
    options = {"samplers": ["dry", "typ_p", "temperature"], "dry_multiplier": 2, "typical_p": 0.9, "temperature": 2}
    options |= {"dry_sequence_breakers": ["\n", r"a\b"], "dynatemp_exponent": 0.5, "seed": 5}
    code, out, _ = run("generate", "-m", model, "abab", "-n", 12, "--quiet", *given)
    with pymla.load(model) as loaded:
        assert (code, out) == (0, loaded.generate("abab", max_tokens=12, **options))
        options |= {"dry_sequence_breakers": ()}
        none = [*given[:-6], "--dry-sequence-breaker", "none", "--dynatemp-exp", 0.5]
        assert run("generate", "-m", model, "abab", "-n", 12, "--quiet", *none)[1] == loaded.generate(
            "abab", max_tokens=12, **options
        )


def test_every_sampling_parameter_is_an_option(run):
    """Each under its section of the help, with its default."""
    code, out, _ = run("generate", "--help")
    sections = re.split(r"^(\S.*):$", out, flags=re.MULTILINE)[1:]
    texts = {name: " ".join(text.split()) for name, text in zip(sections[::2], sections[1::2], strict=True)}
    assert code == 0
    assert list(texts) == ["Options", "Sampling", "Penalties on repetition", "More samplers", "Speculation"]
    for field in dataclasses.fields(SamplingParams):
        option = "--" + field.name.replace("_", "-").removesuffix("s" if field.name.endswith("breakers") else "")
        assert [name for name, text in texts.items() if f"{option} " in text or f"{option}," in text], field.name
        assert "--quiet" in texts["Options"]
    assert "[default: the file's, or 0.95]" in texts["Sampling"]
    assert "[default: 1.75]" in texts["Penalties on repetition"]


def test_generate_json(run, model):
    code, out, _ = run("generate", "-m", model, "abc", "-n", 5, "--seed", 3, "--json", "--logprobs", 2)
    report = json.loads(out)
    assert code == 0
    assert report["finish_reason"] == "length"
    assert len(report["tokens"]) == len(report["logprobs"]) == 5
    assert report["stats"]["generated_tokens"] == 5
    assert (
        run("generate", "-m", model, "abc", "-n", 5, "--seed", 3, "--json")[1].count(json.dumps(report["tokens"])) == 1
    )


def test_prompt_from_a_file_and_standard_input(run, model, tmp_path):
    (tmp_path / "prompt").write_text("abc")
    options = ["-m", model, "-n", 8, "--temperature", 0, "--quiet"]
    expected = run("generate", *options, "abc")[1]
    assert run("generate", *options, "-f", tmp_path / "prompt")[1] == expected
    command = [sys.executable, "-m", "pymla", "generate", *map(str, options)]
    piped = subprocess.run(command, input=b"abc", capture_output=True, check=True)
    given = subprocess.run([*command, "abc"], capture_output=True, check=True)
    assert piped.stdout == given.stdout


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_mark_of_a_prompt(run, model, tmp_path, encoding):
    """As Windows' Notepad and PowerShell write it."""
    (tmp_path / "prompt").write_bytes("é🦙".encode(encoding))
    options = ["generate", "-m", model, "-n", 8, "--temperature", 0, "--json", "--echo"]
    expected = run(*options, "é🦙")
    for report in (run(*options, "-f", tmp_path / "prompt")[1], from_standard_input(options, "é🦙".encode(encoding))):
        report = json.loads(report)
        assert report["prompt"] == "é🦙"
        assert report["tokens"] == json.loads(expected[1])["tokens"]


def from_standard_input(args, data, **environment):
    """Standard output of the command in a process of its own."""
    command = [sys.executable, "-m", "pymla", *map(str, args)]
    result = subprocess.run(command, input=data, env=os.environ | environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_full_context_is_said(run, model):
    code, _, err = run(
        "generate", "-m", model, "abc", "--ctx", 64, "-n", 500, "--temperature", 0, "--logit-bias", "7=100"
    )
    assert code == 0
    assert "context of 64 tokens is full" in err


def test_chat_templates(run, refused, model, tmp_path):
    """A file instead of the model's template stands for --chat; variables are JSON, or else text."""
    path = tmp_path / "template.jinja"
    path.write_text(
        "\ufeff{{ bos_token }}{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        "{{ a }}{{ a is boolean }},{{ b }}{{ b is number }},{{ c }},{{ d }}{{ d is string }},{{ e[0] }}\r\n",
        encoding="utf-8",
    )
    options = ["-m", model, "-n", 4, "--temperature", 0, "--json"]
    values = ["a=false", "b=3", "c=x=y z", "d=NaN", "e=[7]"]
    code, out, _ = run(
        "generate", *options, "Hi", "--chat-template", path, "--system", "S", *(f"--template-var={v}" for v in values)
    )
    assert code == 0
    with pymla.load(model) as loaded:
        prompt = "system=S;user=Hi;FalseTrue,3True,x=y z,NaNTrue,7"
        assert json.loads(out)["text"] == loaded.generate(prompt, max_tokens=4, temperature=0)
    path.write_text("a\n{{ raise_exception('not\x1b so') }}", encoding="utf-8")
    refused("generate", *options, "Hi", "--chat-template", path, parts=["template.jinja: ", r"line 2: not\x1b so"])
    path.write_bytes(b"caf\xe9")
    refused("generate", *options, "Hi", "--chat-template", path, parts=["template.jinja", "byte 3"])
    refused("generate", *options, "Hi", "--chat-template", tmp_path / "none", parts=["none", "No such file"])
    for pair in ("a", "=1", "a b=1", "1=2", "messages=[]"):
        refused("generate", *options, "Hi", "--chat", "--template-var", pair, parts=["--template-var"])


def test_thinking_on_and_off(run, model, tmp_path):
    template = "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}thinking"
    path = rewritten(model, tmp_path / "thinking.gguf", metadata={"tokenizer.chat_template": template})
    prompts = [
        json.loads(run("generate", "-m", path, "x", "-n", 1, "--chat", "--json", *variables)[1])["stats"][
            "prompt_tokens"
        ]
        for variables in ([], ["--template-var", "enable_thinking=true"], ["--template-var", "enable_thinking=false"])
    ]
    assert prompts[0] == prompts[1] < prompts[2]


def test_a_prompt_that_spells_bos(run, model):
    options = ["generate", "-m", model, "-n", 1, "--quiet", "<｜begin▁of▁sentence｜>x"]
    code, _, err = run(*options)
    assert code == 0
    assert re.fullmatch("pymla: warning: the prompt begins with <｜begin▁of▁sentence｜>, .* leave it out\n", err)
    assert run(*options, "--chat")[2] == ""


def test_control_tokens(run, refused, model):
    """They are read in the prompt, and shown in the text, on demand."""
    with pymla.load(model) as loaded:
        end, bos = min(loaded.tokenizer.eos_ids), loaded.tokenizer.bos_id
    options = ["-m", model, "-n", 3, "--temperature", 0, "--quiet"]
    bias = [f"--logit-bias={end}=1e6"]
    assert run("generate", *options, "abc", *bias)[1] == ""
    assert run("generate", *options, "abc", *bias, "--special")[1] == "<｜end▁of▁sentence｜>"
    bias = [f"--logit-bias={bos}=1e6"]
    assert run("generate", *options, "abc", *bias)[1] == ""
    assert run("generate", *options, "abc", *bias, "--special")[1] == 3 * "<｜begin▁of▁sentence｜>"
    prompt = "<｜begin▁of▁sentence｜>abc"
    code, out, err = run("generate", *options[:-1], prompt, "--parse-special", "--json")
    assert (code, json.loads(out)["text"]) == (0, run("generate", *options, "abc")[1])
    assert "warning" not in err
    assert "begins with <｜begin" in run("generate", *options, prompt)[2]
    refused("generate", *options, "abc", "--chat", "--parse-special", parts=["--parse-special", "--chat"])


def test_special_ids_outside_the_vocabulary(run, model, tmp_path):
    """Which converters write for none: a warning, and the token counts as absent."""
    ids = {f"tokenizer.ggml.{key}_token_id": 0xFFFFFFFF for key in ("bos", "eos", "padding")}
    path = rewritten(model, tmp_path / "none.gguf", metadata=ids)
    code, _, err = run("generate", "-m", path, "x", "-n", 1, "--quiet")
    assert code == 0
    assert [line[:17] for line in err.splitlines()] == ["pymla: warning: " + str(path)[:1]] * 3
    assert all(f"{key} is 4294967295" in err for key in ids)
    found = json.loads(run("inspect", path, "--json")[1])
    assert found["tokenizer"]["special"]["bos"] == {"id": 0xFFFFFFFF, "token": None}
    assert [end["token"] for end in found["tokenizer"]["ends_of_text"]] == ["<｜end▁of▁sentence｜>"]
    assert len(found["tokenizer"]["warnings"]) == 3
    assert "4294967295 (not in the vocabulary)" in run("inspect", path)[1]


def test_stop_strings(model):
    with pymla.load(model) as loaded:
        text = loaded.generate("abc", max_tokens=20, temperature=0)
        stop = text[len(text) // 2 :][:3]
        generation = loaded.generation("abc", max_tokens=20, temperature=0, stop=stop)
        assert "".join(generation) == text[: text.index(stop)]
        assert generation.finish_reason == "stop"


def started(*args, **options):
    return test_interrupts.started("-m", "pymla", *map(str, args), text=False, **options)


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_ctrl_c_while_generating(long_model, options):
    """What was generated stays, and the figures are those so far."""
    process = started("generate", "-m", long_model, "abc", "-n", 1_000_000, "--device", "cpu", *options)
    first = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    if options:
        assert err == b""
        return
    assert (first + rest).startswith(b"abc")
    assert rest.endswith(b"\n")
    ((line,),) = [err.decode().splitlines()]
    figures = re.fullmatch(
        r"prompt 3 tokens, .* tokens/s \| generated (\d+), .* \| cache (\d+) tokens.*interrupted", line
    )
    assert 0 < int(figures[1]) < 1_000_000
    assert int(figures[2]) - int(figures[1]) in (2, 3)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_json_of_an_interrupted_generation(run, model, monkeypatch, steps):
    step, calls = Model.step, []

    def interrupted(self, *args, **options):
        calls.append(args)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(Model, "step", interrupted)
    code, out, err = run("generate", "-m", model, "abc", "--json", "--temperature", 0, "--logprobs", 1)
    report = json.loads(out)
    assert code == 130
    assert report["finish_reason"] == "interrupted"
    assert len(report["tokens"]) == len(report["logprobs"]) == report["stats"]["generated_tokens"] == steps
    with pymla.load(model) as loaded:
        assert report["text"] == loaded.detokenize(report["tokens"])
    assert err.endswith("| interrupted\n")


def test_reader_that_goes_away(long_model):
    generating = ["generate", "-m", long_model, "abc", "-n", 1_000_000, "--device", "cpu"]
    for args in (generating, ["inspect", long_model, "--tensors"]):
        process = started(*args)
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(model):
    for args in (["generate", "-m", model, "abc", "-n", 2, "--device", "cpu"], ["inspect", model]):
        with open("/dev/full", "wb") as full:
            process = started(*args, stdout=full)
        assert process.stderr.read() == b"pymla: error: standard output: No space left on device\n"
        assert process.wait() == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_that_shows_at_the_end():
    """What a command left in the buffer is written last."""
    program = "from pymla.cli import app, main; app.group = lambda **_: print('text', end=''); main()"
    with open("/dev/full", "wb") as full:
        result = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (2, b"pymla: error: standard output: No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams(model):
    command = [
        "sh",
        "-c",
        'exec "$@" <&- >&- 2>&-',
        "sh",
        sys.executable,
        "-m",
        "pymla",
        "generate",
        "-m",
        model,
        "-n",
        "2",
    ]
    assert subprocess.run(command, check=False).returncode == 0


def test_encoding_that_lacks_characters(model):
    command = [sys.executable, "-m", "pymla", "generate", "-m", model, "-n", "1", "--seed", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(command, input="🦙".encode(), env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stdout[:10]) == (0, b"\\U0001f999")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1:strict"}, {"PYTHONIOENCODING": "utf-16"}, ASCII])
def test_json_in_every_encoding(model, tmp_path, environment):
    path = rewritten(model, tmp_path / "named.gguf", metadata={"general.name": "é🦙\x1b\n\u2028"})
    found = json.loads(from_standard_input(["inspect", path, "--json"], b"", **environment))
    assert found["name"] == "é🦙\x1b\n\u2028"
    if environment is ASCII:
        options = ["generate", "-m", model, "-n", 1, "--json", "--echo"]
        assert json.loads(from_standard_input(options, "é🦙".encode(), **environment))["prompt"] == "é🦙"


def test_an_argument_in_a_locale_without_utf8(model):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ["generate", "-m", model, "-n", 1, "--json", "--echo"]
    assert json.loads(from_standard_input([*options, "é🦙"], b"", **environment))["prompt"] == "é🦙"


def test_json_has_no_numbers_of_its_own(capfd):
    """Infinity and NaN are strings; what cannot be encoded is escaped."""
    write_json({"a": [math.inf, -math.inf, math.nan, 1.5, (1, {"b": math.inf})], "c": "\ud800é\x9b", "d": 2**64 - 1})
    out = capfd.readouterr().out
    assert out.isascii()
    assert json.loads(out, parse_constant=pytest.fail) == {
        "a": ["inf", "-inf", "nan", 1.5, [1, {"b": "inf"}]],
        "c": "\ud800é\x9b",
        "d": 2**64 - 1,
    }


def test_json_and_the_prompt(run, model):
    """One JSON object with or without the prompt, which is there where it is asked for."""
    for options, prompt in (([], None), (["--echo"], "abc"), (["--no-echo"], None), (["--echo", "--quiet"], "abc")):
        report = json.loads(run("generate", "-m", model, "abc", "-n", 2, "--json", *options)[1])
        assert report.get("prompt") == prompt


STEERING = "\x1b[31m\x07\x9b\u202e\u200b\u2028\r\n"


def harmless(text):
    """Whether a text has nothing but characters that a terminal shows, and line ends."""
    return all(line.isprintable() for line in text.split("\n"))


def test_what_a_file_says_does_not_steer_the_terminal(run, refused, model, tmp_path):
    changes = (
        {"general.architecture": STEERING * 5000},
        {"tokenizer.ggml.pre": STEERING * 5000},
        {"tokenizer.ggml.model": STEERING},
        {"tokenizer.ggml.merges": [STEERING]},
        {"tokenizer.chat_template": "{{ raise_exception('" + "\x1b[31m\u202e" * 500 + "') }}"},
        {"deepseek2.block_count": STEERING},
    )
    for metadata in changes:
        path = rewritten(model, tmp_path / "steering.gguf", metadata=metadata)
        line = refused("generate", "-m", path, "x", "--chat", parts=["steering.gguf: "])
        assert line.isprintable()
        assert len(line) <= 1000
    names = {"general.name": STEERING * 100, "tokenizer.ggml.pre": STEERING, f"deepseek2.{'k' * 60_000}": 1}
    for more in ({}, {"general.architecture": "llama", f"llama.{'k' * 60_000}": STEERING * 100}):
        path = rewritten(model, tmp_path / "names.gguf", metadata=names | more)
        code, out, err = run("inspect", path, "--tensors")
        assert (code, err) == (0, "")
        assert harmless(out)
        assert len(out) < 20_000
        assert json.loads(run("inspect", path, "--json")[1])["name"] == STEERING * 100


def test_messages_are_no_longer_than_a_screen(refused, model):
    for args in (["-m", "x" * 100_000], ["--system", "x", "--mla", "\x1b" * 100_000], ["--" + "x" * 100_000]):
        line = refused("generate", "y", *args)
        assert line.isprintable()
        assert len(line) <= 1000
    line = refused("generate", "-m", model, "x", "--chat", "--template-var", "\x1b" * 100_000, parts=["NAME=VALUE"])
    assert line.isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_generated_control_characters(model):
    """They reach a file or a pipe as they are, and no terminal."""
    import pty

    (escape,) = pymla.text.tokenizer.Tokenizer.from_gguf(model).encode("\x1b", add_bos=False)
    options = ["-n", 2, "--temperature", 0, "--logit-bias", f"{escape}=1e6", "--device", "cpu"]
    command = ["generate", "-m", model, "\x1b[31mred", *options]
    assert from_standard_input(command, b"") == b"\x1b[31mred\x1b\x1b\n"
    ours, theirs = pty.openpty()
    process = started(*command, stdout=theirs)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        text = b""
        with contextlib.suppress(OSError):  # Linux' end of a terminal
            while piece := terminal.read(1000):
                text += piece
    process.communicate(timeout=60)
    assert text.replace(b"\r\n", b"\n") == rb"\x1b[31mred\x1b\x1b" + b"\n"


def test_help(run):
    for args in ([], ["generate"], ["imatrix"], ["inspect"], ["convert"]):
        code, out, _ = run(*args, "--help")
        assert code == 0
        assert "Example" in out


@pytest.fixture
def quick(monkeypatch):
    """Benchmarks need not measure the machine."""
    monkeypatch.setattr("pymla.cpu.limits.measure", lambda: Limits(read=1e10, int8=1e11))


def with_file(command, path):
    """The arguments that make a command read a GGUF file."""
    return {"generate": ["generate", "x", "-m", path], "bench": ["bench", "-m", path], "inspect": ["inspect", path]}[
        command
    ]


READERS = ("generate", "bench", "inspect")


@pytest.mark.parametrize("command", READERS)
def test_not_a_model(refused, tmp_path, command):
    refused(*with_file(command, tmp_path / "missing.gguf"), parts=["missing.gguf", "No such file"])
    refused(*with_file(command, tmp_path), parts=[tmp_path, "Is a directory"])
    (tmp_path / "text").write_text("This is no model at all, but a text.")
    refused(*with_file(command, tmp_path / "text"), parts=["text", "not a GGUF file"])
    (tmp_path / "empty").touch()
    refused(*with_file(command, tmp_path / "empty"), parts=["empty", "not a GGUF file"])


@pytest.mark.parametrize("command", READERS)
def test_truncated_anywhere(refused, model, tmp_path, command):
    data = model.read_bytes()
    path = tmp_path / "cut.gguf"
    # The file may end in padding, whose loss harms nothing.
    for size in np.random.default_rng(0).integers(0, len(data) - 64, 50):
        path.write_bytes(data[:size])
        refused(*with_file(command, path), parts=["cut.gguf"])


@pytest.mark.parametrize("command", READERS)
def test_missing_part(refused, model, tmp_path, command):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(model.read_bytes())
    refused(*with_file(command, path), parts=["m-00001-of-00002.gguf", "split.count"])
    first = {"split.count": 2, "split.no": 0, "split.tensors.count": 99}
    refused(*with_file(command, rewritten(model, path, metadata=first)), parts=["m-00002-of-00002.gguf", "missing"])


def test_conversion_of_what_is_no_model(refused, tmp_path):
    refused("convert", tmp_path / "none", tmp_path / "m.gguf", parts=["none", "config.json", "Hugging Face"])
    refused("convert", tmp_path, tmp_path / "m.gguf", parts=["config.json", "Hugging Face"])
    (tmp_path / "config.json").write_text("{")
    refused("convert", tmp_path, tmp_path / "m.gguf", parts=["config.json"])
    assert not (tmp_path / "m.gguf").exists()


def rewritten(model, path, *, metadata=None, tensors=None):
    """A copy of a model with some metadata and tensors replaced, or left out where they are None."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, "deepseek2")
    metadata = metadata or {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in metadata or name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(
            name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    for name, value in metadata.items():
        if name == "general.architecture":
            writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.STRING)
        else:
            gguf_files.add(writer, name, value)
    tensors = tensors or {}
    for tensor in reader.tensors:
        data, qtype = tensors.get(tensor.name, (tensor.data, tensor.tensor_type))
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=qtype)
    return gguf_files.finish(writer, path)


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"general.architecture": "llama"}, ["general.architecture", "llama"]),
        ({"tokenizer.ggml.pre": "gemma4"}, ["tokenizer.ggml.pre", "gemma4"]),
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model", "'bert'"]),
        ({"deepseek2.block_count": "three"}, ["deepseek2.block_count", "three"]),
        ({"deepseek2.block_count": 4_000_000_000}, ["deepseek2.block_count", "4000000000"]),
        ({"deepseek2.block_count": None}, ["deepseek2.block_count", "missing"]),
        ({"deepseek2.block_count": 3.5}, ["deepseek2.block_count", "3.5"]),
        ({"deepseek2.context_length": 4_000_000_000}, ["deepseek2.context_length", "4000000000"]),
        ({"deepseek2.rope.freq_base": float("nan")}, ["deepseek2.rope.freq_base", "nan"]),
        ({"deepseek2.embedding_length": 12345}, ["token_embd.weight", "12345"]),
        ({"deepseek2.expert_used_count": 0}, ["expert_used_count"]),
        ({"deepseek2.expert_used_count": [1, 2]}, ["expert_used_count", "array"]),
        ({"deepseek2.expert_shared_count": 0}, ["ffn_gate_shexp", "expert_shared_count"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_bad_metadata(refused, quick, model, tmp_path, metadata, parts, command):
    path = rewritten(model, tmp_path / "bad.gguf", metadata=metadata)
    refused(*with_file(command, path), parts=["bad.gguf", *parts])


@pytest.mark.parametrize("command", READERS)
def test_check_tensors(run, quick, model, tmp_path, command, monkeypatch):
    """What is refused with it, and before the machine is measured."""
    data, tensor = bytearray(model.read_bytes()), ModelFile.open(model).tensors["blk.3.ffn_up_exps.weight"]
    at = data.index(tensor.data.tobytes()) + 34 * 99
    data[at : at + 2] = [0, 0x7E]
    (tmp_path / "nan.gguf").write_bytes(data)
    if command == "bench":
        monkeypatch.setattr("pymla.measure.facts.measure_limits", lambda *_: pytest.fail("measured"))
    code, out, err = run(*with_file(command, tmp_path / "nan.gguf"), "--check-tensors")
    told = " ".join((out if command == "inspect" else err).split())
    assert code == (0 if command == "inspect" else 2)
    assert "tensor blk.3.ffn_up_exps.weight holds NaN or infinity in 1 of" in told


def test_bad_tensors(refused, model, tmp_path):
    f32, i8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I8
    name = "output_norm.weight"
    path = rewritten(model, tmp_path / "a.gguf", tensors={name: (None, None)})
    refused("generate", "-m", path, "x", parts=[name, "missing"])
    path = rewritten(model, tmp_path / "b.gguf", tensors={name: (np.zeros(3, np.float32), f32)})
    refused("generate", "-m", path, "x", parts=[name, "[3]"])
    shape = ModelFile.open(model).tensors["token_embd.weight"].shape
    path = rewritten(model, tmp_path / "c.gguf", tensors={"token_embd.weight": (np.ones(shape, np.int8), i8)})
    refused("generate", "-m", path, "x", parts=["token_embd.weight", "I8"])


@pytest.mark.parametrize("command", READERS)
def test_tensor_outside_the_file(refused, model, tmp_path, command):
    data = bytearray(model.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight")
    at += 4 + 8 * int.from_bytes(data[at : at + 4], "little") + 4
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "out.gguf").write_bytes(data)
    refused(*with_file(command, tmp_path / "out.gguf"), parts=["out.gguf", "output_norm.weight"])


def test_inspect_shows_what_cannot_be_run(run, model, tmp_path):
    path = rewritten(model, tmp_path / "bad.gguf", metadata={"deepseek2.block_count": "three"})
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert "Not run" in out
    assert "three" in out


def test_bad_prompts(refused, model, tmp_path):
    refused("generate", "-m", model, "word " * 500, "--ctx", 64, parts=["2002", "64", "--ctx", "1024"])
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    refused("generate", "-m", model, "-f", tmp_path / "latin1", parts=["latin1", "byte 3"])
    refused("generate", "-m", model, "-f", tmp_path / "none", parts=["none", "No such file"])
    refused("generate", "-m", model, "-f", tmp_path, parts=[tmp_path, "Is a directory"])
    refused("generate", "-m", model, "x", "-f", tmp_path / "latin1", parts=["-f", "not both"])
    refused("generate", "-m", model, "a\udcff", parts=["position 1", "UTF-8"])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--top-p", 2], ["--top-p is 2"]),
        (["--temperature", -1], ["--temperature is -1"]),
        (["--temperature", "warm"], ["--temperature", "'warm'", "generate --help"]),
        (["--top-k", -1], ["--top-k is -1"]),
        (["--typical", 2], ["--typical-p is 2"]),
        (["--mirostat", 3], ["--mirostat is 3", "from 0 to 2"]),
        (["--samplers", "top_k;best"], ["--samplers is 'best'", "penalties, dry, top_n_sigma"]),
        (["--dry-sequence-breaker", ""], ["--dry-sequence-breaker is ''", "1 to 40 bytes"]),
        (["--device", "tpu"], ["tpu"]),
        (["--threads", 10_000], ["--threads is 10000"]),
        (["--threads", 0], ["--threads is 0"]),
        (["--ctx", 0], ["--ctx", "0"]),
        (["--ctx", 2000], ["--ctx is 2000", "1024"]),
        (["-n", -3], ["--max-tokens", "-3"]),
        (["--seed", -1], ["--seed", "-1"]),
        (["--stop", ""], ["--stop has an empty text"]),
        (["--logit-bias", "abc"], ["--logit-bias 'abc'", "ID=VALUE"]),
        (["--logit-bias", "3=nan"], ["--logit-bias[3] is nan"]),
        (["--logit-bias", "3=inf"], ["--logit-bias[3] is inf"]),
        (["--logit-bias", "512=1"], ["token 512", "vocabulary has 512"]),
        (["--cache-type", "q4"], ["--cache-type", "'q4'", "q8_0"]),
        (["--mla", 7], ["--mla", "'7'", "auto"]),
        (["--dsa", "yes"], ["--dsa", "'yes'", "on", "off"]),
        (["--system", "Be brief."], ["--system", "--chat"]),
        (["--template-var", "a=1"], ["--template-var", "--chat"]),
        (["--logprobs", 2], ["--logprobs", "--json"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_bad_options(refused, model, options, parts):
    refused("generate", "-m", model, "x", *options, parts=parts)


def test_bad_commands(refused):
    refused("generat", parts=["'generat'", "--help"])
    refused("inspect", parts=["FILE", "inspect --help"])
    refused("convert", "x", "y", "--type", "q9", parts=["'q9'", "Q8_0"])


def test_no_command_is_a_question(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out == run("--help")[1]


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_not_enough_memory(refused, quick, model, monkeypatch, command):
    monkeypatch.setattr("pymla.engine.fitting.available_memory", lambda: 10 << 20)
    monkeypatch.setattr("pymla.engine.loading.Weights.from_gguf", None)  # not reached
    parts = ["not enough memory for 1024 tokens", "cache", "scratch", "0.01 GiB is available", "--ctx"]
    refused(*with_file(command, model), "--ctx", 1024, parts=parts)


def test_unwritable_cache_folder_is_only_a_warning(run, model, tmp_path, monkeypatch):
    options = "generate", "-m", model, "a", "-n", 5, "--temperature", 0, "--quiet"
    expected = run(*options)[1]
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    # A kernel that this process has not compiled yet, of those that are kept.
    monkeypatch.setattr(activations.quantise_activations.compiled, "_result", None)
    code, out, err = run(*options)
    assert (code, out) == (0, expected)
    (line,) = err.splitlines()
    assert line.startswith(f"pymla: warning: compiled kernels cannot be cached in {tmp_path / 'file'}")
    assert "Not a directory" in line
    assert "PYMLA_CACHE_DIR" in line


@pytest.mark.usefixtures("all_cores")
def test_a_process_that_gets_no_more_threads(run, model, monkeypatch):
    options = "generate", "-m", model, "a", "-n", 5, "--temperature", 0, "--device", "cpu"
    expected = run(*options)[1]

    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_pool", threads.Pool(2))
    monkeypatch.setattr("threading.Thread.start", refused)
    code, out, err = run(*options, "--threads", min(2, cores.usable_cores()))
    assert (code, out) == (0, expected)
    assert "Traceback" not in err
    if cores.usable_cores() > 1:
        assert "start 1 of 2 threads" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the address space")
@pytest.mark.parametrize("megabytes", [100, 300, 520, 600])
def test_little_address_space(model, megabytes):
    """Libraries and kernels would end the process where they get no memory: it is refused before."""
    import resource

    limits = megabytes << 20, megabytes << 20
    process = started(
        *("generate", "-m", model, "abc", "-n", 2, "--device", "cpu", "--quiet"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 2), err
    if process.returncode == 2:
        assert re.fullmatch(rb"pymla: error: .*(address space|not enough memory).*\n", err), err
    assert megabytes > 512 or process.returncode == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NUMBA_CPU_NAME", "no-such-processor"),
        ("NUMBA_CPU_FEATURES", "+no-such-feature"),
        ("NUMBA_CPU_FEATURES", "avx2"),
        ("NUMBA_DISABLE_JIT", "1"),
        ("NUMBA_NUM_THREADS", "0"),
        ("NUMBA_NUM_THREADS", "many"),
        ("NUMBA_OPT", "nine"),
    ],
)
def test_variables_of_numba_that_cannot_be_used(model, variable, value):
    process = started(
        *("generate", "-m", model, "abc", "-n", 2, "--device", "cpu", "--quiet"), env=os.environ | {variable: value}
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    (line,) = err.decode().splitlines()
    assert line.startswith("pymla: error: ")
    assert variable in line
    assert value in line
