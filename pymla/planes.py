"""Where the numbers of quantised types lie in their blocks: facts that the kernels of all fast backends are made from.

Most types are bit planes. A *plane* holds some bits of every code of a block, in fields of 1, 2, 4 or 8 bits; codes of
5 bits, for instance, are a plane of nibbles and a plane of single bits. The integer scales of small blocks are laid out
in the same way. A `Layout` names the planes of a type, what is taken off its codes or which levels they stand for, and
where its scales are. `pymla.reference.formats` reads the same types in other words, and the tests compare the two.

Layouts follow ``ggml-common.h`` of llama.cpp and of ik_llama.cpp (commit 8337e4cd); docs/types.md has them as a table.
"""

from typing import NamedTuple

from pymla import ggml


class Plane(NamedTuple):
    """Some bits of every number of a block: byte i of a run of bytes has those of the numbers i, i + run, i + 2 run, …,
    from its lowest bits on; the next run has those of the numbers behind them."""

    at: int  # byte of the block at which the plane begins
    bits: int  # of each number: 1, 2, 4 or 8
    run: int  # bytes of a run
    shift: int = 0  # place of these bits in the number
    order: tuple[int, ...] = ()  # the field of a byte that number ``i // run`` has, where it is not the next one

    @property
    def fields(self) -> int:
        """Numbers of which a byte has bits."""
        return 8 // self.bits

    def place(self, number: int) -> tuple[int, int]:
        """Where a number has its bits: a byte of the block, and the lowest bit in it."""
        field = number // self.run % self.fields
        field = self.order[field] if self.order else field
        return self.at + number // (self.run * self.fields) * self.run + number % self.run, self.bits * field


class Places(NamedTuple):
    """A plane without a rule."""

    bits: int
    places: tuple[tuple[int, int], ...]  # of each number: a byte of the block, and the lowest bit in it
    shift: int = 0

    def place(self, number: int) -> tuple[int, int]:
        """`Plane.place`."""
        return self.places[number]


class Codes(NamedTuple):
    """Codes of a block, integers of which weights are multiples."""

    planes: tuple[Plane, ...]
    minus: int = 0  # what is taken off the number that the planes hold
    signed: bool = False  # int8, of a plane of 8 bits
    levels: tuple[int, ...] = ()  # or the code that each such number stands for
    #: A bit for each small block: whether its levels are `moved` up.
    variants: Plane | Places | None = None
    moved: int = 0

    @property
    def lowest(self) -> int:
        """The smallest code."""
        if self.signed:
            return -128
        return min(self.levels) if self.levels else -self.minus

    @property
    def highest(self) -> int:
        """The largest code."""
        if self.signed:
            return 127
        if self.levels:
            return max(self.levels) + self.moved
        return sum(((1 << plane.bits) - 1) << plane.shift for plane in self.planes) - self.minus


class Scales(NamedTuple):
    """Integer scales of small blocks, or integer minima."""

    planes: tuple[Plane | Places, ...]
    minus: int = 0
    signed: bool = False  # int8, of a plane of 8 bits
    #: A scale is ``times * number + plus`` of the number that the planes hold less `minus`, …
    times: float = 1
    plus: float = 0
    levels: tuple[int, ...] = ()  # … or the level that it stands for, …
    negative: Plane | None = None  # … or that with the sign that another plane has.


#: Where the float number is that scales of a block are multiples of: a half, or a float of 8 bits, in every block; a
#: float or a half in the header of the row.
HALF, E8M0, E4M3, ROW_FLOAT, ROW_HALF = "half", "e8m0", "e4m3", "row float", "row half"


class Layout(NamedTuple):
    """A type whose blocks are planes."""

    codes: Codes
    each: int  # weights of a small block, which has a scale: 16 or 32
    scale: str = HALF
    scale_at: int = 0  # the byte of the block at which the float number begins
    scales: Scales | None = None  # None: the float number is the scale of all small blocks
    minima: Scales | None = None  # integer minima, taken off
    minimum_at: int = 0  # the byte at which the half is that minima are multiples of


IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ2_LEVELS = (-31, -13, 1, 17)
IQ3_LEVELS = (-63, -40, -23, -10, 1, 13, 28, 47)
_IQ5_LEVELS = (
    *(-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6),
    *(-1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121),
)
_IQ6_LEVELS = (
    *(-127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54),
    *(-51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5),
    *(-2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44),
    *(47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121),
)
#: Twice the numbers of E2M1: a sign, two bits of exponent, one of mantissa.
_E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

# Twelve bytes that begin at byte 4 have eight scales and eight minima of 6 bits: bytes 0 to 3 the first four scales,
# bytes 4 to 7 the first four minima, with the two high bits of the last four in their own high bits; bytes 8 to 11 the
# low nibbles of the last four, scales in the lower half.
_FIRST, _LAST = range(4, 8), range(12, 16)
K_SCALES = Scales(
    (
        Places(4, (*((byte, 0) for byte in _FIRST), *((byte, 0) for byte in _LAST))),
        Places(2, (*((byte, 4) for byte in _FIRST), *((byte, 6) for byte in _FIRST)), 4),
    )
)
K_MINIMA = Scales(
    (
        Places(4, (*((byte + 4, 0) for byte in _FIRST), *((byte, 4) for byte in _LAST))),
        Places(2, (*((byte + 4, 4) for byte in _FIRST), *((byte + 4, 6) for byte in _FIRST)), 4),
    )
)
_SIX_BITS_IN_ORDER = Scales((Plane(8, 4, 1), Plane(4, 2, 1, 4)), minus=32)
_BYTES = tuple((byte, 0) for byte in range(8))
#: Bytes of which the lowest bit is a variant; the others are a scale, odd numbers from -127 to 127.
_ODD_BYTES = Scales((Places(7, tuple((byte, 1) for byte, _ in _BYTES), 1),), minus=127)
_VARIANTS_IN_BYTES = Places(1, _BYTES)


