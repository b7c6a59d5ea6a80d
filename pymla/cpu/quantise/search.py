"""Searches for the scale, or the scale and the offset, of some weights: sixteen candidates at a time.

A candidate is a lane of a register. Each weight x, of importance w, is broadcast to all lanes, each lane rounds it to a
code q by its own scale, and adds w·q·q and w·x·q to its own sums (and w·q where there is an offset). With these sums a
lane knows the best scale *for its codes*, and the error that this leaves, without another look at the weights:

    scale = Σwxq / Σwqq        error = Σwxx - (Σwxq)² / Σwqq

and the like from two equations in two unknowns with an offset. Sixteen candidates thus cost two loads and eight
operations on registers for a weight, about four cycles with registers of 512 bits. ggml's searches take as long for one
candidate, and choose by an error that is weighted by the size of weights as well.

A search begins with candidates that spread the codes over all weights, or let some of the farthest be clipped. A search
for a scale goes on for as long as the best candidate is the last one. A search for a scale and an offset looks at the
neighbourhood of the best, too.
"""

import numpy as np

from pymla.cpu.machine.simd import add, div, fma, larger, largest, mul, round_even, sub, total, where_positive
from pymla.cpu.machine.simd_memory import load_f16, store_f16
from pymla.cpu.machine.simd_quantise import (
    broadcast_f32x16,
    clipped,
    first_lane,
    lane_value,
    load_f32x16,
    ramp,
    ramp_of_fours,
    ramp_of_halves,
    ramps_of_four,
    smaller,
    smallest,
    splat_f32x16,
    store_as_bytes,
    store_f32x16,
)
from pymla.cpu.runtime.compiling import helper, inlined

#: Weights that are all nearer to zero than this are zero in every type whose scales are IEEE halves.
SMALLEST = np.float32(2.0**-40)
#: Weights beyond this one have no scale that is an IEEE half, and their squares might not be finite.
LARGEST = np.float32(2.0**40)
#: The largest IEEE half, and the smallest above zero.
LARGEST_HALF, SMALLEST_HALF = np.float32(65504), np.float32(2.0**-24)
LARGEST_FLOAT = np.finfo(np.float32).max
_ZERO, _ONE, _TWO, _HALF, _QUARTER = (np.float32(value) for value in (0, 1, 2, 0.5, 0.25))
#: The difference of the farthest weight's codes from one candidate to the next.
_STEP = np.float32(5 / 16)
#: Relative error, and more, of a difference of two sums.
_ROUNDING = np.float32(2e-6)
#: Codes by which the ends of a line are moved in the first round, from one candidate to the next.
_FIRST_STEP = np.float32(0.4)
#: Steps of a search that goes on from its last candidate: more would clip all weights but the smallest.
_MOST_STEPS = 8


@inlined
def half_scale(value, at):
    """A scale as the IEEE half at an address that is nearest to it, and that half as float32. Scales beyond the range
    of halves become the largest and the smallest one, with the same sign; zero stays zero."""
    size = min(max(abs(value), SMALLEST_HALF), LARGEST_HALF)
    kept = _ZERO if value == _ZERO else size if value > _ZERO else -size
    store_f16(at, kept)
    return load_f16(at)


@inlined
def half_offset(value, at):
    """The same of an offset, which may be rounded to zero."""
    store_f16(at, min(max(value, -LARGEST_HALF), LARGEST_HALF))
    return load_f16(at)


@inlined
def inverse_of(scale):
    """``1 / scale``, and 0 of 0."""
    return _ONE / scale if scale != _ZERO else _ZERO


@inlined
def extremes(x, n):
    """The smallest and the largest of `n` float32 at an address, a multiple of 16."""
    low = high = load_f32x16(x)
    for i in range(64, 4 * n, 64):
        values = load_f32x16(x + i)
        low, high = smaller(low, values), larger(high, values)
    return smallest(low), largest(high)


@inlined
def farthest_of(x, n):
    """The weight of largest size of `n` at an address."""
    low, high = extremes(x, n)
    return high if high > -low else low


@inlined
def write_scaled(x, n, factor, shift, to):
    """``x * factor + shift`` of `n` float32, from one address to another."""
    factors, shifts = splat_f32x16(factor), splat_f32x16(shift)
    for i in range(0, 4 * n, 64):
        store_f32x16(to + i, fma(load_f32x16(x + i), factors, shifts))


@inlined
def write_codes(x, n, inverse, shift, top, to):
    """Codes ``round(x * inverse + shift)``, from 0 to `top`, of `n` weights as bytes."""
    inverses, shifts = splat_f32x16(inverse), splat_f32x16(shift)
    for i in range(0, n, 16):
        store_as_bytes(to + i, codes_of(load_f32x16(x + 4 * i), inverses, shifts, splat_f32x16(np.float32(top))))


