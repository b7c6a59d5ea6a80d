"""Choosing tokens."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymla.errors import PymlaError
from pymla.text.sampling import Sampler, SamplingParams
from pymla.text.sampling.selection import likeliest

pytestmark = pytest.mark.filterwarnings("error")

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
        np.testing.assert_array_equal(likeliest(each, count), np.argsort(-each, kind="stable")[:count])


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


# By the definitions ---------------------------------------------------------------------------------------------------

OFF = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
EIGHTHS = st.integers(-40, 40).map(lambda i: i / 8)  # exact in float32, with many equal ones


def chances(logits, history, p):
    """Pairs of a token and its chance, from the likeliest on, one token and one filter at a time: llama.cpp's chain."""
    logits = [x + p.logit_bias.get(token, 0) for token, x in enumerate(map(float, logits))]
    window = history[-p.penalty_window :] if p.penalty_window else history
    for token in set(window):
        x = logits[token]
        x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        logits[token] = x - window.count(token) * p.frequency_penalty - p.presence_penalty
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if p.temperature == 0:
        return [(order[0], 1.0)]
    kept = [(token, math.exp(logits[token] - logits[order[0]])) for token in order[: p.top_k or None]]
    total = sum(share for _, share in kept)
    before, nucleus = 0.0, []
    for token, share in kept:
        if before < p.top_p or not nucleus or p.top_p == 1:
            nucleus.append((token, share / total))
        before += share / total
    kept = [token for token, share in nucleus if share >= p.min_p * nucleus[0][1]]
    weights = [math.exp((logits[token] - logits[order[0]]) / p.temperature) for token in kept]
    return [(token, weight / sum(weights)) for token, weight in zip(kept, weights, strict=True)]


def token_at(number, logits, history=(), **params):
    """The token that is sampled where the generator gives this number."""
    sampler = Sampler(SamplingParams(**OFF | params), history)
    sampler._generator = SimpleNamespace(random=lambda: number)
    return sampler.sample(np.array(logits, np.float32)).token


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=st.lists(EIGHTHS, min_size=1, max_size=9),
    history=st.lists(st.integers(0, 8), max_size=9),
    params=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0, 0.25, 1, 2, 100]),
            "top_k": st.sampled_from([0, 0, 1, 2, 3, 7, 40]),
            "top_p": st.sampled_from([0, 0.25, 0.5, 0.9, 1, 1]),
            "min_p": st.sampled_from([0, 0, 0.1, 0.5, 1]),
            "repetition_penalty": st.sampled_from([0.5, 1, 1, 2, 3]),
            "frequency_penalty": st.sampled_from([-0.5, 0, 0, 1, 1.25]),
            "presence_penalty": st.sampled_from([-2, 0, 0, 1, 1.5]),
            "penalty_window": st.sampled_from([0, 1, 3, 64]),
            "logit_bias": st.dictionaries(st.integers(0, 8), EIGHTHS, max_size=2),
        }
    ),
)
@example([2.0, 1.0, -1.0], [0, 0, 2], OFF | {"repetition_penalty": 2})
@example([1.0, 0.5, -1.0], [0, 0, 2], OFF | {"frequency_penalty": 0.25})
@example([1.0, 0.5, -1.0], [0, 0, 2], OFF | {"presence_penalty": 1})
@example([1.0, 0.5, -1.0], [0, 1, 1], OFF | {"presence_penalty": 1, "penalty_window": 0})
@example([0.0, -40.0], [], OFF | {"temperature": 100})  # a probability of 1e-17 counts, where no filter is on
@example([1.0, 1.0, 0.5, 1.0], [], OFF | {"min_p": 1})  # as likely as the likeliest: kept
@example([1.0, 1.0, 1.0, 1.0], [], OFF | {"top_p": 0.5})  # two reach it together
def test_tokens_have_the_chances_of_the_definitions(logits, history, params):
    history = [token for token in history if token < len(logits)]
    bias = {token: x for token, x in params.pop("logit_bias", {}).items() if token < len(logits)}
    params |= {"logit_bias": bias}
    expected, upto = chances(logits, history, SamplingParams(**OFF | params)), 0.0
    for token, chance in expected:
        if chance > 1e-9:  # inside its stretch of the numbers from 0 to 1, next to both ends
            for number in (upto + 1e-6 * chance, upto + (1 - 1e-6) * chance):
                assert token_at(number, logits, history, **params) == token
        upto += chance


