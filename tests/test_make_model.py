import dataclasses
import math
import shutil
from collections import namedtuple

import gguf
import make_model as script
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import quants
from make_model import PRESETS, make_model
from model_mixes import uniform

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.make.fallbacks import fitting_type, rows_apart
from pymla.make.model_metadata import FILE_TYPES
from pymla.reference.quant import dequantise

TINY = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=96,
    intermediate_size=160,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    vocab_size=300,
)


def read(path):
    """Tensors by name and metadata by key, by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {t.name: t for t in reader.tensors}, {key: field.contents() for key, field in reader.fields.items()}


def weights(tensor):
    return quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("qtype", script.QTYPES, ids=script.QTYPE_NAMES)
def test_weights_have_the_asked_type(tmp_path, qtype):
    """Read by pymla, because gguf-py refuses ik_llama.cpp's types."""
    shape = dataclasses.replace(TINY, hidden_size=256, num_hidden_layers=1, first_k_dense_replace=0, vocab_size=304)
    file = ModelFile.open(make_model(tmp_path / "m.gguf", shape, qtype=qtype))
    plain = ggml.plain_type(qtype)
    assert file.tensors["blk.0.ffn_gate_exps.weight"].qtype == qtype
    assert file.tensors["blk.0.ffn_gate_inp.weight"].qtype == ggml.F32
    assert file.tensors["output.weight"].qtype == (qtype if plain in ggml.FLOATS else ggml.Q6_K)
    assert file.tensors["token_embd.weight"].qtype == rows_apart(qtype)
    assert file.metadata.get("general.file_type") == FILE_TYPES.get(qtype)
    info = file.tensors["blk.0.ffn_gate_exps.weight"]
    w = dequantise(info.data.reshape(-1, ggml.row_bytes(qtype, 256)), qtype)
    assert abs(w.std() * 16 - 1) < 0.05


@pytest.mark.parametrize("layout", ["split", "all"])
@pytest.mark.parametrize(
    ("qtype", "k_type"),
    [
        ("q4_k", ggml.Q5_0),
        ("iq4_xs", ggml.Q8_0),
        ("iq4_k_r4", ggml.Q5_0),
        ("q8_0_r8", ggml.Q8_0),
        ("iq5_ks", ggml.Q5_0),
        ("q8_kv", ggml.Q8_0),
    ],
)
def test_layouts_of_types_without_a_quantiser(tmp_path, layout, qtype, k_type):
    """k_b is of a type that weights can be quantised to, and v_b has the rows of kv_b."""
    shape = dataclasses.replace(TINY, hidden_size=256, kv_lora_rank=256, num_hidden_layers=1)
    whole = ModelFile.open(make_model(tmp_path / "kv_b.gguf", shape, qtype=qtype)).tensors["blk.0.attn_kv_b.weight"]
    tensors = ModelFile.open(make_model(tmp_path / "m.gguf", shape, qtype=qtype, layout=layout)).tensors
    k_b, v_b = (tensors[f"blk.0.attn_{each}_b.weight"] for each in "kv")
    assert (v_b.qtype, k_b.qtype) == (ggml.ID[qtype.upper()], k_type)
    expected, k, v = (
        dequantise(each.data.reshape(math.prod(each.shape[:-1]), -1), each.qtype).reshape(TINY.num_attention_heads, -1)
        for each in (whole, k_b, v_b)
    )
    nope, rank = TINY.qk_nope_head_dim, 256
    expected = expected.reshape(len(expected), -1, rank)
    np.testing.assert_array_equal(v, expected[:, nope:].reshape(v.shape))
    k = k.reshape(len(k), rank, nope).transpose(0, 2, 1)
    assert np.abs(k - expected[:, :nope]).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("qtype", "shape", "expected"),
    [
        ("Q6_K", (5, 512), "Q6_K"),
        ("Q6_K", (5, 1408), "Q8_0"),
        ("Q4_K", (5, 1408), "Q5_0"),
        ("Q5_K", (5, 1408), "Q5_1"),
        ("Q2_K", (5, 128), "Q4_0"),
        ("TQ1_0", (5, 128), "Q4_0"),
        ("IQ2_XXS", (5, 128), "IQ4_NL"),
        ("IQ4_KS", (5, 10944), "IQ4_NL"),
        ("IQ5_K", (5, 1408), "Q6_0"),
        ("IQ6_K", (5, 1408), "Q8_0"),
        ("NVFP4", (5, 96), "Q8_0"),
        ("Q4_K", (5, 100), "F16"),
        ("Q4_0", (5, 100), "F16"),
        ("F32", (7,), "F32"),
        ("IQ4_K_R4", (3, 8, 512), "IQ4_K_R4"),
        ("IQ4_K_R4", (3, 6, 512), "IQ4_K"),
        ("IQ4_K_R4", (3, 8, 1408), "Q5_0"),
        ("Q8_0_R8", (4, 32), "Q8_0"),
        ("IQ1_M_R4", (3, 512), "IQ1_M"),
    ],
)
def test_types_that_do_not_fit_a_matrix_fall_back(qtype, shape, expected):
    assert ggml.NAME[fitting_type(ggml.ID[qtype], shape)] == expected


