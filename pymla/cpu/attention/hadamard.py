"""Numbers times a Hadamard matrix, before they become codes with a common scale: keys, and rows of the cache.

The matrix consists of 1 and -1, and its rows are orthogonal. The product of two vectors that were both multiplied by it
is larger by a factor, the number of rows. A number that is much larger than the others, and would make the scale coarse
for all of them, is spread over all numbers. (Ashkboos et al., "QuaRot", 2024.)
"""

import numpy as np

from pymla.cpu.machine.simd import add, hadamard, load_f32xL, mul, splat_f32xL, store_f32xL, sub
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import helper
from pymla.pages import MIXED, READ


@helper
def mix(x, count):
    """Multiply `count` float32 at the address `x` by the Hadamard matrix of as many rows, in place. `count` is a power
    of two and at least 16."""
    for at in range(x, x + 4 * count, 4 * LANES):
        store_f32xL(at, hadamard(load_f32xL(at)))
    distance = 4 * LANES
    while distance < 4 * count:
        for group in range(x, x + 4 * count, 2 * distance):
            for at in range(group, group + distance, 4 * LANES):
                a, b = load_f32xL(at), load_f32xL(at + distance)
                store_f32xL(at, add(a, b))
                store_f32xL(at + distance, sub(a, b))
        distance *= 2


@helper
def mix_read(x, count):
    """Rows of `pymla.pages.HADAMARD_TYPES` as they are read, or queries that meet such rows, or results of them:
    `count` float32 at the address `x`, in place; `MIXED` divides `count`."""
    factor = splat_f32xL(np.float32(READ))
    for block in range(x, x + 4 * count, 4 * MIXED):
        mix(block, MIXED)
        for at in range(block, block + 4 * MIXED, 4 * LANES):
            store_f32xL(at, mul(load_f32xL(at), factor))