def test_stretches_of_the_random_number_begin_with_their_first():
    assert [token_at(number, [3, 3, 3, 3]) for number in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]
    # Ten times 0.1 is less than the largest number that a generator gives.
    assert token_at(1 - 2**-53, [1.0] * 10) == 9


def test_penalties_look_back_on_what_was_sampled():
    assert drawn(4, temperature=0, presence_penalty=3.0) == [0, 1, 2, 3]
    assert drawn(4, temperature=0, presence_penalty=3.0, penalty_window=1) == [0, 1, 0, 1]


@pytest.mark.parametrize("shift", [-30, 0, 3])
def test_log_probabilities_of_logits_of_any_height(shift):
    sampled = Sampler(SamplingParams(temperature=0, presence_penalty=9, logprobs=5), [0]).sample(LOGITS + shift)
    assert (sampled.token, sampled.logprob) == (1, pytest.approx(math.log(0.25), abs=1e-5))
    assert [token for token, _ in sampled.alternatives] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([logprob for _, logprob in sampled.alternatives], LOGITS, atol=1e-5)


# Options --------------------------------------------------------------------------------------------------------------


def test_bias_of_a_token_next_to_the_vocabulary():
    with pytest.raises(PymlaError, match="token 5: the vocabulary has 5"):
        Sampler(SamplingParams(logit_bias={5: 1.0})).sample(LOGITS)
    assert Sampler(SamplingParams(logit_bias={0: -20, 4: 20})).sample(LOGITS).token == 4


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", 0, 100),
        ("dynatemp_range", 0, 100),
        ("dynatemp_exponent", 0, 100),
        ("top_k", 0, 2**31),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("typical_p", 0, 1),
        ("top_n_sigma", -1, 1000),
        ("xtc_probability", 0, 1),
        ("xtc_threshold", 0, 1),
        ("min_keep", 0, 2**31),
        ("repetition_penalty", 0.01, 100),
        ("frequency_penalty", -100, 100),
        ("presence_penalty", -100, 100),
        ("penalty_window", 0, 2**31),
        ("dry_multiplier", 0, 100),
        ("dry_base", 1, 100),
        ("dry_allowed_length", 0, 2**31),
        ("dry_window", 0, 2**31),
        ("mirostat", 0, 2),
        ("mirostat_tau", 0, 100),
        ("mirostat_eta", 0, 100),
        ("adaptive_target", -1, 1),
        ("adaptive_decay", 0, 0.99),
        ("logprobs", 0, 1000),
    ],
)
def test_limits(name, low, high):
    whole = name in (
        *("top_k", "min_keep", "penalty_window", "dry_allowed_length", "dry_window"),
        *("mirostat", "logprobs"),
    )
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (low - 1, high + 1, *(() if whole else (math.nextafter(low, -1e9), math.nextafter(high, 1e9)))):
        with pytest.raises(PymlaError, match=rf"^`{name}` is .* from {low:g} to {high if whole else f'{high:g}'} is"):
            SamplingParams(**{name: value})


def test_samplers_by_llama_cpps_names():
    assert SamplingParams(samplers="Top-K;minp;typ;nucleus;temp").samplers == (
        *("top_k", "min_p", "typ_p", "top_p", "temperature"),
    )
    assert SamplingParams(samplers=["adaptive-p", "topnsigma"]).samplers == ("adaptive_p", "top_n_sigma")
    assert SamplingParams(samplers="").samplers == SamplingParams(samplers=[]).samplers == ()
    for refused, named in (("top_k;infill", "'infill'"), ("top_k;", "''"), ([3], "3"), (3, "3"), ({"dry": 1}, "{")):
        with pytest.raises(PymlaError, match=f"^`samplers` is {named}"):
            SamplingParams(samplers=refused)


