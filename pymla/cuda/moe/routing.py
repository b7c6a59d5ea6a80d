"""The choice of experts: a warp takes a token."""

import numpy as np
from numba import cuda, types

from pymla.constants import LOG2E
from pymla.cuda.machine.ptx import WARP, ballot, div, exp2, lane, shfl_idx, syncwarp, warp_max, warp_sum
from pymla.cuda.runtime.array_types import F1, F2, I2
from pymla.cuda.runtime.jit import device, kernel

_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)

_LOG2E = np.float32(LOG2E)


@device
def _first_best(choice, first, end):
    """The largest of ``choice[first:end]`` and where it is first; an empty range gives −inf."""
    top, at = -_INFINITY, 0
    for e in range(first, end):
        if choice[e] > top:
            top, at = choice[e], e
    return top, at


@device
def _best_of_warp(top, at):
    """The first of the lanes' largest: its place."""
    return shfl_idx(at, cuda.ffs(ballot(top == warp_max(top))) - 1)


@device
def _score_experts(t, logits, bias, sigmoid, scores, choice):
    """Scores of all experts of a token, and the scores with their bias that the choice goes by."""
    me, count = lane(), logits.shape[1]
    most = -_INFINITY
    for e in range(me, count, WARP):
        most = max(most, logits[t, e])
    most = warp_max(most)
    total = _ZERO
    for e in range(me, count, WARP):
        x = exp2((-logits[t, e] if sigmoid else logits[t, e] - most) * _LOG2E)
        scores[e] = x
        total += x
    total = warp_sum(total)
    for e in range(me, count, WARP):
        score = div(_ONE, _ONE + scores[e]) if sigmoid else div(scores[e], total)
        scores[e] = score
        choice[e] = score + bias[e] if len(bias) else score
    syncwarp()


@device
def _keep_groups(grouping, choice, of_groups):
    """Exclude experts outside the best groups from the choice."""
    me = lane()
    groups, size, kept, best = grouping
    for g in range(me, groups, WARP):
        top = second = -_INFINITY
        # Each lane begins elsewhere in its group, for the banks' sake.
        at = g if g < size else 0
        for _ in range(size):
            x = choice[g * size + at]
            second = max(second, min(x, top))
            top = max(top, x)
            at = at + 1 if at + 1 < size else 0
        of_groups[g] = top if best == 1 else top + second
    syncwarp()
    for g in range(me, groups, WARP):
        score, better = of_groups[g], 0
        for other in range(groups):
            if of_groups[other] > score or (of_groups[other] == score and other < g):
                better += 1
        if better >= kept:
            for e in range(g * size, g * size + size):
                choice[e] = -_INFINITY
    syncwarp()


@device
def _choose(t, choice, scores, ids, weights, own):
    """The best experts of a token one by one, with their scores as weights; returns the sum of these. `own` is the
    range of experts of this lane."""
    first, end = own
    top, at = _first_best(choice, first, end)
    chosen = _ZERO
    for j in range(ids.shape[1]):
        winner = _best_of_warp(top, at)
        score = scores[winner]
        chosen += score
        if lane() == j & 31:
            ids[t, j] = winner
            weights[t, j] = score
        if first <= winner and winner < end:
            choice[winner] = -_INFINITY
            top, at = _first_best(choice, first, end)
    return chosen


@kernel(
    F2,
    F1,
    types.boolean,
    types.UniTuple(types.int64, 4),
    types.boolean,
    types.float32,
    I2,
    F2,
    max_threads=WARP,
)
def router(logits, bias, sigmoid, grouping, normalise, factor, ids, weights):
    """A warp for each token. `grouping`: groups, experts of a group, groups that are kept, and how many of its best
    experts a group counts as. Lanes own neighbouring experts, so that the first lane has the first of equal ones."""
    t, me, count = cuda.blockIdx.x, lane(), logits.shape[1]
    groups = grouping[0]
    shared = cuda.shared.array(0, np.float32)
    scores, choice, of_groups = shared[:count], shared[count : 2 * count], shared[2 * count : 2 * count + groups]
    # An odd number of experts for each lane: no two lanes meet at a bank of shared memory.
    own = (count + WARP - 1 >> 5) | 1
    first, end = min(me * own, count), min(me * own + own, count)

    _score_experts(t, logits, bias, sigmoid, scores, choice)
    if groups > 1:
        _keep_groups(grouping, choice, of_groups)
    chosen = _choose(t, choice, scores, ids, weights, (first, end))
    for j in range(me, ids.shape[1], WARP):
        share = div(weights[t, j], chosen + np.float32(1e-20)) if normalise else weights[t, j]
        weights[t, j] = share * factor
