"""K-quants: super-blocks of 256 weights with a scale, and smaller blocks with integer scales of their own.

A weight is ``d * scale * code``, or ``d * scale * code - dmin * minimum`` in the types with minima; products are
rounded to float32 from left to right.
"""

import numpy as np

from pymla.reference.formats.bits import blockwise, planes
from pymla.reference.formats.format import Format, load_half


def _dequantise_q2_k(blocks: np.ndarray) -> np.ndarray:
    scales, codes = blocks[:, :16], planes(blocks[:, 16:80].reshape(-1, 2, 32), 2)
    d = load_half(blocks, 80) * (scales & 15).astype(np.float32)
    m = load_half(blocks, 82) * (scales >> 4).astype(np.float32)
    return blockwise(d, codes) - np.repeat(m, 16, axis=-1)


def _dequantise_q3_k(blocks: np.ndarray) -> np.ndarray:
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    high = planes(blocks[:, :32], 1).reshape(-1, 256)
    low_scales, high_scales = planes(blocks[:, 96:104], 4), planes(blocks[:, 104:108], 2)
    scales = (low_scales.reshape(-1, 16) | high_scales.reshape(-1, 16) << 4).astype(np.float32) - 32
    return blockwise(load_half(blocks, 108) * scales, (low | high << 2).astype(np.float32) - 4)


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


def _dequantise_affine(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K: eight scales and minima, for 32 codes each."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    d = load_half(blocks, 0) * scales.astype(np.float32)
    m = load_half(blocks, 2) * minima.astype(np.float32)
    return blockwise(d, codes) - np.repeat(m, 32, axis=-1)


def _dequantise_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _dequantise_affine(blocks, planes(blocks[:, 16:].reshape(-1, 4, 32), 4))


def _dequantise_q5_k(blocks: np.ndarray) -> np.ndarray:
    low = planes(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    high = planes(blocks[:, 16:48], 1).reshape(-1, 256)
    return _dequantise_affine(blocks, low | high << 4)


def _dequantise_q6_k(blocks: np.ndarray) -> np.ndarray:
    low, high, scales = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208]
    low, high = low.reshape(-1, 2, 1, 2, 32), high.reshape(-1, 2, 1, 32)
    # A half of 128 weights has 64 bytes of low nibbles and 32 bytes that hold four times the two high bits.
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    codes = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scale = load_half(blocks, 208) * scales.view(np.int8).astype(np.float32)
    return (scale[..., None] * codes).reshape(len(blocks), 256)


Q2_K = Format(_dequantise_q2_k)
Q3_K = Format(_dequantise_q3_k)
Q4_K = Format(_dequantise_q4_k)
Q5_K = Format(_dequantise_q5_k)
Q6_K = Format(_dequantise_q6_k)
