"""Where the weights of types with three codes, of which a byte has five, lie in their blocks: facts that the kernels of
all fast backends are made from.

A byte is a number of five ternary digits times 256 / 243, rounded up: multiplied by ``3 ** n`` modulo 256, the digit
with n digits in front of it is what three times the product carries over 256 (`pymla.reference.formats.ternary`).
"""

from typing import NamedTuple

from pymla import ggml
from pymla.planes import HALF, ROW_HALF, Codes, Layout


class Trits(NamedTuple):
    """A type whose codes are digits less 1."""

    #: Of each weight of a block: the byte that has its digit, and how many digits stand in front of it.
    digits: tuple[tuple[int, int], ...]
    layout: Layout  # its scales


def _in_planes(first: int, count: int, digits: int) -> tuple[tuple[int, int], ...]:
    """Of bytes the first digits, then their second ones, and so on."""
    return tuple((first + i, n) for n in range(digits) for i in range(count))


def _bitnet() -> tuple[tuple[int, int], ...]:
    """Sixteen weights are the digits of three bytes, from the last one on, and one digit of the block's last byte."""
    return tuple(
        digit
        for sixteen in range(4)
        for digit in (*((3 * sixteen + i, 4 - j) for i in range(3) for j in range(5)), (12, 4 - sixteen))
    )


TRITS: dict[int, Trits] = {
    ggml.TQ1_0: Trits(
        _in_planes(0, 32, 5) + _in_planes(32, 16, 5) + _in_planes(48, 4, 4), Layout(Codes(()), 32, HALF, scale_at=52)
    ),
    ggml.IQ1_BN: Trits(_bitnet(), Layout(Codes(()), 32, ROW_HALF)),
}