@inlined
def codes_of(values, inverse, shift, top):
    """Codes ``round(values * inverse + shift)`` from 0 to `top`, all registers."""
    return clipped(round_even(fma(values, inverse, shift)), top)


@inlined
def weighted_sums(x, w, n):
    """The sums of w and of w·x of `n` weights at addresses."""
    weights = load_f32x16(w)
    sums, products = weights, mul(weights, load_f32x16(x))
    for i in range(64, 4 * n, 64):
        weights = load_f32x16(w + i)
        sums, products = add(sums, weights), fma(weights, load_f32x16(x + i), products)
    return total(sums), total(products)


# Scales alone: codes from `low` to `high`, 0 among them


@inlined
def signed_sums(x, w, n, inverse, low, high):
    """For each lane the sums of w·x·q and of w·q·q, of codes ``q = round(x * inverse)`` from `low` to `high`."""
    zero, top = splat_f32x16(np.float32(-low)), splat_f32x16(np.float32(high - low))
    xq = qq = odd_xq = odd_qq = splat_f32x16(_ZERO)
    for i in range(0, 4 * n, 8):
        value, weight = broadcast_f32x16(x + i), broadcast_f32x16(w + i)
        code = sub(codes_of(value, inverse, zero, top), zero)
        product = mul(weight, code)
        xq, qq = fma(product, value, xq), fma(product, code, qq)
        value, weight = broadcast_f32x16(x + i + 4), broadcast_f32x16(w + i + 4)
        code = sub(codes_of(value, inverse, zero, top), zero)
        product = mul(weight, code)
        odd_xq, odd_qq = fma(product, value, odd_xq), fma(product, code, odd_qq)
    return add(xq, odd_xq), add(qq, odd_qq)


def scale_search_for(size, low, high, is_fine=False):
    """Make ``search(x, w, farthest)``: the scale of `size` weights at an address, of importance w, with codes from
    `low` to `high`. `farthest` is the weight of largest size, which is from `SMALLEST` to `LARGEST`. A scale may be
    negative: then the farthest weight above zero has the code `low`.

    The first candidates give the farthest weight codes from 0.6 inside of either end to 1.6 beyond it, where it is
    clipped. Where the search `is_fine`, the best one's neighbours come next: in types of 4 and 5 bits they lower the
    error by less than 0.1 %.
    """
    far_low, far_high = np.float32(low) + _TWO * _STEP, np.float32(high) - _TWO * _STEP

    @inlined
    def best_of(x, w, inverse):
        """What the best candidate lowers the error by, its lane, and the scale of its codes."""
        xq, qq = signed_sums(x, w, size, inverse, low, high)
        scales = div(xq, qq)
        gains = mul(xq, scales)
        gain = largest(gains)
        lane = first_lane(gains, gain)
        return gain, lane, lane_value(scales, lane)

    @inlined
    def search(x, w, farthest):
        per_code = splat_f32x16(_ONE / farthest)
        best_gain, best_scale, best_code = np.float32(-1), _ZERO, _ZERO
        for step in range(_MOST_STEPS):
            first = np.float32(8 * step) * _STEP
            codes = ramp_of_halves(far_low - first, -_STEP, far_high + first, _STEP)
            gain, lane, scale = best_of(x, w, mul(codes, per_code))
            if gain <= best_gain:
                break
            best_gain, best_scale, best_code = gain, scale, lane_value(codes, lane)
            if lane % 8 != 7:
                break
        if is_fine:
            codes = ramp(best_code - _STEP, _STEP / np.float32(8))
            gain, lane, scale = best_of(x, w, mul(codes, per_code))
            best_scale = scale if gain > best_gain else best_scale
        return best_scale

    return search


# Scales and offsets: codes from 0 to `top`


@inlined
def code_sums(x, w, n, inverse, shift, top):
    """For each lane the sums of w·q, of w·q·q and of w·x·q, of codes ``q = round(x * inverse + shift)`` from 0 to
    `top`."""
    tops = splat_f32x16(np.float32(top))
    q = qq = xq = odd_q = odd_qq = odd_xq = splat_f32x16(_ZERO)
    for i in range(0, 4 * n, 8):
        value, weight = broadcast_f32x16(x + i), broadcast_f32x16(w + i)
        code = codes_of(value, inverse, shift, tops)
        product = mul(weight, code)
        q, qq, xq = add(q, product), fma(product, code, qq), fma(product, value, xq)
        value, weight = broadcast_f32x16(x + i + 4), broadcast_f32x16(w + i + 4)
        code = codes_of(value, inverse, shift, tops)
        product = mul(weight, code)
        odd_q, odd_qq, odd_xq = add(odd_q, product), fma(product, code, odd_qq), fma(product, value, odd_xq)
    return add(q, odd_q), add(qq, odd_qq), add(xq, odd_xq)


