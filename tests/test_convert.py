import json
import math
import resource
import shutil

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from hub import (
    CODER,
    GLM,
    LITE,
    TOKENIZER_CONFIG,
    V2,
    V3,
    V32,
    YARN,
    hub_folder,
    random_weights,
    safetensors,
    tokenizer_json,
    write_json,
)

from pymla import ggml
from pymla.cli.convert import convert as command
from pymla.cpu.quantise import quantise
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.make import checkpoint_tensors
from pymla.make import convert as module
from pymla.make.checkpoint_tensors import Plan
from pymla.make.convert import LAYOUTS, convert
from pymla.make.hub_tokenizer_bpe import detect_pre
from pymla.models.config import Indexer, ModelConfig, Yarn
from pymla.reference.quant import dequantise
from pymla.text.pre_tokenizers import IGNORE_MERGES, PRE_TOKENIZERS
from pymla.text.tokenizer import Tokenizer

#: Types by their names on the command line, with one that is quantised: tests/test_quantise.py has all.
TYPES = {"f32": ggml.F32, "f16": ggml.F16, "bf16": ggml.BF16, "q8_0": ggml.Q8_0}


def converted(tmp_path, config=V2, weights=None, dtype="F32", files=1, **options):
    folder = hub_folder(tmp_path / "Tiny", config, random_weights(config) if weights is None else weights, dtype, files)
    options.setdefault("pre", "deepseek-coder")
    return ModelFile.open(convert(folder, tmp_path / "m.gguf", **options).path)


def expected_tensors(c, w, layout):
    """GGUF names and float32 values of a checkpoint, written down once more, from DESIGN's list and gguf's names."""
    # Which knows the indexer's names, too.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, c["num_hidden_layers"])
    found = {}
    experts = {}
    for name, value in w.items():
        parts = name.split(".")
        if "experts" in parts:
            parts.pop(parts.index("experts") + 1)
            experts.setdefault(".".join(parts), []).append(value)
        elif name.endswith("kv_b_proj.weight"):
            by_head = value.reshape(c["num_attention_heads"], -1, c["kv_lora_rank"])
            k, v = by_head[:, : c["qk_nope_head_dim"]].transpose(0, 2, 1), by_head[:, c["qk_nope_head_dim"] :]
            if layout != "split":
                found[names.get_name(name, (".weight",))] = value
            if layout != "kv_b":
                for letter, part in (("k", k), ("v", v)):
                    flat = part.reshape(-1, part.shape[-1]) if layout == "all" else part
                    found[names.get_name(name.replace("kv_b", f"{letter}_b"), (".weight",))] = flat
        elif name.endswith("e_score_correction_bias"):
            found[names.get_name(name.replace("_bias", ".bias"), (".bias",))] = value
        elif name.endswith("k_norm.bias"):
            found[names.get_name(name, (".bias",))] = value
        else:
            found[names.get_name(name, (".weight",))] = value
    return found | {names.get_name(name, (".weight",)): np.stack(values) for name, values in experts.items()}


