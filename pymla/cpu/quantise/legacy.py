"""Types of ggml's first generation, and Q6_0 of ik_llama.cpp: blocks of 32 weights with a scale, and a minimum in those
whose name ends in 1. Layouts are those of `pymla.reference.formats.legacy`.

For each block the scale, or the scale and the minimum, come from `pymla.cpu.quantise.search` and are rounded to IEEE
halves. Codes are the nearest ones under the rounded numbers. A weight costs one pass of sixteen candidates where there
is a scale alone, and two where there is a minimum: 4 and 8 cycles with registers of 512 bits.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.machine.simd import address, sub
from pymla.cpu.machine.simd_quantise import (
    load_f32x16,
    splat_f32x16,
    store_as_bytes,
    store_high_pairs,
    store_nibbles,
    store_sixteenths,
)
from pymla.cpu.quantise.quantiser import Quantiser
from pymla.cpu.quantise.search import (
    LARGEST,
    LARGEST_FLOAT,
    SMALLEST,
    codes_of,
    extremes,
    farthest_of,
    half_offset,
    half_scale,
    inverse_of,
    line_search_for,
    scale_search_for,
    weighted_sums,
    write_scaled,
)
from pymla.cpu.runtime.compiling import inlined

_SIZE = 32
_ZERO, _ONE = np.float32(0), np.float32(1)
#: Rounds of the search for scale and minimum: two more lower the error by 0.2 %.
_ROUNDS = 1


@inlined
def _write_4(low, high, codes):
    """Codes of 4 bits at an address: the first sixteen are the low halves of the bytes."""
    store_nibbles(codes, low, high)


@inlined
def _write_5(low, high, codes):
    """Codes of 5 bits: the fifth bits come first."""
    store_sixteenths(codes, low, high)
    store_nibbles(codes + 4, low, high)


@inlined
def _write_6(low, high, codes):
    """Codes of 6 bits: the two high bits come first."""
    store_high_pairs(codes, low, high)
    store_nibbles(codes + 8, low, high)


@inlined
def _write_8(low, high, codes):
    """Codes of 8 bits, with a sign."""
    zero = splat_f32x16(np.float32(127))
    store_as_bytes(codes, sub(low, zero))
    store_as_bytes(codes + 16, sub(high, zero))


def _with_scale(low, high, write, is_fine=False):
    """The quantiser of a type with a scale, whose codes are from `low` to `high`. ``write(first, last, address)``
    stores sixteen codes and sixteen more, as numbers from 0 on."""
    search = scale_search_for(_SIZE, low, high, is_fine)
    top, zero, lowest = np.float32(high - low), np.float32(-low), np.float32(low)

    @inlined
    def quantise_block(x, w, block, scratch):
        source, at = address(x), address(block)
        farthest, d = farthest_of(source, _SIZE), _ZERO
        if abs(farthest) > LARGEST:
            d = farthest / lowest
        elif abs(farthest) >= SMALLEST:
            d = search(source, address(w), farthest)
        inverse = splat_f32x16(inverse_of(half_scale(d, at)))
        zeros, tops = splat_f32x16(zero), splat_f32x16(top)
        first = codes_of(load_f32x16(source), inverse, zeros, tops)
        write(first, codes_of(load_f32x16(source + 64), inverse, zeros, tops), at + 2)

    return Quantiser(quantise_block)


def _with_minimum(top, write):
    """The quantiser of a type with a scale and a minimum, whose codes are from 0 to `top`."""
    search = line_search_for(_SIZE, top, False, _ROUNDS)
    largest_code = np.float32(top)

    @inlined
    def quantise_block(x, w, block, scratch):
        source, at, scaled = address(x), address(block), address(scratch)
        m, largest = extremes(source, _SIZE)
        span, d = min(largest - m, LARGEST_FLOAT), _ZERO
        if span >= SMALLEST:
            write_scaled(source, _SIZE, _ONE / span, -m / span, scaled)
            sums = weighted_sums(scaled, address(w), _SIZE)
            scale, offset = search(scaled, address(w), (_ZERO, _ONE), sums)
            d, m = scale * span, m + offset * span
        m = half_offset(m, at + 2)
        inverse = inverse_of(half_scale(d, at))
        inverses, shifts, tops = splat_f32x16(inverse), splat_f32x16(-m * inverse), splat_f32x16(largest_code)
        first = codes_of(load_f32x16(source), inverses, shifts, tops)
        write(first, codes_of(load_f32x16(source + 64), inverses, shifts, tops), at + 4)

    return Quantiser(quantise_block, _SIZE)


QUANTISERS = {
    ggml.Q4_0: _with_scale(-8, 7, _write_4),
    ggml.Q4_1: _with_minimum(15, _write_4),
    ggml.Q5_0: _with_scale(-16, 15, _write_5),
    ggml.Q5_1: _with_minimum(31, _write_5),
    ggml.Q6_0: _with_scale(-32, 31, _write_6, is_fine=True),
    ggml.Q8_0: _with_scale(-127, 127, _write_8),
}
