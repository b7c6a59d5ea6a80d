"""Arguments from Python: taken for what they obviously mean, or refused in one line that names the argument."""

import inspect
import math
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pymla
from pymla import checks
from pymla.errors import PymlaError
from pymla.text.sampling import SamplingParams

ODD = [
    None,
    True,
    -1,
    0,
    3,
    2.0,
    2.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    1e308,
    "3",
    "all",
    "",
    "\x1b[31m",
    b"x",
    np.int64(3),
    np.float32(0.5),
    np.float64("nan"),
    np.bool_(True),
    np.array(3),
    np.array([1, 2]),
    np.array([]),
    [1],
    [],
    ["a", 1],
    [[1, 2], [3]],
    (1.5,),
    {},
    {1: 2.0},
    {"a": 1},
    {1: None},
    {-1: 1.0},
    {1.5: 1},
    range(3),
    Fraction(1, 2),
    1j,
    object(),
    object,
    len,
]


def shown(value):
    """A value as a part of a test's name, which is the same in every process."""
    return "object()" if type(value) is object else repr(value)


SAMPLING = [field.name for field in fields(SamplingParams)]
ARRAYS_AND_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.booleans(),
    st.none(),
    st.lists(st.integers() | st.floats() | st.text(max_size=2), max_size=3),
    st.sampled_from(ODD),
)


@pytest.fixture(scope="module")
def demo():
    with pymla.load(device="cpu", ctx=64) as language_model:
        yield language_model


def one_line(error, name=None):
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 400
    assert name is None or name in text, text


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLING), ARRAYS_AND_NUMBERS)
def test_sampling(name, value):
    try:
        params = SamplingParams.of({name: value})
    except PymlaError as error:
        one_line(error, f"`{name}")
        return
    kept, default = getattr(params, name), getattr(SamplingParams(), name)
    if value is None:
        assert kept == default
    elif name in ("samplers", "dry_sequence_breakers"):
        assert type(kept) is tuple
        assert {type(text) for text in kept} <= {str}
    elif name != "logit_bias":
        assert type(kept) in (int, float)
        assert kept == value
        assert not isinstance(value, bool)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["max_tokens", "stop", "progress"]), ARRAYS_AND_NUMBERS)
def test_generation(demo, name, value):
    options = {"max_tokens": 2} | {name: value}
    try:
        generation = demo.generation("x", temperature=0, **options)
    except PymlaError as error:
        one_line(error, f"`{name}`")
        return
    if name == "max_tokens":
        assert generation.max_tokens == value
        assert generation.max_tokens is None or type(generation.max_tokens) is int
    if name != "progress" or value is None:  # what can be called need not take two numbers
        next(iter(generation), None)


@pytest.mark.parametrize("value", ODD, ids=shown)
def test_prompts_and_ids(demo, value):
    for call in (demo.logits, demo.detokenize, demo.tokenize, lambda prompt: demo.generate(prompt, max_tokens=1)):
        try:
            call(value)
        except PymlaError as error:
            one_line(error)


@pytest.mark.parametrize("name", [name for name in inspect.signature(pymla.load).parameters if name != "path"])
@pytest.mark.parametrize("value", ODD, ids=shown)
def test_loading(name, value):
    try:
        pymla.load(**{"device": "cpu", "ctx": 64} | {name: value}).close()
    except PymlaError as error:
        one_line(error, f"`{name}`" if name not in ("gpu_layers", "cpu_moe") else None)


@pytest.mark.parametrize("path", [each for each in ODD if each is not None], ids=shown)
def test_paths(path):
    with pytest.raises(PymlaError, match=r"`path` is|cannot be opened"):
        pymla.load(path)


def test_the_obvious_meaning(demo):
    text = demo.generate("def ", max_tokens=5, temperature=0)
    for options in (
        {"max_tokens": np.int32(5), "temperature": np.float32(0)},
        {"max_tokens": 5.0, "temperature": False + 0.0, "stop": None, "seed": None},
        {"max_tokens": np.array(5), "temperature": 0, "stop": [], "logit_bias": None, "top_k": None},
        {"max_tokens": 5, "temperature": Fraction(0), "logit_bias": {np.int64(1): np.float32(0)}},
    ):
        assert demo.generate("def ", **options) == text
    ids = demo.tokenize("def ")
    for same in (tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert demo.generate(same, max_tokens=5, temperature=0) == text


@pytest.mark.parametrize("value", [2.5, "2", True, None, math.nan, -1, 1 << 40], ids=repr)
def test_whole_numbers(value):
    with pytest.raises(PymlaError, match=r"`n` is .*; a whole number from 0 to 10 is expected"):
        checks.integer("n", value, 0, 10)


def test_unknown_options_are_named(demo):
    with pytest.raises(PymlaError, match="no option `temprature`; did you mean `temperature`"):
        demo.generate("x", temprature=0)
    with pytest.raises(PymlaError, match="no option `q`; there are temperature, dynatemp_range"):
        demo.generate("x", q=0)


def test_all_tokens_banned(demo):
    banned = dict.fromkeys(range(demo.config.vocab_size), -math.inf)
    for options in ({}, {"temperature": 0}, {"top_k": 0, "min_p": 0}):
        with pytest.raises(PymlaError, match="`logit_bias` bans every token"):
            demo.generate("x", max_tokens=1, logit_bias=banned, **options)
    del banned[300]
    generation = demo.generation("x", max_tokens=3, logit_bias=banned)
    list(generation)
    assert generation.tokens == [300] * 3
