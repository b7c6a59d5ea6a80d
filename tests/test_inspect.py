"""``pymla inspect``, on files that run and on files that do not."""

import dataclasses
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import write
from make_model import PRESETS, make_model

from pymla import ggml
from pymla.cli.inspect import inspect
from pymla.cli.inspect_report import report
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("inspect") / "tiny.gguf", "tiny", qtype="q8_0")


def output(*args):
    result = CliRunner().invoke(inspect, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result.output


def test_text(tiny):
    text = output(tiny)
    assert "Not run" not in text
    for words in (
        "deepseek2",
        "kv_b layout   kv_b",
        "2 of 8 and 1 shared",
        "sigmoid, 2 of 4 groups by their two best, normalised, scaled by",
        "nope 32, rope 32, v 32",
        "YaRN 4 × 256",
        "Q8_0",
        "pre-tokenizer deepseek-llm",
        "<｜begin▁of▁sentence｜>",
        "chat template  no",
        "q8_0",
        "1,000 tokens",
        "MMAC",
    ):
        assert words in text, words
    assert "blk.0" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_tensors(tiny):
    lines = output(tiny, "--tensors").splitlines()
    for tensor in ModelFile.open(tiny).tensors.values():
        (line,) = (line for line in lines if line.split()[:1] == [tensor.name])
        assert " × ".join(map(str, tensor.shape)) in line
    assert max(map(len, lines)) <= 80


def test_json(tiny):
    found = json.loads(output(tiny, "--json"))
    file = ModelFile.open(tiny)
    assert found == json.loads(json.dumps(report(file) | {"memory": found["memory"]}))
    assert found["runs"] is True
    assert found["problems"] == []
    assert found["bytes"] == tiny.stat().st_size
    assert found["weights"] == sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    assert found["config"]["kv_lora_rank"] == 64
    assert found["config"]["yarn"]["factor"] == 4
    types = {entry["type"]: entry for entry in found["types"]}
    assert sum(entry["tensors"] for entry in types.values()) == len(file.tensors) == len(found["tensors"])
    assert all(entry["supported"] for entry in types.values())
    assert found["tokenizer"]["tokens"] == 512
    assert found["tokenizer"]["special"]["bos"] == {"id": 510, "token": "<｜begin▁of▁sentence｜>"}
    assert found["tokenizer"]["add_bos"] is True
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"length": 512}
    assert found["metadata"]["deepseek2.block_count"] == 4
    assert found["memory"]["cache_per_1000_tokens"]["f32"] == 1000 * 4 * (64 + 32) * 4
    (gpu,) = found["memory"]["gpu"]
    assert gpu["context"] == 1024
    assert gpu["all"] - gpu["cpu_moe"] > sum(
        each["bytes"] for each in found["tensors"] if each["name"].endswith("_exps.weight")
    )
    # The context is 1024 tokens: nothing is said of 4096.
    (cost,) = found["costs"]
    assert cost["context"] == 0
    for part in (cost["prompt"], cost["generation"]):
        assert sum(op["macs"] for op in part["ops"].values()) == pytest.approx(part["macs"])
        assert sum(op["bytes"] for op in part["ops"].values()) == pytest.approx(part["bytes"])


@pytest.mark.parametrize(
    ("layout", "words"), [("split", "k_b + v_b"), ("all", "all: kv_b, k_b and v_b"), ("kv_b", "kv_b")]
)
def test_layouts(tmp_path, layout, words):
    file = ModelFile.open(make_model(tmp_path / "model.gguf", "tiny", layout=layout))
    found = report(file)
    assert found["layout"] == words
    assert (found["memory"]["derived"] > 0) is (layout == "split")


def test_unknown_architecture(tmp_path):
    metadata = {
        "llama.block_count": (GGUFValueType.UINT32, 30),
        "llama.rope.freq_base": (GGUFValueType.FLOAT32, 1e6),
        "other.key": (GGUFValueType.UINT32, 777),
    }
    tensors = {"token_embd.weight": (np.zeros((8, 32), np.float32), ggml.F32)}
    path = write(tmp_path / "llama.gguf", metadata, tensors, "llama")
    text = output(path)
    assert "Not run: metadata general.architecture is 'llama'" in text
    assert "block_count" in text
    assert "1e+06" in text
    assert "777" not in text
    assert "F32" in text
    found = json.loads(output(path, "--json"))
    assert found["runs"] is False
    assert found["config"] is found["memory"] is found["costs"] is found["tokenizer"] is None
    assert found["metadata"]["other.key"] == 777


