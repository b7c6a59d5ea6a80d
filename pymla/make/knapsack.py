"""A choice of one option for each of many items: least cost in all, within a limit of bytes in all.

This is the multiple-choice knapsack problem. Of each item's options those count at first that lie on the lower convex
hull of cost over bytes: on it, a byte brings less with each step up. Steps of all items are taken in the order of what
a byte brings, while they fit. This solves the problem exactly if the last step may be taken in part, which gives a
bound that no choice can beat. What the limit leaves is then used by exchanges: options off the hull count, too, alone
or where one item gives bytes to another one, as long as the cost falls.

Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Option(NamedTuple):
    """An option of an item."""

    nbytes: int
    cost: float


class Solution(NamedTuple):
    """A choice."""

    chosen: list[int]  # number of the option, for each item
    nbytes: int
    cost: float
    least_cost: float  # no choice within the limit costs less


class _Step(NamedTuple):
    """From one point of an item's hull to the next. The lowest one brings most for a byte."""

    cost_per_byte: float  # negative
    item: int
    point: int  # where it leads, on the hull


def solve(items: Sequence[Sequence[Option]], limit: int) -> Solution | None:
    """The cheapest choice that was found; None where even the smallest options are beyond the limit.

    Its cost is above `Solution.least_cost` by less than one step of a hull brings.

    Parameters
    ----------
    items : options of each item, at least one, in any order; costs are finite and not negative
    limit : bytes of all chosen options
    """
    hulls = [_hull(options) for options in items]
    chosen = [hull[0] for hull in hulls]
    spare = limit - sum(options[at].nbytes for options, at in zip(items, chosen, strict=True))
    if spare < 0:
        return None
    least_cost = _take_steps(items, hulls, chosen, spare)
    _exchange(items, chosen, limit)
    options = [options[at] for options, at in zip(items, chosen, strict=True)]
    cost = sum(option.cost for option in options)
    return Solution(chosen, sum(option.nbytes for option in options), cost, max(0.0, min(cost, least_cost)))


def _hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull, from the smallest to the cheapest."""
    hull: list[int] = []
    for at in sorted(range(len(options)), key=lambda at: options[at]):
        if hull and options[at].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _slope(options: Sequence[Option], one: int, other: int) -> float:
    return (options[other].cost - options[one].cost) / (options[other].nbytes - options[one].nbytes)


def _take_steps(items: Sequence[Sequence[Option]], hulls: Sequence[list[int]], chosen: list[int], spare: int) -> float:
    """Go up the hulls while bytes are spare. Returns the least cost that any choice can have."""
    cost = sum(options[at].cost for options, at in zip(items, chosen, strict=True))
    least_cost = None
    steps: list[_Step] = []

    def offer(item: int, point: int) -> None:
        if point < len(hulls[item]):
            heapq.heappush(steps, _Step(_slope(items[item], *hulls[item][point - 1 : point + 1]), item, point))

    for item in range(len(items)):
        offer(item, 1)
    while steps:
        step = heapq.heappop(steps)
        now, then = items[step.item][chosen[step.item]], items[step.item][hulls[step.item][step.point]]
        if then.nbytes - now.nbytes > spare:
            if least_cost is None:
                least_cost = cost + step.cost_per_byte * spare
            continue  # smaller steps of other items may fit
        spare -= then.nbytes - now.nbytes
        cost += then.cost - now.cost
        chosen[step.item] = hulls[step.item][step.point]
        offer(step.item, step.point + 1)
    return cost if least_cost is None else least_cost


def _exchange(items: Sequence[Sequence[Option]], chosen: list[int], limit: int) -> None:
    """Change the options of one item or of two while that lowers the cost."""
    # With an item without a choice, the exchange of a single item is one of two.
    items, counts = [*items, [Option(0, 0.0)]], [*map(len, items), 1]
    item = np.repeat(np.arange(len(items)), counts)
    first = np.cumsum([0, *counts[:-1]])
    nbytes = np.array([option.nbytes for options in items for option in options], np.int64)
    cost = np.array([option.cost for options in items for option in options])
    at = first + np.array([*chosen, 0])
    while True:
        change = cost - cost[at][item]
        moves = _best_moves(item, nbytes - nbytes[at][item], change, limit - int(nbytes[at].sum()))
        if change[moves].sum() >= -1e-12 * cost[at].sum():
            break
        at[item[moves]] = moves
    chosen[:] = (at - first)[:-1].tolist()


def _best_moves(item: np.ndarray, more: np.ndarray, change: np.ndarray, spare: int) -> list[int]:
    """The two options of different items that lower the cost most and take at most `spare` bytes more.

    Parameters
    ----------
    item, more, change : arrays (options,)
        Of each option its item, and the bytes and the cost that choosing it adds. Those of chosen options are 0.
    """
    order = np.argsort(more, kind="stable")
    best, runner_up = _running_best(item[order], change[order])
    # For every option as the first: how many options, in the order of bytes, fit as the second.
    fits = np.searchsorted(more[order], spare - more, side="right") - 1
    one = np.flatnonzero(fits >= 0)
    other, instead = order[best[fits[one]]], runner_up[fits[one]]
    same = item[other] == item[one]
    other = np.where(same, order[instead], other)
    total = np.where(same & (instead < 0), np.inf, change[one] + change[other])
    least = int(total.argmin())
    return [int(one[least]), int(other[least])]


def _running_best(item: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every beginning of a list of options: the one with the least change, and the best one of another item; -1
    where there is no other item."""
    best, runner_up = np.empty(len(item), np.int64), np.empty(len(item), np.int64)
    items, changes = item.tolist(), change.tolist()
    first, other = 0, -1
    for at in range(len(items)):
        if changes[at] < changes[first]:
            if items[at] != items[first]:
                other = first
            first = at
        elif items[at] != items[first] and (other < 0 or changes[at] < changes[other]):
            other = at
        best[at], runner_up[at] = first, other
    return best, runner_up
