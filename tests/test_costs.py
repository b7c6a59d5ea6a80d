"""Costs against figures worked out elsewhere, and against what a file holds."""

import dataclasses
import math

import pytest
from make_model import PRESETS, make_model

from pymla import ggml
from pymla.engine.cache_layout import cache_bytes, row_bytes
from pymla.engine.costs import nextn_ops, step_ops, token_bytes, token_macs
from pymla.engine.forms import cheaper_form
from pymla.engine.memory_plan import choice_bytes, derived_bytes, scratch_bytes, tensor_bytes
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile, TensorInfo
from pymla.models.config import Indexer, ModelConfig, Yarn
from pymla.scratch import CHOICE_SCRATCH

V2_LITE = ModelConfig(
    architecture="deepseek2",
    name="DeepSeek-V2-Lite",
    vocab_size=102400,
    context_length=163840,
    hidden_size=2048,
    num_hidden_layers=27,
    intermediate_size=10944,
    first_k_dense_replace=1,
    num_attention_heads=16,
    rms_norm_eps=1e-6,
    q_lora_rank=0,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    moe_intermediate_size=1408,
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    scoring_func="softmax",
    n_group=1,
    topk_group=1,
    group_score="max",
    rope_theta=10000.0,
    yarn=Yarn(40.0, 4096, 0.0707),
    original_context_length=4096,
)


def v2_lite_tensors(qtype=ggml.Q4_0, layout="kv_b"):
    """V2-Lite's tensors without their bytes: matrices of `qtype`, Q6_K output, F32 norms and router."""
    shapes = {"token_embd": (102400, 2048), "output": (102400, 2048), "output_norm": (2048,)}
    for layer in range(27):
        names = {
            "attn_norm": (2048,),
            "attn_q": (3072, 2048),
            "attn_kv_a_mqa": (576, 2048),
            "attn_kv_a_norm": (512,),
            "attn_output": (2048, 2048),
            "ffn_norm": (2048,),
        }
        if layout != "split":
            names["attn_kv_b"] = (4096, 512)
        if layout != "kv_b":
            names |= {"attn_k_b": (16, 512, 128), "attn_v_b": (16, 128, 512)}
        if layer == 0:
            names |= {"ffn_gate": (10944, 2048), "ffn_up": (10944, 2048), "ffn_down": (2048, 10944)}
        else:
            names["ffn_gate_inp"] = (64, 2048)
            for suffix, shape in (("_exps", (64, 1408, 2048)), ("_shexp", (2816, 2048))):
                names |= {f"ffn_gate{suffix}": shape, f"ffn_up{suffix}": shape}
                names[f"ffn_down{suffix}"] = (*shape[:-2], shape[-1], shape[-2])
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    types = {"output": ggml.Q6_K}
    tensors = {}
    for name, shape in shapes.items():
        is_f32 = len(shape) == 1 or name.endswith("ffn_gate_inp")
        found = types.get(name, ggml.F32 if is_f32 else qtype)
        tensors[f"{name}.weight"] = TensorInfo(f"{name}.weight", found, shape, None, None)
    return tensors


def by_name(ops):
    return {op.name: op for op in ops}


def test_v2_lite_macs():
    """2.24 GMAC per prompt token, 2.45 per generated one: it has logits. 0.47 MMAC per token of context."""
    prompt = step_ops(V2_LITE, None, 1, 0, mla="1", logits=0)
    assert sum(op.macs for op in prompt) == pytest.approx(2.24e9, rel=0.002)
    assert token_macs(V2_LITE, 0) == pytest.approx(2.45e9, rel=0.002)
    assert token_macs(V2_LITE, 1001) - token_macs(V2_LITE, 1) == 1000 * 27 * 16 * (576 + 512)
    assert token_macs(V2_LITE, 16384) - token_macs(V2_LITE, 0) == pytest.approx(7.7e9, rel=0.002)


