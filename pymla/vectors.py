"""Where the numbers lie in the blocks of types whose codes come in vectors: facts that the kernels of all fast backends
are made from.

Eight or four neighbouring weights share an index of a codebook (`pymla.codebooks`), whose entry has their codes, or the
magnitudes of their codes: then eight bits are the signs of eight weights, or seven bits, and the last sign makes the
number of negative ones even. `pymla.reference.formats` reads the same types in other words.
"""

from typing import NamedTuple

from pymla import ggml
from pymla.codebooks import codebook
from pymla.planes import Codes, Layout, Places, Plane, Scales


class Field(NamedTuple):
    """Some bits of every number of a block, in words that lie in equal distances: a `planes.Plane` whose numbers may
    reach into a second byte."""

    at: int  # the byte of the block at which the first word begins
    bits: int  # of each number
    per: int = 1  # numbers of a word
    stride: int = 1  # bytes from a word to the next one
    first: int = 0  # the bit of a word at which its first number begins
    shift: int = 0  # place of these bits in the number
    step: int | None = None  # bits from a number of a word to the next one; None: they follow each other

    def place(self, number: int) -> tuple[int, int]:
        """Where a number has its bits: a byte of the block, and the lowest bit in it."""
        word, i = divmod(number, self.per)
        bit = self.first + (self.bits if self.step is None else self.step) * i
        return self.at + self.stride * word + bit // 8, bit % 8


class Vectors(NamedTuple):
    """A type whose codes come in vectors, in blocks of 256 weights."""

    name: str  # of the codebook
    indices: tuple[Field | Plane, ...]  # of each vector
    layout: Layout  # its scales
    signs: Field | None = None  # of eight weights, 8 bits or 7; None: the codebook has codes with their signs
    #: A bit of each vector, of codes that are eight times those of the codebook and one more, or one less where it is
    #: set.
    down: Field | None = None

    @property
    def highest(self) -> int:
        """The largest code. The smallest one is its negative."""
        largest = int(abs(codebook(self.name)).max())
        return 8 * largest + 1 if self.down else largest


def _scaled(each: int, scales: Scales) -> Layout:
    """Scales that are multiples of the half at the beginning of the block."""
    return Layout(Codes(()), each, scales=scales)


def _odd_eighths(planes: tuple[Plane | Places, ...]) -> Scales:
    """Scales ``(2 * number + 1) / 8``."""
    return Scales(planes, times=0.25, plus=0.125)


_IQ1_M_INDICES = Field(0, 8), Field(32, 3, per=2, step=4, shift=8)
_IQ1_M_DOWN = Field(32, 1, per=2, first=3, step=4)
#: Four words of 16 bits with four scales each, ``(2 * number + 1) / 8``, of 16 weights; the fields behind them are the
#: bits of the half that they multiply, the lowest ones first.
IQ1_M_SCALES = Field(48, 3, per=4, stride=2)
IQ1_M_HALF = Field(48, 4, stride=2, first=12)

VECTORS: dict[int, Vectors] = {
    # A word of 64 bits for 32 weights: four indices, four times seven signs, and a scale.
    ggml.IQ2_XXS: Vectors(
        "IQ2_XXS",
        (Field(2, 8, per=4, stride=8),),
        _scaled(32, _odd_eighths((Places(4, tuple((2 + 8 * i + 7, 4) for i in range(8))),))),
        Field(6, 7, per=4, stride=8),
    ),
    ggml.IQ2_XS: Vectors(
        "IQ2_XS",
        (Field(2, 9, stride=2),),
        _scaled(16, _odd_eighths((Plane(66, 4, 1),))),
        Field(2, 7, stride=2, first=9),
    ),
    ggml.IQ2_S: Vectors(
        "IQ2_S",
        (Field(2, 8), Field(66, 2, per=4, shift=8)),
        _scaled(16, _odd_eighths((Plane(74, 4, 1),))),
        Field(34, 8),
    ),
    ggml.IQ3_XXS: Vectors(
        "IQ3_XXS",
        (Field(2, 8),),
        _scaled(32, Scales((Places(4, tuple((66 + 4 * i + 3, 4) for i in range(8))),), times=0.5, plus=0.25)),
        Field(66, 7, per=4, stride=4),
    ),
    ggml.IQ3_S: Vectors(
        "IQ3_S",
        (Field(2, 8), Field(66, 1, per=8, shift=8)),
        _scaled(32, Scales((Plane(106, 4, 1),), times=2, plus=1)),
        Field(74, 8),
    ),
    # A word of 16 bits for 32 weights: the high bits of four indices, a scale, and whether codes are moved down.
    ggml.IQ1_S: Vectors(
        "IQ1_S",
        (Field(2, 8), Field(34, 3, per=4, stride=2, shift=8)),
        _scaled(32, _odd_eighths((Places(3, tuple((35 + 2 * i, 4) for i in range(8))),))),
        down=Field(34, 1, per=4, stride=2, first=15, step=0),
    ),
    # A nibble for eight weights: the high bits of an index, and whether codes are moved down. Scales are no planes.
    ggml.IQ1_M: Vectors("IQ1_S", _IQ1_M_INDICES, Layout(Codes(()), 16), down=_IQ1_M_DOWN),
    ggml.IQ1_M_R1: Vectors(
        "IQ1_S",
        _IQ1_M_INDICES,
        Layout(Codes(()), 16, scale_at=56, scales=Scales((Plane(48, 4, 1),), times=0.125)),
        down=_IQ1_M_DOWN,
    ),
}