def assert_holds(file, expected, qtype):
    """Every tensor, and no other, in the type asked for, blocks exactly as quantised whole."""
    assert set(file.tensors) == set(expected)
    for name, value in expected.items():
        plain = value.ndim == 1 or "ffn_gate_inp" in name or "indexer.proj" in name
        wanted = ggml.F32 if plain else qtype
        info = file.tensors[name]
        assert (info.qtype, info.shape) == (wanted, value.shape), name
        rows = np.ascontiguousarray(value.reshape(-1, value.shape[-1]))
        np.testing.assert_array_equal(info.data, quantise(rows, wanted).reshape(-1), err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("qtype", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("config", [LITE, V2, V3, V32, GLM], ids=["lite", "v2", "v3", "v3.2", "glm"])
def test_tensors_in_every_type_and_layout(tmp_path, config, qtype, layout):
    weights = random_weights(config)
    file = converted(tmp_path, config, weights, qtype=qtype, layout=layout)
    assert_holds(file, expected_tensors(config, weights, layout), TYPES[qtype])


def test_the_gguf_package_reads_the_same(tmp_path):
    weights = random_weights(V3)
    converted(tmp_path, V3, weights, qtype="q8_0", layout="split")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = expected_tensors(V3, weights, "split")
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, expected[tensor.name], atol=0.02)


@pytest.mark.parametrize(
    ("config", "architecture", "full"),
    [
        (V32, "deepseek32", (True, True)),
        (GLM, "glm-dsa", (True, False)),
        (GLM | {"indexer_types": None}, "glm-dsa", (True, True)),
    ],
)
def test_an_indexer_reads_back(tmp_path, config, architecture, full):
    found = ModelConfig.from_gguf(converted(tmp_path, config))
    assert found.architecture == architecture
    assert found.indexer == Indexer(heads=3, head_dim=32, top_k=20, full=full, interleave=architecture == "glm-dsa")


@pytest.mark.parametrize("types", [["full"], ["full", "half"], ["full", 1]])
def test_types_of_an_indexer_that_are_refused(tmp_path, types):
    with pytest.raises(PymlaError, match=r"indexer_types is .*; full or shared is expected for each of 2 layers"):
        converted(tmp_path, GLM | {"indexer_types": types}, random_weights(GLM))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_reads_back(tmp_path, layout):
    config = ModelConfig.from_gguf(converted(tmp_path, V2, layout=layout))
    for key, value in V2.items():
        if hasattr(config, key):
            assert getattr(config, key) == pytest.approx(value), key
    assert config.context_length == 256
    assert config.rope_theta == 5000.0
    assert vars(config.yarn) == pytest.approx(vars(Yarn(4.0, 64, 0.0707, 16.0, 2.0)))
    assert (config.scoring_func, config.group_score) == ("softmax", "max")


def test_metadata_of_the_layouts(tmp_path):
    whole = converted(tmp_path, V2, layout="kv_b", qtype="q8_0").metadata
    options = {"layout": "split", "pre": "deepseek-llm", "qtype": "q8_0"}
    split_up = ModelFile.open(convert(tmp_path / "Tiny", tmp_path / "s.gguf", **options).path).metadata
    keys = ["head_count_kv", "key_length", "value_length", "key_length_mla", "value_length_mla"]
    assert [whole.get(f"deepseek2.attention.{key}") for key in keys] == [2, 48, 96, None, None]
    assert [split_up.get(f"deepseek2.attention.{key}") for key in keys] == [1, 80, 64, 48, 96]
    assert split_up["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert split_up["deepseek2.rope.scaling.original_context_length"] == 64
    assert split_up["deepseek2.expert_gating_func"] == 1
    assert (split_up["deepseek2.expert_group_count"], split_up["deepseek2.expert_group_used_count"]) == (2, 1)
    assert split_up["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert (split_up["general.architecture"], split_up["general.name"]) == ("deepseek2", "Tiny")


def test_what_v3_leaves_unsaid(tmp_path):
    bare = {key: value for key, value in V3.items() if key not in ("rms_norm_eps", "rope_parameters", "hidden_act")}
    config = ModelConfig.from_gguf(converted(tmp_path, bare | {"rope_theta": 20000}, name="A name"))
    assert (config.scoring_func, config.group_score, config.norm_topk_prob) == ("sigmoid", "top2", True)
    assert (config.rope_theta, config.yarn, config.name) == (20000.0, None, "A name")
    assert config.rms_norm_eps == pytest.approx(1e-6)


def test_greedy_choice_ignores_groups(tmp_path):
    assert ModelConfig.from_gguf(converted(tmp_path, V2 | {"topk_method": "greedy"})).n_group == 1


def test_rope_scaling_of_older_files(tmp_path):
    older = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    config = V2 | {"rope_parameters": None, "rope_theta": 7000.0, "rope_scaling": older | {"type": "yarn"}}
    read = ModelConfig.from_gguf(converted(tmp_path, config))
    assert read.rope_theta == 7000.0
    assert read.yarn.factor == 4.0


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
@pytest.mark.parametrize("files", [1, 3])
def test_other_source_types_and_several_files(tmp_path, dtype, files):
    weights = random_weights(V2)
    if dtype == "F16":
        weights = {name: value.astype(np.float16).astype(np.float32) for name, value in weights.items()}
    file = converted(tmp_path, V2, weights, dtype, files, qtype="f32")
    assert_holds(file, expected_tensors(V2, weights, "split"), ggml.F32)


def fused(weights):
    """The experts of layer 1 in the tensors that transformers 5 holds them in."""
    prefix = "model.layers.1.mlp.experts."
    rest = {name: value for name, value in weights.items() if not name.startswith(prefix)}

    def stack(part):
        return np.stack([weights[f"{prefix}{i}.{part}_proj.weight"] for i in range(4)])

    gate_up = np.concatenate([stack("gate"), stack("up")], axis=1)
    return rest | {prefix + "gate_up_proj": gate_up, prefix + "down_proj": stack("down")}


@pytest.mark.parametrize("piece", [2000, 1 << 22])
def test_fused_experts_and_small_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(checkpoint_tensors, "PIECE_WEIGHTS", piece)
    weights = random_weights(V2)
    file = converted(tmp_path, V2, fused(weights), qtype="q8_0")
    assert_holds(file, expected_tensors(V2, weights, "split"), ggml.Q8_0)


def test_float8_weights_with_scales_per_block(tmp_path):
    config = V3 | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 40]}}
    weights = random_weights(config)
    rng = np.random.default_rng(1)
    stored, name = dict(weights), "model.layers.0.mlp.gate_proj.weight"  # 96 × 64
    codes = rng.integers(0, 127, (96, 64), np.uint8) | (rng.integers(0, 2, (96, 64), np.uint8) << 7)
    scales = rng.uniform(0.1, 2, (2, 2)).astype(np.float32)
    stored[name] = ("F8_E4M3", codes)
    stored[name + "_scale_inv"] = scales

    def value(code):
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
        return -magnitude if code & 128 else magnitude

    weights[name] = np.array(
        [[np.float32(value(int(codes[i, j]))) * scales[i // 48, j // 40] for j in range(64)] for i in range(96)]
    )
    file = converted(tmp_path, config, stored, qtype="f32")
    assert_holds(file, expected_tensors(config, weights, "split"), ggml.F32)


def test_columns_that_do_not_fit_a_block_become_f16(tmp_path):
    config = V2 | {"qk_nope_head_dim": 24, "moe_intermediate_size": 40, "n_shared_experts": 4}
    folder = hub_folder(tmp_path / "odd", config, random_weights(config))
    done = convert(folder, tmp_path / "m.gguf", qtype="q8_0", layout="split", pre="deepseek-coder")
    tensors = ModelFile.open(done.path).tensors
    odd = ["blk.0.attn_k_b.weight", "blk.1.attn_k_b.weight", "blk.1.ffn_down_exps.weight"]
    assert [note.partition(":")[0] for note in done.notes] == odd
    assert done.notes[0].endswith("24 columns are no multiple of 32: F16 for Q8_0")
    assert {tensors[name].qtype for name in odd} == {ggml.F16}
    assert tensors["blk.1.ffn_down_shexp.weight"].qtype == ggml.Q8_0


@pytest.mark.parametrize("stored", [True, False])
def test_tied_embeddings(tmp_path, stored):
    weights = random_weights(V2)
    if not stored:
        del weights["lm_head.weight"]
    file = converted(tmp_path, V2 | {"tie_word_embeddings": True}, weights, qtype="f32")
    assert "output.weight" not in file.tensors
    assert "token_embd.weight" in file.tensors


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    weights = random_weights(V3)
    extra = {"model.layers.2.eh_proj.weight": np.ones((64, 128), np.float32)}
    extra["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = hub_folder(tmp_path / "nextn", V3, weights | extra)
    done = convert(folder, tmp_path / "m.gguf", qtype="f32", pre="deepseek-coder")
    assert done.notes == ("layers 2 predict further tokens and are left out",)
    assert_holds(ModelFile.open(done.path), expected_tensors(V3, weights, "split"), ggml.F32)


def test_a_dense_model(tmp_path):
    config = V3 | {"first_k_dense_replace": 2, "n_routed_experts": None}
    weights = random_weights(V3 | {"first_k_dense_replace": 2})
    file = converted(tmp_path, config, weights, qtype="f32")
    assert_holds(file, expected_tensors(config, weights, "split"), ggml.F32)
    read = ModelConfig.from_gguf(file)
    assert (read.n_routed_experts, read.first_k_dense_replace) == (0, 2)


def test_tokenizer_metadata(tmp_path):
    metadata = converted(tmp_path).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "deepseek-coder")
    assert len(tokens) == len(types) == 300
    assert (tokens[ord("A")], tokens[32], tokens[258]) == ("A", "Ġ", "Ġa")
    assert (tokens[256], types[256]) == ("<｜begin▁of▁sentence｜>", gguf.TokenType.CONTROL)
    assert (tokens[280], types[280]) == ("<｜fim▁hole｜>", gguf.TokenType.CONTROL)
    assert (tokens[281], types[281]) == ("a word", gguf.TokenType.USER_DEFINED)
    assert (tokens[299], types[299]) == ("[PAD299]", gguf.TokenType.UNUSED)
    assert metadata["tokenizer.ggml.merges"][:3] == ["Ġ a", "t h", "th e"]
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (256, 257)
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert metadata["tokenizer.chat_template"] == TOKENIZER_CONFIG["chat_template"]


def test_merges_as_pairs(tmp_path):
    folder = hub_folder(tmp_path / "pairs", V2, random_weights(V2))
    tokenizer = tokenizer_json(CODER)
    tokenizer["model"]["merges"] = [merge.split() for merge in tokenizer["model"]["merges"]]
    write_json(folder / "tokenizer.json", tokenizer)
    metadata = ModelFile.open(convert(folder, tmp_path / "m.gguf").path).metadata
    assert metadata["tokenizer.ggml.merges"][:3] == ["Ġ a", "t h", "th e"]
    assert metadata["tokenizer.ggml.pre"] == "deepseek-coder"


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    out.write_bytes(b"an older file")
    seen = []

    def interrupt(done, total, tensor):
        seen.append((done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, progress=interrupt, pre="deepseek-coder")
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == b"an older file"
    assert all(0 <= done <= total for done, total in seen)
    convert(folder, out, progress=lambda *step: seen.append(step), pre="deepseek-coder")
    assert seen[-1][0] == seen[-1][1]
    assert ModelFile.open(out).tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 128}, "model.embed_tokens.weight has shape"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_attention_heads": True}, "num_attention_heads is true"),
        ({"q_lora_rank": None}, "q_proj.weight is missing"),
        ({"n_shared_experts": None}, "shared_experts"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"vocab_size": 256}, "embed_tokens"),
        ({"rope_parameters": YARN | {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": YARN | {"factor": None}}, "factor of the rope parameters is missing"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, "mscale_all_dim"),
        ({"rope_parameters": YARN | {"attention_factor": 1.5}}, "attention_factor"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.bits"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size"),
    ],
)
def test_config_errors(tmp_path, change, message):
    folder = hub_folder(tmp_path / "bad", V2, random_weights(V2))
    write_json(folder / "config.json", V2 | change)
    with pytest.raises(PymlaError, match=message) as error:
        convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("m.gguf*"))


def spoil(folder, kind):
    weights = random_weights(V2)
    file = folder / "model.safetensors"
    if kind == "no weights":
        file.unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "config no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "config no object":
        (folder / "config.json").write_text("[]")
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif kind == "truncated header":
        file.write_bytes(file.read_bytes()[:50])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "header no JSON":
        file.write_bytes((5).to_bytes(8, "little") + b"{{{{{")
    elif kind == "header entry":
        header = b'{"x": {"dtype": "F32", "shape": [2]}}'
        file.write_bytes(len(header).to_bytes(8, "little") + header)
    elif kind == "index without files":
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "model-9.safetensors"}})
    elif kind == "index without map":
        write_json(folder / "model.safetensors.index.json", {"weight_map": [1]})
    elif kind == "another tensor":
        safetensors(file, weights | {"model.layers.0.self_attn.q_proj.bias": np.ones(3, np.float32)})
    elif kind == "NaN":
        weights["model.layers.1.mlp.gate.weight"][2, 3] = np.nan
        safetensors(file, weights)
    elif kind == "integers":
        safetensors(file, weights | {"model.norm.weight": ("I64", np.ones(64, np.int64))})
    elif kind == "float8 without scales":
        name = "model.layers.0.mlp.up_proj.weight"
        safetensors(file, weights | {name: ("F8_E4M3", np.ones((96, 64), np.uint8))})
    elif kind == "not BPE":
        write_json(folder / "tokenizer.json", {"model": {"type": "Unigram", "vocab": []}})
    elif kind == "vocabulary":
        write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b", "c": 1}}})
    elif kind == "too many tokens":
        write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 300}, "merges": []}})
    elif kind == "merges":
        write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "neither model.safetensors"),
        ("no config", "config.json"),
        ("no tokenizer", "tokenizer.json"),
        ("config no JSON", "not valid JSON"),
        ("config no object", "JSON list"),
        ("truncated", "does not fit the file"),
        ("truncated header", "truncated"),
        ("empty", "truncated"),
        ("header no JSON", "not valid JSON"),
        ("header entry", "tensor x has a damaged"),
        ("index without files", "1 of the 1 files"),
        ("index without map", "weight_map"),
        ("another tensor", "model.layers.0.self_attn.q_proj.bias"),
        ("NaN", "blk.1.ffn_gate_inp.weight holds infinity or NaN in row 2, column 3"),
        ("integers", "type I64"),
        ("float8 without scales", "up_proj.weight_scale_inv is missing"),
        ("not BPE", "byte-pair"),
        ("vocabulary", "damaged vocabulary"),
        ("too many tokens", "300"),
        ("merges", "special tokens|merges"),
    ],
)
def test_damaged_folders(tmp_path, kind, message):
    folder = hub_folder(tmp_path / "bad", V2, random_weights(V2))
    spoil(folder, kind)
    with pytest.raises(PymlaError, match=message) as error:
        convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_weight_too_large_for_f16(tmp_path):
    weights = random_weights(V2)
    weights["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(PymlaError, match=r"blk.1.ffn_up_exps.weight holds 1e\+06 in matrix 2, row 0, column 0"):
        converted(tmp_path, V2, weights, qtype="f16")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("qtype", "largest", "too_large", "wider"), [("f16", 65504, 65520, "BF16"), ("bf16", 3.38e38, 3.4e38, "F32")]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_at_the_end_of_a_types_range(tmp_path, qtype, largest, too_large, wider, sign):
    weights = random_weights(V2)
    matrix = weights["model.layers.0.mlp.up_proj.weight"]
    matrix[5, 7] = sign * largest
    info = converted(tmp_path, V2, weights, qtype=qtype).tensors["blk.0.ffn_up.weight"]
    values = dequantise(info.data.reshape(96, -1), info.qtype)
    assert np.isfinite(values).all()
    assert values[5, 7] == pytest.approx(sign * largest, rel=0.01)
    matrix[5, 7] = sign * too_large
    shutil.rmtree(tmp_path / "Tiny")
    older = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(PymlaError, match=rf"Tiny: .*blk\.0\.ffn_up\.weight holds .*, such as {wider}$"):
        converted(tmp_path, V2, weights, qtype=qtype)
    assert (tmp_path / "m.gguf").read_bytes() == older


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("qtype", TYPES)
def test_values_too_small_for_a_scale_are_0(tmp_path, qtype):
    weights = random_weights(V2)
    weights["model.layers.0.mlp.up_proj.weight"][5] = 1e-42
    info = converted(tmp_path, V2, weights, qtype=qtype).tensors["blk.0.ffn_up.weight"]
    values = dequantise(info.data.reshape(96, -1), info.qtype)
    np.testing.assert_allclose(values[5], 0, atol=1e-41)
    assert values[4].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 2}}, "yarn_beta_fast is 1.0; it is below"),
        ({"rope_parameters": YARN | {"beta_fast": -1}}, "yarn_beta_fast is -1"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "freq_base is 0.5"),
        ({"rms_norm_eps": 2.0}, "layer_norm_rms_epsilon is 2.0"),
        ({"rms_norm_eps": 0}, "layer_norm_rms_epsilon is 0"),
        ({"rms_norm_eps": 1e-50}, "layer_norm_rms_epsilon is 0"),
        ({"n_group": 3}, "expert_group_count is 3"),
        ({"topk_group": 5}, "expert_group_used_count is 5"),
        ({"num_experts_per_tok": 5}, "expert_used_count is 5"),
        ({"routed_scaling_factor": -1}, "expert_weights_scale is -1"),
    ],
)
def test_what_load_would_refuse_is_not_written(tmp_path, monkeypatch, change, message):
    folder = hub_folder(tmp_path / "bad", V2, random_weights(V2))
    write_json(folder / "config.json", V2 | change)
    monkeypatch.setattr(module, "write_model", lambda *_, **__: pytest.fail("hours of writing"))
    with pytest.raises(PymlaError, match=f"bad: cannot be converted, the file would not load: .*{message}") as error:
        convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")
    assert ".part" not in str(error.value)
    assert not list(tmp_path.glob("m.gguf*"))


