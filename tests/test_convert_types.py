"""The types that `pymla convert` gives to tensors, and the ways in which weights come from quantised checkpoints."""

import numpy as np
import pytest
from click.testing import CliRunner
from hub import GLM, V2, V3, hub_folder, random_weights, safetensors
from test_hub_weights import by_columns

from pymla import ggml
from pymla.cli.convert import convert as command
from pymla.cpu.quantise import quantise
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.files.imatrix_entries import Entry
from pymla.make.convert import convert, prepare
from pymla.make.hub_weights import HubWeights
from pymla.make.importance import Importance
from pymla.reference import checkpoint_types
from pymla.reference.quant import dequantise
from pymla.small_floats import E4M3

GATE = "model.layers.1.mlp.experts.{}.gate_proj.weight"


def folder_of(tmp_path, config=V2, weights=None, dtype="BF16"):
    return hub_folder(tmp_path / "Tiny", config, random_weights(config) if weights is None else weights, dtype)


def converted(folder, path, **options):
    return ModelFile.open(convert(folder, path, **{"pre": "deepseek-coder"} | options).path)


@pytest.mark.parametrize(("dtype", "qtype"), [("BF16", ggml.BF16), ("F16", ggml.F16), ("F32", ggml.F16)])
def test_auto_is_what_llama_cpp_takes(tmp_path, dtype, qtype):
    file = converted(folder_of(tmp_path, dtype=dtype), tmp_path / "m.gguf", qtype="AUTO")
    assert {info.qtype for info in file.tensors.values()} == {qtype, ggml.F32}
    assert file.metadata["general.file_type"] == {ggml.F16: 1, ggml.BF16: 32}[qtype]


@pytest.mark.parametrize("layout", ["split", "kv_b", "all"])
@pytest.mark.parametrize("config", [V2, GLM], ids=["v2", "glm"])
def test_weights_that_keep_their_type_are_copied(tmp_path, monkeypatch, config, layout):
    folder = folder_of(tmp_path, config)
    plain = converted(folder, tmp_path / "plain.gguf", qtype="F32", layout=layout)
    read, rows = set(), HubWeights.rows
    monkeypatch.setattr(HubWeights, "rows", lambda self, name, *span: read.add(name) or rows(self, name, *span))
    file = converted(folder, tmp_path / "m.gguf", layout=layout)
    # Vectors and routers become F32, and k_b is transposed.
    shapes = {name: HubWeights(folder).encoding(name).shape for name in read}
    odd = ("kv_b_proj.weight", "mlp.gate.weight", "indexer.weights_proj.weight")
    assert all(len(shape) == 1 or name.endswith(odd) for name, shape in shapes.items())
    for name, info in file.tensors.items():
        value = dequantise(info.data.reshape(-1, ggml.row_bytes(info.qtype, info.shape[-1])), info.qtype)
        np.testing.assert_array_equal(value.reshape(-1), plain.tensors[name].data.view(np.float32), err_msg=name)


def test_rules_before_the_type(tmp_path):
    folder = folder_of(tmp_path)
    (tmp_path / "recipe.txt").write_text("ffn_down = F16\nffn_.*_exps = F32\n")
    options = {
        "qtype": "q8_0",
        "recipe": tmp_path / "recipe.txt",
        "tensor_types": ["ffn_down_exps=BF16", "nothing=F16"],
    }
    done = convert(folder, tmp_path / "m.gguf", **options)
    types = {name: info.qtype for name, info in ModelFile.open(done.path).tensors.items()}
    expected = {"ffn_down_exps": ggml.BF16, "ffn_down": ggml.F16, "ffn_up_exps": ggml.F32, "attn_q_a": ggml.Q8_0}
    assert {name: types[f"blk.{name != 'ffn_down':d}.{name}.weight"] for name in expected} == expected
    assert done.notes == ("rule 'nothing=F16' matches no tensor that is quantised",)


