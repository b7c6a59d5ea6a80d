"""Choosing tokens."""

import numpy as np
import pytest

from pymla.errors import PymlaError
from pymla.sampling import Sampler, SamplingParams, _likeliest

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


@pytest.mark.parametrize("count", [1, 3, 40, 999, 1000, 5000])
def test_the_likeliest_are_those_of_a_whole_sort(count):
    # Many are equal, some are impossible, and no number of parts divides them evenly.
    logits = np.random.default_rng(count).integers(0, 300, 1013).astype(np.float64)
    logits[::7] = -np.inf
    for each in (logits, -logits[1:2].repeat(1013), np.sort(logits)):
        np.testing.assert_array_equal(_likeliest(each, count), np.argsort(-each, kind="stable")[:count])


@pytest.mark.parametrize("filters", [{"min_p": 0.1}, {"min_p": 0.1, "top_p": 0.5}, {"top_k": 9, "top_p": 0.8}, {}])
def test_filters_are_those_of_a_whole_sort(filters):
    params = SamplingParams(**{"top_k": 0, "top_p": 1, "min_p": 0, "seed": 2} | filters)
    logits = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    kept = np.argsort(-logits, kind="stable")[: params.top_k or None]
    weights = np.exp(logits[kept].astype(np.float64))
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    allowed = kept[(before < params.top_p) & (weights >= params.min_p * weights[0])]
    sampler = Sampler(params)
    seen = {sampler.sample(logits).token for _ in range(3000)}
    assert seen <= set(allowed.tolist())
    assert len(allowed) > 100 or seen == set(allowed.tolist())


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
    with pytest.raises(PymlaError, match=r"`top_p` is 1.5"):
        SamplingParams(top_p=1.5)
    with pytest.raises(PymlaError, match="`temperature` is nan"):
        SamplingParams(temperature=float("nan"))
    for bias in (float("nan"), float("inf"), 1e300):
        with pytest.raises(PymlaError, match=r"`logit_bias\[3\]` is"):
            SamplingParams(logit_bias={3: bias})
    with pytest.raises(PymlaError, match="token 1 is nan"):
        Sampler(SamplingParams()).sample(np.array([0, np.nan], np.float32))
    with pytest.raises(PymlaError, match="token 9"):
        Sampler(SamplingParams(logit_bias={9: 1.0})).sample(LOGITS)
