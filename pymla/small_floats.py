"""The numbers with eight bits and fewer, which checkpoints and types of tensors are made of."""

import numpy as np

#: Columns that share a scale in MXFP4, and in NVFP4.
MX_GROUP, NV_GROUP = 32, 16

#: What is taken off the four bits of an integer from -8 to 7.
INT4_ZERO = 8

#: E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, section 5.3.3).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(code & 127) == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)


def _e8m0() -> np.ndarray:
    powers = np.ldexp(np.ones(256), np.arange(256) - 127)
    powers[255] = np.nan
    return powers.astype(np.float32)


#: E4M3 without infinities: a sign, four bits of exponent with bias 7, three of mantissa (arXiv:2209.05433, table 1).
#: The codes 127 and 255 are NaN.
E4M3 = _e4m3()

#: E8M0: powers of two from 2⁻¹²⁷ on (OCP Microscaling Formats, section 5.4.1); the code 255 is NaN.
E8M0 = _e8m0()