def test_type_that_is_not_run(tiny, tmp_path):
    """No model has integers as weights; only the header changes."""
    path = tmp_path / "i8.gguf"
    contents = bytearray(tiny.read_bytes())
    for name in (b"blk.0.attn_output.weight", b"blk.1.attn_output.weight"):
        at = contents.index(name) + len(name) + 4 + 2 * 8
        contents[at] = GGMLQuantizationType.I8
    path.write_bytes(contents)
    text = output(path)
    assert "tensor blk.0.attn_output.weight has type I8, which pymla does not run" in " ".join(text.split())
    assert "I8 (not run)" in text
    found = json.loads(output(path, "--json"))
    assert found["runs"] is False
    assert len(found["problems"]) == 1
    assert {entry["type"]: entry["tensors"] for entry in found["types"]}["I8"] == 2
    assert found["costs"] is not None
    assert found["memory"] is not None


def test_interleaved_type(tmp_path):
    path = make_model(tmp_path / "m.gguf", "tiny", qtype="q8_0_r8")
    text = output(path)
    assert "Not run" not in text
    assert "Q8_0_R8 (loaded as Q8_0)" in text
    assert "plain copies of interleaved weights" in text
    assert "plain copies" not in output(make_model(tmp_path / "plain.gguf", "tiny", qtype="q8_0"))
    found = json.loads(output(path, "--json"))
    entry = next(entry for entry in found["types"] if entry["type"] == "Q8_0_R8")
    assert entry["loaded_as"] == "Q8_0"
    assert found["memory"]["plain"] == entry["bytes"]
    assert found["memory"]["weights"] + entry["bytes"] == path.stat().st_size


def test_missing_tensor(tiny, tmp_path):
    path = tmp_path / "renamed.gguf"
    path.write_bytes(
        tiny.read_bytes().replace(b"blk.2.ffn_norm", b"blk.2.ffn_none").replace(b"blk.2.attn_q_b", b"x" * 14)
    )
    text = output(path)
    assert "tensor blk.2.attn_q_b.weight is missing" in text
    assert "tensor blk.2.ffn_norm.weight is missing" in text
    assert "Cost" not in text


