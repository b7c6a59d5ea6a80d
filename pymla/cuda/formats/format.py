"""The set of device functions that makes a type."""

from typing import NamedTuple


class Format(NamedTuple):
    """A quantised type: device functions, and the meaning of the two numbers of a block."""

    #: (row, block, w) -> (word, word, float32, number): a piece of block `block` of 32 weights of the row at an
    #: address, and two numbers, the first of which is the scale.
    piece: object
    #: (piece) -> the eight weights, float32.
    weights: object
    #: (address, i) -> (eight words, float32, number): block i of 32 weights of a run at an address of shared memory. In
    #: rows with a header, the scale is without the factor that `row_scale` gives.
    block: object
    #: (block, eight words, scale, total, sum) -> float32: ``sum`` and the block's product with words of activation
    #: codes, where activations are ``scale * code`` and all 32 of them add up to `total`.
    dot: object
    halves: bool = False  # the second number is the scale of the second half
    minimum: bool = False  # the second number is the minimum
    #: The second number is a word: integer minima of both halves in the low bytes, and above them a float16 that they
    #: are multiples of.
    minima: bool = False
    #: (row) -> float32: the scale in the header of the row at an address; None where rows have no header.
    row_scale: object = None
    #: Whether `block`, for four rows at once, would spill where a thread has 128 registers.
    many_registers: bool = False


class FloatFormat(NamedTuple):
    """A float type: device functions of an address."""

    one: object  # a weight, as float32
    four: object  # four weights; the address is a multiple of their bytes
    nbytes: int  # of a weight
