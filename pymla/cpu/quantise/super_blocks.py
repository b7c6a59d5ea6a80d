"""Super-blocks of 256 weights: integer scales of small blocks, and the halves that they are multiples of.

The small blocks are searched first, each for the scale that it would like best (`pymla.cpu.quantise.search`). A
super-block then starts from a half under which the largest of these scales is the largest integer, and repeats:

1. Each small block tries sixteen integers around its own scale, or sixteen pairs of an integer scale and an integer
   minimum, with codes of their own, and takes the one with the smallest error.
2. With these codes and integers the error is a quadratic function of the half, or of the two halves: the next pass
   begins at its minimum, rounded to halves.

Other starts give other roundings of all integers. The best pass counts. A pass costs as much as a round of the search.
"""

import numpy as np

from pymla.cpu.machine.simd import absolute, add, address, div, mul, sub, where_positive
from pymla.cpu.machine.simd_quantise import (
    first_lane,
    lane_value,
    ramp,
    ramp_of_fours,
    ramps_of_four,
    smallest,
    splat_f32x16,
)
from pymla.cpu.quantise.search import (
    SMALLEST,
    code_sums,
    error_of,
    extremes,
    farthest_of,
    half_scale,
    inverse_of,
    line_search_for,
    scale_search_for,
    signed_sums,
    weighted_sums,
    write_codes,
    write_scaled,
)
from pymla.cpu.runtime.compiling import helper, inlined

SIZE = 256
#: Most small blocks of a super-block.
MOST = 16
#: The memory of a super-block, of float32. From 0 on: the weights, divided by the largest of them. From here on four
#: numbers of each small block: the scale and the minimum that the search found, the sums of w and of w·x.
_FOUND = SIZE
#: The integer scales and the integer minima of the present pass.
_TAKEN = _FOUND + 4 * MOST
#: Those of the best pass so far.
INTEGERS = _TAKEN + 2 * MOST
#: The codes as bytes.
CODES = INTEGERS + 2 * MOST
#: A number to round halves in.
_SPARE = CODES + SIZE // 4
SCRATCH = _SPARE + 1

#: Passes from every start.
_PASSES = 3

_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def _normalise(x, scaled):
    """Write the weights divided by the one of largest size. It is returned: 0 where all are about zero, and then the
    written ones are zero."""
    low, high = extremes(x, SIZE)
    size = max(high, -low)
    write_scaled(x, SIZE, _ONE / size if size >= SMALLEST else _ZERO, _ZERO, scaled)
    return size if size >= SMALLEST else _ZERO


@inlined
def _keep(scratch):
    """Keep the integers of the present pass."""
    for i in range(2 * MOST):
        scratch[INTEGERS + i] = scratch[_TAKEN + i]


@inlined
def _keep_zeros(scratch):
    """Keep zeros in the place of integers."""
    for i in range(2 * MOST):
        scratch[INTEGERS + i] = _ZERO


@inlined
def _held(scale, size, spare):
    """The scale of weights divided by `size` that is nearest to `scale` and, times `size`, an IEEE half."""
    return half_scale(scale * size, spare) / size


@inlined
def _inverses(scale):
    """``1 / scale`` in every lane, and 0 of 0."""
    return where_positive(absolute(scale), div(splat_f32x16(_ONE), scale))


# Scales alone