def test_v2_lite_bytes():
    """1.43 GB per token in Q4_0 with a Q6_K output, without the router's 13.6 MB in F32."""
    ops = by_name(step_ops(V2_LITE, v2_lite_tensors(layout="all"), 1, 0))
    assert ops["router"].nbytes == 26 * 64 * 2048 * 4
    total = sum(op.nbytes for op in ops.values())
    assert total - ops["router"].nbytes == pytest.approx(1.43e9, rel=0.002)
    assert ops["output"].nbytes == 102400 * 2048 // 256 * 210
    assert ops["experts"].nbytes == 26 * 6 * 3 * 1408 * 2048 // 32 * 18


def test_transposed_k_b_costs_its_8_bits():
    file = token_bytes(V2_LITE, v2_lite_tensors(layout="all"), 0)
    derived = token_bytes(V2_LITE, v2_lite_tensors(layout="split"), 0)
    k_b = 27 * 16 * 512 * 128
    assert derived - file == k_b * 34 // 32 - k_b * 18 // 32


def test_macs_are_the_same_in_all_layouts():
    expected = [op.macs for op in step_ops(V2_LITE, None, 7, 100)]
    for layout in ("kv_b", "split", "all"):
        assert [op.macs for op in step_ops(V2_LITE, v2_lite_tensors(layout=layout), 7, 100)] == expected


def test_fused_gate_and_up():
    tensors = v2_lite_tensors()
    expected = step_ops(V2_LITE, tensors, 3, 10)
    for layer in range(1, 27):
        gate = tensors.pop(f"blk.{layer}.ffn_gate_exps.weight")
        del tensors[f"blk.{layer}.ffn_up_exps.weight"]
        name = f"blk.{layer}.ffn_gate_up_exps.weight"
        tensors[name] = TensorInfo(name, gate.qtype, (64, 2816, 2048), None, None)
    assert step_ops(V2_LITE, tensors, 3, 10) == expected


def test_missing_tensor():
    tensors = v2_lite_tensors()
    del tensors["blk.3.ffn_down_exps.weight"]
    with pytest.raises(PymlaError, match=r"blk\.3\.ffn_down_exps\.weight is missing"):
        step_ops(V2_LITE, tensors, 1, 1)


def test_tied_output():
    tensors = v2_lite_tensors()
    del tensors["output.weight"]
    output = by_name(step_ops(V2_LITE, tensors, 1, 1))["output"]
    assert output.nbytes == tensor_bytes(tensors["token_embd.weight"])


def test_experts_of_a_prompt():
    """One token touches its experts, many all of them."""
    tensors = v2_lite_tensors()

    def experts(tokens):
        return by_name(step_ops(V2_LITE, tensors, tokens, tokens))["experts"]

    everything = sum(tensor_bytes(t) for name, t in tensors.items() if name.endswith("_exps.weight"))
    assert experts(1).nbytes == everything * 6 // 64
    assert experts(2).nbytes == pytest.approx(everything * (1 - (58 / 64) ** 2))
    assert experts(512).nbytes == pytest.approx(everything)
    assert experts(512).macs == 512 * experts(1).macs


@pytest.mark.parametrize(("cache_type", "row"), [("q8_0", 672), ("f16", 1152), ("bf16", 1152), ("f32", 2304)])
def test_cache_rows(cache_type, row):
    assert row_bytes(V2_LITE, cache_type, "auto") == 27 * row
    assert cache_bytes(V2_LITE, cache_type, "3", 65) == 128 * 27 * row
    ops = {cached: by_name(step_ops(V2_LITE, None, 1, cached, cache_type=cache_type)) for cached in (0, 10)}
    assert ops[0]["attention"].nbytes == 0
    assert ops[10]["attention"].nbytes == 10 * 27 * row


@pytest.mark.parametrize(("cache_type", "size"), [("q8_0", 1.0625), ("f16", 2), ("bf16", 2), ("f32", 4)])
def test_rows_of_the_full_cache(cache_type, size):
    assert row_bytes(V2_LITE, cache_type, "0") == 27 * 16 * 320 * size


def test_unknown_cache_type():
    with pytest.raises(PymlaError, match="'q3_0'"):
        row_bytes(V2_LITE, "q3_0", "auto")


