"""The kernels that a model is compiled for on the GPU are those that it launches.

Which ones it launches depends on types, sizes and modes, never on values, so that the simulator launches without
computing anything.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import simulated  # noqa: F401
from make_model import PRESETS, make_model

import pymla
from pymla import ggml
from pymla.cuda import backend, memory, needed, quant, sampling
from pymla.cuda.runtime.jit import KERNELS, Kernel, compile_all
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES
from pymla.text.sampling import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("v2-lite", "v2", "v3", "moonlight", "minicpm3", "mistral4")
SHAPE = dataclasses.replace(PRESETS["tiny"], context_length=128, temperature_scale=0.1, temperature_length=64)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that are launched from now on, and compute nothing."""
    seen = set()
    monkeypatch.setattr(Kernel, "_launch", lambda kernel, *_: seen.add(kernel))
    return seen


def generate(model):
    """Prompts of few and of many tokens, and tokens one by one, of one and of several sequences."""
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 9, 40, 100):
        sequence = model.new_sequence()
        model.forward([(sequence, rng.integers(0, 100, tokens, dtype=np.int32))])
        model.forward([(sequence, np.array([3], np.int32))])
        model.free(sequence)
    few = [(model.new_sequence(), rng.integers(0, 100, 2, dtype=np.int32)) for _ in range(2)]
    logits = model.step(few)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1)):
        sampling.sample(logits, params, memory.empty((2, 2), np.int64), memory.empty((2, 2), np.int32))


def check(path, launched, **options):
    with pymla.load(path, device="cuda", ctx=128, **options) as language_model:
        generate(language_model.model)
        wanted = needed.kernels(language_model.model)
    assert len(wanted) == len(set(wanted))
    assert launched
    missing = sorted(kernel.__name__ for kernel in launched - set(wanted))
    assert not missing, "these would be compiled in the middle of a text"
    return wanted


@pytest.mark.parametrize("mla", ["auto", "0", "1", "2", "3"])
@pytest.mark.parametrize("name", NAMES)
def test_no_kernel_of_a_golden_model_is_missing(launched, name, mla):
    for cache_type, qtype in CACHE_TYPES.items():
        if mla == "0" and qtype in HADAMARD_TYPES:
            continue  # of latent rows alone
        check(GOLDEN / f"{name}.gguf", launched, cache_type=cache_type, mla=mla)
        launched.clear()


@pytest.mark.parametrize("mla", ["auto", "1", "3"])
@pytest.mark.parametrize("name", ["v3.2", "glm-5"])
def test_no_kernel_of_a_golden_model_with_an_indexer_is_missing(launched, name, mla):
    for cache_type in CACHE_TYPES:
        check(GOLDEN / f"{name}.gguf", launched, cache_type=cache_type, mla=mla)
        launched.clear()
    without = check(GOLDEN / f"{name}.gguf", launched, mla=mla, dsa=False)
    assert not [each.__name__ for each in without if each.__name__.startswith(("index", "sparse", "choose"))]


@pytest.mark.parametrize("qtype", ["q4_0", "q8_0", "f16"])
def test_no_kernel_of_a_type_is_missing(tmp_path, launched, qtype):
    path = make_model(tmp_path / "model.gguf", SHAPE, qtype=qtype, seed=1)
    wanted = check(path, launched)
    # What is compiled in vain: other sizes of products, and forms that this model's sizes never choose.
    assert len(set(wanted) - launched) <= 16, sorted(each.__name__ for each in set(wanted) - launched)


@pytest.mark.parametrize("preset", ["tiny-minicpm3", "tiny-plm", "tiny-mistral4"])
def test_no_kernel_of_another_family_is_missing(tmp_path, launched, preset):
    shape = dataclasses.replace(PRESETS[preset], context_length=128)
    check(make_model(tmp_path / "model.gguf", shape, seed=1), launched)


def test_a_type_is_compiled_alone(tmp_path, launched):
    path = make_model(tmp_path / "model.gguf", SHAPE, qtype="q4_0", seed=1)
    names = [each.__name__ for each in check(path, launched)]
    assert not [name for name in names if "q4_1" in name or name.startswith(("gate_up[q8_0", "grouped[q8_0"))]
    assert backend.compile_for is needed.compile_for


def test_kernels_are_made_when_something_asks_for_them():
    quant.matmul_kernels(ggml.Q4_1)
    assert "gemv[q4_1]" in KERNELS
    everything = needed.everything()
    assert {"gemv[q6_k]", "gate_up[q4_0,q8_0]", "absorbed[q8_0,f16,512,64]", "multiply"} <= everything.keys()


def test_progress_names_the_kernels_that_have_to_be_compiled(monkeypatch):
    wanted, told, warnings = quant.matmul_kernels(ggml.Q8_0)[:3], [], []
    monkeypatch.setattr(Kernel, "is_ready", property(lambda kernel: kernel is wanted[1]))
    loaded = []
    monkeypatch.setattr(Kernel, "load", lambda kernel: loaded.append(kernel))
    compile_all(wanted, lambda *step: told.append(step), warnings.append)
    assert told == [(0, 2, "gemv[q8_0]"), (1, 2, "gemm[q8_0,64]"), (2, 2, "")]
    assert set(loaded) == set(wanted)
    assert warnings == []
