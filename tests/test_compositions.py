"""Whole models of mixed types, as public files and llama-quantize have them, against the same weights as float32."""

import dataclasses

import numpy as np
import pytest
from compare import assert_close
from make_model import PRESETS, make_model, model_tensors
from model_mixes import MIXES, PUBLIC_FILES

import pymla
from pymla import ggml
from pymla.files import gguf_writer
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.make.model_metadata import ARCHITECTURE
from pymla.reference.formats import dequantise_rows

#: Rows of 256 weights, so that every type fits where it fits in the real model. All experts of a token are used, so
#: that rounding chooses no others. Nine layers have every type of a mix that differs by layer.
_SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 9,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "vocab_size": 288,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "context_length": 256,
}
#: V2-Lite's experts and its dense layer have rows that blocks of 256 do not divide; its shared experts have not.
SHAPES = {
    "v2-lite": dataclasses.replace(PRESETS["v2-lite"], **_SMALL, intermediate_size=288, moe_intermediate_size=128),
    "v3": dataclasses.replace(
        PRESETS["v3"], **_SMALL, intermediate_size=512, moe_intermediate_size=256, q_lora_rank=256
    ),
}

#: Mixes of llama.cpp, from many bits to few.
_OF_LLAMA = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "iq4_xs", "iq3_xxs", "iq2_xxs", "iq1_s")

#: Name to shape, layout and mix.
COMPOSITIONS = {name: (file.preset, file.layout, file.mix) for name, file in PUBLIC_FILES.items()} | {
    f"V2-Lite {mix}": ("v2-lite", "split", mix) for mix in _OF_LLAMA
}


def types(name):
    preset, layout, mix = COMPOSITIONS[name]
    return {tensor.qtype for tensor in model_tensors(SHAPES[preset], layout, MIXES[mix], 0)}


RUNNABLE = [name for name in COMPOSITIONS if set(map(ggml.plain_type, types(name))) <= set(ggml.SUPPORTED)]


def write_floats(path, target):
    """The model with its weights as float32."""
    file = ModelFile.open(path)

    def pieces(tensor):
        columns = tensor.shape[-1]
        rows = np.asarray(tensor.data).reshape(-1, ggml.row_bytes(tensor.qtype, columns))
        yield dequantise_rows(rows, tensor.qtype, columns)

    tensors = [
        NewTensor(each.name, each.shape, ggml.F32, lambda each=each: pieces(each)) for each in file.tensors.values()
    ]
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    gguf_writer.write(target, ARCHITECTURE, metadata, tensors)


def logits(path, device):
    """Of a prompt, whose products have many columns, and of one token."""
    ids = np.arange(1, 40, dtype=np.int32)
    with pymla.load(path, device=device, cache_type="f32", ctx=64) as model:
        return np.concatenate([model.logits(ids), model.logits(ids[:1])])


@pytest.mark.parametrize("name", RUNNABLE)
def test_logits_are_those_of_the_dequantised_model(name, tmp_path):
    preset, layout, mix = COMPOSITIONS[name]
    path = make_model(tmp_path / "model.gguf", SHAPES[preset], layout=layout, mix=mix)
    write_floats(path, tmp_path / "floats.gguf")
    expected = logits(tmp_path / "floats.gguf", "reference")
    assert_close(logits(path, "cpu"), expected, rtol_max=0.1, reason="int8 activations")


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_small_models_have_every_type_of_their_file(name):
    assert {ggml.NAME[qtype] for qtype in types(name) - {ggml.F32}} == set(PUBLIC_FILES[name].counts)


def test_every_composition_runs():
    assert set(RUNNABLE) == set(COMPOSITIONS)
