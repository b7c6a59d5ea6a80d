"""Types of three levels, -1, 0 and 1, with a scale for 256 weights: TQ1_0 packs five codes into a byte, TQ2_0 four.

With a scale d the nearest codes are not 0 for the weights that are farther from zero than d / 2. So the best scale is
the weighted mean of the sizes of the weights beyond some bound. Candidates are sixteen bounds that divide the whole
range; from the best of them, half of a scale is the next bound, for as long as the error falls.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.machine.simd import absolute, add, address, div, fma, larger, largest, mul, sub, total, where_positive
from pymla.cpu.machine.simd_quantise import (
    broadcast_f32x16,
    first_lane,
    lane_value,
    load_f32x16,
    ramp,
    splat_f32x16,
    store_as_bytes,
    store_f32x16,
)
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import half_scale
from pymla.cpu.runtime.compiling import helper, inlined

_SIZE = 256
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
#: Floats of the work memory: sizes of weights, and their products with the importance.
_PRODUCTS_AT, _SCRATCH = _SIZE, 2 * _SIZE
#: Scales that follow the one of the best candidate.
_ROUNDS = 6


@inlined
def take_sizes(x, w, work):
    """Sizes of the weights at `x` and their products with the importance at `w` to the work memory; returns the largest
    size."""
    most = splat_f32x16(_ZERO)
    for at in range(0, 4 * _SIZE, 64):
        size = absolute(load_f32x16(x + at))
        store_f32x16(work + at, size)
        store_f32x16(work + 4 * _PRODUCTS_AT + at, mul(size, load_f32x16(w + at)))
        most = larger(size, most)
    return largest(most)


@inlined
def best_of_bounds(work, w, bounds):
    """The scale of the weights beyond the best of sixteen bounds, and what it lowers the error by."""
    products = weights = splat_f32x16(_ZERO)
    for at in range(0, 4 * _SIZE, 4):
        beyond = sub(broadcast_f32x16(work + at), bounds)
        products = add(products, where_positive(beyond, broadcast_f32x16(work + 4 * _PRODUCTS_AT + at)))
        weights = add(weights, where_positive(beyond, broadcast_f32x16(w + at)))
    scales = where_positive(weights, div(products, weights))
    gains = mul(scales, products)
    gain = largest(gains)
    return lane_value(scales, first_lane(gains, gain)), gain


@inlined
def next_scale(work, w, scale):
    """The scale of the weights beyond half of another scale, and what it lowers the error by."""
    products = weights = splat_f32x16(_ZERO)
    bound = splat_f32x16(scale * _HALF)
    for at in range(0, 4 * _SIZE, 64):
        beyond = sub(load_f32x16(work + at), bound)
        products = add(products, where_positive(beyond, load_f32x16(work + 4 * _PRODUCTS_AT + at)))
        weights = add(weights, where_positive(beyond, load_f32x16(w + at)))
    product, weight = total(products), total(weights)
    found = product / weight if weight > _ZERO else _ZERO
    return found, found * product


@inlined
def write_scale(x, w, scratch, at):
    """The scale of 256 weights as a half to an address; returns the bound beyond which codes are not 0."""
    work = address(scratch)
    most = take_sizes(x, w, work)
    scale, gain = best_of_bounds(work, w, ramp(_ZERO, most / np.float32(16)))
    for _ in range(_ROUNDS):
        following, its_gain = next_scale(work, w, scale)
        if its_gain <= gain:
            break
        scale, gain = following, its_gain
    return half_scale(scale, at) * _HALF


@inlined
def codes_of(x, bound):
    """Codes 0, 1 and 2 of sixteen weights at an address."""
    values, bounds, one = load_f32x16(x), splat_f32x16(bound), splat_f32x16(_ONE)
    below = where_positive(sub(sub(splat_f32x16(_ZERO), values), bounds), one)
    return sub(add(one, where_positive(sub(values, bounds), one)), below)


@inlined
def digits_of(x, count, run, bound, base):
    """Sixteen numbers of `count` digits: code i, i + run, i + 2 run, … of the weights at an address are those of number
    i, the highest first."""
    number, factor = codes_of(x, bound), splat_f32x16(np.float32(base))
    for digit in range(1, count):
        number = fma(number, factor, codes_of(x + 4 * run * digit, bound))
    return number


@helper
def tq2_0(x, w, block, scratch):
    """Byte i of 32 has codes i, i + 32, i + 64 and i + 96 of 128, from the lowest bits on."""
    codes = address(x)
    bound = write_scale(codes, address(w), scratch, address(block) + 64)
    for group in range(0, _SIZE, 128):
        for i in range(0, 32, 16):
            # The last run comes first: it has the highest bits.
            packed = digits_of(codes + 4 * (group + 96 + i), 4, -32, bound, 4)
            store_as_bytes(address(block) + group // 4 + i, packed)


@inlined
def as_fraction(number):
    """Numbers of five digits to the base 3 as bytes: times 256 / 243, rounded up."""
    numerator = fma(number, splat_f32x16(np.float32(256)), splat_f32x16(np.float32(242)))
    return div(numerator, splat_f32x16(np.float32(243)))


@helper
def tq1_0(x, w, block, scratch):
    """Bytes of five codes: 32 with those that are 32 apart, 16 with those that are 16 apart; then four bytes of four
    codes that are 4 apart, as the first four of five digits."""
    codes, target = address(x), address(block)
    bound = write_scale(codes, address(w), scratch, target + 52)
    for i in range(0, 32, 16):
        store_as_bytes(target + i, as_fraction(digits_of(codes + 4 * i, 5, 32, bound, 3)))
    store_as_bytes(target + 32, as_fraction(digits_of(codes + 4 * 160, 5, 16, bound, 3)))
    store_f32x16(address(scratch), codes_of(codes + 4 * 240, bound))
    for i in range(4):
        number = 0
        for digit in range(4):
            number = 3 * number + np.int64(scratch[4 * digit + i])
        block[48 + i] = (3 * number * 256 + 242) // 243


QUANTISERS = {ggml.TQ1_0: Quantiser(tq1_0, _SCRATCH), ggml.TQ2_0: Quantiser(tq2_0, _SCRATCH)}