def _scales_for(size, low, high, integers):
    """Make ``take(x, w, d, found, taken)``, a pass under the half `d` (both relative to the largest weight): `taken` is
    the integer scale of each small block, from ``integers[0]`` to ``integers[1]``. It returns the error, less Σwxx, and
    the best `d` for these integers and codes."""
    lowest, last_first = np.float32(integers[0]), np.float32(integers[1] - 15)

    @helper
    def take(x, w, d, found, taken):
        error = products = squares = np.float64(0)
        inverse_d = inverse_of(d)
        for block in range(SIZE // size):
            at = 4 * size * block
            middle = np.float32(np.rint(found[block] * inverse_d))
            tried = ramp(min(max(middle - np.float32(8), lowest), last_first), _ONE)
            scale = mul(tried, splat_f32x16(d))
            xq, qq = signed_sums(x + at, w + at, size, _inverses(scale), low, high)
            errors = mul(scale, sub(mul(scale, qq), add(xq, xq)))
            least = smallest(errors)
            lane = first_lane(errors, least)
            taken[block] = lane_value(tried, lane)
            integer = np.float64(taken[block])
            error += least
            products += integer * lane_value(xq, lane)
            squares += integer * integer * lane_value(qq, lane)
        return error, np.float32(products / squares) if squares > 0 else _ZERO

    return take


def scaled_super_blocks_for(size, low, high, integers, starts):
    """Make ``choose(x, w, scratch)`` for types of small blocks of `size` weights with a scale: an integer from
    ``integers[0]`` to ``integers[1]`` times a half. Codes are from `low` to `high`.

    It returns the half as float32. From ``scratch[INTEGERS]`` on are then the integers, as float32, and from
    ``scratch[CODES]`` on the codes less `low`, as bytes.
    """
    count = SIZE // size
    search, take = scale_search_for(size, low, high), _scales_for(size, low, high, integers)
    first, last = integers

    @helper
    def best_half(scaled, w, largest, scratch):
        """The half, and the integers of the best pass."""
        if largest == _ZERO:
            _keep_zeros(scratch)
            return _ZERO
        found, taken, spare = scratch[_FOUND:_TAKEN], scratch[_TAKEN:INTEGERS], address(scratch[_SPARE:])
        farthest = _ZERO
        for block in range(count):
            at = 4 * size * block
            own = farthest_of(scaled + at, size)
            found[block] = search(scaled + at, w + at, own) if abs(own) >= SMALLEST else _ZERO
            farthest = found[block] if abs(found[block]) > abs(farthest) else farthest
        least, best = np.inf, _ZERO
        for start in range(starts):
            bound = last - start // 2 if start % 2 else first + start // 2
            d = _held(farthest / np.float32(bound), largest, spare)
            for _ in range(_PASSES):
                error, better = take(scaled, w, d, found, taken)
                if error < least:
                    least, best = error, d
                    _keep(scratch)
                d = _held(better, largest, spare)
        return half_scale(best * largest, spare)

    @helper
    def choose(x, w, scratch):
        source, scaled, codes = address(x), address(scratch), address(scratch[CODES:])
        d = best_half(scaled, address(w), _normalise(source, scaled), scratch)
        for block in range(count):
            inverse = inverse_of(d * scratch[INTEGERS + block])
            write_codes(source + 4 * size * block, size, inverse, np.float32(-low), high - low, codes + size * block)
        return d

    return choose


# Scales and minima


@inlined
def _first_of_four(wished, largest):
    """The first of four integers from 0 to `largest`, of which two are on either side of a number."""
    return min(max(np.float32(np.floor(wished)) - _ONE, _ZERO), np.float32(largest - 3))


@inlined
def _best_halves(scales, minima, mixed, products, offsets, dmin):
    """The halves d and dmin, 0 or more, that minimise ``scales * d² + minima * dmin² - 2 * products * d + 2 * offsets *
    dmin - 2 * mixed * d * dmin``; `dmin` where it does not matter."""
    determinant = scales * minima - mixed * mixed
    if determinant > 1e-9 * scales * minima:
        d = (products * minima - offsets * mixed) / determinant
        dmin = np.float32((products * mixed - offsets * scales) / determinant)
        if d > 0 and dmin >= _ZERO:
            return np.float32(d), dmin
        dmin = _ZERO
    return np.float32(max((products + mixed * dmin) / scales, 0.0)) if scales > 0 else _ZERO, dmin


def _lines_for(size, top, largest):
    """Make ``take(x, w, halves, found, taken)``, a pass under the halves d and dmin (both relative to the largest
    weight): `taken` are the integer scales of all small blocks, then the integer minima, from 0 to `largest`. It
    returns the error, less Σwxx, and the best halves for these integers and codes."""

    @helper
    def take(x, w, halves, found, taken):
        error = scales = minima = mixed = products = offsets = np.float64(0)
        d, dmin = halves
        inverse_d, inverse_dmin = inverse_of(d), inverse_of(dmin)
        for block in range(SIZE // size):
            at, own = 4 * size * block, found[4 * block : 4 * block + 4]
            tried = ramps_of_four(_first_of_four(own[0] * inverse_d, largest), _ONE)
            tried_minima = ramp_of_fours(_first_of_four(own[1] * inverse_dmin, largest), _ONE)
            scale, offset = mul(tried, splat_f32x16(d)), mul(tried_minima, splat_f32x16(-dmin))
            inverse = _inverses(scale)
            shift = sub(splat_f32x16(_ZERO), mul(offset, inverse))
            sums = code_sums(x + at, w + at, size, inverse, shift, top)
            errors = error_of(scale, offset, sums, splat_f32x16(own[2]), splat_f32x16(own[3]))
            least = smallest(errors)
            lane = first_lane(errors, least)
            taken[block], taken[MOST + block] = lane_value(tried, lane), lane_value(tried_minima, lane)
            integer, minimum = np.float64(taken[block]), np.float64(taken[MOST + block])
            error += least
            mixed += integer * minimum * lane_value(sums[0], lane)
            scales += integer * integer * lane_value(sums[1], lane)
            products += integer * lane_value(sums[2], lane)
            minima += minimum * minimum * own[2]
            offsets += minimum * own[3]
        return error, _best_halves(scales, minima, mixed, products, offsets, dmin)

    return take


def line_super_blocks_for(size, top, largest, rounds, starts):
    """Make ``choose(x, w, scratch)`` for types of small blocks of `size` weights with a scale and a minimum, integers
    from 0 to `largest` times one half each. Codes are from 0 to `top`; the search has so many rounds.

    It returns the two halves as float32. From ``scratch[INTEGERS]`` on are then the integer scales, as float32, `MOST`
    behind them the integer minima, and from ``scratch[CODES]`` on the codes, as bytes.
    """
    count = SIZE // size
    search, take = line_search_for(size, top, True, rounds), _lines_for(size, top, largest)

    @helper
    def best_halves(scaled, w, largest_weight, scratch):
        """The halves, and the integers of the best pass."""
        if largest_weight == _ZERO:
            _keep_zeros(scratch)
            return _ZERO, _ZERO
        found, taken, spare = scratch[_FOUND:_TAKEN], scratch[_TAKEN:INTEGERS], address(scratch[_SPARE:])
        largest_scale, largest_minimum = _ZERO, _ZERO
        for block in range(count):
            at, own = 4 * size * block, found[4 * block : 4 * block + 4]
            sum_w, sum_wx = weighted_sums(scaled + at, w + at, size)
            scale, offset = search(scaled + at, w + at, extremes(scaled + at, size), (sum_w, sum_wx))
            own[0], own[1], own[2], own[3] = scale, -offset, sum_w, sum_wx
            largest_scale, largest_minimum = max(largest_scale, own[0]), max(largest_minimum, own[1])
        least, best, best_minimum = np.inf, _ZERO, _ZERO
        for start in range(starts):
            bound = np.float32(largest - start)
            d = _held(largest_scale / bound, largest_weight, spare)
            dmin = _held(largest_minimum / bound, largest_weight, spare)
            for _ in range(_PASSES):
                error, better = take(scaled, w, (d, dmin), found, taken)
                if error < least:
                    least, best, best_minimum = error, d, dmin
                    _keep(scratch)
                d, dmin = _held(better[0], largest_weight, spare), _held(better[1], largest_weight, spare)
        return half_scale(best * largest_weight, spare), half_scale(best_minimum * largest_weight, spare)

    @helper
    def choose(x, w, scratch):
        source, scaled, codes = address(x), address(scratch), address(scratch[CODES:])
        d, dmin = best_halves(scaled, address(w), _normalise(source, scaled), scratch)
        for block in range(count):
            minimum = dmin * scratch[INTEGERS + MOST + block]
            inverse = inverse_of(d * scratch[INTEGERS + block])
            write_codes(source + 4 * size * block, size, inverse, minimum * inverse, top, codes + size * block)
        return d, dmin

    return choose
