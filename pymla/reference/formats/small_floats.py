"""Types of floats of 4 bits, E2M1, with a scale that is a float of 8 bits.

Values are twice those of E2M1, so that they are integers; scales are halved.
"""

import numpy as np

from pymla.reference.formats.bits import planes
from pymla.reference.formats.format import Codes, coded, format_of_codes

#: Twice the numbers of E2M1: a sign, two bits of exponent, one of mantissa.
E2M1_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _half_e8m0(exponents: np.ndarray) -> np.ndarray:
    """Half of ``2 ** (e - 127)``. The two smallest are subnormal numbers; 255 is a power like the others, not NaN."""
    wide = exponents.astype(np.uint32)
    return np.where(wide < 2, np.uint32(0x200000) << wide, (wide - 1) << 23).astype(np.uint32).view(np.float32)


def _half_e4m3(codes: np.ndarray) -> np.ndarray:
    """Half of the unsigned E4M3 numbers with bias 7: the top bit of a byte counts for nothing, and 127 is 0."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    number = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7))
    return np.where(codes == 127, np.float32(0), number * np.float32(0.5)).astype(np.float32)


def _mxfp4(blocks: np.ndarray) -> Codes:
    return coded(_half_e8m0(blocks[:, :1]), E2M1_VALUES[planes(blocks[:, 1:], 4)])


def _nvfp4(blocks: np.ndarray) -> Codes:
    return coded(_half_e4m3(blocks[:, :4]), E2M1_VALUES[planes(blocks[:, 4:].reshape(-1, 4, 8), 4)])


MXFP4 = format_of_codes(_mxfp4)
NVFP4 = format_of_codes(_nvfp4)
