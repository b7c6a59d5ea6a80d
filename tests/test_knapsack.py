"""A choice of types within a size, against all choices."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla.make.knapsack import Option, solve

OPTION = st.builds(Option, st.integers(1, 40), st.integers(0, 60).map(float))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def best(items, limit):
    """The least cost of all choices; None where none is within the limit."""
    costs = [
        sum(option.cost for option in options)
        for options in itertools.product(*items)
        if sum(option.nbytes for option in options) <= limit
    ]
    return min(costs, default=None)


@settings(max_examples=400, deadline=None)
@given(ITEMS, st.integers(0, 160))
def test_close_to_the_best_choice(items, limit):
    """Within the limit; below the bound's promise; and nothing that one or two items could still gain."""
    found, least = solve(items, limit), best(items, limit)
    if least is None:
        assert found is None
        return
    options = [options[at] for options, at in zip(items, found.chosen, strict=True)]
    assert found.nbytes == sum(option.nbytes for option in options) <= limit
    assert found.cost == sum(option.cost for option in options)
    assert found.least_cost <= least + 1e-9
    assert found.cost >= least
    largest_step = max(max(each.cost for each in options) - min(each.cost for each in options) for options in items)
    assert found.cost - found.least_cost <= largest_step + 1e-9
    for pair in itertools.combinations(range(len(items)), min(2, len(items))):
        fixed = [[option] for option in options]
        for at in pair:
            fixed[at] = items[at]
        assert best(fixed, limit) >= found.cost - 1e-9


def test_all_is_taken_where_there_is_room():
    items = [[Option(1, 5.0), Option(3, 1.0), Option(2, 0.5)], [Option(4, 0.0), Option(9, 2.0)]]
    found = solve(items, 1000)
    assert found.chosen == [2, 0]
    assert found.cost == found.least_cost == 0.5


def test_options_off_the_hull_fill_what_is_left():
    """The second option is above the line between its neighbours, and the only step that fits."""
    items = [[Option(10, 10.0), Option(15, 9.0), Option(20, 0.0)]]
    assert solve(items, 16).chosen == [1]


def test_two_items_exchange_bytes():
    """The steepest step alone leaves no room for two steps that bring more together."""
    items = [[Option(0, 6.0), Option(6, 0.0)], [Option(0, 9.0), Option(10, 0.0)]]
    assert solve(items, 10).cost == 6.0


def test_nothing_to_choose():
    assert solve([], 0).cost == 0
    assert solve([[Option(2, 1.0)]], 1) is None


def test_many_items_are_near_the_bound():
    """As many as a model of 61 layers has tensors, of three sizes, with errors that fall by a factor for a bit."""
    rng = np.random.default_rng(0)
    bits = np.array([1.56, 2.06, 2.31, 2.56, 2.63, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5])
    items = []
    for size in rng.choice([10**7, 10**8, 4 * 10**9], 1000):
        costs = rng.uniform(0.5, 2) * 4.0 ** -(bits + rng.normal(0, 0.1, len(bits)))
        items.append([Option(int(size * each / 8), float(cost)) for each, cost in zip(bits, costs, strict=True)])
    limit = int(sum(options[-1].nbytes for options in items) * 0.35)
    found = solve(items, limit)
    assert found.nbytes <= limit
    assert found.cost == pytest.approx(found.least_cost, rel=1e-3)
