"""Steps of a whole layer of experts with its attention, by the engine itself."""

import dataclasses

import numpy as np
import pytest
from make_model import PRESETS, make_model

import pymla
from pymla.cpu.graph import Graph
from pymla.engine import costs

#: V2-Lite with one layer, and so few tokens in its vocabulary that the output matrix does not count.
SHAPE = dataclasses.replace(PRESETS["v2-lite"], num_hidden_layers=1, first_k_dense_replace=0, vocab_size=2560)
CTX = 4096 + 512
ENGINE = {"rtol_max": 0.05, "reason": "activations and cache are int8"}


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("layer") / "layer.gguf", SHAPE)


@pytest.fixture(scope="session")
def layer(path):
    with pymla.load(path, device="cpu", ctx=CTX) as language_model:
        yield language_model


@pytest.fixture(scope="session")
def gate(path):
    """A few tokens, and their logits by the reference."""
    ids = np.array([1, 2, 3], np.int32)
    with pymla.load(path, device="reference", ctx=64) as language_model:
        return ids, language_model.logits(ids)


@pytest.mark.parametrize("depth", [0, 4096])
@pytest.mark.parametrize("tokens", [1, 512])
def bench_layer(measure, layer, gate, tokens, depth):
    model, ids = layer.model, np.random.default_rng(0).integers(SHAPE.vocab_size, size=CTX, dtype=np.int32)
    sequence = model.new_sequence()
    if depth:
        model.forward([(sequence, ids[:depth])])

    def run():
        model.cache.truncate(sequence, depth)
        model.forward([(sequence, ids[depth : depth + tokens])])

    def checks():
        # The gate's tokens take the cache's pages in turn with the sequence that is measured.
        model.cache.truncate(sequence, depth)
        yield layer.logits(gate[0]), gate[1]

    ops = costs.step_ops(layer.config, layer.file.tensors, tokens, depth + tokens)
    macs, nbytes = sum(op.macs for op in ops), sum(op.nbytes for op in ops)
    measure(run, checks, macs=macs, nbytes=nbytes if tokens == 1 else 0, **ENGINE)
    model.free(sequence)


def bench_python_of_a_step(measure, layer, gate, monkeypatch):
    """A generated token's step without its kernels: what Python costs, however many layers there are."""
    model, token = layer.model, np.array([1], np.int32)
    sequence = model.new_sequence()
    model.step([(sequence, token)])  # records
    monkeypatch.setattr(Graph, "replay", lambda self: self.result)

    def run():
        model.cache.truncate(sequence, 1)
        model.step([(sequence, token)])

    def checks():
        # Several tokens are not replayed.
        yield layer.logits(gate[0]), gate[1]

    measure(run, checks, **ENGINE)
    model.free(sequence)
