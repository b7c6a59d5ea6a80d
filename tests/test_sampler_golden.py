"""Samplers against the distributions that llama.cpp's own gave (tools/golden_samplers.py)."""

import json

import golden_samplers as recorded
import numpy as np
import pytest

from pymla.text.sampling import Sampler, SamplingParams
from pymla.text.tokenizer import Tokenizer

GOLDEN = json.loads(recorded.PATH.read_text())
CASES = list(recorded.cases())
TOKENIZER = Tokenizer.from_gguf(recorded.MODEL)

#: llama.cpp computes in float32, and of Mirostat and adaptive-p what it learned, too.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-7}


def test_cases_are_those_that_were_recorded():
    assert recorded.checksum() == GOLDEN["crc32"]
    assert [case.params for case in CASES] == [case["params"] for case in GOLDEN["cases"]]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i].params))
def test_distributions_are_those_of_llama_cpp(number):
    case = CASES[number]
    sampler = Sampler(case.sampling().for_tokenizer(TOKENIZER), case.history)
    for logits, expected in zip(case.logits, GOLDEN["cases"][number]["steps"], strict=True):
        found = sampler.distribution(logits)
        assert found.ids.tolist() == expected["ids"]
        np.testing.assert_allclose(found.probabilities, expected["probabilities"], **TOLERANCE)
        sampler.accept(expected["token"])


def test_every_case_has_an_effect():
    """But for those of XTC that are meant to have none."""
    without = []
    for case, golden in zip(CASES[1:], GOLDEN["cases"][1:], strict=True):
        off = recorded.OFF | ({"top_k": case.params["top_k"]} if "dry_multiplier" in case.params else {})
        found = Sampler(SamplingParams(**off)).distribution(case.logits[0])
        step = golden["steps"][0]
        if found.ids.tolist() == step["ids"] and np.allclose(found.probabilities, step["probabilities"], rtol=1e-3):
            without.append(case.params)
    assert [each.get("min_keep") or each["xtc_threshold"] for each in without] == [47, 0.51]
