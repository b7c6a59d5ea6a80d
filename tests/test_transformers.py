"""Whole models against transformers itself, where it is installed: other seeds and shapes than the golden files."""

import dataclasses

import numpy as np
import pytest
from compare import assert_close
from make_golden import SHAPES, SPARSE_SHAPES, clear_model, logits, prompts, to_gguf
from model_errors import MODELS, modes_of

import pymla

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

SEED = 1000
LITE, V2, V3, MOONLIGHT = (SHAPES[name] for name in ("v2-lite", "v2", "v3", "moonlight"))
CASES = {
    **SHAPES,
    "odd heads, uneven head sizes": dataclasses.replace(
        V3, num_attention_heads=5, qk_nope_head_dim=64, v_head_dim=96, kv_lora_rank=96
    ),
    "no dense layer, one expert a token": dataclasses.replace(LITE, first_k_dense_replace=0, num_experts_per_tok=1),
    "dense layers only": dataclasses.replace(V3, first_k_dense_replace=3),
    "every expert chosen": dataclasses.replace(MOONLIGHT, num_experts_per_tok=10),
    "one group of many": dataclasses.replace(V2, n_group=2, topk_group=1),
    "V3's YaRN, far past the original context": dataclasses.replace(V3, yarn_factor=40.0, yarn_original=8),
    "Kimi-K2's YaRN": dataclasses.replace(MOONLIGHT, yarn_factor=32.0, yarn_original=16, beta_fast=1.0),
    "tied embeddings": dataclasses.replace(LITE, tie_word_embeddings=True),
}
V32, GLM = SPARSE_SHAPES.values()
CASES |= {
    **SPARSE_SHAPES,
    "a single position": dataclasses.replace(V32, index_topk=1),
    "a page of positions": dataclasses.replace(V32, index_topk=64),
    "more positions than tokens": dataclasses.replace(GLM, index_topk=128),
    "as many rotated numbers as a key has": dataclasses.replace(V32, index_head_dim=32, index_n_heads=24),
    "odd heads of attention and of an indexer, uneven head sizes": dataclasses.replace(
        GLM, num_attention_heads=5, qk_nope_head_dim=64, v_head_dim=96, kv_lora_rank=96, index_n_heads=17
    ),
    "every layer has an indexer, and YaRN": dataclasses.replace(
        GLM, indexer_types=None, yarn_factor=4.0, yarn_original=32
    ),
    "one choice for all layers": dataclasses.replace(GLM, indexer_types=("full", *["shared"] * 3)),
}
CASES |= {f"as {name}": shape for name, shape in MODELS.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    shape = CASES[case]
    model, seed = clear_model(shape, SEED)
    path = to_gguf(model, shape, tmp_path / "model.gguf")
    expected = {prompt: (ids, logits(model, ids)) for prompt, ids in prompts(shape, seed).items()}
    for device in ("reference", "cpu"):
        for mla in modes_of(shape):
            loaded = pymla.load(path, device=device, mla=mla, cache_type="f32")
            for ids, wanted in expected.values():
                assert_close(loaded.logits(ids), wanted, rtol_max=1e-4, reason="float32 throughout")


@pytest.mark.parametrize("layout", ["kv_b", "all"])
@pytest.mark.parametrize("shape", [V3, V32], ids=["v3", "v3.2"])
def test_converted_layouts_equal_transformers(shape, layout, tmp_path):
    model, seed = clear_model(shape, SEED)
    path = to_gguf(model, shape, tmp_path / "model.gguf", layout=layout)
    ids = prompts(shape, seed)["long"]
    for device in ("reference", "cpu"):
        loaded = pymla.load(path, device=device, cache_type="f32")
        assert_close(loaded.logits(ids), logits(model, ids), rtol_max=1e-4, reason="float32 throughout")


@pytest.mark.parametrize("shape", [V3, MODELS["mistral-large-3"]], ids=["v3", "mistral-large-3"])
def test_greedy_generation_equals_that_of_transformers(shape, tmp_path):
    model, seed = clear_model(shape, SEED)
    path = to_gguf(model, shape, tmp_path / "model.gguf")
    sequence = prompts(shape, seed)["short"]
    engine = pymla.load(path, device="cpu", cache_type="f32").model
    state = engine.new_sequence()
    step = engine.forward([(state, sequence)])
    for _ in range(60):
        wanted = logits(model, sequence)[-1]
        assert_close(step[0], wanted, rtol_max=1e-4, reason="float32 throughout")
        token = np.array([wanted.argmax()], np.int32)
        sequence = np.append(sequence, token)
        step = engine.forward([(state, token)])
