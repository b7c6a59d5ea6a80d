"""Numbers of a few bits to the places that a type has for them (`pymla.planes.Plane`, `pymla.vectors.Field`)."""

import numpy as np

from pymla.cpu.runtime.compiling import helper


def writer_for(fields, count):
    """Make ``write(block, number, value)``: the bits of one of `count` numbers, int64 from 0 on, to a block, uint8,
    whose bits are 0 there. Bits that the fields do not hold are left out."""
    places = np.array([[each.place(number) for number in range(count)] for each in fields], np.int64)
    shifts = np.array([each.shift for each in fields], np.int64)
    masks = np.array([(1 << each.bits) - 1 for each in fields], np.int64)

    @helper
    def write(block, number, value):
        for field in range(len(shifts)):
            at, bit = places[field, number, 0], places[field, number, 1]
            bits = (value >> shifts[field] & masks[field]) << bit
            block[at] |= np.uint8(bits & 255)
            if bits > 255:
                block[at + 1] |= np.uint8(bits >> 8)

    return write
