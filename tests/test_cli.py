"""The command line as a user meets it: what it prints, and what it says to bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
from make_model import PRESETS, make_model

import pymla
from pymla.cli import main
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
        lines = [line for line in err.splitlines() if not line.startswith("pymla: compiling")]
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


def test_ctrl_c_ends_cleanly(model):
    command = [sys.executable, "-u", "-m", "pymla", "generate", "-m", str(model), "abc", "-n", "100000", "--ctx", "100"]
    command[-1] = str(pymla.load(model).config.context_length)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(8)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert b"Traceback" not in err
    assert b"tokens/s" in err


def test_help(run):
    for args in ([], ["generate"], ["inspect"], ["convert"]):
        code, out, _ = run(*args, "--help")
        assert code == 0
        assert "Example" in out


def test_not_a_model(refused, tmp_path):
    refused("generate", "-m", tmp_path / "missing.gguf", "x", parts=["missing.gguf"])
    refused("generate", "-m", tmp_path, "x", parts=[tmp_path])
    (tmp_path / "text").write_text("This is no model at all, but a text.")
    refused("generate", "-m", tmp_path / "text", "x", parts=["text"])


def test_truncated_anywhere(refused, model, tmp_path):
    data = model.read_bytes()
    path = tmp_path / "cut.gguf"
    # The file may end in padding, whose loss harms nothing.
    for size in np.random.default_rng(0).integers(0, len(data) - 64, 50):
        path.write_bytes(data[:size])
        refused("generate", "-m", path, "x", parts=["cut.gguf"])


def test_missing_part(refused, model, tmp_path):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(model.read_bytes())
    refused("generate", "-m", path, "x", parts=["00002"])


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
        ({"general.architecture": "llama"}, ["llama"]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, ["llama-bpe"]),
        ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.model"]),
        ({"deepseek2.block_count": "three"}, ["deepseek2.block_count", "three"]),
        ({"deepseek2.block_count": 4_000_000_000}, ["deepseek2.block_count", "4000000000"]),
        ({"deepseek2.embedding_length": 12345}, ["token_embd.weight", "12345"]),
        ({"deepseek2.expert_used_count": 0}, ["expert_used_count"]),
    ],
)
def test_bad_metadata(refused, model, tmp_path, metadata, parts):
    refused(
        "generate", "-m", rewritten(model, tmp_path / "bad.gguf", metadata=metadata), "x", parts=["bad.gguf", *parts]
    )


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


def test_tensor_outside_the_file(refused, model, tmp_path):
    data = bytearray(model.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight")
    at += 4 + 8 * int.from_bytes(data[at : at + 4], "little") + 4
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "out.gguf").write_bytes(data)
    refused("generate", "-m", tmp_path / "out.gguf", "x", parts=["output_norm.weight"])


def test_bad_requests(refused, model, tmp_path):
    refused("generate", "-m", model, "word " * 500, "--ctx", 64, parts=["2002", "64", "--ctx"])
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    refused("generate", "-m", model, "-f", tmp_path / "latin1", parts=["latin1", "byte 3"])
    refused("generate", "-m", model, "x", "--top-p", 2, parts=["top_p is 2"])
    refused("generate", "-m", model, "x", "--device", "tpu", parts=["tpu"])
    refused("generate", "-m", model, "x", "--threads", 10_000, parts=["--threads 10000"])


def test_not_enough_memory(refused, model, monkeypatch):
    monkeypatch.setattr("pymla.loading.available_memory", lambda: 10 << 20)
    refused("generate", "-m", model, "x", "--ctx", 1024, parts=["not enough memory", "cache", "scratch"])


def test_unwritable_cache_folder_is_only_a_warning(model, tmp_path):
    (tmp_path / "file").write_text("")
    environment = os.environ | {"PYMLA_CACHE_DIR": str(tmp_path / "file" / "cache")}
    command = [sys.executable, "-m", "pymla", "generate", "-m", str(model), "a", "-n", "2", "--quiet"]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert b"cannot be cached" in result.stderr
