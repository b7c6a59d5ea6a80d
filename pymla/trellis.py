"""Where the numbers of ik_llama.cpp's trellis types lie in their blocks: facts that the kernels of all fast backends
are made from.

Eight or four neighbouring weights have an index, which starts a random number generator: the index and `OFFSET` are
multiplied modulo ``2 ** 32`` by `FACTOR`, once more for each weight. A level is the sum of the four bytes of the
number, six bits of each, less `MIDDLE` (`pymla.reference.formats.ik_trellis`).
"""

from typing import NamedTuple

from pymla import ggml
from pymla.planes import IQ4_LEVELS, ROW_FLOAT, Codes, Layout, Places, Plane, Scales
from pymla.vectors import Field

FACTOR, OFFSET, MIDDLE = 0xCBAC1FED, 4096, 126
#: The bits of a number that its level is the sum of.
SIX_BITS = 0x3F3F3F3F


class Trellis(NamedTuple):
    """A type whose codes come from a generator, in blocks of 256 weights."""

    group: int  # weights of an index
    indices: tuple[Field | Plane, ...]
    layout: Layout  # its scales
    #: Signs of weights; levels then lose their own.
    signs: Plane | None = None
    #: A bit for each 32 weights, and what is added to their indices where it is set.
    moved: Field | None = None
    moved_by: int = 0


def _scaled(scales: Scales) -> Layout:
    """Scales of 32 weights that are multiples of the float at the beginning of the row."""
    return Layout(Codes(()), 32, ROW_FLOAT, scales=scales)


TRELLISES: dict[int, Trellis] = {
    # A byte for 32 weights: a scale, and the highest bits of four indices.
    ggml.IQ1_KT: Trellis(
        8,
        (Field(8, 8), Plane(40, 4, 16, 8), Field(0, 1, per=4, first=4, shift=12)),
        _scaled(Scales((Places(4, tuple((i, 0) for i in range(8))),), levels=IQ4_LEVELS)),
    ),
    ggml.IQ2_KT: Trellis(8, (Field(4, 16, stride=2),), _scaled(Scales((Plane(0, 4, 4),), levels=IQ4_LEVELS))),
    ggml.IQ3_KT: Trellis(8, (Field(4, 16, stride=2),), _scaled(Scales((Plane(0, 4, 4),))), signs=Plane(68, 1, 32)),
    # A word of 32 bits for 32 weights: whether their indices are moved, a scale, and the high bits of eight indices.
    ggml.IQ4_KT: Trellis(
        4,
        (Field(32, 8), Plane(96, 4, 32, 8), Field(0, 3, per=8, stride=4, first=8, shift=12)),
        _scaled(Scales((Places(7, tuple((4 * i, 1) for i in range(8))),), minus=64)),
        moved=Field(0, 1, stride=4),
        moved_by=32768,
    ),
}
