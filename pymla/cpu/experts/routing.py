"""Choosing the experts of every token, and sorting the pairs of a token and an expert by expert."""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.array_types import F2, I1, I2, WEIGHTS_F1
from pymla.cpu.runtime.jit import helper, kernel


class Rules(NamedTuple):
    """How experts are chosen, as integers."""

    sigmoid: int  # whether scores are sigmoids of logits, else their softmax
    groups: int  # of experts
    kept: int  # groups whose experts may be chosen: those that score highest
    best: int  # experts of a group that its score is the sum of: 1 or 2
    normalise: int  # whether weights are normalised to a sum of 1


RULES = types.NamedUniTuple(types.int64, len(Rules._fields), Rules)


@kernel(F2, WEIGHTS_F1, RULES, types.float64, I2, F2)
def router(first, last, logits, bias, rules, factor, ids, weights):
    """`router` over tokens. An empty `bias` is none; weights are multiplied by a factor."""
    count, groups = logits.shape[1], rules.groups
    scores = np.empty(count, np.float32)
    choice = np.empty(count, np.float32)
    group_scores = np.empty(groups, np.float32)
    for t in range(first, last):
        _score(logits[t], rules.sigmoid, scores)
        for e in range(count):
            choice[e] = scores[e] + (bias[e] if len(bias) else np.float32(0))
        if groups > 1:
            _score_groups(choice, rules.best, group_scores)
            _exclude_groups(group_scores, groups - rules.kept, choice)
        _choose(choice, scores, ids[t], weights[t])
        _weigh(weights[t], rules.normalise, np.float32(factor))


@helper
def _score(logits, sigmoid, scores):
    """Scores of the experts: the sigmoid of each logit, or their softmax."""
    most = logits[0]
    for e in range(len(logits)):
        most = max(most, logits[e])
    total = np.float32(0)
    for e in range(len(logits)):
        if sigmoid:
            scores[e] = np.float32(1) / (np.float32(1) + np.exp(-logits[e]))
        else:
            scores[e] = np.exp(logits[e] - most)
            total += scores[e]
    if not sigmoid:
        for e in range(len(logits)):
            scores[e] /= total


@helper
def _score_groups(choice, best, group_scores):
    """The score of a group of experts: its best expert's, or the sum of its two best ones'."""
    size = len(choice) // len(group_scores)
    for g in range(len(group_scores)):
        top, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if choice[e] > top:
                top, second = choice[e], top
            elif choice[e] > second:
                second = choice[e]
        group_scores[g] = top if best == 1 else top + second


@helper
def _exclude_groups(group_scores, count, choice):
    """Exclude the experts of the `count` worst groups; of equal groups the last ones."""
    size = len(choice) // len(group_scores)
    for _ in range(count):
        worst = 0
        for g in range(len(group_scores)):
            if group_scores[g] <= group_scores[worst]:
                worst = g
        group_scores[worst] = np.inf
        for e in range(worst * size, (worst + 1) * size):
            choice[e] = -np.inf


@helper
def _choose(choice, scores, ids, weights):
    """The best experts by `choice`, and their scores; of equal experts the first ones."""
    for j in range(len(ids)):
        top = 0
        for e in range(len(choice)):
            if choice[e] > choice[top]:
                top = e
        ids[j] = top
        weights[j] = scores[top]
        choice[top] = -np.inf


@helper
def _weigh(weights, normalise, factor):
    """Weights of a token's experts: their scores, normalised to a sum of 1 where asked, times a factor."""
    chosen = np.float32(0)
    for j in range(len(weights)):
        chosen += weights[j]
    for j in range(len(weights)):
        share = weights[j] / (chosen + np.float32(1e-20)) if normalise else weights[j]
        weights[j] = share * factor


@kernel(I2, types.int64, I1, I1, I1)
def sort_pairs(first, last, ids, shared, pairs, tokens, starts):
    """Numbers of the pairs (token * choices + choice) by expert, their tokens, and where each expert's pairs begin."""
    choices = ids.shape[1] + shared
    count = len(starts) - 1
    starts[:] = 0
    for t in range(len(ids)):
        for j in range(choices):
            starts[_expert(ids, t, j, count - shared) + 1] += 1
    for e in range(count):
        starts[e + 1] += starts[e]
    next_of = starts.copy()
    for t in range(len(ids)):
        for j in range(choices):
            e = _expert(ids, t, j, count - shared)
            at = next_of[e]
            next_of[e] += 1
            pairs[at] = t * choices + j
            tokens[at] = t


@helper
def _expert(ids, t, j, count):
    """The j-th expert of a token, of `count` routed ones; behind a token's routed experts come the shared experts,
    whose numbers begin at `count`."""
    return ids[t, j] if j < ids.shape[1] else count + j - ids.shape[1]


@helper
def next_expert(starts, e):
    """The first expert behind `e` that has tokens, or the number of experts."""
    e += 1
    while e < len(starts) - 1 and starts[e] == starts[e + 1]:
        e += 1
    return e


@helper
def most_tokens(starts, first, last):
    """The largest number of tokens that one of the experts `first` to `last` (not included) has."""
    most = 0
    for e in range(first, last):
        most = max(most, starts[e + 1] - starts[e])
    return most
