"""What a type of tensors is to kernels: a row of `pymla.cpu.formats.FORMATS`."""

from collections.abc import Callable
from typing import NamedTuple

from pymla.cpu.machine.orders import FOURS
from pymla.cpu.runtime.isa import AMX


class Format(NamedTuple):
    """The functions and figures of a type. None stands for a function that the type does not have.

    All functions are helpers of kernels; their arguments, but for numbers of weights, are addresses.
    """

    #: ``add_block(row, block, weight, acc)``: `acc`, 32 float32, plus ``weight`` times the 32 weights of a row from
    #: ``32 * block`` on.
    add_block: Callable
    #: ``dot_row(row, x, columns)`` of float types: a row of weights times float32 activations.
    dot_row: Callable | None = None
    #: ``dot_four(rows, activations, columns)`` of quantised types: four rows of weights times the activations of one
    #: token (`pymla.cpu.matmul.activations.parts`), whose codes lie in the type's `order`.
    dot_four: Callable | None = None
    #: ``dot_tokens(row, tokens, columns)``: a row of weights times the activations of four tokens; its codes are taken
    #: out of the row once for all of them.
    dot_tokens: Callable | None = None
    #: The order of codes of activations that `dot_four` and `dot_tokens` read.
    order: int = FOURS
    #: ``unpack(rows, first, count, codes, scales, minima, scratch)`` of quantised types: see `legacy.unpack_q4_0`.
    unpack: Callable | None = None
    #: Bits of the codes that `unpack` gives; 0 for float types.
    code_bits: int = 0
    #: Weights that have a scale of those that `unpack` gives: 32 (`panels.SCALE_EACH` for codes of 8 bits), or 16.
    scale_each: int = 32
    #: What is taken off the codes that `unpack` gives where a scale is for 32 weights; tiles of AMX take codes without
    #: it.
    zero_point: int = 0
    #: Weights that have a minimum beside their scale: 32, or 16; 0 where there are no minima.
    minimum_each: int = 0
    #: Bytes of the blocks of 256 weights.
    bytes_256: int = 0
    #: ``write_block(x, block)``: thirty-two float32 at `x` as a block, of types that a cache may have.
    write_block: Callable | None = None
    #: A number of a float type at an address: ``load_one(address)``, eight of them, and ``store_one(address, value)``.
    load_one: Callable | None = None
    load_eight: Callable | None = None
    store_one: Callable | None = None

    @property
    def number_bytes(self):
        """Bytes of a number of a float type."""
        return self.bytes_256 // 256

    @property
    def takes_tiles(self):
        """Whether panels of this type are multiplied by tiles of AMX."""
        return AMX and self.code_bits > 0 and self.scale_each == 32