def test_tensors_that_load_would_refuse(tmp_path, monkeypatch):
    """The whole file is looked at before it gets its name."""
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))

    def missing(plan):
        yield from list(Plan.every_source(plan))[:-1]

    monkeypatch.setattr(Plan, "every_source", Plan.sources, raising=False)
    monkeypatch.setattr(Plan, "sources", missing)
    with pytest.raises(PymlaError, match=r"would not load: tensor blk\.1\.ffn_down_shexp\.weight is missing"):
        convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")
    assert not list(tmp_path.glob("m.gguf*"))


def test_yarn_betas_of_0_are_the_default(tmp_path):
    """As in transformers' ``_compute_yarn_parameters``."""
    rope = YARN | {"beta_fast": 0, "beta_slow": 0}
    yarn = ModelConfig.from_gguf(converted(tmp_path, V2 | {"rope_parameters": rope})).yarn
    assert (yarn.beta_fast, yarn.beta_slow) == (32, 1)


def test_outputs_that_are_inputs(tmp_path):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    (tmp_path / "hard.gguf").hardlink_to(folder / "model.safetensors")
    (tmp_path / "link.gguf").symlink_to(folder / "config.json")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for out in (*folder.iterdir(), tmp_path / "hard.gguf", tmp_path / "link.gguf"):
        with pytest.raises(PymlaError, match=r"is read; choose another file for the output"):
            convert(folder, out, pre="deepseek-coder")
    with pytest.raises(PymlaError, match="it is a device"):
        convert(folder, "/dev/null", pre="deepseek-coder")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # A folder may well take its own model.
    assert convert(folder, folder / "m.gguf", pre="deepseek-coder").nbytes


