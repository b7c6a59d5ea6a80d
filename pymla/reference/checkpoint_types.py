"""Weights as checkpoints store them, to float32, in NumPy.

>>> import numpy as np
>>> from pymla.reference import checkpoint_types
>>> checkpoint_types.from_e4m3(np.array([[0x38, 0xC0]], np.uint8), np.float32([[2.0]]), (128, 128), 0)
array([[ 2., -4.]], dtype=float32)
"""

import numpy as np

from pymla.small_floats import E2M1, E4M3, E8M0, INT4_ZERO, MX_GROUP


def from_bf16(codes):
    """The upper halves of float32 numbers, uint16 of any shape, as float32."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def from_e4m3(codes, scales, block, first):
    """Numbers of eight bits with a scale for each block of a matrix, as DeepSeek V3 is published.

    Parameters
    ----------
    codes : uint8 array (R, K)
        Rows of the matrix.
    scales : float32 array (n, ceil(K / block[1]))
        Those of the blocks that hold these rows.
    block : (int, int)
        Rows and columns that share a scale.
    first : int
        Rows of the first block that lie before the first row of `codes`.

    Returns
    -------
    float32 array (R, K)
        NaN for the codes 127 and 255.
    """
    rows = (first + np.arange(codes.shape[0])) // block[0]
    columns = np.arange(codes.shape[1]) // block[1]
    with np.errstate(over="ignore"):
        return E4M3[codes] * scales[rows[:, None], columns]


def from_int4(codes, scales, zeros=None):
    """Integers of four bits with a scale and a zero point for a group of columns.

    They are packed as compressed-tensors does it (``pack_to_int32`` of its ``pack_quantized`` format), where the zero
    point is 8: eight columns in a word of 32 bits, the first in its lowest bits. So is Kimi-K2-Thinking published.

    Parameters
    ----------
    codes : int32 array (R, K / 8)
    scales : float32 array (R, n)
        K is a multiple of n, and K / n of 8.
    zeros : uint8 array (R, n), optional
        The codes that stand for 0, which may be 16; 8 by default.

    Returns
    -------
    float32 array (R, K)
    """
    nibbles = codes[..., None] >> np.arange(0, 32, 4, dtype=np.int32) & 15
    rows, columns = len(codes), 8 * codes.shape[1]
    grouped = nibbles.reshape(*scales.shape, columns // max(1, scales.shape[1]))
    zeros = INT4_ZERO if zeros is None else zeros[..., None].astype(np.int32)
    with np.errstate(over="ignore"):
        return ((grouped - zeros).astype(np.float32) * scales[..., None]).reshape(rows, columns)


def from_e2m1(codes, scales):
    """Numbers of four bits, E2M1, with a scale for a group of columns.

    Parameters
    ----------
    codes : uint8 array (R, K / 2)
        Two columns in a byte, the first in its low bits.
    scales : float32 array (R, n)
        K is a multiple of n, and K / n is even.

    Returns
    -------
    float32 array (R, K)
    """
    rows, columns = len(codes), 2 * codes.shape[1]
    numbers = E2M1[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(
        *scales.shape, columns // max(1, scales.shape[1])
    )
    with np.errstate(over="ignore"):
        return (numbers * scales[..., None]).reshape(rows, columns)


def from_mxfp4(codes, scales):
    """The same with a power of two for every 32 columns: uint8 array (R, K / 32), E8M0, of which 255 is NaN."""
    return from_e2m1(codes, E8M0[scales])


def mxfp4_blocks(codes, scales):
    """The same weights as ggml's blocks of MXFP4, bit for bit: the scale, then sixteen bytes, of which byte j holds the
    columns j and j + 16. Arguments are those of `from_mxfp4`; returns uint8 (R, K / 32 * 17)."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, MX_GROUP)
    halves = nibbles[..., : MX_GROUP // 2] | nibbles[..., MX_GROUP // 2 :] << 4
    blocks = np.concatenate([scales[..., None], halves], axis=-1)
    return blocks.reshape(len(codes), scales.shape[1] * blocks.shape[-1])


def largest_magnitude(words):
    """The largest of some floats as the bits that it has without its sign: an int, 0 of no floats.

    Bits of floats without sign are in the order of the numbers, infinity and NaN behind all others.

    Parameters
    ----------
    words : uint16 or uint32 array, one-dimensional
        Float16, bfloat16 or float32 by their bits.
    """
    return int((words & words.dtype.type(np.iinfo(words.dtype).max >> 1)).max(initial=0))
