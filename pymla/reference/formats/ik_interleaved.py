"""Row-interleaved types of ik_llama.cpp: blocks of 4, 8 or 16 rows lie together, their bytes mixed.

A block of so many rows holds the bits of as many blocks of a plain type, in another order. `Interleaved.split` puts
them back: nothing is rounded, and the size stays the same. Row headers need no function: those of a group of rows come
first, one after the other, and then the group's blocks. Layouts follow ``ggml-common.h`` and ``iqk_quantize.cpp`` of
ik_llama.cpp, commit 8337e4cd.

In most types the unit that is interleaved is a quad: four bytes, whose fields with the same shift belong to four
neighbouring weights. A quad of the first row comes first, then one of the second row, and so on.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pymla.reference.formats import floats, ik_bitnet, ik_quants, iq_quants, k_quants, legacy, small_floats
from pymla.reference.formats.bits import fields, load, pack_fields, pack_planes
from pymla.reference.formats.format import Codes, Format, coded, format_of_codes, load_half


class Interleaved(NamedTuple):
    """A type whose blocks hold blocks of several rows."""

    #: The format of the rows by themselves.
    plain: Format
    #: uint8 (n, rows * block_bytes) → uint8 (n, rows, block_bytes), rows being ``ggml.ROWS_TOGETHER``.
    split: Callable[[np.ndarray], np.ndarray]
    #: Where the rows by themselves are not of ``ggml.PLAIN``: their blocks as blocks of that type with as many weights,
    #: uint8 (n, bytes) both. The scale is zero where only the header of a row has it.
    join: Callable[[np.ndarray], np.ndarray] | None = None


_WEIGHTS = np.arange(256)
_GROUPS = np.arange(8)  # of 32 weights
_SMALL = np.arange(16)  # groups of 16 weights


def _take(blocks: np.ndarray, at: np.ndarray, shift: np.ndarray | int = 0, bits: int = 8) -> np.ndarray:
    """Fields of `bits` bits: from byte ``at[row, i]`` of every block, above its lowest ``shift[i]`` bits.

    Parameters
    ----------
    blocks : uint8 array (n, block_bytes)
    at : int array (rows, m)
    shift : int array (m,) or (rows, m), or int

    Returns
    -------
    uint8 array (n, rows, m)
    """
    return blocks[:, at] >> np.asarray(shift, np.uint8) & np.uint8((1 << bits) - 1)


def _row(rows: int = 4) -> np.ndarray:
    return np.arange(rows)[:, None]


def _picked(numbers: np.ndarray, *bits: int) -> np.ndarray:
    """Numbers made of some bits of others; the bit that becomes the lowest is named first."""
    return np.bitwise_or.reduce([(numbers >> bit & 1) << i for i, bit in enumerate(bits)])


def _quads(first: int, rows: int, quad: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Bytes (rows, weights) of weights `w` that lie in quad number ``quad[w]`` of their row's."""
    return first + 4 * rows * quad + 4 * _row(rows) + w % 4


def _halves(blocks: np.ndarray, rows: int, at: int = 0) -> np.ndarray:
    """Two bytes of each row, one after the other: (n, rows, 2)."""
    return blocks[:, at : at + 2 * rows].reshape(-1, rows, 2)


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


# Codes of 4 rows. A byte's nibbles belong to weights that are eight apart, those of a plain type to weights that are 16
# or 32 apart. Weights are counted from the beginning of the block.


