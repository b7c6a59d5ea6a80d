"""The table of a model's tensors against files."""

import dataclasses
import math

import pytest
from cases import TINY
from make_model import PRESETS, make_model

from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.tensors import model_tensors, outer_tensors


@pytest.mark.parametrize("layout", ["kv_b", "split"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["v2-lite", "v3", "minicpm3", "tiny-plm", "mistral4"])
def test_a_file_holds_the_tensors_of_the_table(tmp_path, name, tied, layout):
    shape = dataclasses.replace((PRESETS | TINY)[name], tie_word_embeddings=tied)
    file = ModelFile.open(make_model(tmp_path / "m.gguf", shape, layout=layout))
    config = ModelConfig.from_gguf(file)
    specs = model_tensors(config, file.tensors)
    assert sorted(spec.name for spec in specs) == sorted(file.tensors)
    assert specs[0].name == "token_embd.weight"
    outer = [spec for spec in specs if spec.part in ("embedding", "output", "rope")]
    assert outer == outer_tensors(config, file.tensors)
    for spec in specs:
        assert file.tensors[spec.name].shape in spec.shapes
        assert spec.weights == math.prod(file.tensors[spec.name].shape)
        stem = spec.name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        assert spec.stem == stem
        assert spec.field == stem.replace("_shexp", "")
        assert spec.is_vector == (len(file.tensors[spec.name].shape) == 1)
        assert spec.is_norm == stem.endswith("_norm")
        assert spec.is_router == (stem == "ffn_gate_inp")
        if spec.name.startswith("blk."):
            assert spec.layer == int(spec.name.split(".")[1])
            assert spec.part == ("experts" if stem.endswith("_exps") else "layer")
        else:
            of_stem = {"token_embd": "embedding", "rope_factors_long": "rope", "rope_factors_short": "rope"}
            assert spec.part == of_stem.get(stem, "output")


def test_gate_and_up_in_one_tensor(tmp_path):
    config = ModelConfig.from_gguf(ModelFile.open(make_model(tmp_path / "m.gguf", TINY["v3"])))
    apart = {spec.name: spec for spec in model_tensors(config)}
    gate, up = (apart.pop(f"blk.2.ffn_{half}_exps.weight") for half in ("gate", "up"))
    name = "blk.2.ffn_gate_up_exps.weight"
    fused = {spec.name: spec for spec in model_tensors(config, [name])}
    both = fused.pop(name)
    assert fused == apart
    assert (both.field, both.part, both.layer) == ("ffn_gate_up_exps", "experts", 2)
    assert both.weights == gate.weights + up.weights
    assert gate.part == up.part == "experts"
