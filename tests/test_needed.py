"""The kernels that a model is compiled for are those that it launches."""

import dataclasses

import numpy as np
import pytest
from make_model import PRESETS, make_model

import pymla
from pymla import cpu
from pymla.cpu import needed
from pymla.cpu.attention.largest import take_largest
from pymla.cpu.runtime import compiling
from pymla.cpu.runtime.jit import Kernel
from pymla.engine.nextn import Span

SHAPE = dataclasses.replace(PRESETS["tiny"], context_length=512, temperature_scale=0.1, temperature_length=64)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that are launched from now on."""
    seen, launch = set(), Kernel.__getitem__
    monkeypatch.setattr(Kernel, "__getitem__", lambda kernel, items: (seen.add(kernel), launch(kernel, items))[1])
    return seen


def generate(language_model):
    """Prompts of few and of many tokens, and tokens one by one, of one and of several sequences."""
    model, rng = language_model.model, np.random.default_rng(0)
    for tokens in (1, 4, 5, 40, 300):
        sequence = model.new_sequence()
        model.forward([(sequence, rng.integers(0, 200, tokens, dtype=np.int32))])
        model.forward([(sequence, np.array([3], np.int32))])
        model.free(sequence)
    few = [(model.new_sequence(), rng.integers(0, 200, 2, dtype=np.int32)) for _ in range(3)]
    model.forward(few, logits="all")
    language_model.generate("x", max_tokens=2)


@pytest.mark.parametrize("mla", ["auto", "0", "1", "2", "3"])
@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("qtype", ["q4_0", "f16"])
def test_no_kernel_is_missing(tmp_path, launched, qtype, cache_type, mla):
    path = tmp_path / "model.gguf"
    make_model(path, SHAPE, qtype=qtype, seed=1)
    with pymla.load(path, device="cpu", ctx=512, cache_type=cache_type, mla=mla) as language_model:
        generate(language_model)
        wanted = set(needed.kernels(language_model.model))
    names = sorted(kernel.__name__ for kernel in launched - wanted)
    assert not names, "these would be compiled in the middle of a text"
    # What is compiled in vain: forms that this model's sizes never choose, and the experts' other ways.
    assert len(wanted - launched) <= 12, sorted(each.__name__ for each in wanted - launched)
    assert {each.__name__ for each in wanted} <= {each.__name__ for each in compiling.COMPILED}


@pytest.mark.parametrize("preset", ["tiny-minicpm3", "tiny-plm", "tiny-mistral4"])
def test_no_kernel_of_another_family_is_missing(tmp_path, launched, preset):
    path = tmp_path / "model.gguf"
    make_model(path, dataclasses.replace(PRESETS[preset], context_length=512), seed=1)
    with pymla.load(path, device="cpu", ctx=512) as language_model:
        generate(language_model)
        missing = launched - set(needed.kernels(language_model.model))
    assert not missing, sorted(kernel.__name__ for kernel in missing)


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("preset", ["tiny-v3.2", "tiny-glm"])
def test_no_kernel_of_sparse_attention_is_missing(tmp_path, launched, preset, cache_type):
    path = tmp_path / "model.gguf"
    make_model(path, dataclasses.replace(PRESETS[preset], context_length=512), seed=1)
    for dsa in (True, False):
        with pymla.load(path, device="cpu", ctx=512, cache_type=cache_type, dsa=dsa) as language_model:
            generate(language_model)
            wanted = set(needed.kernels(language_model.model))
        assert not launched - wanted, sorted(kernel.__name__ for kernel in launched - wanted)
        assert (take_largest in wanted) == dsa
        launched.clear()


def test_no_kernel_of_a_nextn_block_is_missing(tmp_path, launched):
    path = tmp_path / "model.gguf"
    make_model(path, dataclasses.replace(PRESETS["tiny"], num_nextn_predict_layers=1), seed=1)
    with pymla.load(path, device="cpu", ctx=512, nextn=True) as language_model:
        model, ids = language_model.model, np.arange(300, dtype=np.int32) % 200
        for tokens in (1, 4, 40, 300):
            sequence = model.new_sequence()
            hidden = np.array(model.step([(sequence, ids[:tokens])], hidden=True).hidden)
            model.nextn_fill(Span(sequence, 0, ids[:tokens]), hidden)
            model.nextn_step([Span(sequence, 0, ids[:tokens])], hidden)
            model.nextn_step([Span(sequence, tokens, ids[:1])], hidden[:1])
            model.free(sequence)
        missing = launched - set(needed.kernels(model))
    assert not missing, sorted(kernel.__name__ for kernel in missing)


def test_a_type_is_compiled_alone(tmp_path):
    path = tmp_path / "model.gguf"
    make_model(path, SHAPE, qtype="q4_0", seed=1)
    with pymla.load(path, device="cpu", ctx=64) as language_model:
        names = [each.__name__ for each in needed.kernels(language_model.model)]
    assert len(names) == len(set(names))
    assert not [name for name in names if "Q8_0" in name or "Q4_1" in name]
    assert cpu.compile_for is needed.compile_for
