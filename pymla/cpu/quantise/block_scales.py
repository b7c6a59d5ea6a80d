"""The float number of a block of 256 weights, of which small blocks have small multiples as their scales.

A family of types says which scale each small block would choose for itself, and how much of its weights' squared sum
that scale explains. From this, the best number of each of several ranges of sizes is a candidate. Each candidate is
rounded to a half, and the small blocks say exactly what they can do with it.
"""

from typing import NamedTuple

import numpy as np

from pymla.cpu.machine.simd import (
    address,
    div,
    fma,
    larger,
    load_f32x32,
    mul,
    round_even,
    splat_f32x32,
    store_f32x32,
    sub,
)
from pymla.cpu.quantise.search import half_scale
from pymla.cpu.runtime.compiling import helper

#: Sizes of a range of candidates.
RANGE = 32
#: float32 that `choose` works in, of small blocks that are no more than sixteen.
SCRATCH = RANGE + 16
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)


class Multiples(NamedTuple):
    """What the scale of a small block can be: the number of the block times ``times * number + plus``."""

    times: float
    plus: float
    top: int  # the largest number


def ranges(lowest, highest, count):
    """Sizes of candidates in `count` ranges, float32 (count, `RANGE`), a little larger from one to the next: 1 is the
    smallest number with which all small blocks can have scales as large as they would choose."""
    return np.geomspace(lowest, highest, count * RANGE).astype(np.float32).reshape(count, RANGE)


@helper
def vertex(curve, at, count, positions):
    """Where a curve has its maximum: that of the parabola through the largest of its `count` values, at `at`, and both
    neighbours. `positions` are those of the values."""
    if at == 0 or at + 1 >= count:
        return positions[at]
    left, right = curve[at] - curve[at - 1], curve[at] - curve[at + 1]
    if not left + right > _ZERO:
        return positions[at]
    offset = _HALF * (left - right) / (left + right)
    if offset > _ZERO:
        return positions[at] + offset * (positions[at + 1] - positions[at])
    return positions[at] - offset * (positions[at - 1] - positions[at])


def nearest_number_for(multiples):
    """Make ``nearest_number(scale, d)``: the real number whose multiple of `d` is a scale, from 0 to the top."""
    times, plus, top = (np.float32(each) for each in multiples)

    @helper
    def nearest_number(scale, d):
        number = (scale / d - plus) / times
        return min(number, top) if number > _ZERO else _ZERO

    return nearest_number


def choice_for(multiples, small_blocks, sizes, best_number):
    """Make ``choose(block, scratch, wanted, gains, unit, numbers, work)``.

    Parameters
    ----------
    multiples : Multiples
    small_blocks : int
        At most 16.
    sizes : array
        Of `ranges`.
    best_number : helper
        ``best_number(scratch, small, wanted, d)``: the best number of a small block, and what it explains.
    """
    times, plus, top = (np.float32(each) for each in multiples)
    inverse_times, start = np.float32(1 / multiples.times), np.float32(-multiples.plus / multiples.times)
    highest = np.float32(multiples.times * multiples.top + multiples.plus)
    tried = len(sizes)

    @helper
    def best_of_range(row, base, wanted, gains, costs):
        """The candidate with which small blocks lose least, where each loses the square of its scale's relative
        error."""
        d = mul(load_f32x32(address(sizes) + 4 * RANGE * row), splat_f32x32(base))
        inverse, zero, tops = div(splat_f32x32(_ONE), d), splat_f32x32(_ZERO), splat_f32x32(top)
        cost = zero
        for small in range(small_blocks):
            if wanted[small] > _ZERO:
                number = fma(splat_f32x32(wanted[small] * inverse_times), inverse, splat_f32x32(start))
                number = larger(round_even(number), zero)
                number = sub(tops, larger(sub(tops, number), zero))
                scale = mul(fma(number, splat_f32x32(times), splat_f32x32(plus)), d)
                off = fma(scale, splat_f32x32(_ONE / wanted[small]), splat_f32x32(-_ONE))
                cost = fma(mul(off, splat_f32x32(gains[small])), off, cost)
        store_f32x32(address(costs), cost)
        best = 0
        for i in range(1, RANGE):
            if costs[i] < costs[best]:
                best = i
        return sizes[row, best] * base

    @helper
    def choose(block, scratch, wanted, gains, unit, numbers, work):
        """The number that a block stores as a half, in its first two bytes for now, and the numbers of its small
        blocks.

        Parameters
        ----------
        block : uint8 array (bytes,)
        scratch : float32 array
            For `best_number`.
        wanted, gains : float32 arrays (small blocks,)
            The scale that each small block would choose, and what it explains.
        unit : float32
            What scales are multiples of: of all weights the largest one.
        numbers : float32 array (small blocks,)
            Written to.
        work : float32 array (`SCRATCH`,)

        Returns
        -------
        float32, as a multiple of the unit; 0 where nothing explains more than a block of zeros does.
        """
        costs, trial = work[:RANGE], work[RANGE:]
        most = _ZERO
        for small in range(small_blocks):
            most = max(most, wanted[small])
        best, chosen, at = _ZERO, _ZERO, address(block)
        for row in range(tried):
            d = half_scale(best_of_range(row, most / highest, wanted, gains, costs) * unit, at) / unit
            total = _ZERO
            if d > _ZERO:
                for small in range(small_blocks):
                    trial[small], gain = best_number(scratch, small, wanted[small], d)
                    total += gain
            if total > best:
                best, chosen = total, d
                for small in range(small_blocks):
                    numbers[small] = trial[small]
        half_scale(chosen * unit, at)
        return chosen

    return choose