def _k(bits: int, *planes: Plane) -> Codes:
    """Codes of a type whose name ends in K, with a variant for 16 weights."""
    return Codes(planes, levels=_IK_LEVELS[bits], variants=Plane(2, 1, 1), moved=_MOVED[bits])


def _ks(bits: int, variants: Plane | Places, *planes: Plane) -> Codes:
    """Codes of a type whose name ends in KS, with a variant for 32 weights."""
    return Codes(planes, levels=_IK_LEVELS[bits], variants=variants, moved=_MOVED[bits])


_IK_LEVELS = {2: _IQ2_LEVELS, 3: IQ3_LEVELS, 4: IQ4_LEVELS, 5: _IQ5_LEVELS, 6: _IQ6_LEVELS}
_MOVED = {2: 5, 3: 4, 4: 4, 5: 2, 6: 1}

_LLAMA_CPP: dict[int, Layout] = {
    ggml.Q2_K: Layout(
        Codes((Plane(16, 2, 32),)),
        16,
        scale_at=80,
        scales=Scales((Plane(0, 4, 16),)),
        minima=Scales((Plane(0, 4, 16, order=(1, 0)),)),
        minimum_at=82,
    ),
    ggml.Q3_K: Layout(
        Codes((Plane(32, 2, 32), Plane(0, 1, 32, 2)), minus=4),
        16,
        scale_at=108,
        scales=Scales((Plane(96, 4, 8), Plane(104, 2, 4, 4)), minus=32),
    ),
    ggml.Q4_K: Layout(Codes((Plane(16, 4, 32),)), 32, scales=K_SCALES, minima=K_MINIMA, minimum_at=2),
    ggml.Q5_K: Layout(
        Codes((Plane(48, 4, 32), Plane(16, 1, 32, 4))), 32, scales=K_SCALES, minima=K_MINIMA, minimum_at=2
    ),
    ggml.IQ4_NL: Layout(Codes((Plane(2, 4, 16),), levels=IQ4_LEVELS), 32),
    ggml.IQ4_XS: Layout(
        Codes((Plane(8, 4, 16),), levels=IQ4_LEVELS),
        32,
        scales=Scales((Plane(4, 4, 1), Plane(2, 2, 1, 4)), minus=32),
    ),
    ggml.MXFP4: Layout(Codes((Plane(1, 4, 16),), levels=_E2M1_LEVELS), 32, scale=E8M0),
    ggml.NVFP4: Layout(Codes((Plane(4, 4, 8),), levels=_E2M1_LEVELS), 16, scale=E4M3),
    ggml.TQ2_0: Layout(Codes((Plane(0, 2, 32),), minus=1), 32, scale_at=64),
    ggml.Q1_0: Layout(Codes((Plane(2, 1, 1, 1),), minus=1), 32),
    ggml.Q2_0: Layout(Codes((Plane(2, 2, 1),), minus=1), 32),
}

_IK_LLAMA_CPP: dict[int, Layout] = {
    ggml.Q6_0: Layout(Codes((Plane(10, 4, 16), Plane(2, 2, 8, 4, order=(0, 2, 1, 3))), minus=32), 32),
    ggml.IQ2_K: Layout(_k(2, Plane(12, 2, 32)), 16, scales=Scales((Plane(4, 4, 1),), minus=8)),
    ggml.IQ3_K: Layout(
        _k(3, Plane(14, 2, 32), Plane(78, 1, 32, 2)),
        16,
        scales=Scales((Plane(6, 4, 1),), times=2, plus=1, negative=Plane(4, 1, 1)),
    ),
    ggml.IQ4_K: Layout(_k(4, Plane(16, 4, 16)), 16, scales=_SIX_BITS_IN_ORDER),
    ggml.IQ5_K: Layout(_k(5, Plane(16, 4, 32), Plane(144, 1, 32, 4)), 16, scales=_SIX_BITS_IN_ORDER),
    ggml.IQ6_K: Layout(
        _k(6, Plane(20, 4, 32), Plane(148, 2, 32, 4)), 16, scales=Scales((Plane(4, 8, 16),), signed=True)
    ),
    ggml.IQ2_KS: Layout(
        _ks(2, Plane(0, 1, 1), Plane(6, 2, 32)),
        32,
        scale=ROW_HALF,
        scales=Scales((Plane(2, 4, 1), Plane(1, 1, 1, 4)), minus=16),
    ),
    ggml.IQ3_KS: Layout(
        _ks(3, Plane(1, 1, 1), Plane(6, 2, 32), Plane(70, 1, 32, 2)),
        32,
        scale=ROW_HALF,
        scales=Scales((Plane(2, 4, 4), Plane(0, 1, 1, 4)), minus=16),
    ),
    ggml.IQ4_KS: Layout(_ks(4, _VARIANTS_IN_BYTES, Plane(8, 4, 16)), 32, scale=ROW_FLOAT, scales=_ODD_BYTES),
    ggml.IQ5_KS: Layout(
        _ks(5, _VARIANTS_IN_BYTES, Plane(8, 4, 32), Plane(136, 1, 32, 4)), 32, scale=ROW_FLOAT, scales=_ODD_BYTES
    ),
    ggml.Q8_KV: Layout(Codes((Plane(0, 8, 32),), signed=True), 32, scale=ROW_FLOAT),
    ggml.IQ2_BN: Layout(Codes((Plane(0, 2, 16),), minus=1), 32, scale=ROW_FLOAT),
}

LAYOUTS: dict[int, Layout] = _LLAMA_CPP | _IK_LLAMA_CPP
