"""Mixes of types against what llama-quantize chose and what public files hold."""

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_mixes import by_stem
from make_model import PRESETS, main, make_model, model_tensors
from mixes import LLAMA_QUANTIZE, MIXES, PUBLIC_FILES
from test_make_model import TINY, read

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mixes.json").read_text())["mixes"]


def types(preset, layout, mix):
    """Names of types by names of matrices; routers and vectors are F32 in every mix."""
    tensors = model_tensors(PRESETS[preset], layout, MIXES[mix], 0)
    return {each.name: ggml.NAME[each.qtype] for each in tensors if each.qtype != ggml.F32}


def test_every_mix_of_llama_quantize_has_a_golden_plan():
    assert set(GOLDEN) == set(LLAMA_QUANTIZE)


@pytest.mark.parametrize("layout", ["kv_b", "split"])
@pytest.mark.parametrize("mix", LLAMA_QUANTIZE)
def test_types_are_those_that_llama_quantize_chooses(mix, layout):
    assert by_stem(types("v2-lite", layout, mix)) == GOLDEN[mix][layout]


@pytest.mark.parametrize("name", PUBLIC_FILES)
def test_public_files_have_the_recorded_counts(name):
    file = PUBLIC_FILES[name]
    assert Counter(types(file.preset, file.layout, file.mix).values()) == file.counts


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
    with pytest.raises(PymlaError, match="unknown mix 'q9'; choose q8_0"):
        make_model(tmp_path / "m.gguf", TINY, mix="q9")
