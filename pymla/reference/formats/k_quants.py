"""K-quants: super-blocks of 256 weights with a scale, and smaller blocks with integer scales of their own.

A weight is ``d * scale * code``, or ``d * scale * code - dmin * minimum`` in the types with minima; products are
rounded to float32 from left to right.
"""

import numpy as np

from pymla.reference.formats.bits import planes
from pymla.reference.formats.format import Codes, coded, format_of_codes, load_half


def _q2_k(blocks: np.ndarray) -> Codes:
    scales, codes = blocks[:, :16], planes(blocks[:, 16:80].reshape(-1, 2, 32), 2)
    d = load_half(blocks, 80) * (scales & 15).astype(np.float32)
    m = load_half(blocks, 82) * (scales >> 4).astype(np.float32)
    return coded(d, codes, -m)


def _q3_k(blocks: np.ndarray) -> Codes:
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    high = planes(blocks[:, :32], 1).reshape(-1, 256)
    low_scales, high_scales = planes(blocks[:, 96:104], 4), planes(blocks[:, 104:108], 2)
    scales = (low_scales.reshape(-1, 16) | high_scales.reshape(-1, 16) << 4).astype(np.float32) - 32
    return coded(load_half(blocks, 108) * scales, (low | high << 2).astype(np.int8) - 4)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits, uint8 (n, 8) each, of 12 bytes (n, 12).

    Bytes 0 to 3 have the first four scales, bytes 4 to 7 the first four minima, with the two high bits of the last four
    in their own high bits. Bytes 8 to 11 have the low nibbles of the last four: scales, and minima in the high half.
    """
    scales, minima, last = np.split(packed, 3, axis=-1)
    return (
        np.concatenate([scales & 63, last & 15 | scales >> 6 << 4], axis=-1),
        np.concatenate([minima & 63, last >> 4 | minima >> 6 << 4], axis=-1),
    )


def _with_minima(blocks: np.ndarray, codes: np.ndarray) -> Codes:
    """Q4_K and Q5_K: eight scales and minima, for 32 codes each."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    d = load_half(blocks, 0) * scales.astype(np.float32)
    m = load_half(blocks, 2) * minima.astype(np.float32)
    return coded(d, codes, -m)


def _q4_k(blocks: np.ndarray) -> Codes:
    return _with_minima(blocks, planes(blocks[:, 16:].reshape(-1, 4, 32), 4))


def _q5_k(blocks: np.ndarray) -> Codes:
    low = planes(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    high = planes(blocks[:, 16:48], 1).reshape(-1, 256)
    return _with_minima(blocks, low | high << 4)


def _q6_k(blocks: np.ndarray) -> Codes:
    # A half of 128 weights has 64 bytes of low nibbles and 32 bytes that hold four times the two high bits.
    low = planes(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = planes(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scales = load_half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return coded(scales, (low | high << 4).astype(np.int8) - 32)


Q2_K = format_of_codes(_q2_k)
Q3_K = format_of_codes(_q3_k)
Q4_K = format_of_codes(_q4_k)
Q5_K = format_of_codes(_q5_k)
Q6_K = format_of_codes(_q6_k)
