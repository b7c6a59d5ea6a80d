"""Numbers times a Hadamard matrix, before they become codes with a common scale.

The matrix consists of 1 and -1, and its rows are orthogonal. The product of two vectors that were both multiplied by it
is larger by a factor, the number of rows. A number that is much larger than the others, and would make the scale coarse
for all of them, is spread over all numbers. (Ashkboos et al., "QuaRot", 2024.)
"""

from pymla.cpu.machine.simd import add, hadamard, load_f32xL, store_f32xL, sub
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import helper


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