def test_sequence_breakers_are_texts():
    assert SamplingParams(dry_sequence_breakers=["a", "bc"]).dry_sequence_breakers == ("a", "bc")
    assert SamplingParams(dry_sequence_breakers="a;b").dry_sequence_breakers == ("a;b",)
    assert SamplingParams(dry_sequence_breakers=()).dry_sequence_breakers == ()
    for refused in ([""], ["x" * 41], ["é" * 21], [None], 3, b"a"):
        with pytest.raises(PymlaError, match=r"^`dry_sequence_breakers` is .* expected$"):
            SamplingParams(dry_sequence_breakers=refused)


def test_sequence_breakers_need_a_tokenizer():
    with pytest.raises(PymlaError, match="`dry_sequence_breakers` are texts"):
        Sampler(SamplingParams(dry_multiplier=1))
    for options in ({"dry_sequence_breakers": ()}, {"samplers": "top_k"}, {"mirostat": 1}):
        Sampler(SamplingParams(dry_multiplier=1, **options)).sample(LOGITS)
    assert SamplingParams(dry_multiplier=1, mirostat=1).for_tokenizer(None).dry_sequence_breakers[0] == "\n"


def test_limits_of_bias_and_seed():
    for bias in (-1e9, 1e9, -math.inf, np.float32(-math.inf)):
        kept = SamplingParams(logit_bias={np.int64(0): bias}).logit_bias
        assert kept == {0: bias}
        assert {type(each) for item in kept.items() for each in item} == {int, float}
    for bias in (math.nextafter(-1e9, -2e9), math.nextafter(1e9, 2e9), math.inf, math.nan, "1"):
        with pytest.raises(PymlaError, match=r"`logit_bias\[0\]` is .*; a number from -1e\+09 to 1e\+09 is expected"):
            SamplingParams(logit_bias={0: bias})
    for token in (-1, 0.5, "0"):
        with pytest.raises(PymlaError, match=r"`logit_bias` is .*; a whole number from 0 on is expected"):
            SamplingParams(logit_bias={token: 1.0})
    with pytest.raises(PymlaError, match="`logit_bias` is 3; a dict of token ids and numbers is expected"):
        SamplingParams(logit_bias=3)
    assert SamplingParams(seed=0).seed == 0
    with pytest.raises(PymlaError, match="`seed` is -1; a whole number from 0 on is expected"):
        SamplingParams(seed=-1)


def test_defaults_are_those_of_llama_cpp():
    """Those of its command line (``common_params_sampling``), which has its penalties off."""
    assert SamplingParams() == SamplingParams(
        samplers="penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature",
        temperature=0.8,
        dynatemp_range=0,
        dynatemp_exponent=1,
        top_k=40,
        top_p=0.95,
        min_p=0.05,
        typical_p=1,
        top_n_sigma=-1,
        xtc_probability=0,
        xtc_threshold=0.1,
        min_keep=0,
        dry_multiplier=0,
        dry_base=1.75,
        dry_allowed_length=2,
        dry_window=64,
        dry_sequence_breakers=["\n", ":", '"', "*"],
        mirostat=0,
        mirostat_tau=5,
        mirostat_eta=0.1,
        adaptive_target=-1,
        adaptive_decay=0.9,
        repetition_penalty=1,
        frequency_penalty=0,
        presence_penalty=0,
        penalty_window=64,
        logit_bias={},
        seed=None,
        logprobs=0,
    )


def test_options_by_name():
    assert SamplingParams.of({"top_k": None, "temperature": 0.5}) == SamplingParams(temperature=0.5)
    with pytest.raises(PymlaError, match=r"^there is no option `temprature`; did you mean `temperature`\?$"):
        SamplingParams.of({"temprature": 0})
    with pytest.raises(
        PymlaError, match=r"^there is no option `q`; there are temperature, dynatemp_range, .*, logprobs$"
    ):
        SamplingParams.of({"q": None})


def test_no_token_may_be_chosen():
    banned = dict.fromkeys(range(5), -math.inf)
    for options in ({}, {"temperature": 0}, {"presence_penalty": 1}):
        with pytest.raises(PymlaError, match="bans every token"):
            Sampler(SamplingParams(logit_bias=banned, **options)).sample(LOGITS)
