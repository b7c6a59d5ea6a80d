"""Types of ggml's first generation: blocks of 32 weights with a scale, and a minimum in those whose name ends in 1.

Byte i of the codes of 4 bits has the code of weight i in its low half and that of weight i + 16 in its high half.
"""

import numpy as np

from pymla.reference.formats.format import Codes, coded, format_of_codes, half_bytes, inverse, load_half


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, (n, 32), of their bytes, (n, 16)."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def symmetric_codes(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (n, 1) and codes (n, 32) of types without a minimum: the weight of largest magnitude keeps its sign and
    becomes code 0, which is the zero point below 0."""
    zero_point, largest_code = 1 << bits - 1, (1 << bits) - 1
    extreme = np.take_along_axis(weights, np.abs(weights).argmax(-1)[:, None], axis=-1)
    d = extreme / np.float32(-zero_point)
    codes = np.trunc(weights * inverse(d) + np.float32(zero_point + 0.5)).astype(np.uint8)
    return d, codes.clip(0, largest_code)


def _affine_codes(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales (n, 1), minima (n, 1) and codes (n, 32) of types with a minimum."""
    largest_code = (1 << bits) - 1
    m = weights.min(-1, keepdims=True)
    d = (weights.max(-1, keepdims=True) - m) / np.float32(largest_code)
    codes = np.trunc((weights - m) * inverse(d) + np.float32(0.5)).astype(np.uint8)
    return d, m, codes.clip(0, largest_code)


def _q4_0(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), _nibbles(blocks[:, 2:]).astype(np.int8) - 8)


def _quantise_q4_0(weights: np.ndarray) -> np.ndarray:
    d, codes = symmetric_codes(weights, 4)
    return np.concatenate([half_bytes(d), _pack_nibbles(codes)], axis=-1)


def _q4_1(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), _nibbles(blocks[:, 4:]), load_half(blocks, 2))


def _quantise_q4_1(weights: np.ndarray) -> np.ndarray:
    d, m, codes = _affine_codes(weights, 4)
    return np.concatenate([half_bytes(d), half_bytes(m), _pack_nibbles(codes)], axis=-1)


def _codes_5(qh_and_qs: np.ndarray) -> np.ndarray:
    """Codes of 5 bits, (n, 32), of a word ``qh``, whose bit i is the fifth bit of code i, and the nibbles ``qs``
    behind it, (n, 20)."""
    fifth = np.unpackbits(qh_and_qs[:, :4], axis=-1, bitorder="little")
    return _nibbles(qh_and_qs[:, 4:]) | fifth << 4


def _pack_5(codes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder="little"), _pack_nibbles(codes & 15)], axis=-1)


def _q5_0(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), _codes_5(blocks[:, 2:]).astype(np.int8) - 16)


def _quantise_q5_0(weights: np.ndarray) -> np.ndarray:
    d, codes = symmetric_codes(weights, 5)
    return np.concatenate([half_bytes(d), _pack_5(codes)], axis=-1)


def _q5_1(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), _codes_5(blocks[:, 4:]), load_half(blocks, 2))


def _quantise_q5_1(weights: np.ndarray) -> np.ndarray:
    d, m, codes = _affine_codes(weights, 5)
    return np.concatenate([half_bytes(d), half_bytes(m), _pack_5(codes)], axis=-1)


def _q8_0(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), blocks[:, 2:].view(np.int8))


def _quantise_q8_0(weights: np.ndarray) -> np.ndarray:
    d = np.abs(weights).max(-1, keepdims=True) / np.float32(127)
    scaled = weights * inverse(d)
    # ggml rounds halves away from zero (roundf), NumPy to even.
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    return np.concatenate([half_bytes(d), codes.astype(np.int8).view(np.uint8)], axis=-1)


Q4_0 = format_of_codes(_q4_0, _quantise_q4_0)
Q4_1 = format_of_codes(_q4_1, _quantise_q4_1)
Q5_0 = format_of_codes(_q5_0, _quantise_q5_0)
Q5_1 = format_of_codes(_q5_1, _quantise_q5_1)
Q8_0 = format_of_codes(_q8_0, _quantise_q8_0)
