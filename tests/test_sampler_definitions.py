"""Samplers against their definitions (`sampler_definitions`), and draws against distributions."""

import math

import numpy as np
import pytest
import sampler_definitions as definitions
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymla.errors import PymlaError
from pymla.text.sampling import Sampler, SamplingParams, sample_batch
from pymla.text.sampling.dry import Breakers
from pymla.text.sampling.params import DEFAULT_SAMPLERS
from pymla.text.sampling.selection import descending

pytestmark = pytest.mark.filterwarnings("error")

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EIGHTHS = st.integers(-40, 40).map(lambda i: i / 8)  # exact in float32, with many equal ones

#: Values at which no sum of probabilities of a few such logits lies, so that rounding decides nothing.
CHOICES = {
    "temperature": [0, 0.25, 1, 1, 2],
    "dynatemp_range": [0, 0, 0.5, 1.5],
    "dynatemp_exponent": [0.5, 1, 2],
    "top_k": [0, 0, 1, 2, 5, 40],
    "top_p": [0, 0.31, 0.62, 0.9, 1, 1],
    "min_p": [0, 0, 0.1, 0.3],
    "typical_p": [0.17, 0.62, 0.93, 1, 1],
    "top_n_sigma": [-1, 0, 0.37, 1.13],
    "xtc_probability": [0, 0.5, 1],
    "xtc_threshold": [0, 0.04, 0.21, 0.7],
    "min_keep": [0, 0, 1, 3, 20],
    "repetition_penalty": [0.5, 1, 1, 2],
    "frequency_penalty": [-0.5, 0, 0, 1.25],
    "presence_penalty": [-2, 0, 0, 1.5],
    "penalty_window": [0, 1, 3, 64],
    "dry_multiplier": [0, 0.5, 2],
    "dry_base": [1, 1.75, 3],
    "dry_allowed_length": [0, 1, 2, 3],
    "dry_window": [0, 4, 64],
}
BREAKERS = [[], [(0,)], [(1, 0), (0, 2)], [(2,), (2, 0, 1), (1, 1)]]


def as_breakers(sequences):
    tails = {}
    for head, *tail in sequences:
        tails.setdefault(head, []).append(tuple(tail))
    return Breakers(tails)


