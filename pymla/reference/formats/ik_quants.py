"""Types of ik_llama.cpp: nonlinear levels in two variants, of which a bit for every small block chooses one.

The second variant of a table is the first one moved up a little. In the types whose name ends in S or L, and in Q8_KV,
a row begins with its scale, a float or a half, which here stands before every block. Layouts and tables follow
``ggml-common.h`` and ``iqk_quantize.cpp`` of ik_llama.cpp, commit 8337e4cd.
"""

import math

import numpy as np

from pymla.reference.formats.bits import fields, load, pack_planes, planes
from pymla.reference.formats.format import Codes, coded, format_of_codes, half_bytes, load_half
from pymla.reference.formats.iq_quants import IQ4_VALUES
from pymla.reference.formats.legacy import symmetric_codes

_IQ2_VALUES = np.array([-31, -13, 1, 17], np.int8)
_IQ3_VALUES = np.array([-63, -40, -23, -10, 1, 13, 28, 47], np.int8)
_IQ5_VALUES = np.array(
    [
        *(-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6),
        *(-1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121),
    ],
    np.int8,
)
_IQ6_VALUES = np.array(
    [
        *(-127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54),
        *(-51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5),
        *(-2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44),
        *(47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121),
    ],
    np.int8,
)

#: Levels of a type by the bits of a code, in both variants: int8 (2, codes). The second one is moved up.
LEVELS = {
    bits: np.stack([values, values + np.int8(moved)])
    for bits, values, moved in (
        (2, _IQ2_VALUES, 5),
        (3, _IQ3_VALUES, 4),
        (4, IQ4_VALUES, 4),
        (5, _IQ5_VALUES, 2),
        (6, _IQ6_VALUES, 1),
    )
}

#: Pairs of neighbouring weights of IQ2_KL by code, as indices of the first variant's levels of 3 bits.
_PAIR_INDICES = (
    "02 05 10 13 15 17 21 22 24 25 26 30 34 35 37 42 43 44 45 46 51 52 53 54 55 60 62 64 66 67 72 75"
)  # fmt: skip
PAIRS = np.array([[_IQ3_VALUES[int(digit)] for digit in pair] for pair in _PAIR_INDICES.split()], np.int8)


def _levels(bits: int, codes: np.ndarray, variants: np.ndarray) -> np.ndarray:
    """Levels of codes (n, ...) in the order of the weights, by the variant of each small block, (n, small blocks)."""
    each = math.prod(codes.shape[1:]) // variants.shape[1]
    return LEVELS[bits][variants[..., None], codes.reshape(*variants.shape, each)]


def _six_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Scales of 6 bits, of nibbles and the two bits above them, less 32."""
    return (low | high << 4).astype(np.float32) - 32


def _eight_bits(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales with the variant in their lowest bit: odd numbers from -127 to 127, and the variants."""
    return (scales & 254).astype(np.float32) - 127, scales & 1


def load_float(blocks: np.ndarray) -> np.ndarray:
    """The float at the beginning of every block, (n, 1)."""
    return load(blocks, 0, 1, np.float32)


def _q6_0(blocks: np.ndarray) -> Codes:
    # The four fields of a high byte belong to weights i, i + 16, i + 8 and i + 24.
    high = planes(blocks[:, 2:10], 2).reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(-1, 32)
    codes = planes(blocks[:, 10:], 4).reshape(-1, 32) | high << 4
    return coded(load_half(blocks, 0), codes.astype(np.int8) - 32)


def _quantise_q6_0(weights: np.ndarray) -> np.ndarray:
    d, codes = symmetric_codes(weights, 6)
    high = (codes >> 4).reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(-1, 4, 8)
    low = (codes & 15).reshape(-1, 2, 16)
    return np.concatenate([half_bytes(d), pack_planes(high, 2), pack_planes(low, 4)], axis=-1)


def _iq2_k(blocks: np.ndarray) -> Codes:
    variants, codes = fields(blocks[:, 2:4], 1), planes(blocks[:, 12:].reshape(-1, 2, 32), 2)
    scales = load_half(blocks, 0) * (fields(blocks[:, 4:12], 4).astype(np.float32) - 8)
    return coded(scales, _levels(2, codes, variants))


