"""Models whose parts are on several backends, and the way of a step's arrays to them."""

import dataclasses
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from make_model import PRESETS, make_model

from pymla import reference
from pymla.engine.model import Model
from pymla.engine.nextn import Span
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement, moved, moved_input
from pymla.models.weights import Weights
from pymla.pages import Step

GOLDEN = Path(__file__).parent / "golden"
LAYERS = 3


class Foreign(np.ndarray):
    """An array of the other backend."""


def native(array):
    """What only the other backend has."""
    assert isinstance(array, Foreign)
    return array


#: The reference again, with a memory of its own.
OTHER = ModuleType("other")
vars(OTHER).update(vars(reference))
OTHER.memory = SimpleNamespace(
    empty=lambda shape, dtype: np.empty(shape, dtype).view(Foreign),
    to_device=lambda array, progress=None: np.array(array).view(Foreign),
    to_host=lambda array: np.array(native(array)),
    take=lambda array, rows: native(array)[rows],
)


def test_arrays_move_between_backends():
    array = np.arange(6.0).reshape(2, 3)
    assert moved(array, reference, reference) is array
    there = moved(array, reference, OTHER)
    assert isinstance(there, Foreign)
    back = moved(there, OTHER, reference)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, array)
    activation = reference.quant.Activation(array)
    assert moved_input(activation, reference, reference) is activation
    assert isinstance(moved_input(activation, reference, OTHER).x, Foreign)


def test_a_placement_names_each_backend_once():
    assert Placement.on(reference, 2) == (reference, (reference,) * 2, (reference,) * 2, reference)
    assert Placement.on(reference, 2).backends == [reference]
    mixed = Placement(reference, (reference, OTHER), (reference, OTHER), OTHER)
    assert mixed.backends == [reference, OTHER]


def test_a_step_is_packed_into_one_array():
    step = Step(*(np.arange(3, dtype=np.int32) + 10 * i for i in range(4)), np.array([[1, 2], [3, 0]], np.int32))
    packed = step.packed()
    assert packed.dtype == np.int32
    assert len(packed) == 4 * 3 + 2 * 2
    for mine, other in zip(Step.unpacked(packed, 3, 2), step, strict=True):
        np.testing.assert_array_equal(mine, other)
    padded = Step.unpacked(step.packed(pages=4), 3, 2)
    np.testing.assert_array_equal(padded.block_tables, [[1, 2, 0, 0], [3, 0, 0, 0]])
    np.testing.assert_array_equal(padded.slots, step.slots)
    assert isinstance(step.on(OTHER).tokens, Foreign)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(reference, (reference, OTHER, OTHER), (reference, OTHER, OTHER), OTHER),
        Placement(OTHER, (OTHER,) * LAYERS, (OTHER, reference, reference), OTHER),
        Placement(OTHER, (OTHER, reference, OTHER), (reference, reference, reference), reference),
    ],
    ids=["the last layers", "experts elsewhere", "back and forth"],
)
def test_a_model_on_two_backends_computes_the_same(placement):
    file = ModelFile.open(GOLDEN / "v3.gguf")
    config = ModelConfig.from_gguf(file)
    ids = np.arange(1, 30, dtype=np.int32)
    results = []
    for backend in (reference, placement):
        where = backend if isinstance(backend, Placement) else Placement.on(backend, LAYERS)
        model = Model(config, Weights.from_gguf(file, config, placement=where), backend, cache_type="f32", ctx=128)
        a, b = model.new_sequence(), model.new_sequence()
        results.append([model.forward([(a, ids[:20]), (b, ids[20:])]), model.forward([(a, ids[20:21])])])
        assert model.backend is where.output
    for mine, other in zip(results[1], results[0], strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(reference, (reference, OTHER), (reference, reference), OTHER),
        Placement(OTHER, (reference, reference), (reference, OTHER), reference),
    ],
)
def test_a_nextn_block_on_two_backends_computes_the_same(placement, tmp_path):
    shape = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=2, num_nextn_predict_layers=1)
    file = ModelFile.open(make_model(tmp_path / "nextn.gguf", shape))
    config, ids, results = ModelConfig.from_gguf(file), np.arange(1, 12, dtype=np.int32), []
    for where in (Placement.on(reference, 2), placement):
        weights = Weights.from_gguf(file, config, placement=where, nextn=True)
        model = Model(config, weights, where, cache_type="f32", ctx=64)
        sequence, to_host = model.new_sequence(), model.backend.memory.to_host
        outputs = model.step([(sequence, ids[:10])], hidden=True)
        model.nextn_fill(Span(sequence, 0, ids[1:10]), outputs.hidden[:9])
        drafted = model.nextn_step([Span(sequence, 9, ids[10:])], to_host(outputs.hidden)[9:])
        results.append([to_host(each) for each in (*outputs, *drafted)])
    for mine, other in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_recorded_step_of_more_sequences(monkeypatch):
    """Sequences whose step is part of a larger one, alone in their cache."""
    file = ModelFile.open(GOLDEN / "v3.gguf")
    config = ModelConfig.from_gguf(file)
    weights, ids, results = Weights.from_gguf(file, config), np.arange(1, 30, dtype=np.int32), []
    for size in (lambda sequences: None, lambda sequences: -(-sequences // 4) * 4):
        monkeypatch.setattr(reference.Graph, "size", staticmethod(size))
        model = Model(config, weights, reference, cache_type="f32", ctx=64, cache_tokens=128, dtype=np.float64)
        a, b = model.new_sequence(), model.new_sequence()
        steps = [(a, 0, 10), (b, 10, 13)], [(a, 13, 14), (b, 14, 15)], [(b, 15, 16)], [(a, 16, 17), (b, 17, 18)]
        results.append([model.forward([(sequence, ids[i:j]) for sequence, i, j in step]) for step in steps])
    for mine, other in zip(*results, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