def as_mask(allowed):
    """The words of a mask, of bool (V,)."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


def assert_is(found, expected):
    assert found.ids.tolist() == [token for token, _ in expected]
    np.testing.assert_allclose(found.probabilities, [share for _, share in expected], rtol=1e-9, atol=1e-300)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits=st.lists(EIGHTHS, min_size=1, max_size=9),
    history=st.lists(st.integers(0, 3), max_size=14),
    chosen=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}),
    samplers=st.just(DEFAULT_SAMPLERS) | st.lists(st.sampled_from(DEFAULT_SAMPLERS), unique=True, max_size=9),
    bias=st.dictionaries(st.integers(0, 8), EIGHTHS | st.just(-math.inf), max_size=2),
    breakers=st.sampled_from(BREAKERS),
    allowed=st.none() | st.lists(st.booleans(), min_size=9, max_size=9),
    coin=st.sampled_from([0, 0.499, 0.5, 0.999]),
)
@example([1.0, 1.0, 1.0, 1.0], [], {"top_p": 0.5}, DEFAULT_SAMPLERS, {}, [], None, 0)  # two reach it together
@example([1.0, 1.0, 1.0, 1.0], [], {"typical_p": 0.5}, DEFAULT_SAMPLERS, {}, [], None, 0)  # it takes three for more
@example([2.0, 0.0], [], {"top_n_sigma": 2}, DEFAULT_SAMPLERS, {}, [], None, 0)  # at the bound
@example([1.0, 1.0], [], {"xtc_probability": 1, "xtc_threshold": 0.5}, DEFAULT_SAMPLERS, {}, [], None, 0)
@example([1.0, 1.0], [], {"xtc_probability": 0.5, "xtc_threshold": 0.5}, DEFAULT_SAMPLERS, {}, [], None, 0.5)
@example([1.0, 1.0, -3.0], [], {"xtc_probability": 1, "min_keep": 2}, DEFAULT_SAMPLERS, {}, [], None, 0)
@example([1.0, 1.0, -3.0], [], {"xtc_probability": 1, "min_keep": 3}, DEFAULT_SAMPLERS, {}, [], None, 0)
@example([3.0, 2.0, 1.0], [1, 1, 0, 1, 1], {"dry_multiplier": 1}, DEFAULT_SAMPLERS, {}, [(0,)], None, 0)
@example([3.0, 2.0, 1.0], [0] * 9, {"dry_multiplier": 1, "dry_base": 1}, DEFAULT_SAMPLERS, {}, [], None, 0)
@example([3.0, 2.0, 1.0], [0, 1] * 9, {"dry_multiplier": 1}, ("top_k", "dry"), {}, [(2, 2)], None, 0)
@example([0.0, -800.0], [], {"typical_p": 0.9}, DEFAULT_SAMPLERS, {}, [], None, 0)  # a probability rounded to 0
@example([0.0, -800.0], [], {"dynatemp_range": 0.5}, DEFAULT_SAMPLERS, {}, [], None, 0)
def test_distributions_are_those_of_the_definitions(logits, history, chosen, samplers, bias, breakers, allowed, coin):
    tokens = len(logits)
    history = [token for token in history if token < tokens]
    bias = {token: value for token, value in bias.items() if token < tokens}
    banned = [] if allowed is None else [token for token in range(tokens) if not allowed[token]]
    options = {"samplers": samplers, "logit_bias": bias, "dry_sequence_breakers": as_breakers(breakers)}
    params = SamplingParams(**OFF | chosen | options)
    sampler = Sampler(params, history)
    sampler._state.coin = coin
    mask = None if allowed is None else as_mask(allowed)
    if all(token in banned or bias.get(token) == -math.inf for token in range(tokens)):
        with pytest.raises(PymlaError, match=r"bans every token|the grammar allows none"):
            sampler.distribution(np.array(logits, np.float32), mask)
        return
    expected = definitions.distribution(logits, params, text=history, coin=coin, breakers=breakers, banned=banned)
    assert_is(sampler.distribution(np.array(logits, np.float32), mask), expected)


# Those that learn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_the_surprise_of_chosen_tokens(version):
    rng, tau, eta = np.random.default_rng(version), 2.5, 0.3
    sampler = Sampler(SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=0.5, seed=1))
    mu = 2 * tau
    for _ in range(12):
        logits = rng.standard_normal(300).astype(np.float32)
        scaled = {token: float(x) / 0.5 for token, x in enumerate(logits)}
        left = [definitions.mirostat, definitions.mirostat_v2][version - 1](scaled, mu)
        shares = definitions.softmax(left)
        found = sampler.distribution(logits)
        assert_is(found, [(token, shares[token]) for token in definitions.ordered(left)])
        token = sampler.sample(logits).token
        mu -= eta * (-math.log2(shares[token]) - tau)


def test_mirostat_of_logits_without_a_slope():
    """Zipf's exponent is 1, and 0, where its formula has no value; one token is left at least."""
    powers = -np.log(np.arange(1, 201)).astype(np.float32)
    expected = 2 ** (2 * 2.0) * 1 / math.log(200)  # the limit: k ** 1 = 2 ** μ / ln N
    found = Sampler(SamplingParams(mirostat=1, mirostat_tau=2, temperature=1)).distribution(powers)
    assert len(found.ids) == pytest.approx(expected, abs=1)
    for tau, left in ((0, 1), (20, 50)):
        equal = Sampler(SamplingParams(mirostat=1, mirostat_tau=tau)).distribution(np.zeros(50, np.float32))
        assert len(equal.ids) == left
    assert len(Sampler(SamplingParams(mirostat=1)).distribution(np.zeros(1, np.float32)).ids) == 1


def test_adaptive_p_meets_its_target():
    rng, target, decay = np.random.default_rng(0), 0.3, 0.8
    options = {"adaptive_target": target, "adaptive_decay": decay, "samplers": "adaptive_p;top_k", "seed": 3}
    sampler = Sampler(SamplingParams(**OFF | options | {"top_k": 15}))
    total, weight, met = target / (1 - decay), 1 / (1 - decay), []
    for _ in range(100):
        logits = 2 * rng.standard_normal(40).astype(np.float32)
        left = definitions.some(dict(enumerate(map(float, logits))), np.argsort(-logits)[:15].tolist())
        aim = min(max(2 * target - total / weight, 0), 1)
        new = definitions.adaptive_p(left, aim)
        shares = definitions.softmax(new)
        assert_is(sampler.distribution(logits), [(token, shares[token]) for token in definitions.ordered(new)])
        before = definitions.softmax(left)[sampler.sample(logits).token]
        total, weight = before + decay * total, 1 + decay * weight
        met.append(before)
    assert np.mean(met) == pytest.approx(target, abs=0.08)