# The two forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "cached", "form"),
    [
        (1, 1, "absorbed"),
        (1, 100000, "absorbed"),
        (16, 16384, "absorbed"),
        (150, 16384, "absorbed"),
        (200, 16384, "expanded"),
        (512, 16384, "expanded"),
        (512, 512, "expanded"),
        (2, 2, "expanded"),
    ],
)
def test_cheaper_form(tokens, cached, form):
    assert cheaper_form(V2_LITE, tokens, cached) == form


def test_cheaper_form_is_cheaper():
    for tokens, cached in [(2, 2), (5, 64), (30, 1000), (171, 16384), (172, 16384), (64, 200)]:
        macs = {
            form: sum(op.macs for op in step_ops(V2_LITE, None, tokens, cached, mla=mla))
            for form, mla in (("absorbed", "1"), ("expanded", "3"))
        }
        assert cheaper_form(V2_LITE, tokens, cached) == min(macs, key=macs.get)


def test_attention_counts_pairs():
    """Three new tokens on four old ones see 5, 6 and 7."""
    attention = {mla: by_name(step_ops(V2_LITE, None, 3, 7, mla=mla))["attention"].macs for mla in "013"}
    pairs = (5 + 6 + 7) * 27 * 16
    assert attention == {"0": pairs * 320, "1": pairs * 1088, "3": pairs * 320}


def test_up_projection_of_new_or_of_all():
    up = {mla: by_name(step_ops(V2_LITE, None, 3, 7, mla=mla))["attention up"].macs for mla in "0123"}
    weights = 27 * 4096 * 512
    assert up == {"0": 3 * weights, "1": 3 * weights, "2": 7 * weights, "3": 7 * weights}


# Whole files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "cached"), [("tiny", 5), ("tiny-v3.2", 500)])
def test_a_drafted_token_reads_the_nextn_block(tmp_path, preset, cached):
    """Where every expert is chosen: its matrices, the model's output matrix, two rows and its layer of the cache."""
    every = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1}
    shape = dataclasses.replace(PRESETS[preset], **every)
    file = ModelFile.open(make_model(tmp_path / "tiny.gguf", shape, layout="kv_b", qtype="f16"))
    config = ModelConfig.from_gguf(file)
    block = f"blk.{shape.num_hidden_layers}."
    matrices = {name: each for name, each in file.tensors.items() if name.startswith(block) and len(each.shape) > 1}
    expected = sum(map(tensor_bytes, matrices.values())) + tensor_bytes(file.tensors["output.weight"])
    ops = by_name(nextn_ops(config, file.tensors, 1, cached, cache_type="f16"))
    row = 2 * (shape.kv_lora_rank + shape.qk_rope_head_dim)
    attended = min(cached, shape.index_topk or cached)
    keys = cached * 2 * shape.index_head_dim if attended < cached else 0
    assert ops["attention"].nbytes == attended * row
    assert sum(op.nbytes for op in ops.values()) == expected + 2 * shape.hidden_size + attended * row + keys
    assert ops["projection"].macs == 2 * shape.hidden_size**2


