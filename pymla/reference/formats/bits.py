"""Fields of a few bits: how codes and scales lie in the bytes of a block, and back."""

import numpy as np


def planes(words: np.ndarray, bits: int) -> np.ndarray:
    """Fields of `bits` bits, lowest first, plane by plane: row i has the i-th field of every word.

    Parameters
    ----------
    words : unsigned integer array (..., m)
    bits : int
        1, 2 or 4.

    Returns
    -------
    array (..., fields, m) of the words' dtype
    """
    shifts = np.arange(0, 8 * words.dtype.itemsize, bits, dtype=words.dtype)
    return words[..., None, :] >> shifts[:, None] & words.dtype.type((1 << bits) - 1)


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Fields of `bits` bits, lowest first, word by word: unsigned integers (..., m) become (..., m * fields)."""
    each = 8 * words.dtype.itemsize // bits
    return planes(words[..., None], bits).reshape(*words.shape[:-1], words.shape[-1] * each)


def pack_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `planes`: codes (..., fields, m) as words (..., m)."""
    shifts = np.arange(codes.shape[-2], dtype=codes.dtype) * codes.dtype.type(bits)
    return np.bitwise_or.reduce(codes << shifts[:, None], axis=-2)


def pack_fields(codes: np.ndarray, bits: int, dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """The inverse of `fields`: codes (..., m * fields) as words (..., m) of `dtype`."""
    each = 8 * np.dtype(dtype).itemsize // bits
    parts = codes.astype(dtype).reshape(*codes.shape[:-1], codes.shape[-1] // each, each, 1)
    return pack_planes(parts, bits)[..., 0]


def load(blocks: np.ndarray, at: int, count: int, dtype: type[np.number]) -> np.ndarray:
    """`count` little-endian numbers that begin at byte `at` of every block, uint8 (n, block_bytes), as (n, count)."""
    width = count * np.dtype(dtype).itemsize
    return np.ascontiguousarray(blocks[:, at : at + width]).view(dtype)
