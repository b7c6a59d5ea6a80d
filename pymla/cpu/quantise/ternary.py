"""Types of three levels, -1, 0 and 1, with a scale for 256 weights: TQ1_0 packs five codes into a byte, TQ2_0 four.

With a scale d the nearest codes are not 0 for the weights that are farther from zero than d / 2. So the best scale is
the weighted mean of the sizes of the weights beyond some bound. Candidates are bounds: sixteen that divide the whole
range, then sixteen that divide the part about the best.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.machine.simd import absolute, add, address, div, larger, largest, mul, sub, where_positive
from pymla.cpu.machine.simd_quantise import (
    broadcast_f32x16,
    first_lane,
    lane_value,
    load_f32x16,
    ramp,
    splat_f32x16,
    store_f32x16,
)
from pymla.cpu.quantise.packing import code_packer
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import half_scale
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.planes import LAYOUTS

_SIZE = 256
_ZERO, _HALF = np.float32(0), np.float32(0.5)
#: Floats of the work memory: sizes of weights, products with their importance, codes.
_PRODUCTS_AT, _CODES_AT, _SCRATCH = _SIZE, 2 * _SIZE, 2 * _SIZE + _SIZE // 4
_LARGEST_HALF = np.float32(65504)
_tq2_0_pack = code_packer(LAYOUTS[ggml.TQ2_0].codes.planes, _SIZE)


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
def best_bound(work, w, bounds):
    """The best of sixteen bounds, and the scale of the weights beyond it."""
    products = weights = splat_f32x16(_ZERO)
    for at in range(0, 4 * _SIZE, 4):
        beyond = sub(broadcast_f32x16(work + at), bounds)
        products = add(products, where_positive(beyond, broadcast_f32x16(work + 4 * _PRODUCTS_AT + at)))
        weights = add(weights, where_positive(beyond, broadcast_f32x16(w + at)))
    scales = where_positive(weights, div(products, weights))
    gains = mul(scales, products)
    lane = first_lane(gains, largest(gains))
    return lane_value(bounds, lane), lane_value(scales, lane)


@inlined
def best_scale(work, w, most):
    """The scale of weights whose largest size is `most`."""
    step = most / np.float32(16)
    bound, _ = best_bound(work, w, ramp(_ZERO, step))
    first = max(bound - step, _ZERO)
    _, scale = best_bound(work, w, ramp(first, (bound + step - first) / np.float32(16)))
    return min(scale, _LARGEST_HALF)


@inlined
def take_codes(x, w, scratch, codes, scale_at):
    """Codes 0, 1 and 2 of 256 weights, and their scale to an address."""
    work, sizes = address(scratch), scratch[:_SIZE]
    most = take_sizes(address(x), address(w), work)
    bound = half_scale(best_scale(work, address(w), most), scale_at) * _HALF
    for i in range(_SIZE):
        code = np.uint8(1) if sizes[i] <= bound else np.uint8(2)
        codes[i] = 2 - code if x[i] < _ZERO else code


@helper
def tq2_0(x, w, block, scratch):
    """Four codes in a byte."""
    codes = scratch[_CODES_AT:].view(np.uint8)
    take_codes(x, w, scratch, codes, address(block) + 64)
    _tq2_0_pack(codes, block)


@inlined
def pack_trits(codes, first, count, run, block, at):
    """Runs of `run` codes, `count` of them one behind the other, to as many bytes: byte i has code i of each run as the
    digits, highest first, of a number of five digits to the base 3, times 256 / 243 and rounded up."""
    for i in range(run):
        number = 0
        for digit in range(5):
            number *= 3
            if digit < count:
                number += np.int64(codes[first + digit * run + i])
        block[at + i] = (number * 256 + 242) // 243


@helper
def tq1_0(x, w, block, scratch):
    """Five codes in a byte, and four in the last four bytes."""
    codes = scratch[_CODES_AT:].view(np.uint8)
    take_codes(x, w, scratch, codes, address(block) + 52)
    pack_trits(codes, 0, 5, 32, block, 0)
    pack_trits(codes, 160, 5, 16, block, 32)
    pack_trits(codes, 240, 4, 4, block, 48)


QUANTISERS = {ggml.TQ1_0: Quantiser(tq1_0, _SCRATCH), ggml.TQ2_0: Quantiser(tq2_0, _SCRATCH)}