@pytest.mark.parametrize("options", [{"mirostat": 2}, {"samplers": "adaptive_p", "adaptive_target": 0.2}], ids=str)
def test_tokens_that_were_no_candidates_teach_nothing(options):
    """As those that a grammar or a prompt forces."""
    logits = np.zeros(40, np.float32)
    logits[0] = 30
    sampler, fresh = (Sampler(SamplingParams(**OFF | options)) for _ in range(2))
    sampler.accept(5)
    sampler.distribution(logits, as_mask(np.arange(40) < 3))
    sampler.accept(5)
    assert_same(sampler.distribution(logits), fresh.distribution(logits))
    sampler.accept(0)
    slope = -np.arange(40, dtype=np.float32) / 4
    once = sampler.copy()
    sampler.accept(0)  # without a distribution
    assert_same(sampler.distribution(slope), once.distribution(slope))
    one, other = sampler.distribution(slope), fresh.distribution(slope)
    assert len(one.ids) != len(other.ids) or not np.allclose(one.probabilities, other.probabilities)


def assert_same(one, other):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


# Draws ----------------------------------------------------------------------------------------------------------------


def assert_drawn_from(counts, shares):
    """Pearson's chi-square, below the value that one in 30,000 such tests is above (Wilson and Hilferty, 1931)."""
    expected = shares * counts.sum()
    assert (counts[shares == 0] == 0).all()
    used = expected > 5
    rest, rest_expected = counts[~used].sum(), expected[~used].sum()
    statistic = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    statistic += (rest - rest_expected) ** 2 / max(rest_expected, 1)
    freedom = used.sum()
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound, (statistic, freedom)


def dense(candidates, tokens):
    shares = np.zeros(tokens)
    shares[candidates.ids] = candidates.probabilities
    return shares


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "dynatemp_range": 0.5, "typical_p": 0.95},
        {"top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1},
        {"top_n_sigma": 1.5, "temperature": 3},
        {"samplers": "temperature;top_p;xtc", "xtc_probability": 1, "temperature": 2},
        {"logit_bias": {3: 2.0, 5: -math.inf}},
    ],
    ids=str,
)
def test_draws_have_the_distribution(options):
    logits = np.random.default_rng(8).standard_normal(60).astype(np.float32)
    sampler = Sampler(SamplingParams(seed=11, **options))
    shares = dense(sampler.distribution(logits), 60)
    counts = np.bincount([sampler.sample(logits).token for _ in range(4000)], minlength=60)
    assert_drawn_from(counts, shares)


def test_xtc_works_on_as_many_tokens_as_its_probability_says():
    logits = np.random.default_rng(8).standard_normal(30).astype(np.float32)
    params = {"xtc_probability": 0.3, "xtc_threshold": 0.08}
    sampler = Sampler(SamplingParams(seed=2, **OFF | params))
    shares = 0.0
    for coin, chance in ((0.0, 0.3), (0.9, 0.7)):
        each = Sampler(SamplingParams(**OFF | params))
        each._state.coin = coin
        shares = shares + chance * dense(each.distribution(logits), 30)
    counts = np.bincount([sampler.sample(logits).token for _ in range(4000)], minlength=30)
    assert_drawn_from(counts, shares)


@pytest.mark.parametrize("logits", ["flat", "steep", "equal"])
@pytest.mark.parametrize(
    "options", [{"top_p": 0.97}, {"top_p": 0.9, "min_p": 0.2}, {"top_p": 0.9, "min_keep": 9000}, {}]
)
def test_long_rows_are_sorted_as_far_as_it_takes(logits, options):
    rng = np.random.default_rng(5)
    row = {
        "flat": rng.standard_normal(20000) / 8,
        "steep": 4 * rng.standard_normal(20000),
        "equal": rng.integers(0, 9, 20000),
    }[logits].astype(np.float32)
    params = SamplingParams(**OFF | options)
    order = np.argsort(-row, kind="stable")
    weights = np.exp(row[order].astype(np.float64))
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    ranks = np.arange(len(row))
    kept = (before < params.top_p) | (ranks < params.min_keep)
    kept &= (weights >= params.min_p * weights[0] * (1 - 1e-12)) | (ranks < params.min_keep)
    found = Sampler(params).distribution(row)
    np.testing.assert_array_equal(found.ids, order[kept])
    np.testing.assert_allclose(found.probabilities, weights[kept] / weights[kept].sum(), rtol=1e-9)
    cumulative = np.cumsum(found.probabilities)
    for number in (0.0, 0.001, 0.4, 0.999, 1 - 2**-53):
        sampler = Sampler(params)
        sampler.random = lambda number=number: number
        at = min(np.searchsorted(cumulative, number, side="right"), len(found.ids) - 1)
        assert sampler.sample(row).token == found.ids[at]


