"""What the NumPy functions of operations (`pymla.cpu.machine.intrinsics.Operation`) have in common: memory at an
address, and arithmetic that rounds as the processor does. A register is an array of one dimension, an address an
integer.
"""

import ctypes
from collections.abc import Callable

import numpy as np


def view(address: int, dtype: type, count: int) -> np.ndarray:
    """The memory at an address as an array of `count` elements, whatever its alignment."""
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def read_lanes(address: int, dtype: type, count: int) -> np.ndarray:
    """A copy of `count` elements from an address on."""
    return view(address, dtype, count).copy()


def read_number(address: int, dtype: type) -> np.generic:
    """The number at an address."""
    return view(address, dtype, 1)[0]


def read_strided(address: int, dtype: type, count: int, stride: int) -> np.ndarray:
    """`count` numbers, `stride` bytes from one to the next."""
    return np.array([read_number(address + stride * i, dtype) for i in range(count)], dtype)


def write_lanes(address: int, values: np.ndarray | np.generic) -> None:
    """Write an array or a number to an address."""
    values = np.asarray(values).reshape(-1)
    view(address, values.dtype, len(values))[:] = values


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` of float32, rounded once.

    In float64 the product is exact, and the sum is rounded to odd, so that rounding it again gives the right float32
    (Boldo and Melquiond, Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd, 2008).
    """
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y, z.astype(np.float64)
        total = product + addend
        # What was rounded off, exactly (Knuth's two-sum).
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        even = total.view(np.int64) & 1 == 0
        towards = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        odd = np.where(even & (error != 0) & np.isfinite(error), towards, total)
        return odd.astype(np.float32)


def combined(x: np.ndarray, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.generic:
    """All lanes combined to one: the upper half with the lower half, again and again."""
    while len(x) > 1:
        x = combine(x[: len(x) // 2], x[len(x) // 2 :])
    return x[0]


def add_dots(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``acc`` plus products of neighbouring elements of `a` and `b`, as many of them for each lane as it takes."""
    products = (a.astype(np.int64) * b).reshape(len(acc), -1)
    return (acc + products.sum(axis=1)).astype(acc.dtype)


def bfloat16_as_float32(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def truncated(x: np.ndarray, dtype: type) -> np.ndarray:
    """float32 as integers, rounded towards zero; of numbers that do not fit, the low bits of an int32."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.int32).astype(dtype)
