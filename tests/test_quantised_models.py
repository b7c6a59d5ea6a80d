"""Whole models with matrices of every quantised type against the same models with their weights as float32."""

import dataclasses

import numpy as np
import pytest
from cases import QUANTISED_REPRESENTATIVES, TINY
from compare import assert_close
from make_model import make_model

import pymla
from pymla import ggml
from pymla.files import gguf_writer
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.make.model_metadata import ARCHITECTURE
from pymla.reference.quant import dequantise

#: All experts of a token are used, so that rounding chooses no others; and rows that blocks of 256 weights divide.
SHAPE = dataclasses.replace(
    TINY["moonlight"],
    n_routed_experts=4,
    num_experts_per_tok=4,
    num_hidden_layers=2,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=256,
    kv_lora_rank=256,
    vocab_size=304,
)

#: Types that files have.
FILES = [qtype for qtype in ggml.QUANTISED if qtype >= 0]


def as_floats(path, target):
    """The same model with matrices of float32."""
    file, tensors = ModelFile.open(path), []
    for info in file.tensors.values():
        weights = dequantise(info.data.reshape(-1, ggml.row_bytes(info.qtype, info.shape[-1])), info.qtype)
        tensors.append(NewTensor(info.name, info.shape, ggml.F32, lambda weights=weights: [weights]))
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    gguf_writer.write(target, ARCHITECTURE, metadata, tensors)
    return target


def logits(path, device="reference"):
    with pymla.load(path, device=device, cache_type="f32", ctx=64) as model:
        return model.logits(np.arange(1, 20, dtype=np.int32))


@pytest.mark.parametrize("qtype", FILES, ids=ggml.NAME.get)
def test_logits_are_those_of_the_dequantised_model(qtype, tmp_path):
    path = make_model(tmp_path / "model.gguf", SHAPE, qtype=qtype)
    assert ModelFile.open(path).tensors["blk.1.ffn_down_exps.weight"].qtype == qtype
    expected = logits(as_floats(path, tmp_path / "floats.gguf"))
    assert_close(logits(path), expected, rtol_max=1e-4, reason="order of summation")


@pytest.mark.parametrize("qtype", QUANTISED_REPRESENTATIVES, ids=ggml.NAME.get)
def test_logits_on_the_cpu(qtype, tmp_path):
    """Every type's products are compared in `test_matrices`."""
    path = make_model(tmp_path / "model.gguf", SHAPE, qtype=qtype)
    expected = logits(as_floats(path, tmp_path / "floats.gguf"))
    assert_close(logits(path, "cpu"), expected, rtol_max=0.1, reason="int8 activations")
