"""Codes and scales to the bit planes of a block (`pymla.planes`)."""

import numpy as np

from pymla.cpu.runtime.compiling import inlined


def code_packer(planes, count):
    """Make ``pack(codes, block)``: `count` codes, uint8, to one or two planes of a block, uint8, all of whose bytes are
    written."""
    packers = [_plane_packer(plane, count) for plane in planes]
    if len(packers) == 1:
        return packers[0]
    first, second = packers

    @inlined
    def pack(codes, block):
        first(codes, block)
        second(codes, block)

    return pack


def _plane_packer(plane, count):
    at, bits, run, shift, fields = plane.at, plane.bits, plane.run, plane.shift, plane.fields
    together, mask = run * fields, (1 << bits) - 1

    @inlined
    def pack(codes, block):
        for group in range(count // together):
            for i in range(run):
                first, packed = group * together + i, 0
                for field in range(fields):
                    packed |= (np.int64(codes[first + field * run]) >> shift & mask) << bits * field
                block[at + group * run + i] = packed

    return pack


def field_writer(planes, count):
    """Make ``put(block, i, number)``: number i of `count` to planes of a block, uint8, whose bits are 0 there."""
    places = np.array([[plane.place(i) for i in range(count)] for plane in planes], np.int64)
    shifts = np.array([plane.shift for plane in planes], np.int64)
    masks = np.array([(1 << plane.bits) - 1 for plane in planes], np.int64)

    @inlined
    def put(block, i, number):
        for plane in range(len(shifts)):
            block[places[plane, i, 0]] |= (number >> shifts[plane] & masks[plane]) << places[plane, i, 1]

    return put
