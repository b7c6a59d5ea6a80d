"""Verification of drafts (`pymla.engine.speculation.verify`)."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla.engine.speculation.drafting import Draft
from pymla.engine.speculation.verify import verify
from pymla.text.sampling import Sampler, SamplingParams

#: Every draw from the model's own distribution.
PLAIN = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}


def history(sampler):
    return sampler._state.history.last(0).tolist()


def logits_of(*probabilities):
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(np.array(probabilities)), -1e9).astype(np.float32)


def test_at_temperature_0_equal_tokens_are_accepted():
    logits = np.eye(5, dtype=np.float32)[[2, 0, 4]]
    for drafted, chosen in (([2, 0], [2, 0, 4]), ([2, 1], [2, 0]), ([3, 0], [2]), ([], [2])):
        sampler = Sampler(SamplingParams(temperature=0), [7])
        result = verify(sampler, logits[: len(drafted) + 1], Draft(drafted))
        assert [each.token for each in result] == chosen
        assert history(sampler) == [7, *chosen]


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 6))
def test_certain_drafts_change_no_text(seed, length):
    """Tokens, and their reported log probabilities, are those of the sampler alone, with penalties and a seed."""
    random = np.random.default_rng(seed)
    table = random.normal(0, 2, (6, 6)).astype(np.float32)
    params = SamplingParams(seed=seed, repetition_penalty=1.3, frequency_penalty=0.2, penalty_window=4, logprobs=2)
    alone, expected, last = Sampler(params, [0]), [], 0
    for _ in range(20):
        expected.append(alone.sample(table[last]))
        last = expected[-1].token
    sampler, text = Sampler(params, [0]), []
    while len(text) < 20:
        drafted = random.integers(0, 6, length).tolist()
        if random.random() < 0.5:  # so that some are right
            drafted = [each.token for each in expected[len(text) : len(text) + length]]
        rows = table[[text[-1].token if text else 0, *drafted]]
        text.extend(verify(sampler, rows, Draft(drafted)))
    assert text[:20] == expected


class Scripted(Sampler):
    """Draws the numbers that it is told."""

    numbers = ()

    def random(self):
        number, *self.numbers = self.numbers
        return number


def test_a_drawn_token_leaves_the_distribution_as_it_is():
    """Over all drafted tokens, and over random numbers as dense as the distributions need: exact."""
    p, q = (1 / 2, 1 / 4, 1 / 4, 0), (1 / 4, 1 / 2, 0, 1 / 4)
    grid = [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    rows = np.stack([logits_of(*p), logits_of(1, 0, 0, 0)])
    share, accepted = np.zeros(4), 0.0
    for token, u, v in itertools.product(range(4), grid, grid):
        sampler = Scripted(SamplingParams(**PLAIN))
        sampler.numbers = [u, v, 0.5]
        result = verify(sampler, rows, Draft([token], np.array([q], np.float32)))
        share[result[0].token] += q[token] / len(grid) ** 2
        accepted += (len(result) == 2) * q[token] / len(grid) ** 2
        assert history(sampler) == [each.token for each in result]
    np.testing.assert_allclose(share, p, atol=1e-12)
    assert accepted == pytest.approx(np.minimum(p, q).sum())


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5, "presence_penalty": 0.4},
        {"top_k": 2, "temperature": 0.7, "frequency_penalty": 1.0},
        {"mirostat": 2, "mirostat_tau": 1.0, "mirostat_eta": 0.5, "logit_bias": {1: 0.5}},
    ],
)
def test_drawn_drafts_leave_the_distribution_of_texts_as_it_is(params):
    """Texts of three tokens by drafts of two, against the exact distribution of texts (chi-square)."""
    params, texts = SamplingParams(**PLAIN | params), 800
    random = np.random.default_rng(5)
    table = random.normal(0, 1, (3, 3)).astype(np.float32)
    q = random.dirichlet([1, 1, 1], 3).astype(np.float32)
    expected = texts * distribution(params, table, 3)
    seen, drafts = np.zeros((3, 3, 3)), np.zeros((3, 3, 3))
    generator = Sampler(params)._generator
    for _ in range(texts):
        sampler = Sampler(params)
        sampler._generator = generator
        text = [0]
        while len(text) < 4:
            drafted = [text[-1]]
            for _ in range(2):
                drafted.append(min(2, int(np.searchsorted(np.cumsum(q[drafted[-1]]), random.random()))))
            result = verify(sampler, table[drafted], Draft(drafted[1:], q[drafted[:-1]]))
            text += [each.token for each in result]
        seen[tuple(text[1:4])] += 1
        drafts[(*drafted[1:], text[3])] += 1
    assert chi_square(seen, expected) < 1
    assert chi_square(drafts, expected) > 5


def distribution(params, table, length):
    """The probability of each text of some tokens behind token 0, by the sampler's distributions."""
    result = np.zeros((len(table),) * length)
    for text in np.ndindex(result.shape):
        sampler, probability, last = Sampler(params), 1.0, 0
        for token in text:
            probability *= sampler.distribution(table[last]).probability(token)
            sampler.accept(token)
            last = token
        result[text] = probability
    return result


def chi_square(seen, expected):
    """By how many times its standard deviation, times five, the statistic exceeds its mean: chance stays below 1."""
    possible = expected > 0
    if seen[~possible].any():
        return np.inf
    freedom = possible.sum() - 1
    statistic = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    return (statistic - freedom) / (5 * np.sqrt(2 * freedom))


@pytest.mark.parametrize("q", [None, np.full((2, 5), 0.2, np.float32)])
def test_masks(q):
    """A drafted token that is not allowed is not accepted, and no mask is needed behind it."""
    logits = np.zeros((3, 5), np.float32)
    even, odd = np.array([0b10101], np.uint32), np.array([0b01010], np.uint32)
    for seed in range(20):
        sampler = Sampler(SamplingParams(seed=seed))
        tokens = [each.token for each in verify(sampler, logits, Draft([2, 2], q), [even, odd])]
        assert tokens[0] % 2 == 0
        assert tokens[0] != 2 or tokens[1] % 2 == 1
        assert len(tokens) == (2 if tokens[0] == 2 else 1)
