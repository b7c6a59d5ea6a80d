"""Metadata in place of a file's own: ``--override-kv`` and `pymla.load`."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from make_model import PRESETS, make_model
from test_cli import quick, refused, run  # noqa: F401

import pymla
from pymla.cli.inputs import overrides
from pymla.cli.inspect import inspect
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile

USED, NAME = "deepseek2.expert_used_count", "general.name"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("overrides") / "tiny.gguf", PRESETS["tiny"], qtype="f32")


def test_metadata_changes_before_anything_reads_it(tiny):
    file = ModelFile.open(tiny, {USED: 4, "general.sampling.temp": 0.5})
    assert file.metadata[USED] == 4
    assert file.overridden == {USED: 2, "general.sampling.temp": None}
    assert ModelFile.open(tiny).overridden == {}


def test_a_model_runs_with_them(tiny):
    options = {"device": "reference", "ctx": 64, "cache_type": "f32"}
    with pymla.load(tiny, **options) as plain, pymla.load(tiny, overrides={USED: np.int64(4)}, **options) as other:
        assert other.config.num_experts_per_tok == 4
        assert np.abs(plain.logits([1, 2]) - other.logits([1, 2])).max() > 1e-3


def test_recommended_sampling_is_the_default_of_a_model(tiny):
    given = {"general.sampling.temp": 0.0, "general.sampling.top_k": 5}
    with pymla.load(tiny, device="reference", ctx=64, overrides=given) as model:
        assert model.recommended == {"temperature": 0.0, "top_k": 5}
        assert model.generation([1]).params.temperature == 0.0
        assert model.generation([1], temperature=None).params.top_k == 5
        assert model.generation([1], top_k=7).params.top_k == 7
        assert model.generation([1]).params.top_p == 0.95


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([("a", 1)], "`overrides` is an array of 1; a dict"),
        ({3: 1}, "`overrides` is 3; a key of the metadata"),
        ({"": 1}, "`overrides` is ''; a key"),
        ({"a.b": [1]}, r"`overrides\[a.b\]` is an array of 1; a whole number"),
        ({"a.b": None}, r"`overrides\[a.b\]` is None"),
    ],
)
def test_what_is_no_override(tiny, value, words):
    with pytest.raises(PymlaError, match=words):
        pymla.load(tiny, overrides=value)


def test_wrong_values_are_named_as_the_files_own_would_be(tiny):
    with pytest.raises(PymlaError, match=r"metadata deepseek2\.block_count is 'four', but an integer is expected"):
        pymla.load(tiny, overrides={"deepseek2.block_count": "four"})
    with pytest.raises(PymlaError, match=r"general\.architecture is 'kimi-linear', which pymla does not run, because"):
        pymla.load(tiny, overrides={"general.architecture": "kimi-linear"})


# The command line -----------------------------------------------------------------------------------------------------


def test_types():
    pairs = ["a=int:-4", "b=float:1e-3", "c=bool:true", "d=bool:false", "e=str:x=y:z", "f=str:", "a=int:5"]
    assert overrides(pairs) == {"a": 5, "b": 0.001, "c": True, "d": False, "e": "x=y:z", "f": ""}
    assert overrides([]) == {}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("a", "--override-kv 'a': write KEY=TYPE:VALUE"),
        ("a=5", "write KEY=TYPE:VALUE"),
        ("=int:5", "write KEY=TYPE:VALUE"),
        ("a=u32:5", "with the type int, float, bool, str"),
        ("a=int:five", "'five' is no whole number of 64 bits"),
        ("a=int:99999999999999999999", "is no whole number"),
        ("a=float:nan", "'nan' is no finite number"),
        ("a=bool:True", "'True' is no true or false"),
    ],
)
def test_what_is_refused(pair, words):
    with pytest.raises(PymlaError) as caught:
        overrides([pair])
    assert words in str(caught.value)


@pytest.mark.parametrize("command", ["generate", "inspect", "bench"])
def test_every_command_that_loads_a_model_takes_them(tiny, refused, command):  # noqa: F811
    arguments = {"generate": ["x", "-m", tiny], "inspect": [tiny], "bench": ["-m", tiny]}[command]
    refused(command, *arguments, "--override-kv", "a=int", parts=["--override-kv"])
    if command != "inspect":
        refused(command, *arguments, "--override-kv", f"{USED}=int:9", parts=["expert_used_count is 9"])


def test_generate_uses_them(tiny, run):  # noqa: F811
    arguments = ["generate", "x", "-m", tiny, "-n", "3", "--json", "--device", "reference"]
    greedy = ["--override-kv", "general.sampling.temp=float:0"]
    code, out, _ = run(*arguments, *greedy)
    assert code == 0
    assert json.loads(out)["tokens"] == json.loads(run(*arguments, "--temperature", "0")[1])["tokens"]


def test_inspect_shows_them(tiny):
    arguments = ["--override-kv", f"{NAME}=str:mine", "--override-kv", "general.sampling.mirostat=int:3"]
    arguments += ["--override-kv", "general.sampling.sequence=str:top_k;temp"]
    result = CliRunner().invoke(inspect, [str(tiny), *arguments])
    found = json.loads(CliRunner().invoke(inspect, [str(tiny), *arguments, "--json"]).output)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert f"{NAME} mine tiny" in text
    assert "general.sampling.mirostat 3 nothing" in text
    assert "samplers top_k;temperature" in text
    assert "`mirostat` is 3" in text
    assert found["overridden"] == {
        NAME: "tiny",
        "general.sampling.mirostat": None,
        "general.sampling.sequence": None,
    }
    assert found["name"] == found["metadata"][NAME] == "mine"
    assert found["sampling"]["recommended"] == {"samplers": "top_k;temperature"}