def _iq3_k(blocks: np.ndarray) -> Codes:
    variants, negative = fields(blocks[:, 2:4], 1), fields(blocks[:, 4:6], 1)
    low = planes(blocks[:, 14:78].reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes = low | planes(blocks[:, 78:], 1).reshape(-1, 256) << 2
    odd = (2 * fields(blocks[:, 6:14], 4) + 1).astype(np.float32)
    return coded(load_half(blocks, 0) * np.where(negative, -odd, odd), _levels(3, codes, variants))


def _iq4_k(blocks: np.ndarray) -> Codes:
    variants, codes = fields(blocks[:, 2:4], 1), planes(blocks[:, 16:].reshape(-1, 8, 16), 4)
    scales = load_half(blocks, 0) * _six_bits(fields(blocks[:, 8:16], 4), fields(blocks[:, 4:8], 2))
    return coded(scales, _levels(4, codes, variants))


def _five_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Codes of 5 bits, (n, 256): nibbles of 128 bytes, and bits of 32."""
    return planes(low.reshape(-1, 4, 32), 4).reshape(-1, 256) | planes(high, 1).reshape(-1, 256) << 4


def _iq5_k(blocks: np.ndarray) -> Codes:
    variants, codes = fields(blocks[:, 2:4], 1), _five_bits(blocks[:, 16:144], blocks[:, 144:])
    scales = load_half(blocks, 0) * _six_bits(fields(blocks[:, 8:16], 4), fields(blocks[:, 4:8], 2))
    return coded(scales, _levels(5, codes, variants))


def _iq6_k(blocks: np.ndarray) -> Codes:
    """Levels are those of the table that ik_llama.cpp quantises, multiplies and, on the GPU, dequantises with. Its
    `dequantize_row_iq6_k` approximates them by a polynomial, which is up to half a level off."""
    variants, low = fields(blocks[:, 2:4], 1), planes(blocks[:, 20:148].reshape(-1, 4, 32), 4)
    high = planes(blocks[:, 148:].reshape(-1, 2, 32), 2)
    codes = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    scales = load_half(blocks, 0) * blocks[:, 4:20].view(np.int8).astype(np.float32)
    return coded(scales, _levels(6, codes, variants))


def _iq4_ks(blocks: np.ndarray) -> Codes:
    scales, variants = _eight_bits(blocks[:, 4:12])
    codes = planes(blocks[:, 12:].reshape(-1, 8, 16), 4)
    return coded(load_float(blocks) * scales, _levels(4, codes, variants))


def _iq5_ks(blocks: np.ndarray) -> Codes:
    scales, variants = _eight_bits(blocks[:, 4:12])
    codes = _five_bits(blocks[:, 12:140], blocks[:, 140:])
    return coded(load_float(blocks) * scales, _levels(5, codes, variants))


def _iq4_kss(blocks: np.ndarray) -> Codes:
    """The lowest bits of eight words of 16 are a scale; each word without its own, xor half of it, has four codes."""
    words = load(blocks, 4, 64, np.uint16).reshape(-1, 8, 8)
    scales, variants = _eight_bits(np.packbits((words & 1).astype(bool), axis=-1, bitorder="little")[..., 0])
    even = words & np.uint16(0xFFFE)
    codes = planes((even ^ even >> 1).view(np.uint8), 4)
    return coded(load_float(blocks) * scales, _levels(4, codes, variants))


def _iq2_ks(blocks: np.ndarray) -> Codes:
    variants, high = fields(blocks[:, 2:3], 1), fields(blocks[:, 3:4], 1)
    codes = planes(blocks[:, 8:].reshape(-1, 2, 32), 2)
    scales = (fields(blocks[:, 4:8], 4) | high << 4).astype(np.float32) - 16
    return coded(load_half(blocks, 0) * scales, _levels(2, codes, variants))


def _iq3_ks(blocks: np.ndarray) -> Codes:
    high, variants = fields(blocks[:, 2:3], 1), fields(blocks[:, 3:4], 1)
    low = planes(blocks[:, 8:72].reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes = low | planes(blocks[:, 72:], 1).reshape(-1, 256) << 2
    scales = (planes(blocks[:, 4:8], 4).reshape(-1, 8) | high << 4).astype(np.float32) - 16
    return coded(load_half(blocks, 0) * scales, _levels(3, codes, variants))


def _iq2_kl(blocks: np.ndarray) -> Codes:
    low = planes(blocks[:, 8:72].reshape(-1, 4, 16), 4).reshape(-1, 128)
    codes = low | planes(blocks[:, 72:], 1).reshape(-1, 128) << 4
    scales = _six_bits(planes(blocks[:, 4:8], 4).reshape(-1, 8), fields(blocks[:, 2:4], 2))
    return coded(load_half(blocks, 0) * scales, PAIRS[codes])


def _q8_kv(blocks: np.ndarray) -> Codes:
    """The header's second number, the sum of the row's codes, an int32, is there for products."""
    return coded(load_float(blocks), blocks[:, 8:].view(np.int8))


Q6_0 = format_of_codes(_q6_0, _quantise_q6_0)
IQ2_K = format_of_codes(_iq2_k)
IQ3_K = format_of_codes(_iq3_k)
IQ4_K = format_of_codes(_iq4_k)
IQ5_K = format_of_codes(_iq5_k)
IQ6_K = format_of_codes(_iq6_k)
IQ2_KS = format_of_codes(_iq2_ks)
IQ3_KS = format_of_codes(_iq3_ks)
IQ4_KS = format_of_codes(_iq4_ks)
IQ5_KS = format_of_codes(_iq5_ks)
IQ4_KSS = format_of_codes(_iq4_kss)
IQ2_KL = format_of_codes(_iq2_kl)
Q8_KV = format_of_codes(_q8_kv)
