"""Mixes of types against what llama-quantize chose and what public files hold."""

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_mixes import MODELS, NAMES, in_short
from make_model import PRESETS, main, make_model, model_tensors
from model_mixes import MIXES, PUBLIC_FILES, uniform
from test_make_model import TINY, read

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.make.mixes import ALIASES, IK_MIXES, LLAMA_MIXES, mix_named
from pymla.make.recipe import TensorInfo, recipe_for

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mixes.json").read_text())["models"]
#: Model, layout, and whether there was an importance matrix.
PLANS = [
    (model, layout, kind)
    for model, (_, layouts) in MODELS.items()
    for layout in layouts
    for kind in ("with", "without")
]


def types(preset, layout, mix):
    """Names of types by names of matrices; routers and vectors are F32 in every mix."""
    tensors = model_tensors(PRESETS[preset], layout, MIXES[mix], 0)
    return {each.name: ggml.NAME[each.qtype] for each in tensors if each.qtype != ggml.F32}


def infos(model, layout):
    """The tensors of a model in F16, and those of F32."""
    tensors = model_tensors(MODELS[model][0], layout, uniform(ggml.F16, ggml.F16), 0)
    return [TensorInfo(each.name, each.shape, each.qtype) for each in tensors]


def test_every_mix_of_llama_quantize_has_a_golden_plan():
    for plans in (GOLDEN[model][layout] for model, layout, _ in PLANS):
        assert set(plans["with"]) == set(NAMES)
        # Rules ask about the importance matrix in these mixes, and for no other.
        assert set(plans["without"]) <= {"Q4_0", "Q5_0", "IQ3_XXS", "IQ4_NL", "IQ4_XS"}


@pytest.mark.parametrize(("model", "layout", "kind"), PLANS)
def test_types_are_those_that_llama_quantize_chooses(model, layout, kind):
    """Every mix, tensor by tensor."""
    shape, _ = MODELS[model]
    tensors, plans = infos(model, layout), GOLDEN[model][layout]
    heads = shape.num_attention_heads if layout == "split" else 1
    for mix in NAMES:
        recipe = recipe_for(mix, exact_mix=True, importance=kind == "with")
        layers = shape.num_hidden_layers + shape.num_nextn_predict_layers
        chosen = recipe.choose(tensors, shape.architecture, layers, heads)
        changed = {each.name: chosen[each.name].qtype for each in tensors if chosen[each.name].qtype != each.qtype}
        found = in_short({name: ggml.NAME[qtype] for name, qtype in changed.items()})
        assert found == plans[kind].get(mix, plans["with"][mix]), mix


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_public_files_have_the_recorded_counts(name):
    file = PUBLIC_FILES[name]
    assert Counter(types(file.preset, file.layout, file.mix).values()) == file.counts


def test_names_of_mixes_in_any_case():
    assert mix_named("q4_k_m") is mix_named("Q4_K_M") is mix_named("Q4_k") is LLAMA_MIXES["Q4_K_M"]
    assert mix_named("iq4_ks") is IK_MIXES["IQ4_KS"]
    assert {mix_named(alias).name for alias in ALIASES} == set(ALIASES.values())
    with pytest.raises(PymlaError, match="unknown type or mix 'Q9_K'; choose F32, "):
        mix_named("Q9_K")


def test_numbers_of_file_types():
    """``general.file_type`` as llama.cpp's include/llama.h has it, and ik_llama.cpp's."""
    expected = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "IQ3_XXS": 23, "IQ2_M": 29, "MXFP4_MOE": 38}
    assert {name: mix_named(name).file_type for name in expected} == expected
    assert mix_named("IQ4_KS").file_type == 145
    numbers = [mix.file_type for mix in (LLAMA_MIXES | IK_MIXES).values()]
    assert len(numbers) == len(set(numbers))
    assert None not in numbers


def test_a_mixed_model_is_written(tmp_path):
    tensors, metadata = read(make_model(tmp_path / "m.gguf", TINY, mix="q8_0", layout="split"))
    assert {each.tensor_type for each in tensors.values()} == {ggml.F32, ggml.Q8_0}
    assert metadata["general.file_type"] == MIXES["q8_0"].file_type


def test_a_mix_is_an_option_of_the_command(tmp_path):
    path = tmp_path / "m.gguf"
    done = CliRunner().invoke(main, ["tiny", str(path), "--mix", "iq2_k_r4", "--layout", "all", "--layers", "2"])
    assert done.exit_code == 0, done.output
    file = ModelFile.open(path)
    assert ggml.NAME[file.tensors["blk.1.ffn_gate_exps.weight"].qtype] == "IQ2_K_R4"
    assert file.metadata["general.file_type"] == 338


def test_an_unknown_mix_is_named(tmp_path):
    with pytest.raises(PymlaError, match="unknown mix 'q9'; choose f32"):
        make_model(tmp_path / "m.gguf", TINY, mix="q9")