def _nibbles_of_4(blocks: np.ndarray, first: int, weights: int = 256) -> np.ndarray:
    w = _WEIGHTS[:weights]
    return _take(blocks, _quads(first, 4, 4 * (w // 32) + _picked(w, 4, 2), w), 4 * _picked(w, 3), 4)


def _bits_of_4(blocks: np.ndarray, first: int, order: tuple[int, int, int], weights: int = 256) -> np.ndarray:
    """Bits above nibbles: `order` says which bits of a weight's number make the number of its bit in the byte."""
    w = _WEIGHTS[:weights]
    return _take(blocks, _quads(first, 4, w // 32, w), _picked(w, *order), 1)


def _pairs_of_4(blocks: np.ndarray, first: int) -> np.ndarray:
    """Codes of 2 bits: a byte has those of four weights, four apart."""
    return _take(blocks, _quads(first, 4, _WEIGHTS // 16, _WEIGHTS), 2 * _picked(_WEIGHTS, 2, 3), 2)


def _nibble_bytes(codes: np.ndarray, apart: int) -> np.ndarray:
    """Codes of 4 bits, (n, rows, weights), as the bytes of a plain type that puts `apart` weights between nibbles."""
    n, rows, weights = codes.shape
    packed = pack_planes(codes.reshape(n, rows, weights // (2 * apart), 2, apart), 4)
    return packed.reshape(n, rows, weights // 2)


def _pair_bytes(codes: np.ndarray) -> np.ndarray:
    """Codes of 2 bits, (n, rows, 256), as the bytes of plain types: those of a byte are 32 weights apart."""
    return pack_planes(codes.reshape(*codes.shape[:2], 2, 4, 32), 2).reshape(*codes.shape[:2], 64)


def _bit_bytes(codes: np.ndarray) -> np.ndarray:
    """Codes of 1 bit, (n, rows, 256), as the bytes of plain types: those of a byte are 32 weights apart."""
    return pack_planes(codes.reshape(*codes.shape[:2], 8, 32), 1)


# Scales. Number i of a row is number ``rows * i + row`` of all; those past the bytes' count lie in higher bits.


def _numbers(blocks: np.ndarray, first: int, rows: int, count: int, size: int, bits: int) -> np.ndarray:
    """`count` numbers of `bits` bits of each row, (n, rows, count), in `size` bytes."""
    number = rows * np.arange(count) + _row(rows)
    return _take(blocks, first + number % size, number // size * bits, bits)


def _scale_bytes_q4_k(blocks: np.ndarray, high_at: int, low_at: int) -> np.ndarray:
    """The 12 bytes of Q4_K's and Q5_K's scales and minima, (n, 4, 12)."""
    number = 4 * _GROUPS + _row()
    low, high = blocks[:, low_at + number], _numbers(blocks, high_at, 4, 8, 16, 4)
    scales, minima = low & 15 | (high & 3) << 4, low >> 4 | high >> 2 << 4
    upper = scales[..., 4:] >> 4 << 6, minima[..., 4:] >> 4 << 6
    last = scales[..., 4:] & 15 | minima[..., 4:] << 4
    return _join(scales[..., :4] | upper[0], minima[..., :4] | upper[1], last)


def _variants(blocks: np.ndarray, first: int) -> np.ndarray:
    """The 16 bits that choose a table in IQ2_K to IQ5_K, (n, 4, 2)."""
    return pack_fields(_take(blocks, first + 4 * (_SMALL % 2) + _row(), _SMALL // 2, 1), 1)


def _q4_0_r8(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS[:32]
    codes = _take(blocks, _quads(16, 8, w % 16 // 4, w), 4 * (w // 16), 4)
    return _join(_halves(blocks, 8), _nibble_bytes(codes, 16))


def _q5_0_r4(blocks: np.ndarray) -> np.ndarray:
    codes, high = _nibbles_of_4(blocks, 24, 32), _bits_of_4(blocks, 8, (4, 2, 3), 32)
    return _join(_halves(blocks, 4), pack_fields(high, 1), _nibble_bytes(codes, 16))


def _q6_0_r4(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS[:32]
    high = _take(blocks, _quads(8, 4, w // 16, w), 2 * _picked(w, 2, 3), 2)
    # The plain type's fields belong to weights i, i + 16, i + 8 and i + 24.
    high = high.reshape(-1, 4, 2, 2, 8).swapaxes(2, 3).reshape(-1, 4, 4, 8)
    return _join(_halves(blocks, 4), pack_planes(high, 2), _nibble_bytes(_nibbles_of_4(blocks, 40, 32), 16))


def _q8_0_r8(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS[:32]
    return _join(_halves(blocks, 8), blocks[:, _quads(16, 8, w // 4, w)])


def _q2_k_r4(blocks: np.ndarray) -> np.ndarray:
    scales, d = blocks[:, 16 + 4 * _SMALL + _row()], _join(_halves(blocks, 4), _halves(blocks, 4, 8))
    return _join(scales, _pair_bytes(_pairs_of_4(blocks, 80)), d)


def _q3_k_r4(blocks: np.ndarray) -> np.ndarray:
    low, high = _numbers(blocks, 24, 4, 16, 32, 4), _numbers(blocks, 8, 4, 16, 16, 2)
    scales = _join(
        pack_planes(low.reshape(-1, 4, 2, 8), 4),
        pack_planes(high.reshape(-1, 4, 4, 4), 2),
    )
    codes, top = _pairs_of_4(blocks, 184), _bits_of_4(blocks, 56, (2, 3, 4))
    return _join(_bit_bytes(top), _pair_bytes(codes), scales, _halves(blocks, 4))


def _q4_k_r4(blocks: np.ndarray) -> np.ndarray:
    d = _join(_halves(blocks, 4), _halves(blocks, 4, 8))
    return _join(d, _scale_bytes_q4_k(blocks, 16, 32), _nibble_bytes(_nibbles_of_4(blocks, 64), 32))


def _q5_k_r4(blocks: np.ndarray) -> np.ndarray:
    d = _join(_halves(blocks, 4), _halves(blocks, 4, 8))
    codes, top = _nibbles_of_4(blocks, 192), _bits_of_4(blocks, 64, (3, 2, 4))
    return _join(d, _scale_bytes_q4_k(blocks, 16, 32), _bit_bytes(top), _nibble_bytes(codes, 32))


def _q6_k_r4(blocks: np.ndarray) -> np.ndarray:
    scales, w = blocks[:, 8 + 4 * _SMALL + _row()], _WEIGHTS
    codes = _nibbles_of_4(blocks, 328)
    top = _take(blocks, _quads(72, 4, w // 16, w), 2 * _picked(w, 3, 2), 2)
    return _join(_nibble_bytes(codes, 64), _pair_bytes(top), scales, _halves(blocks, 4))


def _iq4_nl_r4(blocks: np.ndarray) -> np.ndarray:
    return _join(_halves(blocks, 4), _nibble_bytes(_nibbles_of_4(blocks, 8, 32), 16))


def _iq4_xs_r8(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS
    low, high = _numbers(blocks, 32, 8, 8, 32, 4), _numbers(blocks, 16, 8, 8, 16, 2)
    codes = _take(blocks, _quads(64, 8, w // 8, w), 4 * _picked(w, 2), 4)
    return _join(_halves(blocks, 8), pack_fields(high, 2), pack_fields(low, 4), _nibble_bytes(codes, 16))


def _iq4_ks_r4(blocks: np.ndarray) -> np.ndarray:
    return _join(blocks[:, 4 * _GROUPS + _row()], _nibble_bytes(_nibbles_of_4(blocks, 32), 16))


def _iq5_ks_r4(blocks: np.ndarray) -> np.ndarray:
    codes, top = _nibbles_of_4(blocks, 32), _bits_of_4(blocks, 544, (3, 4, 2))
    return _join(blocks[:, 4 * _GROUPS + _row()], _nibble_bytes(codes, 32), _bit_bytes(top))


def _iq2_k_r4(blocks: np.ndarray) -> np.ndarray:
    scales = pack_fields(_numbers(blocks, 16, 4, 16, 32, 4), 4)
    return _join(_halves(blocks, 4), _variants(blocks, 8), scales, _pair_bytes(_pairs_of_4(blocks, 48)))


def _iq3_k_r4(blocks: np.ndarray) -> np.ndarray:
    signs, scales = _numbers(blocks, 16, 4, 16, 8, 1), _numbers(blocks, 24, 4, 16, 32, 4)
    codes, top = _pairs_of_4(blocks, 56), _bits_of_4(blocks, 312, (2, 3, 4))
    head = _join(_halves(blocks, 4), _variants(blocks, 8), pack_fields(signs, 1), pack_fields(scales, 4))
    return _join(head, _pair_bytes(codes), _bit_bytes(top))


def _head_of_six_bits(blocks: np.ndarray) -> np.ndarray:
    """IQ4_K and IQ5_K in front of the codes: scale, variants, 16 scales of 6 bits."""
    high, low = _numbers(blocks, 16, 4, 16, 16, 2), _numbers(blocks, 32, 4, 16, 32, 4)
    return _join(_halves(blocks, 4), _variants(blocks, 8), pack_fields(high, 2), pack_fields(low, 4))


def _iq4_k_r4(blocks: np.ndarray) -> np.ndarray:
    return _join(_head_of_six_bits(blocks), _nibble_bytes(_nibbles_of_4(blocks, 64), 16))


def _iq5_k_r4(blocks: np.ndarray) -> np.ndarray:
    codes, top = _nibbles_of_4(blocks, 64), _bits_of_4(blocks, 576, (3, 4, 2))
    return _join(_head_of_six_bits(blocks), _nibble_bytes(codes, 32), _bit_bytes(top))


def _signs_and_scales(blocks: np.ndarray, first: int) -> np.ndarray:
    """The words of IQ2_XXS and IQ3_XXS, with four times seven signs and a scale: bytes (n, 4, 8, 4).

    The lowest bits of an interleaved word's bytes are the scale. The others, each xor the next one above it, are eight
    signs, of which the plain type holds seven.
    """
    words = blocks[:, first : first + 128].reshape(-1, 8, 4, 4).swapaxes(1, 2)
    seven = ((words & 254 ^ words >> 1) & 127).astype(np.uint32)
    scale = pack_planes((words & 1)[..., None], 1)[..., 0].astype(np.uint32)
    plain = np.bitwise_or.reduce(seven << np.array([0, 7, 14, 21], np.uint32), axis=-1) | scale << 28
    return plain[..., None].view(np.uint8)


def _iq2_xxs_r4(blocks: np.ndarray) -> np.ndarray:
    indices = blocks[:, 136:].reshape(-1, 8, 4, 4).swapaxes(1, 2)
    both = _join(indices, _signs_and_scales(blocks, 8)).reshape(-1, 4, 64)
    return _join(_halves(blocks, 4), both)


def _iq3_xxs_r4(blocks: np.ndarray) -> np.ndarray:
    indices = blocks[:, 136:].reshape(-1, 8, 4, 8).swapaxes(1, 2).reshape(-1, 4, 64)
    return _join(_halves(blocks, 4), indices, _signs_and_scales(blocks, 8).reshape(-1, 4, 32))


def _iq2_xs_r4(blocks: np.ndarray) -> np.ndarray:
    """Seven bits of signs: each xor the one below it is a sign."""
    words = load(blocks, 8, 128, np.uint16).reshape(-1, 8, 4, 4).swapaxes(1, 2)
    signs = words >> 9
    plain = words & 511 | ((signs ^ signs << 1) & 127) << 9
    return _join(
        _halves(blocks, 4), plain.reshape(-1, 4, 32).copy().view(np.uint8), blocks[:, 264 + 4 * _GROUPS + _row()]
    )


def _iq2_s_r4(blocks: np.ndarray) -> np.ndarray:
    indices, signs = (blocks[:, at : at + 128].reshape(-1, 8, 4, 4).swapaxes(1, 2) for at in (8, 168))
    high, scales = (blocks[:, at + 4 * _GROUPS + _row()] for at in (136, 296))
    return _join(_halves(blocks, 4), indices.reshape(-1, 4, 32), signs.reshape(-1, 4, 32), high, scales)


def _iq3_s_r4(blocks: np.ndarray) -> np.ndarray:
    quad = np.arange(64)  # four weights, which share an index
    indices = blocks[:, 8 + 32 * (quad // 8) + 8 * (quad % 4) + 4 * (quad // 4 % 2) + _row()]
    signs = _take(blocks, _quads(296, 4, _WEIGHTS // 32, _WEIGHTS), _WEIGHTS // 4 % 8, 1)
    scales = pack_fields(_numbers(blocks, 424, 4, 8, 16, 4), 4)
    high = blocks[:, 264 + 4 * _GROUPS + _row()]
    return _join(_halves(blocks, 4), indices, high, pack_fields(signs, 1), scales)


def _iq2_bn_r4(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS[:64]
    codes = _take(blocks, _quads(0, 4, w // 16, w), 2 * _picked(w, 2, 3), 2)
    return pack_planes(codes.reshape(-1, 4, 4, 16), 2)


def _mxfp4_r8(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS[:32]
    codes = _take(blocks, _quads(8, 8, w % 16 // 4, w), 4 * (w // 16), 4)
    return _join(blocks[:, :8, None], _nibble_bytes(codes, 16))


def _bf16_r16(blocks: np.ndarray) -> np.ndarray:
    """Two columns of 16 rows."""
    return blocks.reshape(-1, 16, 4)


def _q8_k_r8(blocks: np.ndarray) -> np.ndarray:
    return _join(_halves(blocks, 8), blocks[:, _quads(16, 8, _WEIGHTS // 4, _WEIGHTS)])


def _q8_k_r16(blocks: np.ndarray) -> np.ndarray:
    """Codes are unsigned, 128 more than they mean."""
    return _join(_halves(blocks, 16), blocks[:, _quads(32, 16, _WEIGHTS // 4, _WEIGHTS)] ^ 128)


def _q8_kv_r8(blocks: np.ndarray) -> np.ndarray:
    w = _WEIGHTS[:32]
    return blocks[:, _quads(0, 8, w // 4, w)]


def _iq1_s_r4(blocks: np.ndarray) -> np.ndarray:
    return _join(blocks[:, 4 * np.arange(4) + _row()], _halves(blocks, 4, 16))


def _iq1_m_r4(blocks: np.ndarray) -> np.ndarray:
    indices, high = blocks[:, 4 * np.arange(4) + _row()], blocks[:, 16 + 4 * np.arange(2) + _row()]
    return _join(indices, high, blocks[:, 24:, None])


# Rows of these types by themselves are no type of files. They are read as they are, and become another type when they
# are loaded.


def _q8_k_row(blocks: np.ndarray) -> Codes:
    """Q8_K_R8 and Q8_K_R16: a half and 256 int8 codes."""
    return coded(load_half(blocks, 0), blocks[:, 2:].view(np.int8))


def _q8_kv_row(blocks: np.ndarray) -> Codes:
    """Q8_KV_R8: Q8_KV without the sum in its header."""
    return coded(ik_quants.load_float(blocks), blocks[:, 4:].view(np.int8))


def _iq1_s_row(blocks: np.ndarray) -> Codes:
    """IQ1_S_R4: IQ1_S with its half once a row."""
    words = load(blocks, 6, 1, np.uint16)
    high = words >> np.array([0, 3, 6, 9], np.uint16) & 7
    scales = load_half(blocks, 0) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    vectors = iq_quants.shifted_vectors(blocks[:, 2:6] | high << 8, np.repeat(words >> 15, 4, axis=-1) == 1)
    return coded(iq_quants.EIGHTH * scales, vectors)


def _iq1_m_row(blocks: np.ndarray) -> Codes:
    """IQ1_M_R4: IQ1_M's codes, with a half once a row and a nibble for 16 weights, which is the scale itself."""
    high = fields(blocks[:, 6:8], 4).astype(np.uint16)
    scales = load_half(blocks, 0) * fields(blocks[:, 8:], 4).astype(np.float32)
    vectors = iq_quants.shifted_vectors(blocks[:, 2:6] | (high & 7) << 8, high >> 3 == 1)
    return coded(iq_quants.EIGHTH * scales, vectors)


def _q8_0_of_q8_k(rows: np.ndarray) -> np.ndarray:
    """Eight blocks of Q8_0, each with the half of all 256 codes."""
    d = np.broadcast_to(rows[:, None, :2], (len(rows), 8, 2))
    return _join(d, rows[:, 2:].reshape(-1, 8, 32)).reshape(len(rows), 272)


def _zeros(rows: np.ndarray) -> np.ndarray:
    return np.zeros((len(rows), 2), np.uint8)


def _iq1_s_of_rows(rows: np.ndarray) -> np.ndarray:
    """A block of IQ1_S of eight blocks of 32 weights."""
    parts = rows.reshape(len(rows), 8, 6)
    return _join(_zeros(rows), parts[..., :4].reshape(-1, 32), parts[..., 4:].reshape(-1, 16))


def _iq1_m_of_rows(rows: np.ndarray) -> np.ndarray:
    """A block of IQ1_M_R1 of eight blocks of 32 weights."""
    parts = rows.reshape(len(rows), 8, 7)
    return _join(parts[..., :4].reshape(-1, 32), parts[..., 4:6].reshape(-1, 16), parts[..., 6], _zeros(rows))


_Q8_K_ROW = format_of_codes(_q8_k_row)

Q4_0_R8 = Interleaved(legacy.Q4_0, _q4_0_r8)
Q5_0_R4 = Interleaved(legacy.Q5_0, _q5_0_r4)
Q6_0_R4 = Interleaved(ik_quants.Q6_0, _q6_0_r4)
Q8_0_R8 = Interleaved(legacy.Q8_0, _q8_0_r8)
Q2_K_R4 = Interleaved(k_quants.Q2_K, _q2_k_r4)
Q3_K_R4 = Interleaved(k_quants.Q3_K, _q3_k_r4)
Q4_K_R4 = Interleaved(k_quants.Q4_K, _q4_k_r4)
Q5_K_R4 = Interleaved(k_quants.Q5_K, _q5_k_r4)
Q6_K_R4 = Interleaved(k_quants.Q6_K, _q6_k_r4)
IQ2_XXS_R4 = Interleaved(iq_quants.IQ2_XXS, _iq2_xxs_r4)
IQ2_XS_R4 = Interleaved(iq_quants.IQ2_XS, _iq2_xs_r4)
IQ3_XXS_R4 = Interleaved(iq_quants.IQ3_XXS, _iq3_xxs_r4)
IQ1_S_R4 = Interleaved(format_of_codes(_iq1_s_row), _iq1_s_r4, _iq1_s_of_rows)
IQ4_NL_R4 = Interleaved(iq_quants.IQ4_NL, _iq4_nl_r4)
IQ3_S_R4 = Interleaved(iq_quants.IQ3_S, _iq3_s_r4)
IQ2_S_R4 = Interleaved(iq_quants.IQ2_S, _iq2_s_r4)
IQ4_XS_R8 = Interleaved(iq_quants.IQ4_XS, _iq4_xs_r8)
IQ1_M_R4 = Interleaved(format_of_codes(_iq1_m_row), _iq1_m_r4, _iq1_m_of_rows)
BF16_R16 = Interleaved(floats.BF16, _bf16_r16)
IQ2_BN_R4 = Interleaved(ik_bitnet.IQ2_BN, _iq2_bn_r4)
IQ2_K_R4 = Interleaved(ik_quants.IQ2_K, _iq2_k_r4)
IQ3_K_R4 = Interleaved(ik_quants.IQ3_K, _iq3_k_r4)
IQ4_K_R4 = Interleaved(ik_quants.IQ4_K, _iq4_k_r4)
IQ5_K_R4 = Interleaved(ik_quants.IQ5_K, _iq5_k_r4)
IQ4_KS_R4 = Interleaved(ik_quants.IQ4_KS, _iq4_ks_r4)
IQ5_KS_R4 = Interleaved(ik_quants.IQ5_KS, _iq5_ks_r4)
MXFP4_R8 = Interleaved(small_floats.MXFP4, _mxfp4_r8)
Q8_K_R16 = Interleaved(_Q8_K_ROW, _q8_k_r16, _q8_0_of_q8_k)
Q8_KV_R8 = Interleaved(format_of_codes(_q8_kv_row), _q8_kv_r8)
Q8_K_R8 = Interleaved(_Q8_K_ROW, _q8_k_r8, _q8_0_of_q8_k)