def test_a_seed_gives_one_model_and_another_seed_another(tmp_path):
    a = make_model(tmp_path / "a.gguf", TINY).read_bytes()
    b = make_model(tmp_path / "b.gguf", TINY).read_bytes()
    c = make_model(tmp_path / "c.gguf", TINY, seed=1).read_bytes()
    assert a == b
    assert a != c
    assert len(a) == len(c)


def test_experts_and_layers_differ(tmp_path):
    shape = dataclasses.replace(TINY, first_k_dense_replace=0)
    tensors, _ = read(make_model(tmp_path / "m.gguf", shape))
    experts = np.concatenate([tensors[f"blk.{i}.ffn_up_exps.weight"].data for i in range(2)])
    assert len({expert.tobytes() for expert in experts}) == 2 * TINY.n_routed_experts


@pytest.mark.parametrize(("qtype", "allowed"), [("f32", 0), ("q8_0", 0.02), ("q4_0", 0.2)])
def test_layouts_hold_the_same_weights(tmp_path, qtype, allowed):
    kv_b, _ = read(make_model(tmp_path / "kv_b.gguf", TINY, qtype=qtype))
    split, metadata = read(make_model(tmp_path / "split.gguf", TINY, qtype=qtype, layout="split"))
    every, _ = read(make_model(tmp_path / "all.gguf", TINY, qtype=qtype, layout="all"))
    name = "blk.1.attn_{}.weight".format
    assert name("kv_b") not in split
    assert name("k_b") not in kv_b
    assert metadata["deepseek2.attention.head_count_kv"] == 1
    assert metadata["deepseek2.attention.key_length"] == TINY.kv_lora_rank + TINY.qk_rope_head_dim
    assert metadata["deepseek2.attention.key_length_mla"] == TINY.qk_nope_head_dim + TINY.qk_rope_head_dim

    heads, nope, rank = TINY.num_attention_heads, TINY.qk_nope_head_dim, TINY.kv_lora_rank
    both = weights(kv_b[name("kv_b")]).reshape(heads, nope + TINY.v_head_dim, rank)
    np.testing.assert_array_equal(weights(split[name("v_b")]), both[:, nope:])
    k_b = weights(split[name("k_b")])
    assert k_b.shape == (heads, rank, nope)
    # k_b is quantised again after transposing.
    assert np.abs(k_b - both[:, :nope].transpose(0, 2, 1)).max() <= allowed * np.abs(both).max()
    assert every[name("k_b")].data.tobytes() == split[name("k_b")].data.tobytes()
    assert weights(every[name("k_b")]).shape == (heads * rank, nope)
    assert every[name("kv_b")].data.tobytes() == kv_b[name("kv_b")].data.tobytes()


def test_switches_of_a_shape_show_in_the_file(tmp_path):
    tensors, metadata = read(make_model(tmp_path / "v3.gguf", TINY))
    assert "blk.1.attn_q_a.weight" in tensors
    assert "blk.1.exp_probs_b.bias" in tensors
    assert metadata["deepseek2.expert_gating_func"] == 2
    assert metadata["deepseek2.expert_group_used_count"] == 2
    assert metadata["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    lite = dataclasses.replace(
        TINY, q_lora_rank=0, scoring_func="softmax", n_group=1, yarn_factor=1.0, tie_word_embeddings=True
    )
    tensors, metadata = read(make_model(tmp_path / "lite.gguf", lite))
    assert "blk.1.attn_q.weight" in tensors
    assert not {"blk.1.exp_probs_b.bias", "output.weight"} & tensors.keys()
    assert metadata["deepseek2.expert_gating_func"] == 1
    assert [metadata[f"deepseek2.expert_group_{key}count"] for key in ("", "used_")] == [1, 1]
    assert "deepseek2.rope.scaling.type" not in metadata


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("v2-lite", 15.7),
        ("v2", 235.7),
        ("v3", 671.0),
        ("kimi-k2", 1026.4),
        ("glm-4.7-flash", 29.9),
        ("moonlight", 16.0),
        ("v3.2", 671.9),
        ("glm-5", 744.0),
        ("glm-5.2", 743.0),
        ("minicpm3-4b", 4.1),
        ("plm-1.8b", 1.83),
        ("mistral-small-4", 119.0),
        ("gigachat3", 10.7),
        ("kanana-2", 30.5),
        ("joyai-llm-flash", 48.7),
        ("youtu-llm", 1.96),
        ("mistral-large-3", 673.0),
    ],
)
def test_presets_have_the_real_models_size(preset, billions):
    # As the model cards give it; V3's without its 14 B of multi-token prediction.
    tensors = script.model_tensors(PRESETS[preset], "kv_b", uniform(ggml.Q4_0, ggml.Q6_K), 0)
    count = sum(int(np.prod(t.shape)) for t in tensors)
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_further_switches_of_a_shape(tmp_path):
    shape = dataclasses.replace(
        TINY, temperature_scale=0.1, temperature_length=128, num_nextn_predict_layers=1, fused_experts=True
    )
    tensors, metadata = read(make_model(tmp_path / "m.gguf", shape))
    assert metadata["deepseek2.block_count"] == 3
    assert metadata["deepseek2.nextn_predict_layers"] == 1
    assert metadata["deepseek2.attention.temperature_scale"] == pytest.approx(0.1)
    assert metadata["deepseek2.attention.temperature_length"] == 128
    assert list(tensors["blk.2.nextn.eh_proj.weight"].shape) == [2 * shape.hidden_size, shape.hidden_size]
    assert "blk.2.attn_output.weight" in tensors
    assert "blk.1.ffn_gate_exps.weight" not in tensors
    fused = [shape.hidden_size, 2 * shape.moe_intermediate_size, shape.n_routed_experts]
    assert list(tensors["blk.1.ffn_gate_up_exps.weight"].shape) == fused