def test_many_problems(tiny, tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(tiny.read_bytes().replace(b".ffn_", b".ffx_").replace(b".attn_", b".attx_"))
    text = output(path)
    assert text.count("Not run") == 10
    problems = json.loads(output(path, "--json"))["problems"]
    assert f"And {len(problems) - 10} more such problems; --json lists all of them." in text


def test_check_tensors(tiny, tmp_path):
    path, contents = tmp_path / "nan.gguf", bytearray(tiny.read_bytes())
    tensor = ModelFile.open(tiny).tensors["output.weight"]
    at = contents.index(tensor.data.tobytes()) + 500 * 210 + 208
    contents[at : at + 2] = [0, 0xFE]
    path.write_bytes(contents)
    assert "Not run" not in output(path)
    text = " ".join(output(path, "--check-tensors").split())
    assert "Not run: tensor output.weight holds NaN or infinity in 1 of 512 blocks, the first at [500, 0]" in text
    assert json.loads(output(path, "--check-tensors", "--json"))["runs"] is False


def test_vocabulary_only(tmp_path):
    tokens = ["a", "[bold]b", "c\x07"]
    metadata = {
        "tokenizer.ggml.model": (GGUFValueType.STRING, "gpt2"),
        "tokenizer.ggml.tokens": (GGUFValueType.ARRAY, tokens),
        "tokenizer.ggml.eos_token_id": (GGUFValueType.UINT32, 1),
        "tokenizer.ggml.eot_token_id": (GGUFValueType.UINT32, 2),
        "tokenizer.ggml.padding_token_id": (GGUFValueType.UINT32, 3),
        "tokenizer.ggml.add_eos_token": (GGUFValueType.BOOL, True),
        "tokenizer.chat_template": (GGUFValueType.STRING, "{{ messages }}"),
    }
    text = output(write(tmp_path / "vocabulary.gguf", metadata, arch="llama"))
    for words in ("3, merges none", "1 [bold]b", r"2 c\x07", "adds           eos", "chat template  yes"):
        assert words in text, words


def test_odd_metadata(tmp_path):
    """Whatever the values are, they are shown."""
    metadata = {
        "general.name": (GGUFValueType.STRING, "two\nlines \x1b[31m[red]"),
        "llama.nan": (GGUFValueType.FLOAT32, math.nan),
        "llama.list": (GGUFValueType.ARRAY, [1, 2]),
        "llama.long": (GGUFValueType.ARRAY, list(range(100))),
        "tokenizer.ggml.tokens": (GGUFValueType.STRING, "none"),
        "tokenizer.ggml.pre": (GGUFValueType.UINT32, 5),
        "tokenizer.ggml.bos_token_id": (GGUFValueType.STRING, "<s>"),
    }
    path = write(tmp_path / "odd.gguf", metadata, arch="llama")
    text = output(path, "--tensors")
    for words in (r"two lines \x1b[31m[red]", "nan", "[1, 2]", "array of 100", "pre-tokenizer 5", "<s>"):
        assert words in text, words
    assert "\x1b" not in text
    found = json.loads(output(path, "--json"))
    assert found["metadata"]["llama.nan"] == "nan"


def test_metadata_that_is_refused(tiny, tmp_path):
    path = tmp_path / "gating.gguf"
    contents = bytearray(tiny.read_bytes())
    key = b"expert_gating_func"
    contents[contents.index(key) + len(key) + 4] = 3
    path.write_bytes(contents)
    text = " ".join(output(path).split())
    assert "Not run: metadata deepseek2.expert_gating_func is 3; pymla implements 1 (softmax) and 2 (sigmoid)" in text


def test_no_metadata_at_all(tmp_path):
    path = tmp_path / "bare.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    assert "general.architecture is missing" in output(path)


def test_not_a_model_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"hello, world")
    result = CliRunner().invoke(inspect, [str(path)])
    assert isinstance(result.exception, PymlaError)
    assert "not a GGUF file" in str(result.exception)


# Layers that predict further tokens, and the attention temperature ----------------------------------------------------


def test_layers_that_predict_further_tokens_are_counted_and_not_planned(tmp_path):
    plain = make_model(tmp_path / "plain.gguf", PRESETS["tiny"])
    shape = dataclasses.replace(PRESETS["tiny"], num_nextn_predict_layers=1)
    file = ModelFile.open(make_model(tmp_path / "nextn.gguf", shape))
    found, without = report(file), report(ModelFile.open(plain))
    of_layer = [each for name, each in file.tensors.items() if name.startswith("blk.4.")]
    nbytes = sum(each.data.nbytes for each in of_layer)
    assert found["nextn"] == {"layers": 1, "tensors": len(of_layer), "bytes": nbytes, "missing": []}
    assert without["nextn"] is None
    assert found["memory"]["not_run"] == nbytes
    assert without["memory"]["not_run"] == 0
    assert abs(found["memory"]["weights"] - without["memory"]["weights"]) < 4096  # the header is longer
    assert found["memory"]["gpu"] == without["memory"]["gpu"]
    text = " ".join(output(file.path).split())
    assert f"nextn layers 1, not loaded: {len(of_layer)} tensors" in text
    assert "nextn layers, not loaded" in text


def test_declared_layers_that_a_file_does_not_hold(tmp_path, tiny):
    overrides = {"deepseek2.block_count": 5, "deepseek2.nextn_predict_layers": 1}
    found = report(ModelFile.open(tiny, overrides))
    assert found["runs"]
    assert found["nextn"] == {"layers": 1, "tensors": 0, "bytes": 0, "missing": []}
    pairs = (f"--override-kv={key}=int:{value}" for key, value in overrides.items())
    assert "1, which the file does not hold" in output(tiny, *pairs)


def test_attention_temperature_and_linear_scaling(tiny):
    text = output(tiny, "--override-kv=deepseek2.attention.temperature_scale=float:0.1")
    assert "temperature 0.1 from 256 on" in " ".join(text.split())
    linear = ("--override-kv=deepseek2.rope.scaling.type=str:linear",)
    linear += ("--override-kv=deepseek2.rope.scaling.yarn_log_multiplier=float:0",)
    assert "linear 4" in " ".join(output(tiny, *linear).split())