@pytest.mark.parametrize("spread", [1 / 64, 4, 100])
def test_typical_tokens_of_a_long_row(spread):
    row = (spread * np.random.default_rng(6).standard_normal(5000)).astype(np.float32)
    for min_keep in (0, 4000):
        params = SamplingParams(**OFF | {"typical_p": 0.8, "min_keep": min_keep, "samplers": "typ_p"})
        assert_is(Sampler(params).distribution(row), definitions.distribution(row.tolist(), params))


def test_sorting_many_numbers():
    values = np.random.default_rng(0).integers(0, 3000, 9000).astype(np.float32)
    positions = np.flatnonzero(values > 100)
    expected = positions[np.argsort(-values[positions], kind="stable")]
    np.testing.assert_array_equal(descending(values, positions), expected)


# Masks, batches, copies -----------------------------------------------------------------------------------------------


def test_masks_end_before_the_vocabulary_or_after_it():
    logits = np.arange(70, dtype=np.float32)
    greedy = SamplingParams(temperature=0)
    assert Sampler(greedy).sample(logits, np.full(2, 2**32 - 1, np.uint32)).token == 63
    assert Sampler(greedy).sample(logits, np.full(9, 2**32 - 1, np.uint32)).token == 69
    assert Sampler(greedy).sample(logits, np.array([1 << 31, 2], np.uint32)).token == 33
    with pytest.raises(PymlaError, match="the grammar allows none"):
        Sampler(greedy).sample(logits, np.zeros(3, np.uint32))


def test_masks_leave_log_probabilities_as_they_are():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    chosen = Sampler(SamplingParams(temperature=0)).sample(logits, np.array([4], np.uint32))
    assert (chosen.token, chosen.logprob) == (2, pytest.approx(math.log(0.2), abs=1e-6))


def test_a_batch_is_its_rows():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((5, 90)).astype(np.float32)
    several = [{}, {"temperature": 0}, {"top_k": 0, "typical_p": 0.5}, {"mirostat": 2}, {"presence_penalty": 1}]
    masks = [None, as_mask(np.arange(90) % 2 == 0), None, None, as_mask(np.arange(90) > 80)]
    together, alone = ([Sampler(SamplingParams(seed=i, **each)) for i, each in enumerate(several)] for _ in range(2))
    for _ in range(5):
        found = sample_batch(together, logits, masks)
        assert found == [sampler.sample(*each) for sampler, *each in zip(alone, logits, masks, strict=True)]
    assert sample_batch(together[:1], logits[:1]) == [alone[0].sample(logits[0])]


def test_a_row_that_fails_leaves_the_others_alone():
    logits = np.zeros((3, 40), np.float32)
    logits[1, 7] = np.nan
    samplers = [Sampler(SamplingParams(seed=i)) for i in range(3)]
    found = sample_batch(samplers, logits, [None, None, np.zeros(2, np.uint32)])
    assert found[0] == Sampler(SamplingParams(seed=0)).sample(logits[0])
    assert [type(each) for each in found[1:]] == [PymlaError, PymlaError]
    assert "token 7 is nan" in str(found[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mirostat": 1},
        {"samplers": "adaptive_p", "adaptive_target": 0.5},
        {"xtc_probability": 0.5},
        {"frequency_penalty": 1},
        {"dry_multiplier": 1, "dry_sequence_breakers": []},
    ],
    ids=str,
)
def test_copies_go_ways_of_their_own(options):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, 50)).astype(np.float32)
    params = SamplingParams(**{"temperature": 1.5, "top_k": 0, "seed": 4} | options)
    expected = Sampler(params, [1, 2, 3])
    tokens = [expected.sample(row).token for row in rows]
    sampler = Sampler(params, [1, 2, 3])
    assert [sampler.sample(row).token for row in rows[:30]] == tokens[:30]
    other = sampler.copy()
    other.accept(7)
    other.sample(rows[0])
    copied = sampler.copy()
    assert [copied.sample(row).token for row in rows[30:]] == tokens[30:]
    for row in rows[30:]:
        sampler.distribution(row)
        sampler.distribution(row)
        assert sampler.sample(row).token == tokens[30]
        tokens.pop(30)


def test_chosen_tokens_are_reported():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=5, logprobs=1))
    chosen = sampler.choose(2, logits)
    assert chosen.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in chosen.alternatives] == [0]
    assert [sampler.sample(logits).token for _ in range(2)] == [0, 1]
