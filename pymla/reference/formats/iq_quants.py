"""IQ types: codes that are looked up in a table, one by one or eight or four at once.

A vector type holds indices of a codebook whose entries are the magnitudes of eight (IQ2) or four (IQ3) neighbouring
weights, and their signs. Eight signs are eight bits, or seven: the last sign then makes the number of negative ones
even. IQ1 holds indices of vectors of -1, 0 and 1, which are shifted by an eighth up or down. Codebooks come from the
gguf package.
"""

import functools

import numpy as np
from gguf import quants

from pymla.reference.formats.bits import fields, load, planes
from pymla.reference.formats.format import Codes, coded, format_of_codes, load_half

#: The levels of IQ4_NL and IQ4_XS.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)

EIGHTH = np.float32(0.125)

#: Bytes of eight signs by the seven of them that are stored.
EVEN_SIGNS = np.array([seven | (seven.bit_count() & 1) << 7 for seven in range(128)], np.uint8)


@functools.cache
def codebook(name: str) -> np.ndarray:
    """The vectors of a type, int8 (entries, 8 or 4)."""
    source = getattr(quants, name)
    source.init_grid()
    return source.grid.reshape(source.grid_shape).astype(np.int8)


def _signed(vectors: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Codes (n, weights) of magnitudes (n, k, 8 or 4) and of signs, eight in a byte: (n, weights / 8)."""
    magnitudes = vectors.reshape(len(vectors), vectors.shape[1] * vectors.shape[2])
    return np.where(fields(signs, 1) == 1, -magnitudes, magnitudes)


def _even_signs(words: np.ndarray) -> np.ndarray:
    """Signs of the vector types with a word of 32 bits for 32 weights, four times seven bits: bytes (n, 4 * words)."""
    seven = words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return EVEN_SIGNS[seven].reshape(len(words), 4 * words.shape[1])


def _half_steps(d: np.ndarray, scales: np.ndarray, unit: float) -> np.ndarray:
    """``d * (scale + 1/2) * unit``."""
    return d * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(unit)


def _iq2_xxs(blocks: np.ndarray) -> Codes:
    pairs = blocks[:, 2:].reshape(-1, 8, 8)
    indices, words = pairs[..., :4].reshape(-1, 32), pairs[..., 4:].copy().view(np.uint32)[..., 0]
    scales = _half_steps(load_half(blocks, 0), words >> 28, 0.25)
    return coded(scales, _signed(codebook("IQ2_XXS")[indices], _even_signs(words)))


def _iq2_xs(blocks: np.ndarray) -> Codes:
    words = load(blocks, 2, 32, np.uint16)
    scales = _half_steps(load_half(blocks, 0), fields(blocks[:, 66:], 4), 0.25)
    return coded(scales, _signed(codebook("IQ2_XS")[words & 511], EVEN_SIGNS[words >> 9]))


def _iq2_s(blocks: np.ndarray) -> Codes:
    low, signs, high, scales = np.split(blocks[:, 2:], [32, 64, 72], axis=-1)
    indices = low.astype(np.uint16) | fields(high, 2).astype(np.uint16) << 8
    steps = _half_steps(load_half(blocks, 0), fields(scales, 4), 0.25)
    return coded(steps, _signed(codebook("IQ2_S")[indices], signs))


def _iq3_xxs(blocks: np.ndarray) -> Codes:
    indices, words = blocks[:, 2:66], load(blocks, 66, 8, np.uint32)
    scales = _half_steps(load_half(blocks, 0), words >> 28, 0.5)
    return coded(scales, _signed(codebook("IQ3_XXS")[indices], _even_signs(words)))


def _iq3_s(blocks: np.ndarray) -> Codes:
    low, high, signs, scales = np.split(blocks[:, 2:], [64, 72, 104], axis=-1)
    indices = low.astype(np.uint16) | fields(high, 1).astype(np.uint16) << 8
    steps = load_half(blocks, 0) * (2 * fields(scales, 4) + 1).astype(np.float32)
    return coded(steps, _signed(codebook("IQ3_S")[indices], signs))


def shifted_vectors(indices: np.ndarray, is_down: np.ndarray) -> np.ndarray:
    """Vectors of IQ1 in eighths, int8 (n, k, 8), by index (n, k), shifted by one: down where `is_down` (n, k)."""
    return 8 * codebook("IQ1_S")[indices] + np.where(is_down, np.int8(-1), np.int8(1))[..., None]


def _iq1_s(blocks: np.ndarray) -> Codes:
    words = load(blocks, 34, 8, np.uint16)
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 32)
    scales = load_half(blocks, 0) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    vectors = shifted_vectors(blocks[:, 2:34] | high << 8, np.repeat(words >> 15, 4, axis=-1) == 1)
    return coded(EIGHTH * scales, vectors)


def _iq1_m(blocks: np.ndarray) -> Codes:
    high, words = fields(blocks[:, 32:48], 4).astype(np.uint16), load(blocks, 48, 4, np.uint16)
    # Each word has four scales of 3 bits, and in its upper 4 bits a quarter of the block's half, lowest first.
    d = np.bitwise_or.reduce(words >> 12 << np.array([0, 4, 8, 12], np.uint16), axis=-1)[:, None].view(np.float16)
    small = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 16)
    scales = d.astype(np.float32) * (2 * small + 1).astype(np.float32)
    return coded(EIGHTH * scales, shifted_vectors(blocks[:, :32] | (high & 7) << 8, high >> 3 == 1))


def _iq1_m_r1(blocks: np.ndarray) -> Codes:
    """IQ1_M with scales that are nibbles: no type of files, but the rows of ik_llama.cpp's IQ1_M_R4."""
    high = fields(blocks[:, 32:48], 4).astype(np.uint16)
    scales = load_half(blocks, 56) * fields(blocks[:, 48:56], 4).astype(np.float32)
    return coded(EIGHTH * scales, shifted_vectors(blocks[:, :32] | (high & 7) << 8, high >> 3 == 1))


def _iq4_nl(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), IQ4_VALUES[planes(blocks[:, 2:], 4)])


def _iq4_xs(blocks: np.ndarray) -> Codes:
    low, high = fields(blocks[:, 4:8], 4), fields(load(blocks, 2, 1, np.uint16), 2).astype(np.uint8)
    scales = load_half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)
    return coded(scales, IQ4_VALUES[planes(blocks[:, 8:].reshape(-1, 8, 16), 4)])


IQ1_S = format_of_codes(_iq1_s)
IQ1_M = format_of_codes(_iq1_m)
IQ1_M_R1 = format_of_codes(_iq1_m_r1)
IQ2_XXS = format_of_codes(_iq2_xxs)
IQ2_XS = format_of_codes(_iq2_xs)
IQ2_S = format_of_codes(_iq2_s)
IQ3_XXS = format_of_codes(_iq3_xxs)
IQ3_S = format_of_codes(_iq3_s)
IQ4_NL = format_of_codes(_iq4_nl)
IQ4_XS = format_of_codes(_iq4_xs)