def test_a_name_that_is_not_unicode(tmp_path):
    assert converted(tmp_path, name="a\udcffb").metadata["general.name"] == "a?b"


def generation_config(folder, **values):
    write_json(folder / "generation_config.json", values)
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "ends", "notes"),
    [
        ([257, 280], 257, (257, 280, None), []),
        (257, [280, 257], (257, 280, None), []),
        ([280], [282, 283], (257, 282, 283), ["token 280, '<｜fim▁hole｜>', ends a text, too"]),
        ([257, -1], None, (257, None, None), []),
        ([257, 5000], None, (257, None, None), ["eos_token_id of config.json: 5000 is outside the vocabulary of 300"]),
        (
            [257, 65],
            [66],
            (257, None, None),
            [
                "eos_token_id of generation_config.json: token 66, 'B', is ordinary text",
                "eos_token_id of config.json: token 65, 'A', is ordinary text",
            ],
        ),
    ],
)
def test_several_tokens_that_end_a_text(tmp_path, config, generation, ends, notes):
    config = V2 | {"eos_token_id": config, "pad_token_id": -1}
    folder = generation_config(hub_folder(tmp_path / "Tiny", config, random_weights(V2)), eos_token_id=generation)
    tokenizer = tokenizer_json(CODER)
    tokenizer["added_tokens"] += [{"id": i, "content": f"<stop {i}>", "special": True} for i in (282, 283)]
    write_json(folder / "tokenizer.json", tokenizer)
    done = convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")
    file = ModelFile.open(done.path)
    assert tuple(file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")) == ends
    assert len(done.notes) == len(notes)
    assert all(note.startswith(start) for note, start in zip(done.notes, notes, strict=True)), done.notes
    assert {ends[0], ends[1]} - {None} <= Tokenizer.from_gguf(file).eos_ids


def test_the_first_end_without_a_name_in_the_tokenizer(tmp_path):
    folder = hub_folder(tmp_path / "Tiny", V2 | {"eos_token_id": [280, 257]}, random_weights(V2))
    (folder / "tokenizer_config.json").unlink()
    metadata = ModelFile.open(convert(folder, tmp_path / "m.gguf").path).metadata
    assert [metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot")] == [256, 280, 257]
    assert "tokenizer.chat_template" not in metadata


@pytest.mark.parametrize("ids", ["257", [257, "280"], 257.0, [[257]], {"a": 1}, True])
def test_ends_that_are_no_ids(tmp_path, ids):
    folder = generation_config(hub_folder(tmp_path / "Tiny", V2, random_weights(V2)), eos_token_id=ids)
    with pytest.raises(PymlaError, match=r"generation_config\.json: eos_token_id is .* expected"):
        convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": None}])
@pytest.mark.parametrize("single", ["<｜begin▁of▁sentence｜> A", "A <｜end▁of▁sentence｜>", "A"])
def test_the_gguf_package_finds_the_same_special_tokens(tmp_path, single, flags):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    pieces = [{"Sequence" if name == "A" else "SpecialToken": {"id": name}} for name in single.split()]
    post_processor = {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}
    write_json(folder / "tokenizer.json", tokenizer_json(CODER) | {"post_processor": post_processor})
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "add_bos_token": None}
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | names | flags)
    metadata = ModelFile.open(convert(folder, tmp_path / "m.gguf", pre="deepseek-coder").path).metadata
    theirs = gguf.SpecialVocab(folder, load_merges=True, n_vocab=300)
    assert metadata["tokenizer.ggml.merges"] == theirs.merges
    assert metadata["tokenizer.chat_template"] == theirs.chat_template
    for name in ("bos", "eos"):
        assert metadata[f"tokenizer.ggml.{name}_token_id"] == theirs.special_token_ids[name]
        assert metadata.get(f"tokenizer.ggml.add_{name}_token") == theirs.add_special_token.get(name)


