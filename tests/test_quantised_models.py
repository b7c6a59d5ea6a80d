"""Whole models with matrices of every quantised type against the same models with their weights as float32."""

import dataclasses

import gguf
import numpy as np
import pytest
from cases import QUANTISED_REPRESENTATIVES, TINY
from compare import assert_close
from make_model import make_model
from test_cli import rewritten

import pymla
from pymla import ggml

#: All experts of a token are used, so that rounding chooses no others.
SHAPE = dataclasses.replace(TINY["moonlight"], num_experts_per_tok=TINY["moonlight"].n_routed_experts)


@pytest.mark.parametrize("qtype", QUANTISED_REPRESENTATIVES, ids=ggml.NAME.get)
def test_logits_are_those_of_the_dequantised_model(qtype, tmp_path):
    path, floats = make_model(tmp_path / "model.gguf", SHAPE, qtype=qtype), {}
    for tensor in gguf.GGUFReader(path).tensors:
        floats[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type), gguf.GGMLQuantizationType.F32
    plain = rewritten(path, tmp_path / "floats.gguf", tensors=floats)
    ids = np.arange(1, 40, dtype=np.int32)

    def logits(file, device):
        with pymla.load(file, device=device, cache_type="f32", ctx=64) as model:
            return model.logits(ids)

    expected = logits(plain, "reference")
    assert_close(logits(path, "reference"), expected, rtol_max=1e-4, reason="order of summation")
    assert_close(logits(path, "cpu"), expected, rtol_max=0.1, reason="int8 activations")
