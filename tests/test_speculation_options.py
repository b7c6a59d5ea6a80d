"""Speculation as callers and users ask for it."""

import json

import pytest
from test_cli import refused, run  # noqa: F401  fixtures

import pymla
from pymla.engine.loading import demo_path
from pymla.errors import PymlaError

PROMPT = "for i in range(3):\n    print(i)\n" * 3
GIVEN = ("generate", PROMPT, "-n", 24, "--temperature", 0, "--cache-type", "f32", "--json")


def test_the_same_text_by_every_drafter(run):  # noqa: F811
    _, out, _ = run(*GIVEN)
    plain = json.loads(out)
    assert "speculation" not in plain
    for options in (("ngram",), ("draft", "--draft-model", demo_path(), "--draft-tokens", 4)):
        code, out, _ = run(*GIVEN, "--speculate", *options)
        told = json.loads(out)
        assert code == 0
        assert told["tokens"] == plain["tokens"]
        counts = told["speculation"]
        assert 0 < counts["accepted"] <= counts["drafted"]


def test_what_was_accepted_is_told(run):  # noqa: F811
    _, _, err = run(*GIVEN[:-1], "--speculate", "ngram")
    assert " | drafts: " in err
    assert " tokens accepted" in err


def test_refusals(refused):  # noqa: F811
    refused("generate", "x", "--speculate", "draft", parts=("--speculate draft", "--draft-model"))
    refused("generate", "x", "--draft-model", "small.gguf", parts=("--draft-model", "--speculate draft"))
    refused("generate", "x", "--speculate", "mtp", parts=("demo.gguf", "nextn"))


def test_an_engine_refuses():
    model = pymla.load(device="reference", ctx=64)
    for options, parts in (
        ({"drafter": "oracle"}, ("drafter", "ngram, draft, mtp")),
        ({"drafter": "draft"}, ("draft_model",)),
        ({"drafter": "ngram", "draft_model": model}, ("draft_model",)),
        ({"drafter": "mtp"}, ("nextn",)),
        ({"drafter": "ngram", "most": 0}, ("most", "0")),
    ):
        with pytest.raises(PymlaError) as error:
            model.engine.speculation(**options)
        assert all(part in str(error.value) for part in parts), str(error.value)
