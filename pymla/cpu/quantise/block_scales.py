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
#: Where the scratch of a block has, of each small block, the scale that it would choose, what that explains, and its
#: number; the numbers of a candidate; and what small blocks lose with the sizes of a range. What comes behind is the
#: family's own.
WANTED, GAINS, NUMBERS, _TRIED, _LOST = 0, 16, 32, 48, 64
SCRATCH = _LOST + RANGE
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


@helper
def nearest_number(scale, d, times, plus, top):
    """The real number whose multiple of `d` is a scale, from 0 to the top."""
    number = (scale / d - plus) / times
    return min(number, top) if number > _ZERO else _ZERO


@helper
def write_losses(scratch, small_blocks, first, base, times, plus, top):
    """What small blocks lose with `RANGE` candidates ``base * size``, the sizes at the address `first`: the square of
    their scale's relative error, times what it explains."""
    d, tops = mul(load_f32x32(first), splat_f32x32(base)), splat_f32x32(top)
    inverse, zero = div(splat_f32x32(_ONE), d), splat_f32x32(_ZERO)
    lost = zero
    for small in range(small_blocks):
        wanted = scratch[WANTED + small]
        if wanted > _ZERO:
            number = fma(splat_f32x32(wanted / times), inverse, splat_f32x32(-plus / times))
            number = larger(round_even(number), zero)
            number = sub(tops, larger(sub(tops, number), zero))
            scale = mul(fma(number, splat_f32x32(times), splat_f32x32(plus)), d)
            off = fma(scale, splat_f32x32(_ONE / wanted), splat_f32x32(-_ONE))
            lost = fma(mul(off, splat_f32x32(scratch[GAINS + small])), off, lost)
    store_f32x32(address(scratch) + 4 * _LOST, lost)


def choice_for(multiples, small_blocks, sizes, best_number):
    """Make ``choose(block, scratch, unit)``.

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
    highest = np.float32(multiples.times * multiples.top + multiples.plus)

    @helper
    def candidate(scratch, row, most):
        """The best number of a range; `most` is the largest scale that a small block would choose."""
        base = most / highest
        write_losses(scratch, small_blocks, address(sizes) + 4 * RANGE * row, base, times, plus, top)
        best = 0
        for i in range(1, RANGE):
            if scratch[_LOST + i] < scratch[_LOST + best]:
                best = i
        return sizes[row, best] * base

    @helper
    def choose(block, scratch, unit):
        """The number that a block stores as a half, in its first two bytes for now, and the numbers of its small
        blocks, which are in the scratch then.

        Parameters
        ----------
        block : uint8 array (bytes,)
        scratch : float32 array
            Has what small blocks want, and what that explains.
        unit : float32
            What scales are multiples of: of all weights the largest one.

        Returns
        -------
        float32, as a multiple of the unit; 0 where nothing explains more than a block of zeros does.
        """
        most = _ZERO
        for small in range(small_blocks):
            most = max(most, scratch[WANTED + small])
        best, chosen, at = _ZERO, _ZERO, address(block)
        for row in range(len(sizes)):
            d = half_scale(candidate(scratch, row, most) * unit, at) / unit
            total = _ZERO
            for small in range(small_blocks):
                scratch[_TRIED + small], gain = best_number(scratch, small, scratch[WANTED + small], d)
                total += gain
            if total > best:
                best, chosen = total, d
                for small in range(small_blocks):
                    scratch[NUMBERS + small] = scratch[_TRIED + small]
        half_scale(chosen * unit, at)
        return chosen

    return choose
