"""Families beside deepseek2: PLM against its definition, MiniCPM3's factors of rope's frequencies against transformers.

`test_golden.py` and `test_transformers.py` have their other models.
"""

import dataclasses

import gguf
import numpy as np
import pytest
from compare import assert_close
from make_golden import SHAPES, logits, prompts, random_model, to_gguf
from make_model import PRESETS, make_model

import pymla

DEVICES = ("reference", "cpu")
MLA = ("auto", "0", "1", "2", "3")
EXACT = {"rtol_max": 1e-4, "reason": "float32 throughout: order of summation only"}
PLM = dataclasses.replace(PRESETS["tiny-plm"], num_hidden_layers=2, num_attention_heads=3, v_head_dim=64)


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x, theta):
    """Pairs of neighbours of x (T, H, R), turned as complex numbers by the positions 0 to T - 1."""
    frequencies = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    turned = x.view(complex) * np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    return turned.view(float)


def plm_logits(path, ids):
    """Logits of PLM after every token, from a file of float32 and in float64: arXiv:2503.12167, section 3."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name.removesuffix(".weight"): tensor.data.astype(float) for tensor in reader.tensors}

    def value(key):
        return reader.fields[f"plm.{key}"].contents()

    heads, rank, key_size = (value(f"attention.{key}") for key in ("head_count", "kv_lora_rank", "key_length"))
    rope, theta, eps = value("rope.dimension_count"), value("rope.freq_base"), value("attention.layer_norm_rms_epsilon")
    tokens, nope = len(ids), key_size - rope
    unseen = np.triu(np.full((tokens, tokens), -np.inf), 1)
    x = tensors["token_embd"][ids]
    for layer in range(value("block_count")):
        w = {name.split(".")[2]: data for name, data in tensors.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x, w["attn_norm"], eps)
        q = (h @ w["attn_q"].T).reshape(tokens, heads, key_size)
        latent = h @ w["attn_kv_a_mqa"].T
        expanded = norm(latent[:, :rank], w["attn_kv_a_norm"], eps) @ w["attn_kv_b"].T
        keys, values = np.split(expanded.reshape(tokens, heads, -1), [nope], axis=-1)
        k_pe = rotated(latent[:, None, rank:].copy(), theta)
        scores = np.einsum("thd,shd->hts", q[..., :nope], keys)
        scores += np.einsum("thd,sd->hts", rotated(q[..., nope:].copy(), theta), k_pe[:, 0])
        weights = np.exp(scores / np.sqrt(key_size) + unseen)
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weights, values).reshape(tokens, -1) @ w["attn_output"].T
        inner = np.maximum(norm(x, w["ffn_norm"], eps) @ w["ffn_up"].T, 0)
        x = x + inner**2 @ w["ffn_down"].T
    return norm(x, tensors["output_norm"], eps) @ tensors["token_embd"].T


@pytest.fixture(scope="module")
def plm(tmp_path_factory):
    """A file, token ids, and their logits."""
    path = make_model(tmp_path_factory.mktemp("plm") / "plm.gguf", PLM, qtype="f32", seed=3)
    ids = np.random.default_rng(0).integers(0, PLM.vocab_size, 100, np.int32)
    return path, ids, plm_logits(path, ids)


@pytest.mark.parametrize("mla", MLA)
@pytest.mark.parametrize("device", DEVICES)
def test_plm(plm, device, mla):
    path, ids, expected = plm
    with pymla.load(path, device=device, mla=mla, cache_type="f32", ctx=128) as language_model:
        for count in (1, 9, 100):
            assert_close(language_model.logits(ids[:count]), expected[:count], **EXACT)
        model = language_model.model
        sequence = model.new_sequence()
        model.forward([(sequence, ids[:90])])
        one_by_one = [model.forward([(sequence, ids[i : i + 1])])[0] for i in range(90, 100)]
        assert_close(np.array(one_by_one), expected[90:], **EXACT)


@pytest.mark.parametrize("mla", MLA)
@pytest.mark.parametrize("device", DEVICES)
def test_longrope(device, mla, tmp_path):
    """The longest sequence that a model is loaded for decides between the factors: within the original context the
    short ones, beyond it the long ones for all tokens."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    shape = dataclasses.replace(SHAPES["minicpm3"], yarn_original=32, attention_factor=1.3)
    model = random_model(shape, 7)
    path, ids = to_gguf(model, shape, tmp_path / "model.gguf"), prompts(shape, 7)
    for name, ctx in (("one", 32), ("short", 32), ("long", 128)):
        with pymla.load(path, device=device, mla=mla, cache_type="f32", ctx=ctx) as loaded:
            assert_close(loaded.logits(ids[name]), logits(model, ids[name]), **EXACT)