@inlined
def error_of(scale, offset, sums, total_w, total_wx):
    """For each lane the error of ``scale * q + offset``, less Σwxx: `sums` are Σwq, Σwqq and Σwxq."""
    q, qq, xq = sums
    twice = splat_f32x16(np.float32(2))
    by_scale = mul(scale, fma(twice, sub(mul(offset, q), xq), mul(scale, qq)))
    return fma(offset, sub(mul(offset, total_w), mul(twice, total_wx)), by_scale)


@inlined
def best_line(sums, total_w, total_wx, inverse_w, is_below_zero):
    """For each lane the scale and the offset of the smallest error; the offset at most 0 where `is_below_zero`.
    `inverse_w` is ``1 / total_w``."""
    q, qq, xq = sums
    products = mul(total_w, qq)
    determinant = sub(products, mul(q, q))
    slope = div(sub(mul(total_w, xq), mul(total_wx, q)), determinant)
    # Where all codes are the same, the difference is nothing but rounding.
    differ = fma(products, splat_f32x16(-_ROUNDING), determinant)
    scale = where_positive(differ, larger(slope, splat_f32x16(_ZERO)))
    offset = mul(sub(total_wx, mul(scale, q)), inverse_w)
    if is_below_zero:
        alone = where_positive(qq, div(xq, qq))
        scale = add(scale, where_positive(offset, sub(alone, scale)))
        offset = smaller(offset, splat_f32x16(_ZERO))
    return scale, offset


def line_search_for(size, top, is_below_zero, rounds):
    """Make ``search(x, w, ends, sums)``: the scale and the offset of `size` weights at an address, of size 1 or less,
    of importance w: a weight is about ``scale * code + offset``, with codes from 0 to `top`. `ends` are the smallest
    and the largest weight, `sums` those of w and of w·x. The scale is not negative; the offset is not positive where
    `is_below_zero`.

    The first candidates spread a range of `top` - 1 to `top` + 0.75 codes over all weights, from the lowest weight on
    or around the middle. Each of `rounds` then takes the best scale and offset so far, and moves the codes of the
    lowest and the highest weight by some steps each, half as large as in the round before.
    """
    most = np.float32(top)

    @inlined
    def best_of(x, w, inverse, shift, sum_w, sum_wx):
        """The error of the best candidate, its scale and its offset."""
        total_w, total_wx = splat_f32x16(sum_w), splat_f32x16(sum_wx)
        sums = code_sums(x, w, size, inverse, shift, top)
        scale, offset = best_line(sums, total_w, total_wx, splat_f32x16(_ONE / sum_w), is_below_zero)
        error = error_of(scale, offset, sums, total_w, total_wx)
        smallest_error = smallest(error)
        lane = first_lane(error, smallest_error)
        return smallest_error, lane_value(scale, lane), lane_value(offset, lane)

    @helper
    def search(x, w, ends, sums):
        """Scale and offset; the scale is 0 where all weights are about equal."""
        low, high = ends
        if is_below_zero:
            low = min(low, _ZERO)
        span = high - low
        if span < SMALLEST:
            return _ZERO, low
        sum_w, sum_wx = sums
        codes = ramp_of_halves(most - _ONE, _QUARTER, most - _ONE, _QUARTER)
        inverse = mul(codes, splat_f32x16(_ONE / span))
        middle = ramp_of_halves(_ZERO, _ZERO, _HALF, -_HALF * _QUARTER)
        shift = sub(middle, mul(inverse, splat_f32x16(low)))
        error, scale, offset = best_of(x, w, inverse, shift, sum_w, sum_wx)
        step, mean = _FIRST_STEP, sum_wx / sum_w
        for _ in range(rounds):
            if scale <= _ZERO:
                break
            slope = _ONE / scale
            inverse = ramps_of_four(slope - step / span, step / span)
            middle = ramp_of_fours((mean - offset) * slope - _HALF * step, _HALF * step)
            shift = sub(middle, mul(inverse, splat_f32x16(mean)))
            new_error, new_scale, new_offset = best_of(x, w, inverse, shift, sum_w, sum_wx)
            if new_error < error:
                error, scale, offset = new_error, new_scale, new_offset
            step *= -_HALF
        return scale, offset

    return search
