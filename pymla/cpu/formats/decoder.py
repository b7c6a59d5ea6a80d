"""How a type is decoded: the functions of which `pymla.cpu.formats.decoded` makes a `Format`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cpu.formats.panels import SCALE_EACH, ZERO_POINT
from pymla.cpu.machine.simd import splat_f32
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.isa import LANES, VNNI

#: Bytes of a register of codes, and how many registers 256 weights take.
REGISTER, REGISTERS = 4 * LANES, 64 // LANES

#: The largest of unsigned codes of which sums of eight products with activations fit an int16.
MOST_OF_INTEGERS = 32767 // (8 * 127)


class Integers(NamedTuple):
    """Scales of sixteen blocks of 16 that are integers times a number, for sums of few small codes."""

    load_scales: Callable  # (address): sixteen int16
    load_unit: Callable  # (address): the number that they are multiples of, in eight lanes
    load_minima: Callable | None = None  # the same for what is taken off
    load_minimum_unit: Callable | None = None


class Multiples(NamedTuple):
    """Codes times the integer scales of their sixteens, which panels hold with one scale for 32 weights."""

    lowest: int
    highest: int
    load_codes: Callable  # as `Decoder.load_codes`; 0 becomes `Decoder.zero_point`, for tiles of AMX 0
    load_scales: Callable  # as `Decoder.load_scales`, for 32 weights


class Together(NamedTuple):
    """Four rows that are decoded together."""

    #: (a, b, c, d), the addresses of their blocks: what is found of the first two rows, and of the last two.
    look_up: Callable
    #: (found, address), for the first and the second of two rows: the four registers of the order `EIGHTS`.
    load_eights: tuple[Callable, Callable]


class Decoder(NamedTuple):
    """How a type is decoded. Addresses are of a row's blocks, behind its header; `row` is where the row begins."""

    qtype: int
    each: int  # weights of a small block, which has a scale: 16 or 32
    lowest: int  # the smallest code, and the largest
    highest: int
    offset: int  # what the codes of `load_codes` are more than codes are
    #: (address, r), a literal: the r-th register of codes of 256 weights in the order of the columns, i8xL.
    load_codes: Callable
    #: (address, block): codes of the weights from ``32 * block`` on, i8x32.
    load_codes_32: Callable
    #: (row, address): the scales of the small blocks of 256 weights, f32x8 or f32x16.
    load_scales: Callable
    #: (row, address, block): the scales of the sixteens of the weights from ``32 * block`` on, two float32.
    load_scale: Callable
    #: The same for minima of a type that has them: (address), and (address, block).
    load_minima: Callable | None = None
    load_minimum: Callable | None = None
    #: With VNNI, where products of codes and integer scales fit a byte, what panels have of them.
    multiples: Multiples | None = None
    #: With registers of 64 bytes also `load_codes` in the order `EIGHTS`, and, of types with blocks of less than 256
    #: weights, of 128 weights in the order `FOURS`.
    load_eights: Callable | None = None
    load_fours: Callable | None = None
    #: Then also, where products of eight codes and of activations fit an int16, integer scales.
    integers: Integers | None = None
    #: (scales, address), where small blocks have levels of one of two variants: scales times what is added to the codes
    #: of `load_eights`, which are those of the first variant and `offset` too large.
    moved_scales: Callable | None = None
    #: How rows are decoded with registers of 64 bytes where it is better to decode four of them together.
    together: Together | None = None

    @property
    def code_bits(self):
        """Bits of the codes of panels: 8 where they have a scale for 16 weights."""
        width = self.highest - self.lowest
        if self.each == 16 or width >= 32:
            return 8
        return 4 if width < 16 else 5

    @property
    def scale_each(self):
        """Weights that have a scale in panels: `Format.scale_each`."""
        if self.multiples:
            return 32
        return self.each if self.code_bits < 8 else min(self.each, SCALE_EACH)

    @property
    def zero_point(self):
        """`Format.zero_point`."""
        if self.scale_each == 16:
            return 0
        if self.multiples:
            return -self.multiples.lowest
        return -self.lowest if self.code_bits < 8 else ZERO_POINT

    @property
    def header(self):
        """Bytes in front of a row's blocks."""
        return ggml.ROW_HEADER[self.qtype]

    @property
    def nbytes(self):
        """Bytes of the blocks of 256 weights."""
        return 256 // ggml.BLOCK_SIZE[self.qtype] * ggml.BLOCK_BYTES[self.qtype]

    @property
    def has_rest(self):
        """Whether a row may have blocks behind the last 256 weights."""
        return ggml.BLOCK_SIZE[self.qtype] < 256


def offset_of(lowest, highest):
    """The `Decoder.offset` of a type: codes become unsigned. Codes of more than 7 bits stay as they are where products
    of unsigned bytes would saturate."""
    if highest - lowest < 128:
        return -lowest
    return 128 if VNNI else 0


@inlined
def no_minima(address):
    """Stands for `load_minima` of a type without minima, where no branch that is left calls it."""
    return splat_f32(np.float32(0))
