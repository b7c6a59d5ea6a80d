"""Choosing tokens."""

import numpy as np
import pytest

from pymla.errors import PymlaError
from pymla.sampling import Sampler, SamplingParams

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def drawn(count=400, history=(), **params):
    sampler = Sampler(
        SamplingParams(**{"top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1, "seed": 1} | params), history
    )
    return [sampler.sample(LOGITS).token for _ in range(count)]


def test_greedy():
    assert set(drawn(5, temperature=0)) == {0}
    assert set(drawn(5, temperature=5, top_k=1)) == {0}


def test_draws_follow_the_distribution():
    counts = np.bincount(drawn(4000), minlength=5) / 4000
    np.testing.assert_allclose(counts, np.exp(LOGITS), atol=0.03)


def test_filters():
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_p=0.6)) == {0, 1}
    assert set(drawn(top_p=0.75)) == {0, 1}
    assert set(drawn(min_p=0.25)) == {0, 1, 2}
    assert set(drawn(temperature=0.01)) == {0}


def test_same_seed_same_tokens():
    assert drawn(50, seed=3) == drawn(50, seed=3) != drawn(50, seed=4)


def test_penalties_and_bias():
    assert drawn(1, [0, 0, 0], temperature=0, frequency_penalty=1.0) == [1]
    assert drawn(1, [0], temperature=0, presence_penalty=2.0) == [1]
    assert drawn(1, [0], temperature=0, repetition_penalty=5.0) == [1]
    assert drawn(1, [0, 3, 3], temperature=0, presence_penalty=2.0, penalty_window=2) == [0]
    assert drawn(1, temperature=0, logit_bias={4: 10.0}) == [4]


@pytest.mark.filterwarnings("error")
def test_extremes():
    assert set(drawn(5, temperature=1e-308)) == {0}
    assert set(drawn(50, logit_bias={0: -float("inf"), 1: -float("inf")})) == {2, 3, 4}


def test_logprobs_are_the_models_own():
    sampled = Sampler(SamplingParams(temperature=0, logit_bias={4: 10.0}, logprobs=2)).sample(LOGITS)
    assert sampled.token == 4
    assert sampled.logprob == pytest.approx(np.log(0.03), abs=1e-5)
    assert [token for token, _ in sampled.alternatives] == [0, 1]
    assert sampled.alternatives[0][1] == pytest.approx(np.log(0.5), abs=1e-5)


def test_refusals():
    with pytest.raises(PymlaError, match=r"top_p is 1.5"):
        SamplingParams(top_p=1.5)
    with pytest.raises(PymlaError, match="temperature is nan"):
        SamplingParams(temperature=float("nan"))
    for bias in (float("nan"), float("inf"), 1e300):
        with pytest.raises(PymlaError, match="logit bias of token 3 is"):
            SamplingParams(logit_bias={3: bias})
    with pytest.raises(PymlaError, match="token 1 is nan"):
        Sampler(SamplingParams()).sample(np.array([0, np.nan], np.float32))
    with pytest.raises(PymlaError, match="token 9"):
        Sampler(SamplingParams(logit_bias={9: 1.0})).sample(LOGITS)
