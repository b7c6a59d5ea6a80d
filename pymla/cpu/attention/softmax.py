"""The online softmax (Milakov and Gimelshein, 2018): a running maximum m, a running sum l, and accumulated values,
which shrink by 2 ** (m_old - m_new) where the maximum grows. Scores are to base 2, which costs half as much as base e:
queries are scaled by `LOG2E` besides."""

import math

import numpy as np

from pymla.cpu.machine.isa import LANES
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

#: Base 2 for base e.
LOG2E = math.log2(math.e)


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
    """Scores (seen, 16) of 16 heads become weights; their maxima and sums (2, 16), and values (16, columns), follow.

    All but the numbers are addresses of float32.
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
    """The larger of a query's maximum and `most`; its sum and values follow."""
    if most > state[0]:
        correction = np.float32(np.exp2(state[0] - most))
        state[1] *= correction
        shrink(correction, result, columns)
        state[0] = most
    return state[0]


@helper
def query_softmax(scores, seen, state, result, columns):
    """Scores of a query, which sees the first ones, become weights, 0 for the rest; maximum, sum and values follow.

    `scores` float32 (n,) with n a multiple of 8; `result` is the address of float32 (columns,).
    """
    row, size = address(scores), 4 * len(scores)
    if seen <= 0:
        scores[:] = 0
        return
    scores[seen:] = -np.inf
    most8 = load_f32x8(row)
    for s in range(32, size, 32):
        most8 = larger(load_f32x8(row + s), most8)
    most = _raise_maximum(largest(most8), state, result, columns)
    negative = splat_f32(-most)
    for s in range(0, size, 32):
        store_f32x8(row + s, exp2(add(load_f32x8(row + s), negative)))
    # `exp2` of minus infinity is a very small number: what the query does not see must count for nothing.
    scores[seen:] = 0
    sums = splat_f32(np.float32(0))
    for s in range(0, size, 32):
        sums = add(sums, load_f32x8(row + s))
    state[1] += total(sums)


@helper
def token_softmax(scores, count, seen, token_scales, state, result, columns):
    """Scores of a query, which sees the first `seen` of `count` tokens, become weights times the tokens' scales, 0 for
    the rest; maximum, sum and values follow.

    `scores`, `token_scales` (count,) and `result` (columns,) are addresses of float32; `LANES` divides `count`.
    """
    lowest, zero = splat_f32xL(np.float32(-np.inf)), splat_f32xL(np.float32(0))
    # `LANES` at a time without a look at what is seen, then the others.
    whole = min(max(seen, 0), count) // LANES * LANES
    most_lanes = lowest
    for s in range(0, whole, LANES):
        most_lanes = larger(load_f32xL(scores + 4 * s), most_lanes)
    for s in range(whole, count, LANES):
        most_lanes = larger(first_lanes(load_f32xL(scores + 4 * s), seen - s, lowest), most_lanes)
    most = _raise_maximum(largest(most_lanes), state, result, columns)
    negative, sums = splat_f32xL(-most), zero
    for s in range(0, whole, LANES):
        weight = exp2(add(load_f32xL(scores + 4 * s), negative))
        sums = add(sums, weight)
        store_f32xL(scores + 4 * s, mul(weight, load_f32xL(token_scales + 4 * s)))
    for s in range(whole, count, LANES):
        weight = exp2(add(load_f32xL(scores + 4 * s), negative))
        sums = add(sums, first_lanes(weight, seen - s, zero))
        store_f32xL(scores + 4 * s, first_lanes(mul(weight, load_f32xL(token_scales + 4 * s)), seen - s, zero))
    state[1] += total(sums)