def test_several_chat_templates(tmp_path):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"chat_template": named})
    metadata = ModelFile.open(convert(folder, tmp_path / "m.gguf").path).metadata
    assert (metadata["tokenizer.chat_template"], metadata["tokenizer.chat_template.tool_use"]) == ("D", "T")
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"chat_template": named[1:]})
    done = convert(folder, tmp_path / "m.gguf")
    assert "none of the templates is named default" in done.notes[0]
    # The file beside it is what transformers reads.
    (folder / "chat_template.jinja").write_text("\ufeffJ", encoding="utf-8")
    done = convert(folder, tmp_path / "m.gguf")
    assert ModelFile.open(done.path).metadata["tokenizer.chat_template"] == "J"
    assert not done.notes


def test_output_that_cannot_be_written(tmp_path):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    with pytest.raises(PymlaError, match="cannot be written"):
        convert(folder, tmp_path / "nowhere" / "m.gguf", pre="deepseek-coder")
    (tmp_path / "taken").mkdir()
    with pytest.raises(PymlaError, match="cannot be written"):
        convert(folder, tmp_path / "taken", pre="deepseek-coder")
    assert not list(tmp_path.glob("taken*/*"))
    assert not (tmp_path / "taken.part").exists()


def test_a_full_disk_is_found_out_before_writing(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PymlaError, match=r"disk has 0\.0 GiB free"):
        convert(folder, tmp_path / "m.gguf", pre="deepseek-coder")


