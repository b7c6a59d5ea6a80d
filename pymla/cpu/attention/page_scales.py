"""The scales of the codes of a page, as the products with it need them."""

from typing import NamedTuple

import numpy as np

from pymla.cpu.machine.simd import (
    absolute,
    larger,
    largest,
    load_f16,
    load_f16x8,
    load_f32x8,
    mul,
    splat_f32,
    store_as_i16,
    store_f32,
    store_f32x8,
)
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE

#: By how much the largest scale is taken for larger where codes are unpacked: products of a code of -128 and a factor
#: then stay within int8.
_HEADROOM = np.float32(128 / 127)


class PageScales(NamedTuple):
    """Addresses of the scales of the rows of a page, and the size of a row, which is padded to a multiple of eight
    blocks with zeros."""

    scales: int  # float32 (PAGE, padded)
    factors: int  # int16 (PAGE, padded): scales relative to the row's largest, times 32768
    largest: int  # float32 (PAGE,)
    padded: int


@helper
def page_scales_bytes(blocks):
    """Bytes of `PageScales` of rows of `blocks` blocks."""
    return PAGE * ((4 + 2) * _padded(blocks) + 4)


@helper
def page_scales_at(memory, blocks):
    """`PageScales` in memory at an address, which begins with zeros."""
    padded = _padded(blocks)
    factors = memory + PAGE * 4 * padded
    return PageScales(memory, factors, factors + PAGE * 2 * padded, padded)


@helper
def _padded(blocks):
    return (blocks + 7) // 8 * 8


@helper
def take_scales(at, seen, blocks, bits, out):
    """Read the scales of the first `seen` rows of a page, `blocks` IEEE halves each from address `at` on, of codes of
    `bits` bits that are unpacked to 8. The other rows get factors of 0, so that they count for nothing whatever their
    codes are."""
    zero = splat_f32(np.float32(0))
    for s in range(seen):
        scales, factors = out.scales + 4 * out.padded * s, out.factors + 2 * out.padded * s
        largest_scale = _take_row(at + 2 * blocks * s, blocks, bits, scales, factors)
        store_f32(out.largest + 4 * s, largest_scale)
    for s in range(seen, PAGE):
        store_f32(out.largest + 4 * s, np.float32(0))
        for i in range(0, out.padded, 8):
            store_as_i16(out.factors + 2 * (out.padded * s + i), zero)


@helper
def _take_row(at, blocks, bits, scales, factors):
    """The scales of one row at an address, to the addresses `scales` and `factors`; returns the largest, without its
    sign."""
    whole, unit = blocks // 8 * 8, np.float32(1 / (1 << 8 - bits))
    for i in range(0, whole, 8):
        store_f32x8(scales + 4 * i, mul(load_f16x8(at + 2 * i), splat_f32(unit)))
    for i in range(whole, blocks):
        store_f32(scales + 4 * i, load_f16(at + 2 * i) * unit)
    most = absolute(load_f32x8(scales))
    for i in range(8, blocks, 8):
        most = larger(absolute(load_f32x8(scales + 4 * i)), most)
    largest_scale = largest(most)
    if bits < 8:
        largest_scale *= _HEADROOM
    inverse = splat_f32(np.float32(0))
    if largest_scale > 0:
        inverse = splat_f32(np.float32(32767) / largest_scale)
    for i in range(0, blocks, 8):
        store_as_i16(factors + 2 * i, mul(load_f32x8(scales + 4 * i), inverse))
    return largest_scale
