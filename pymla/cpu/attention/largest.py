"""The positions of the largest scores of each token.

Scores are int32 in the order of float32 (`pymla.cpu.machine.simd_ordered`). The k-th largest lies in a range of int32
that is halved until it is found: each time all scores are counted that lie in the upper half or above it, which takes a
few instructions for `LANES` of them. One pass more collects the positions in ascending order.
"""

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

#: Bytes of the scores of a register.
_STEP = 4 * LANES


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
    for t in range(first, last):
        seen = positions[t] + 1
        if seen <= k:
            for i in range(k):
                out[t, i] = i if i < seen else -1
            continue
        begin = address(scores[t])
        end = begin + 4 * PAGE * ((seen + PAGE - 1) // PAGE)
        _collect(begin, end, _kth_largest(begin, end, k), k, address(out[t]))


@helper
def _kth_largest(begin, end, k):
    """The k-th largest of the scores between two addresses; or a smaller number, if that separates the same k scores
    from the others."""
    least, most = LOWEST, -LOWEST - 1
    while least < most:
        middle = least + (most - least + 1) // 2
        found = _count_from(begin, end, middle)
        if found < k:
            most = middle - 1
        else:
            least = middle
        if found == k:
            break
    return least


@helper
def _count_from(begin, end, least):
    """How many of the scores between two addresses are at least `least`."""
    bound, found = splat_i32xL(least), splat_i32xL(0)
    for at in range(begin, end, _STEP):
        found = add_at_least(found, load_i32xL(at), bound)
    return sum_of_lanes(found)


@helper
def _collect(begin, end, least, k, out):
    """Ascending positions, to the address `out`, of the scores above `least`, and of as many of those equal to it, the
    first ones, as make `k` positions."""
    equal = k - _count_from(begin, end, least + 1)
    bound = splat_i32xL(least)
    for at in range(begin, end, _STEP):
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