@pytest.mark.parametrize("limit", [10, 3000, 50_000, -1])
def test_a_disk_that_becomes_full(tmp_path, limit):
    """A limit on the size of files: the system refuses to write on, in the header, the vocabulary, the tensors, or when
    the last bytes leave the buffer."""
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    out = tmp_path / "m.gguf"
    limit %= convert(folder, out, pre="deepseek-coder").nbytes
    out.write_bytes(b"an older file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(PymlaError, match=r"cannot be written \(File too large\)"):
            convert(folder, out, pre="deepseek-coder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == b"an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny", "m.gguf"]


@pytest.mark.parametrize(("option", "value"), [("qtype", ["q8_0"]), ("pre", "kimi"), ("pre", 1), ("name", 1)])
def test_arguments_that_are_refused(tmp_path, option, value):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    with pytest.raises(PymlaError, match=f"`{option}`"):
        convert(folder, tmp_path / "m.gguf", **{option: value})


@pytest.mark.parametrize(("option", "value"), [("qtype", "q9_k"), ("layout", "k_b")])
def test_unknown_options(tmp_path, option, value):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    with pytest.raises(PymlaError, match=f"(?i){value}"):
        convert(folder, tmp_path / "m.gguf", **{option: value})


def test_command(tmp_path):
    folder = hub_folder(tmp_path / "Tiny", V2, random_weights(V2))
    result = CliRunner().invoke(
        command, [str(folder), str(tmp_path / "m.gguf"), "--type", "bf16", "--layout", "all", "--name", "N"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    file = ModelFile.open(tmp_path / "m.gguf")
    assert file.metadata["general.name"] == "N"
    assert "blk.0.attn_k_b.weight" in file.tensors
    assert f"{file.nbytes / 2**20:.1f} MiB" in result.stderr


def test_roundtrip_error_is_that_of_the_type(tmp_path):
    weights = random_weights(V2)
    for qtype, error in (("f32", 0), ("bf16", 0), ("f16", 1e-3), ("q8_0", 0.01)):
        shutil.rmtree(tmp_path / "Tiny", ignore_errors=True)
        info = converted(tmp_path, V2, weights, qtype=qtype).tensors["blk.1.ffn_up_exps.weight"]
        values = dequantise(info.data.reshape(4 * 32, -1), info.qtype).reshape(4, 32, 64)
        for expert in range(4):
            wanted = weights[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
            assert np.abs(values[expert] - wanted).max() <= error * np.abs(wanted).max()


def llama_pre(name):
    """llama.cpp's own regular expressions, as tokenizer.json holds them."""
    return json.loads(PRE_TOKENIZERS[name].__getstate__())["pretokenizers"][:-1]


def write_tokenizer(folder, pre_tokenizers, **changes):
    folder.mkdir(exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer_json(pre_tokenizers) | changes)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizer_is_found_out_by_where_it_cuts(tmp_path, name):
    """And by whether a piece that is a token needs merges. Some have several names."""
    path = write_tokenizer(tmp_path, llama_pre(name))
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["ignore_merges"] = name in IGNORE_MERGES
    write_json(path, tokenizer)
    found = detect_pre(path)
    assert PRE_TOKENIZERS[found] is PRE_TOKENIZERS[name]
    assert (found in IGNORE_MERGES) == (name in IGNORE_MERGES)
    tokenizer["model"]["ignore_merges"] = name not in IGNORE_MERGES
    write_json(path, tokenizer)
    assert PRE_TOKENIZERS[detect_pre(path)] is PRE_TOKENIZERS[name]


def test_pre_tokenizer_is_found_out_by_its_tokens(tmp_path):
    digits = {"type": "Digits", "individual_digits": True}
    for name in ("deepseek-llm", "deepseek-coder"):
        path = write_tokenizer(tmp_path, [*llama_pre(name)[:-1], digits])
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if not m[0].isdigit()]
        write_json(path, tokenizer)
        assert detect_pre(path) == name


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(tmp_path, changes):
    path = write_tokenizer(tmp_path, llama_pre("deepseek-v3"), **changes)
    with pytest.raises(PymlaError, match=r"none of deepseek-llm, .*`pre`"):
        detect_pre(path)


def test_a_tokenizer_that_cannot_be_read(tmp_path):
    path = write_tokenizer(tmp_path, [], pre_tokenizer={"type": "Unheard"})
    with pytest.raises(PymlaError, match="cannot be read by the tokenizers package"):
        detect_pre(path)
