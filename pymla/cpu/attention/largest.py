"""The positions of the largest scores of each token.

Scores are int32 in the order of float32 (`pymla.cpu.machine.simd_ordered`). The k-th largest lies in a range of int32
that is halved until it is found: each time the scores in the upper half and above it are counted, which takes a few
instructions for `LANES` of them. Of many scores a sample gives bounds of the k-th largest first, and only the scores
between the bounds, a few percent, are counted again and again. One pass more collects the positions in ascending order.
"""

import numpy as np

from pymla.cpu.machine.simd import address, load_i32, load_i32xL, store_i32
from pymla.cpu.machine.simd_ordered import (
    LOWEST,
    add_at_least,
    lanes_at_least,
    lowest_bit,
    splat_i32xL,
    sum_of_lanes,
)
from pymla.cpu.runtime.array_types import I1, I2
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import helper, kernel
from pymla.pages import PAGE

#: The largest int32.
_HIGHEST = -LOWEST - 1
#: Bytes of the scores of a register.
_REGISTER = 4 * LANES
#: One of so many registers is in the sample, and the scores of which a sample is taken are so many at least.
_SAMPLED, _MANY = 16, 4096
#: Standard deviations of the number of scores in the sample that are among the k largest, between k's share of the
#: sample and the bounds: the k-th largest is outside of them once in some ten thousand times.
_DEVIATIONS = 4


@kernel(I2, I1, I2)
def take_largest(first, last, scores, positions, out):
    """Over tokens: the positions of the largest scores, as `choose` gives them.

    Parameters
    ----------
    scores : int32 array (T, S)
        In order, for the positions that a token sees, and `LOWEST` from there to the end of a page. Of a token that
        sees no more than k positions they are not read.
    positions : int32 array (T,)
    out : int32 array (T, k)
    """
    k = out.shape[1]
    near = np.empty(scores.shape[1], np.int32)
    for t in range(first, last):
        seen = positions[t] + 1
        if seen <= k:
            for i in range(k):
                out[t, i] = i if i < seen else -1
            continue
        begin = address(scores[t])
        end = begin + 4 * PAGE * ((seen + PAGE - 1) // PAGE)
        _collect(begin, end, _kth_largest(begin, end, k, address(near)), k, address(out[t]))


@helper
def _kth_largest(begin, end, k, near):
    """The k-th largest of the scores between two addresses, or a smaller number, if that separates the same k scores
    from the others. At the address `near` is memory for as many scores."""
    count = (end - begin) // 4
    if count >= _MANY:
        least, most = _bounds(begin, end, k)
        above, inside = _keep_between(begin, end, least, most, near)
        if above < k <= above + inside:
            stop = near + 4 * inside
            while (stop - near) % _REGISTER > 0:
                store_i32(stop, LOWEST)
                stop += 4
            return _halve(near, stop, _REGISTER, k - above, least, most)
    return _halve(begin, end, _REGISTER, k, LOWEST, _HIGHEST)


@helper
def _bounds(begin, end, k):
    """Two numbers that the k-th largest of the scores between two addresses hardly ever lies outside of."""
    step, count = _SAMPLED * _REGISTER, (end - begin) // 4
    sample = LANES * ((end - begin + step - 1) // step)
    share = np.float64(k) * sample / count
    margin = _DEVIATIONS * np.sqrt(share)
    # At least one score of the sample is meant by a number: beyond its ends, there is no bound.
    high, low = np.int64(share - margin), np.int64(share + margin) + 1
    most = _halve(begin, end, step, high, LOWEST, _HIGHEST) if high > 0 else _HIGHEST
    least = _halve(begin, end, step, low, LOWEST, _HIGHEST) if low <= sample else LOWEST
    return least, most


@helper
def _keep_between(begin, end, least, most, near):
    """Copy the scores from `least` to `most`, of those between two addresses, to the address `near`. Returns how many
    scores are larger, and how many were copied."""
    bound, above, target = splat_i32xL(least), 0, near
    for at in range(begin, end, _REGISTER):
        lanes = lanes_at_least(load_i32xL(at), bound)
        while lanes != 0:
            score = load_i32(at + 4 * lowest_bit(lanes))
            lanes &= lanes - 1
            if score > most:
                above += 1
            else:
                store_i32(target, score)
                target += 4
    return above, (target - near) // 4


@helper
def _halve(begin, end, step, k, least, most):
    """The k-th largest of the scores in registers that are `step` bytes apart, between two addresses, or a smaller
    number, if that separates the same k scores from the others; it lies from `least` to `most`."""
    while least < most:
        middle = least + (most - least + 1) // 2
        found = _count_from(begin, end, step, middle)
        if found < k:
            most = middle - 1
        else:
            least = middle
        if found == k:
            break
    return least


@helper
def _count_from(begin, end, step, least):
    """How many of the scores in registers that are `step` bytes apart, between two addresses, are at least `least`."""
    bound, found = splat_i32xL(least), splat_i32xL(0)
    for at in range(begin, end, step):
        found = add_at_least(found, load_i32xL(at), bound)
    return sum_of_lanes(found)


@helper
def _collect(begin, end, least, k, out):
    """Ascending positions, to the address `out`, of the scores above `least`, and of as many of those equal to it, the
    first ones, as make `k` positions."""
    equal = k - _count_from(begin, end, _REGISTER, least + 1)
    bound = splat_i32xL(least)
    for at in range(begin, end, _REGISTER):
        lanes = lanes_at_least(load_i32xL(at), bound)
        while lanes != 0:
            lane = lowest_bit(lanes)
            lanes &= lanes - 1
            if load_i32(at + 4 * lane) == least:
                equal -= 1
                if equal < 0:
                    continue
            store_i32(out, (at - begin) // 4 + lane)
            out += 4