def test_an_importance_matrix(tmp_path):
    folder, rng = folder_of(tmp_path), np.random.default_rng(0)
    sums = rng.uniform(1, 100, (4, 64)).astype(np.float32)
    Importance({"blk.1.ffn_gate_exps.weight": Entry(sums, np.full(4, 4))}, ["a text"]).write(tmp_path / "i.gguf")
    file = converted(folder, tmp_path / "m.gguf", qtype="q4_0", imatrix=tmp_path / "i.gguf")
    assert file.metadata["quantize.imatrix.entries_count"] == 1
    assert file.metadata["quantize.imatrix.file"] == str(tmp_path / "i.gguf")
    weights = HubWeights(folder)
    expected = [quantise(weights.read(GATE.format(i)), ggml.Q4_0, sums[i] / 4) for i in range(4)]
    np.testing.assert_array_equal(file.tensors["blk.1.ffn_gate_exps.weight"].data, np.concatenate(expected).reshape(-1))


def int4(weights):
    """Gates of experts as compressed-tensors packs them, their values, and what config.json says."""
    rng = np.random.default_rng(0)
    stored, values = dict(weights), dict(weights)
    for expert in range(4):
        name = GATE.format(expert)
        words = rng.integers(-(2**31), 2**31, (32, 8), np.int64).astype(np.int32)
        scales = np.full((32, 2), 2.0**-5, np.float32)
        del stored[name]
        stored |= {name + "_packed": ("I32", words), name + "_scale": scales}
        stored[name + "_shape"] = ("I64", np.array([32, 64]))
        values[name] = checkpoint_types.from_int4(words, scales)
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}
    return stored, values, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def float8(weights):
    """The same as float8 with a scale for each row."""
    rng = np.random.default_rng(0)
    stored, values = dict(weights), dict(weights)
    for expert in range(4):
        name, codes = GATE.format(expert), rng.integers(0, 64, (32, 64), np.uint8)
        scales = np.full((32, 1), 0.25, np.float32)
        stored |= {name: ("F8_E4M3", codes), name + "_scale": scales}
        values[name] = E4M3[codes] * scales
    groups = {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}
    return stored, values, {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def mxfp4(weights):
    """The same as AMD's Quark stores MXFP4."""
    rng = np.random.default_rng(0)
    stored, values = dict(weights), dict(weights)
    for expert in range(4):
        name, codes = GATE.format(expert), rng.integers(0, 256, (32, 32), np.uint8)
        scales = rng.integers(110, 125, (32, 2), np.uint8)
        stored |= {name: ("U8", codes), name + "_scale": ("U8", scales)}
        values[name] = checkpoint_types.from_mxfp4(codes, scales)
    return stored, values, {"quant_method": "quark"}


def nvfp4(weights):
    """The same as NVIDIA's Model Optimizer stores NVFP4."""
    rng = np.random.default_rng(0)
    stored, values = dict(weights), dict(weights)
    for expert in range(4):
        name, codes = GATE.format(expert), rng.integers(0, 256, (32, 32), np.uint8)
        scales, factor = rng.integers(40, 64, (32, 4), np.uint8), np.float32(0.01 * (expert + 1))
        stored |= {name: ("U8", codes), name + "_scale": ("F8_E4M3", scales), name + "_scale_2": factor}
        stored[name.replace("weight", "input_scale")] = np.float32(1)
        values[name] = checkpoint_types.from_e2m1(codes, E4M3[scales] * factor)
    return stored, values, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def columns_first(weights, kind):
    """The same as GPTQ and AWQ store them."""
    stored, values = dict(weights), dict(weights)
    for expert in range(4):
        name = GATE.format(expert)
        tensors, values[name] = by_columns(kind, rows=32, columns=64, groups=2, seed=expert)
        del stored[name]
        stored |= {name.replace("weight", key.removeprefix("m.")): value for key, value in tensors.items()}
    return stored, values, {"quant_method": kind, "bits": 4, "group_size": 32}


def gptq(weights):
    return columns_first(weights, "gptq")


def awq(weights):
    return columns_first(weights, "awq")


@pytest.mark.parametrize("kind", [int4, float8, mxfp4, nvfp4, gptq, awq])
def test_quantised_checkpoints(tmp_path, kind):
    stored, values, found = kind(random_weights(V3))
    config = V3 | {"quantization_config": found}
    file = converted(folder_of(tmp_path, config, stored, "F32"), tmp_path / "m.gguf", qtype="f32")
    data = file.tensors["blk.1.ffn_gate_exps.weight"].data.view(np.float32).reshape(4, 32, 64)
    np.testing.assert_array_equal(data, np.stack([values[GATE.format(i)] for i in range(4)]))


def test_experts_in_mxfp4_stay_so(tmp_path):
    stored, values, found = mxfp4(random_weights(V3))
    folder = folder_of(tmp_path, V3 | {"quantization_config": found}, stored)
    info = converted(folder, tmp_path / "m.gguf").tensors["blk.1.ffn_gate_exps.weight"]
    assert info.qtype == ggml.MXFP4
    expected = np.concatenate([values[GATE.format(i)] for i in range(4)])
    np.testing.assert_array_equal(dequantise(info.data.reshape(128, -1), ggml.MXFP4), expected)
    ruled = converted(folder, tmp_path / "r.gguf", tensor_types=["gate_exps=F16"])
    assert ruled.tensors["blk.1.ffn_gate_exps.weight"].qtype == ggml.F16


def test_parts(tmp_path):
    folder = folder_of(tmp_path)
    whole = converted(folder, tmp_path / "m.gguf", qtype="q8_0")
    done = convert(folder, tmp_path / "p.gguf", qtype="q8_0", split=60_000, pre="deepseek-coder")
    count = len(done.parts)
    assert count > 2
    assert [path.name for path in done.parts] == [f"p-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    assert done.nbytes == sum(path.stat().st_size for path in done.parts)
    file = ModelFile.open(done.parts[1])
    assert {name: info.data.tobytes() for name, info in file.tensors.items()} == {
        name: info.data.tobytes() for name, info in whole.tensors.items()
    }


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pymla.files.gguf_output.RECORD_BYTES", 1)
    folder, notes = folder_of(tmp_path), []
    converted(folder, tmp_path / "whole.gguf", qtype="q8_0")

    def stop(done, total, name):
        if name == "blk.1.ffn_up_exps.weight":
            raise KeyboardInterrupt

    options = {"qtype": "q8_0", "pre": "deepseek-coder", "name": "Tiny"}
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "m.gguf", progress=stop, **options)
    convert(folder, tmp_path / "m.gguf", note=notes.append, **options)
    assert "goes on" in notes[0]
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    # A shard that was downloaded again may hold anything.
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "m.gguf", progress=stop, **options)
    weights = random_weights(V2, seed=1)
    safetensors(folder / "model.safetensors", weights, "BF16")
    convert(folder, tmp_path / "m.gguf", note=notes.append, **options)
    assert "it begins anew" in notes[-1]
    assert (tmp_path / "m.gguf").read_bytes() == converted(folder, tmp_path / "new.gguf", **options).path.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qtype": "iq2_xxs"}, "IQ2_XXS needs an importance matrix; give one as `imatrix`"),
        ({"qtype": "copy"}, "copy is no type of a new file"),
        ({"qtype": "q4_k_x"}, "unknown type or mix 'q4_k_x'"),
        ({"tensor_types": ["(=F16"]}, "no regular expression"),
        ({"tensor_types": ["x=Q9"]}, "unknown type 'Q9'"),
        ({"imatrix": "nowhere"}, "nowhere: cannot be opened"),
        ({"recipe": "nowhere"}, "nowhere"),
    ],
)
def test_types_that_are_refused(tmp_path, options, message):
    folder = folder_of(tmp_path, V2 | {"hidden_size": 256})
    with pytest.raises(PymlaError, match=message):
        prepare(folder, pre="deepseek-coder", **options)


def test_a_dry_run_writes_nothing(tmp_path):
    folder = folder_of(tmp_path)
    options = ["--dry-run", "--type", "q8_0", "--pre", "deepseek-coder", "--tensor-type", "output=BF16"]
    result = CliRunner().invoke(command, [str(folder), str(tmp_path / "m.gguf"), *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [folder]
    text = " ".join(result.stdout.split())
    for part in ("blk.1.ffn_up_exps.weight", "BF16", "copied", "bits per weight", "Q8_0"):
        assert part in text


def test_the_command_writes_parts(tmp_path):
    folder = folder_of(tmp_path)
    options = ["--outtype", "Q8_0", "--split-max-size", "60K", "--no-mtp", "--pre", "deepseek-coder"]
    result = CliRunner().invoke(command, [str(folder), str(tmp_path / "m.gguf"), *options])
    assert result.exit_code == 0, result.output
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert f"{parts[0]} and {len(parts) - 1} more: " in result.stderr
