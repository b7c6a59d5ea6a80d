"""Addresses of four rows, as tiles take them."""

from typing import NamedTuple

from pymla.cpu.machine.simd import address
from pymla.cpu.runtime.compiling import helper, inlined


class Rows(NamedTuple):
    """Four rows of codes, which a tile broadcasts word by word."""

    codes: tuple[int, int, int, int]  # addresses
    scales: tuple[int, int, int, int]  # addresses of their float32 scales


@helper
def four_from(i, count):
    """The numbers of four of `count` rows from number `i` on; rows past the end repeat the last row."""
    last = count - 1
    return min(i, last), min(i + 1, last), min(i + 2, last), min(i + 3, last)


@helper
def rows_of(array, numbers):
    """Addresses of four rows of an array, given by their numbers."""
    a, b, c, d = numbers
    return address(array[a]), address(array[b]), address(array[c]), address(array[d])


@helper
def rows_apart(base, stride, numbers):
    """Addresses of four rows that begin at the address `base` and lie `stride` bytes apart, given by their numbers."""
    a, b, c, d = numbers
    return base + a * stride, base + b * stride, base + c * stride, base + d * stride


@inlined
def moved(addresses, nbytes):
    """Four addresses, each moved by `nbytes`."""
    a, b, c, d = addresses
    return a + nbytes, b + nbytes, c + nbytes, d + nbytes
