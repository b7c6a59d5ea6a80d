"""Numbers of a few bits to the places that a type has for them (`pymla.planes.Plane`, `pymla.vectors.Field`)."""

import numpy as np

from pymla.cpu.runtime.compiling import helper


def places_of(fields, count):
    """Where `count` numbers have their bits, for `write`: of each field and number the byte, the lowest bit in it, the
    place of these bits in the number, and a mask of as many bits: int64 (fields, count, 4)."""
    return np.array(
        [[(*each.place(i), each.shift, (1 << each.bits) - 1) for i in range(count)] for each in fields], np.int64
    )


@helper
def write(block, places, number, value):
    """Write a value, int64 from 0 on, as one of the numbers with places, to a block, uint8, whose bits are 0 there.
    Bits that the fields do not hold are left out."""
    for field in range(len(places)):
        at = places[field, number, 0]
        bits = (value >> places[field, number, 2] & places[field, number, 3]) << places[field, number, 1]
        block[at] |= np.uint8(bits & 255)
        if bits > 255:
            block[at + 1] |= np.uint8(bits >> 8)
