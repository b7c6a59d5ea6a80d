"""Sampling parameters that a file recommends: ``general.sampling.*``."""

import numpy as np
import pytest
from gguf import GGUFValueType
from gguf_files import write

from pymla.files.gguf_reader import ModelFile
from pymla.text.recommended import Recommended, recommended_sampling


@pytest.fixture
def read(tmp_path):
    """A function that writes keys below ``general.sampling.`` and reads what they recommend."""

    def read(**keys):
        metadata = {f"general.sampling.{name}": value for name, value in keys.items()}
        return recommended_sampling(ModelFile.open(write(tmp_path / "model.gguf", metadata)))

    return read


def test_every_parameter(read):
    found = read(temp=0.6, top_k=20, top_p=0.9, min_p=0.01, penalty_last_n=256, penalty_repeat=1.1)
    assert found.values == {
        "temperature": pytest.approx(0.6),
        "top_k": 20,
        "top_p": pytest.approx(0.9),
        "min_p": pytest.approx(0.01),
        "penalty_window": 256,
        "repetition_penalty": pytest.approx(1.1),
    }
    assert found.warnings == []


def test_none(read):
    assert read() == Recommended({}, [])


def test_values_below_zero_are_what_llama_cpp_takes_them_for(read):
    assert read(temp=-1.0, top_k=-1, penalty_last_n=-1, penalty_repeat=1.2).values == {
        "temperature": 0,
        "top_k": 0,
        "penalty_window": 0,  # all tokens
        "repetition_penalty": pytest.approx(1.2),
    }


def test_a_penalty_over_no_token_is_none(read):
    assert read(penalty_last_n=0, penalty_repeat=1.2).values == {}


def test_other_samplers_and_their_order(read):
    keys = {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.25, "xtc_probability": 0.5, "xtc_threshold": 0.125}
    assert read(**keys) == Recommended(keys, [])
    assert read(sequence="Top-K;temp").values == {"samplers": "top_k;temperature"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"mirostat": 3},
            "general.sampling.mirostat is 3, and is not used: `mirostat` is 3; a whole number from 0 to 2",
        ),
        ({"sequence": "top_k;infill"}, "sequence is 'top_k;infill', and is not used: `samplers` is 'infill'; choose"),
        ({"heat": 1.0}, "general.sampling.heat is 1.0, and is not used: pymla does not know this key"),
        ({"top_p": 1.5}, "top_p is 1.5, and is not used: `top_p` is 1.5; a number from 0 to 1 is expected"),
        ({"temp": "warm"}, "temp is 'warm', and is not used"),
        ({"top_k": True}, "top_k is True, and is not used"),
        ({"top_k": (GGUFValueType.ARRAY, [1, 2])}, "top_k is an array of 2, and is not used"),
    ],
)
def test_what_cannot_be_followed_is_named(read, keys, words):
    found = read(min_p=0.25, **keys)
    assert found.values == {"min_p": 0.25}
    assert len(found.warnings) == 1
    assert words in found.warnings[0]
    assert "model.gguf: metadata general.sampling." in found.warnings[0]


def test_whole_numbers_stay_whole(read):
    assert isinstance(read(top_k=np.int64(5).item()).values["top_k"], int)
