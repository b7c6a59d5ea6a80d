"""How many tokens are drafted: lengths, times, and the bound on what speculation may lose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymla.engine.speculation.length import ALLOWANCE, GUESS, LIMIT, DraftLength
from pymla.engine.speculation.times import MEASUREMENTS, StepTimes

CHEAP = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
DEAR = [0.0, 0.7, 1.4, 2.1, 2.8, 3.5, 4.2, 4.9]


def run(length, steps, accepts, costs):
    """Steps of a text on a clock of plain tokens. `accepts(step, n)` tells how many of n drafted tokens are accepted.

    Returns the drafts' lengths, and the time that was lost after each step.
    """
    drafts, lost, time, tokens = [], [], 0.0, 0
    for step in range(steps):
        n = length.next(lambda: costs)
        accepted = accepts(step, n) if n else 0
        length.saw(n, accepted, costs[n])
        time += 1 + costs[n]
        tokens += 1 + accepted
        drafts.append(n)
        lost.append(time - tokens)
    return drafts, lost


def by_chance(probability, seed=0):
    random = np.random.default_rng(seed)

    def accepts(step, n):
        wrong = np.flatnonzero(random.random(n) >= probability)
        return int(wrong[0]) if len(wrong) else n

    return accepts


@pytest.mark.parametrize(("probability", "costs"), [(0.9, CHEAP), (0.5, CHEAP), (0.97, [0.0, 0.9, 1.8] + [2.0] * 5)])
def test_the_length_is_the_one_with_the_most_tokens_per_time(probability, costs):
    rates = [sum(probability**i for i in range(n + 1)) / (1 + costs[n]) for n in range(8)]
    drafts, _ = run(DraftLength(7), 1000, by_chance(probability), costs)
    counts = np.bincount(drafts[200:], minlength=8)
    assert rates[int(counts.argmax())] > 0.95 * max(rates)
    assert counts.argmax() > 0


@given(
    steps=st.lists(st.integers(0, 7), min_size=1, max_size=400),
    rises=st.lists(st.floats(0, 2), min_size=7, max_size=7),
)
def test_the_loss_is_bounded(steps, rises):
    """Whatever is accepted, and whatever drafts cost."""
    costs = np.cumsum([0.0, *rises]).tolist()
    _, lost = run(DraftLength(7), len(steps), lambda step, n: min(steps[step], n), costs)
    check_bound(lost, costs)


def check_bound(lost, costs):
    # A step without a draft is a plain token; steps with one brought tokens as well, so that the bound is lower.
    for step, loss in enumerate(lost):
        assert loss <= ALLOWANCE * (step + 1) + LIMIT + max(costs) + 1e-9


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
@pytest.mark.parametrize(
    "accepts",
    [
        lambda step, n: 0,
        lambda step, n: 1,
        lambda step, n: n if step % 40 < 20 else 0,
        lambda step, n: n if step % 10 < 9 else 0,
        lambda step, n: n if step < 100 else 0,
    ],
)
def test_the_loss_is_bounded_over_long_texts(accepts, costs):
    _, lost = run(DraftLength(7), 10000, accepts, costs)
    check_bound(lost, costs)


def test_it_turns_itself_off_and_tries_again_rarely():
    length = DraftLength(7)
    drafts, lost = run(length, 4000, lambda step, n: 0, DEAR)
    tried = np.count_nonzero(drafts)
    assert 1 < tried < 100
    assert not length.is_on
    assert lost[-1] > 0
    # The debt of a period is paid before the next one.
    first = next(step for step, n in enumerate(drafts) if n)
    second = next(step for step, n in enumerate(drafts) if n and step > first + 10)
    assert second - first >= (lost[first + 10] - 1) / ALLOWANCE


def test_it_turns_itself_on_again():
    length = DraftLength(7)
    drafts, _ = run(length, 3000, lambda step, n: n if step >= 1000 else 0, CHEAP)
    assert np.count_nonzero(drafts[500:1000]) < 50
    assert min(drafts[2000:]) == 7


def test_a_period_that_gained_has_no_debt():
    """It is tried again at once, as the end of a copied part may be the beginning of another one."""
    length = DraftLength(7)
    run(length, 40, lambda step, n: n, CHEAP)
    while length.is_on:
        n = length.next(lambda: CHEAP)
        length.saw(n, 0, CHEAP[n])
    assert length.next(lambda: CHEAP) > 0


def test_no_draft_is_worth_it():
    length = DraftLength(7)
    assert length.next(lambda: [0.0, 0.9, 1.8, 2.7, 3.6, 4.5, 5.4, 6.3]) == 0  # 0.9 plain tokens for 0.85 accepted ones
    assert not length.is_on


def test_a_step_of_several_texts():
    """0.7 plain tokens for two drafted ones, instead of 0.1 for one, are a small part of what eight texts bring."""
    length = DraftLength(2)
    assert length.next(lambda: [0, 0.1, 0.7]) == 1
    assert length.next(lambda: [0, 0.1, 0.7], texts=8) == 2


def test_acceptance():
    length = DraftLength(3)
    assert length.acceptance == GUESS
    assert length.next(lambda: [0.0, 0.1, 0.2, 0.3]) == 3
    length.saw(3, 1, 0.3)
    assert length.acceptance == pytest.approx((0.9 * 0.85 * 2 + 1) / (0.9 * 2 + 2))


# Times ----------------------------------------------------------------------------------------------------------------


def times_of(prior, *measured):
    """Times by steps of (tokens, seconds), behind a slow first one of each number of tokens."""
    times = StepTimes(prior)
    for tokens in {tokens for tokens, _ in measured}:
        times.saw(tokens, 1000.0)
    for each in measured:
        times.saw(*each)
    return times


def test_the_first_step_of_a_size_does_not_count():
    times = StepTimes(lambda tokens: 1.0)
    assert not times.is_measured
    times.saw(2, 100.0)
    assert not times.is_measured
    times.saw(2, 3.0)
    assert times.is_measured
    assert times.seconds(2) == 3


def test_one_measurement_gives_the_scale():
    times = times_of(lambda tokens: 10.0 + tokens, (1, 0.22))
    assert times.seconds(1) == pytest.approx(0.22)
    assert times.seconds(4) == pytest.approx(0.28)


def test_between_measurements_the_factor_is():
    times = times_of(float, (6, 12.0), (2, 2.0))
    assert [times.seconds(n) for n in (1, 2, 3, 4, 6, 9)] == pytest.approx([1, 2, 3 * 1.25, 4 * 1.5, 12, 18])


def test_the_median_of_the_last_measurements_counts():
    times = times_of(lambda tokens: 1.0, (3, 1.0))
    for seconds in (1, 1, 1, 100, 1):
        times.saw(3, seconds)
        assert times.seconds(3) == 1
    for _ in range(MEASUREMENTS // 2 + 1):
        times.saw(3, 2.0)
    assert times.seconds(3) == 2
