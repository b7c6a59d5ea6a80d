"""The online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

Scores come a page at a time. A running maximum m and a running sum l are kept for each query and head, with accumulated
values; where the maximum grows, sum and values shrink by 2 ** (m_old - m_new). They begin with m = -inf, l = 0 and
values of 0. In the end the values over l are the result.

Weights are 2 ** (score - m): exponentials to base 2 cost half as much as those to base e, so that queries are scaled by
`pymla.constants.LOG2E` beforehand.
"""

import numpy as np

from pymla.cpu.machine.simd import (
    add,
    address,
    exp2,
    first_lanes,
    larger,
    largest,
    load_f32,
    load_f32x8,
    load_f32xL,
    mul,
    splat_f32,
    splat_f32xL,
    store_f32,
    store_f32x8,
    store_f32xL,
    sub,
    total,
)
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES


@helper
def shrink(factor, out, columns):
    """``out *= factor`` at an address of float32."""
    splat = splat_f32(factor)
    for i in range(0, columns // 8 * 32, 32):
        store_f32x8(out + i, mul(splat, load_f32x8(out + i)))
    for i in range(columns // 8 * 32, 4 * columns, 4):
        store_f32(out + i, load_f32(out + i) * factor)


@helper
def heads_softmax(scores, seen, state, values, columns):
    """Scores of 16 heads become weights, in place; running maxima, sums and values follow.

    Parameters
    ----------
    scores : int
        Address of float32 (seen, 16): heads side by side. A head's first scores may not all be -inf.
    seen : int
        Rows of scores, at least 1.
    state : int
        Address of float32 (2, 16): running maxima, and sums.
    values, columns : int
        Address of float32 (16, columns): accumulated values.
    """
    factors = np.empty(16, np.float32)
    for at in range(0, 64, 4 * LANES):
        old = load_f32xL(state + at)
        most = old
        for s in range(seen):
            most = larger(load_f32xL(scores + 64 * s + at), most)
        correction = exp2(sub(old, most))
        summed = mul(load_f32xL(state + 64 + at), correction)
        for s in range(seen):
            weight = exp2(sub(load_f32xL(scores + 64 * s + at), most))
            store_f32xL(scores + 64 * s + at, weight)
            summed = add(summed, weight)
        store_f32xL(state + at, most)
        store_f32xL(state + 64 + at, summed)
        store_f32xL(address(factors) + at, correction)
    for h in range(16):
        if factors[h] != 1:
            shrink(factors[h], values + 4 * columns * h, columns)


@helper
def _raise_maximum(most, state, result, columns):
    """Raise a query's running maximum to `most` if that is larger; its sum and values shrink. Returns the maximum."""
    maximum = load_f32(state)
    if most > maximum:
        correction = np.float32(np.exp2(maximum - most))
        store_f32(state + 4, load_f32(state + 4) * correction)
        shrink(correction, result, columns)
        store_f32(state, most)
        maximum = most
    return maximum


@helper
def query_softmax(scores, count, seen, state, result, columns):
    """Scores of a query become weights, in place; its running maximum, sum and values follow.

    Parameters
    ----------
    scores, count : int
        Address of float32 (count,); `count` is a multiple of 8.
    seen : int
        The query sees the first ones; the others get weights of 0, whatever they are. Where it sees none (0 or less),
        nothing else changes.
    state : int
        Address of the running maximum and sum, float32 (2,).
    result, columns : int
        Address of accumulated values, float32 (columns,).
    """
    seen, size = max(seen, 0), 4 * count
    if seen == 0:
        _fill(scores, 0, count, np.float32(0))
        return
    _fill(scores, seen, count, np.float32(-np.inf))
    most = load_f32x8(scores)
    for s in range(32, size, 32):
        most = larger(load_f32x8(scores + s), most)
    negative = splat_f32(-_raise_maximum(largest(most), state, result, columns))
    for s in range(0, size, 32):
        store_f32x8(scores + s, exp2(add(load_f32x8(scores + s), negative)))
    # `exp2` of minus infinity is not 0 but a very small number.
    _fill(scores, seen, count, np.float32(0))
    sums = splat_f32(np.float32(0))
    for s in range(0, size, 32):
        sums = add(sums, load_f32x8(scores + s))
    store_f32(state + 4, load_f32(state + 4) + total(sums))


@helper
def _fill(at, first, stop, value):
    """Set float32 `first` to `stop` - 1 of those at an address."""
    for i in range(first, stop):
        store_f32(at + 4 * i, value)


@helper
def token_softmax(scores, count, seen, token_scales, state, result, columns):
    """Scores of a query become weights times the tokens' scales, in place; its running maximum, sum and values follow.

    Parameters
    ----------
    scores, count : int
        Address of float32 (count,); `LANES` divides `count`.
    seen : int
        The query sees the first ones, perhaps none (0 or less) or all (`count` or more); the others get weights of 0,
        whatever they are.
    token_scales : int
        Address of the scales of the tokens' values, which are codes, float32 (count,). The sum is that of the weights
        without them.
    state : int
        Address of the running maximum and sum, float32 (2,).
    result, columns : int
        Address of accumulated values, float32 (columns,).
    """
    lowest, zero = splat_f32xL(np.float32(-np.inf)), splat_f32xL(np.float32(0))
    # Whole registers that the query sees need no mask; the others follow.
    whole = min(max(seen, 0), count) // LANES * LANES
    most = lowest
    for s in range(0, whole, LANES):
        most = larger(load_f32xL(scores + 4 * s), most)
    for s in range(whole, count, LANES):
        most = larger(first_lanes(load_f32xL(scores + 4 * s), seen - s, lowest), most)
    negative, sums = splat_f32xL(-_raise_maximum(largest(most), state, result, columns)), zero
    for s in range(0, whole, LANES):
        weight = exp2(add(load_f32xL(scores + 4 * s), negative))
        sums = add(sums, weight)
        store_f32xL(scores + 4 * s, mul(weight, load_f32xL(token_scales + 4 * s)))
    for s in range(whole, count, LANES):
        weight = exp2(add(load_f32xL(scores + 4 * s), negative))
        sums = add(sums, first_lanes(weight, seen - s, zero))
        store_f32xL(scores + 4 * s, first_lanes(mul(weight, load_f32xL(token_scales + 4 * s)), seen - s, zero))
    store_f32(state + 4, load_f32(state + 4) + total(sums))