def test_dense_throughout(tmp_path):
    shape = dataclasses.replace(TINY, n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=0)
    tensors, metadata = read(make_model(tmp_path / "m.gguf", shape))
    assert metadata["deepseek2.leading_dense_block_count"] == 2
    assert "blk.1.ffn_gate.weight" in tensors
    assert not any("exp" in name for name in tensors)


def test_layers_option(tmp_path):
    tensors, metadata = read(make_model(tmp_path / "m.gguf", TINY, layers=1))
    assert metadata["deepseek2.block_count"] == 1
    assert metadata["deepseek2.leading_dense_block_count"] == 1
    assert not any(name.startswith("blk.1.") for name in tensors)


def test_vocabulary_is_copied_and_padded(tmp_path):
    vocab = make_model(tmp_path / "vocab.gguf", TINY)
    larger = dataclasses.replace(TINY, vocab_size=320)
    tensors, metadata = read(make_model(tmp_path / "m.gguf", larger, vocab=vocab))
    _, original = read(vocab)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tensors["token_embd.weight"].shape[1] == len(tokens) == 320
    assert tokens[:300] == original["tokenizer.ggml.tokens"]
    assert tokens[-1] == "[PAD319]"
    assert metadata["tokenizer.ggml.token_type"][300:] == [gguf.TokenType.UNUSED] * 20
    for key in ("merges", "bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token", "pre", "model"):
        assert metadata[f"tokenizer.ggml.{key}"] == original[f"tokenizer.ggml.{key}"]
    with pytest.raises(PymlaError, match="300 tokens, but the model's vocabulary holds 280"):
        make_model(tmp_path / "n.gguf", dataclasses.replace(TINY, vocab_size=280), vocab=vocab)


def test_synthetic_tokenizer_covers_the_bytes():
    tokenizer = script.synthetic_tokenizer(258)
    tokens = tokenizer["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 258
    assert tokens[ord("A")] == "A"
    assert tokens[ord(" ")] == "Ġ"
    with pytest.raises(PymlaError, match="257 tokens is too small"):
        script.synthetic_tokenizer(257)


def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PymlaError, match="free"):
        make_model(tmp_path / "m.gguf", TINY)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(tmp_path / "m.gguf", TINY, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    make_model(tmp_path / "m.gguf", TINY, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    assert sorted(calls) == calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "v9"}, "unknown preset 'v9'"),
        ({"layout": "mixed"}, "unknown layout 'mixed'"),
        ({"qtype": "q8_1"}, "no random weights of type"),
        ({"layers": 0}, "at least one layer"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, message):
    with pytest.raises(PymlaError, match=message):
        make_model(tmp_path / "m.gguf", **{"shape": TINY} | options)


def test_command_line(tmp_path):
    run = CliRunner().invoke
    assert "Examples:" in run(script.main, ["--help"]).output
    out = tmp_path / "m.gguf"
    result = run(script.main, ["tiny", str(out), "--layers", "2", "--qtype", "q8_0"])
    assert result.exit_code == 0, result.output
    assert read(out)[1]["deepseek2.block_count"] == 2
    result = run(script.main, ["tiny", str(tmp_path / "missing" / "m.gguf")])
    assert result.exit_code == 2
    assert "missing" in result.output
    assert "refuse" in run(script.main, ["v2-lite", str(tmp_path / "missing" / "m"), "--layers", "2"]).output
