"""The command line as a user meets it: what it prints, and what it says to bad input."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import test_interrupts
from make_model import PRESETS, make_model

import pymla
from pymla.cli import main
from pymla.cpu import compiling, quant
from pymla.cpu.limits import Limits
from pymla.model import Model
from pymla.modelfile import ModelFile


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


def test_full_context_is_said(run, model):
    code, _, err = run(
        "generate", "-m", model, "abc", "--ctx", 64, "-n", 500, "--temperature", 0, "--logit-bias", "7=100"
    )
    assert code == 0
    assert "context of 64 tokens is full" in err


def test_stop_strings(model):
    with pymla.load(model) as loaded:
        text = loaded.generate("abc", max_tokens=20, temperature=0)
        stop = text[len(text) // 2 :][:3]
        generation = loaded.generation("abc", max_tokens=20, temperature=0, stop=stop)
        assert "".join(generation) == text[: text.index(stop)]
        assert generation.finish_reason == "stop"


@pytest.fixture(scope="session")
def long_model(tmp_path_factory):
    """A model that nothing but an interrupt ends: its context is long and it has no token that ends a text."""
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    make_model(path, replace(PRESETS["tiny"], context_length=1 << 20), qtype="q8_0", seed=1)
    without = {"tokenizer.ggml.token_type": None, "tokenizer.ggml.eos_token_id": None}
    return rewritten(path, path.with_name("endless.gguf"), metadata=without)


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


def test_help(run):
    for args in ([], ["generate"], ["inspect"], ["convert"]):
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
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32, bool: gguf.GGUFValueType.BOOL}
            writer.add_key_value(name, value, kinds.get(type(value), gguf.GGUFValueType.UINT32))
    tensors = tensors or {}
    for tensor in reader.tensors:
        data, qtype = tensors.get(tensor.name, (tensor.data, tensor.tensor_type))
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"general.architecture": "llama"}, ["general.architecture", "llama"]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, ["tokenizer.ggml.pre", "llama-bpe"]),
        ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.model", "'llama'"]),
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


def test_bad_tensors(refused, model, tmp_path):
    f32, q5_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q5_0
    name = "output_norm.weight"
    path = rewritten(model, tmp_path / "a.gguf", tensors={name: (None, None)})
    refused("generate", "-m", path, "x", parts=[name, "missing"])
    path = rewritten(model, tmp_path / "b.gguf", tensors={name: (np.zeros(3, np.float32), f32)})
    refused("generate", "-m", path, "x", parts=[name, "[3]"])
    shape = ModelFile.open(model).tensors["token_embd.weight"].shape
    blocks = gguf.quants.quantize(np.zeros(shape, np.float32), q5_0)
    path = rewritten(model, tmp_path / "c.gguf", tensors={"token_embd.weight": (blocks, q5_0)})
    refused("generate", "-m", path, "x", parts=["token_embd.weight", "Q5_0"])


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
        (["--top-p", 2], ["top_p is 2"]),
        (["--temperature", -1], ["temperature is -1"]),
        (["--temperature", "warm"], ["--temperature", "'warm'", "generate --help"]),
        (["--top-k", -1], ["top_k is -1"]),
        (["--device", "tpu"], ["tpu"]),
        (["--threads", 10_000], ["--threads 10000"]),
        (["--threads", 0], ["--threads 0"]),
        (["--ctx", 0], ["--ctx", "0"]),
        (["--ctx", 2000], ["--ctx 2000", "1024"]),
        (["-n", -3], ["--max-tokens", "-3"]),
        (["--seed", -1], ["--seed", "-1"]),
        (["--stop", ""], ["stop string is empty"]),
        (["--logit-bias", "abc"], ["--logit-bias 'abc'", "ID=VALUE"]),
        (["--logit-bias", "3=nan"], ["token 3 is nan"]),
        (["--logit-bias", "3=inf"], ["token 3 is inf"]),
        (["--logit-bias", "512=1"], ["token 512", "vocabulary has 512"]),
        (["--cache-type", "q4"], ["--cache-type", "'q4'", "q8_0"]),
        (["--mla", 7], ["--mla", "'7'", "auto"]),
        (["--system", "Be brief."], ["--system", "--chat"]),
        (["--logprobs", 2], ["--logprobs", "--json"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_bad_options(refused, model, options, parts):
    refused("generate", "-m", model, "x", *options, parts=parts)


def test_bad_commands(refused):
    refused("generat", parts=["'generat'", "--help"])
    refused("inspect", parts=["FILE", "inspect --help"])
    refused("convert", "x", "y", "--type", "q9", parts=["--type", "'q9'", "q8_0"])


def test_no_command_is_a_question(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out == run("--help")[1]


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_not_enough_memory(refused, quick, model, monkeypatch, command):
    monkeypatch.setattr("pymla.loading.available_memory", lambda: 10 << 20)
    monkeypatch.setattr("pymla.loading.Weights.from_gguf", None)  # not reached
    parts = ["not enough memory for 1024 tokens", "cache", "scratch", "0.01 GiB is available", "--ctx"]
    refused(*with_file(command, model), "--ctx", 1024, parts=parts)


def test_unwritable_cache_folder_is_only_a_warning(run, model, tmp_path, monkeypatch):
    options = "generate", "-m", model, "a", "-n", 5, "--temperature", 0, "--quiet"
    expected = run(*options)[1]
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    # A kernel that this process has not compiled yet, of those that are kept.
    monkeypatch.setattr(compiling, "COMPILED", [])
    compiling.Compiled(quant._quantise_activations._function, quant._quantise_activations._build)
    code, out, err = run(*options)
    assert (code, out) == (0, expected)
    (line,) = err.splitlines()
    assert line.startswith(f"pymla: warning: compiled kernels cannot be cached in {tmp_path / 'file'}")
    assert "Not a directory" in line
    assert "PYMLA_CACHE_DIR" in line


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