@pytest.mark.parametrize("layout", ["kv_b", "split", "all"])
def test_a_token_of_a_model_with_all_experts_reads_the_file(tmp_path, layout):
    """Where every expert is chosen, the matrices that a token reads are those of the file."""
    shape = dataclasses.replace(PRESETS["tiny"], n_group=1, topk_group=1, num_experts_per_tok=8)
    file = ModelFile.open(make_model(tmp_path / "tiny.gguf", shape, layout=layout, qtype="f16"))
    config = ModelConfig.from_gguf(file)
    matrices = {name: tensor for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    if layout == "all":
        matrices = {name: tensor for name, tensor in matrices.items() if "attn_kv_b" not in name}
    row = file.tensors["token_embd.weight"].data.nbytes // config.vocab_size
    weights = sum(tensor.data.nbytes for name, tensor in matrices.items() if name != "token_embd.weight")
    assert token_bytes(config, file.tensors, 0) == weights + row
    macs = sum(math.prod(tensor.shape) for name, tensor in matrices.items() if name != "token_embd.weight")
    assert token_macs(config, 0) == macs


@pytest.mark.parametrize(
    ("layout", "qtype", "size"),
    [("kv_b", "q4_0", 0), ("all", "q4_0", 0), ("split", "q4_0", 34 / 32), ("split", "f16", 2), ("split", "f32", 4)],
)
def test_derived(layout, qtype, size):
    tensors = v2_lite_tensors(ggml.ID[qtype.upper()], layout)
    assert derived_bytes(V2_LITE, tensors) == 27 * 16 * 512 * 128 * size


def test_scratch_grows_with_the_slice_and_is_bounded_in_the_context():
    scratch = [scratch_bytes(V2_LITE, "auto", ctx, 512) for ctx in (64, 4096, 163840, 1 << 20)]
    assert scratch == sorted(scratch)
    assert scratch[-1] == scratch[-2]
    assert scratch_bytes(V2_LITE, "auto", 4096, 1024) > scratch_bytes(V2_LITE, "auto", 4096, 512)
    assert scratch_bytes(V2_LITE, "1", 163840, 512) < scratch[-1]


# Sparse attention -----------------------------------------------------------------------------------------------------

#: V3.2 with two layers that have an indexer and one that shares a choice.
V32 = dataclasses.replace(
    V2_LITE,
    architecture="deepseek32",
    hidden_size=7168,
    num_hidden_layers=3,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    n_routed_experts=0,
    indexer=Indexer(heads=64, head_dim=128, top_k=2048, full=(True, False, True)),
)


def test_costs_of_sparse_attention():
    pair, key = 128 * (2 * 512 + 64), 64 * 128
    matrices = 64 * 128 * 1536 + 64 * 7168
    for cached in (2048, 2049, 65536):
        ops = {op.name: op for op in step_ops(V32, None, 1, cached, cache_type="q8_0")}
        chosen = min(cached, 2048)
        assert ops["attention"].macs == 3 * chosen * pair
        assert ops["attention"].nbytes == 3 * chosen * (16 * 34 + 2 * 64)
        assert ops["index keys"].macs == 2 * 128 * 7168
        assert ops["index"].macs == (2 * (matrices + cached * key) if cached > 2048 else 0)
        assert ops["index"].nbytes == (2 * cached * 4 * 34 if cached > 2048 else 0)
    dense = {op.name: op for op in step_ops(V32.dense(), None, 1, 65536)}
    assert not {"index", "index keys"} & dense.keys()
    assert dense["attention"].macs == 32 * ops["attention"].macs


def test_costs_of_a_prompt_of_sparse_attention():
    """The first tokens attend to all positions, with expanded keys and values."""
    ops = {op.name: op.macs for op in step_ops(V32, None, 3000, 3000)}
    seen = sum(range(2049, 3001))
    assert ops["index"] == 2 * (952 * (64 * 128 * 1536 + 64 * 7168) + seen * 64 * 128)
    dense, sparse = 2048 * 2049 // 2 * 128 * 320, 952 * 2048 * 128 * (2 * 512 + 64)
    assert ops["attention"] == 3 * (dense + sparse)


@pytest.mark.parametrize(
    ("cache_type", "key"), [("f32", 512), ("f16", 256), ("bf16", 256), ("q8_0", 136), ("q4_0", 136)]
)
def test_rows_of_the_indexer(cache_type, key):
    without = row_bytes(V32.dense(), cache_type, "auto")
    assert row_bytes(V32, cache_type, "auto") == without + 2 * key
    assert [row_bytes(V32, cache_type, "auto", [i]) - without // 3 for i in range(3)] == [key, 0, key]
    assert cache_bytes(V32, cache_type, "auto", 65, range(1)) == 128 * (without // 3 + key)


def test_memory_of_choices():
    assert choice_bytes(V32.dense(), 1 << 17) == choice_bytes(V32, 2048) == 0
    assert choice_bytes(V32, 4096) == 4096 * 4 * 2048 + CHOICE_SCRATCH
    assert choice_bytes(V32, 1 << 17) == (8192 + 2048) * 4 * 2048 + CHOICE_SCRATCH
    more = scratch_bytes(V32, "1", 4096, 512) - scratch_bytes(V32.dense(), "1", 4096, 512)
    assert more == choice_bytes(V32, 4096) + 5 * 512 * (64 * 129 + 128)
