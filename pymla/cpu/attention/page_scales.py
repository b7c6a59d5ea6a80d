"""The scales of the codes of a page, as the products with it need them."""

from typing import NamedTuple

import numpy as np

from pymla.cpu.machine.simd import (
    address,
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


class PageScales(NamedTuple):
    """Scales of the rows of a page. A row is padded to a multiple of eight blocks with zeros."""

    scales: np.ndarray  # float32 (PAGE, blocks)
    factors: np.ndarray  # int16 (PAGE, blocks): scales relative to the row's largest, times 32768
    largest: np.ndarray  # float32 (PAGE,)


@helper
def empty_page_scales(blocks):
    """Room for rows of `blocks` blocks."""
    padded = (blocks + 7) // 8 * 8
    return PageScales(
        np.zeros((PAGE, padded), np.float32), np.empty((PAGE, padded), np.int16), np.empty(PAGE, np.float32)
    )


@helper
def take_scales(at, seen, blocks, out):
    """Read the scales of the first `seen` rows of a page, `blocks` IEEE halves each from address `at` on. The other rows
    get factors of 0, so that they count for nothing whatever their codes are."""
    for s in range(seen):
        out.largest[s] = _take_row(at + 2 * blocks * s, blocks, address(out.scales[s]), address(out.factors[s]))
    out.largest[seen:], out.factors[seen:] = 0, 0


@helper
def _take_row(at, blocks, scales, factors):
    """The scales of one row at an address, to the addresses `scales` and `factors`; returns the largest."""
    whole = blocks // 8 * 8
    for i in range(0, whole, 8):
        store_f32x8(scales + 4 * i, load_f16x8(at + 2 * i))
    for i in range(whole, blocks):
        store_f32(scales + 4 * i, load_f16(at + 2 * i))
    most = load_f32x8(scales)
    for i in range(8, blocks, 8):
        most = larger(load_f32x8(scales + 4 * i), most)
    largest_scale = largest(most)
    inverse = splat_f32(np.float32(0))
    if largest_scale > 0:
        inverse = splat_f32(np.float32(32767) / largest_scale)
    for i in range(0, blocks, 8):
        store_as_i16(factors + 2 * i, mul(load_f32x8(scales + 4 * i), inverse))
    return largest_scale
