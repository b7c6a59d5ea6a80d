"""Weights as checkpoints store them, to float32, on all cores. Twin of `pymla.reference.checkpoint_types`,
with the same bits.

>>> import numpy as np
>>> from pymla.cpu import checkpoint_types
>>> checkpoint_types.from_e4m3(np.array([[0x38, 0xC0]], np.uint8), np.float32([[2.0]]), (128, 128), 0)
array([[ 2., -4.]], dtype=float32)
"""

import numpy as np
from numba import types

from pymla.cpu.runtime.array_types import F2, WEIGHTS_BYTES, WEIGHTS_F1
from pymla.cpu.runtime.jit import kernel
from pymla.small_floats import E2M1, E4M3, E8M0, INT4_ZERO, MX_GROUP

# Inner loops go over slices, from 0 on: LLVM then sees that no index counts from the end, and takes registers.

#: Floats of an item of `largest_magnitude`.
_CHUNK = 1 << 14

_U16 = types.Array(types.uint16, 1, "C", readonly=True)
_U32 = types.Array(types.uint32, 1, "C", readonly=True)
_INT4_WORDS = types.Array(types.int32, 2, "C", readonly=True)
_SCALES = types.Array(types.float32, 2, "C", readonly=True)
_U16_OUT = types.Array(types.uint16, 1, "C")
_U32_OUT = types.Array(types.uint32, 1, "C")


def from_bf16(codes: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, contiguous uint16 of any shape, as float32."""
    out = np.empty(codes.shape, np.float32)
    _from_bf16[codes.size](codes.reshape(-1), out.reshape(-1).view(np.uint32))
    return out


def from_e4m3(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], first: int) -> np.ndarray:
    """Numbers of eight bits with a scale for each block of a matrix; contiguous arrays.

    Raises
    ------
    ValueError
        There are too few scales, or too many columns of them.
    """
    rows, columns = codes.shape
    if len(scales) * block[0] < first + rows or scales.shape[1] != -(-columns // block[1]):
        raise ValueError(f"scales {scales.shape} for codes {codes.shape} from row {first} on, in blocks of {block}")
    out = np.empty(codes.shape, np.float32)
    _from_e4m3[rows](codes, scales, block, first, E4M3, out)
    return out


def from_int4(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """Integers of four bits, eight in a word, with a scale and a zero point for a group of columns; contiguous arrays.

    Raises
    ------
    ValueError
        Groups are not whole words, or there are not as many rows of scales as of codes, or not as many zero points as
        scales.
    """
    rows, words = codes.shape
    if len(scales) != rows or (words and (not scales.shape[1] or words % scales.shape[1])):
        raise ValueError(f"scales {scales.shape} for codes {codes.shape}")
    zeros = np.full(scales.shape, INT4_ZERO, np.uint8) if zeros is None else zeros
    if zeros.shape != scales.shape:
        raise ValueError(f"zero points {zeros.shape} for scales {scales.shape}")
    out = np.empty((rows, 8 * words), np.float32)
    _from_int4[rows](codes, scales, zeros, out)
    return out


def from_e2m1(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers of four bits with a float32 scale for a group of columns; contiguous arrays.

    Raises
    ------
    ValueError
        Groups are not whole bytes, or there are not as many rows of scales as of codes.
    """
    rows, pairs = codes.shape
    if len(scales) != rows or (pairs and (not scales.shape[1] or pairs % scales.shape[1])):
        raise ValueError(f"scales {scales.shape} for codes {codes.shape}")
    out = np.empty((rows, 2 * pairs), np.float32)
    _from_e2m1[rows](codes, scales, E2M1, out)
    return out


def from_mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers of four bits with a power of two for every 32 columns; contiguous arrays.

    Raises
    ------
    ValueError
        There is not a scale for every 32 columns.
    """
    if scales.shape != (len(codes), 2 * codes.shape[1] // MX_GROUP):
        raise ValueError(f"scales {scales.shape} for codes {codes.shape}")
    return from_e2m1(codes, E8M0[scales])


def largest_magnitude(words: np.ndarray, alone: bool = False) -> int:
    """The largest of some floats as the bits that it has without its sign; contiguous uint16 or uint32 (n,).

    With `alone` it is found on the calling thread, beside kernels of other threads: for a thread that reads, while
    another one keeps the cores busy.
    """
    out = np.zeros(-(-words.size // _CHUNK), words.dtype)
    largest = _largest_16 if words.dtype == np.uint16 else _largest_32
    if alone:
        largest(0, out.size, words, out)
    else:
        largest[out.size](words, out)
    return int(out.max(initial=0))


@kernel(_U16, _U32_OUT)
def _from_bf16(first, last, codes, bits):
    source, target = codes[first:last], bits[first:last]
    for i in range(len(source)):
        target[i] = np.uint32(source[i]) << 16


@kernel(WEIGHTS_BYTES, _SCALES, types.UniTuple(types.int64, 2), types.int64, WEIGHTS_F1, F2)
def _from_e4m3(first, last, codes, scales, block, start, numbers, out):
    """Items are rows."""
    width = block[1]
    for r in range(first, last):
        group = (start + r) // block[0]
        for b in range(scales.shape[1]):
            scale = scales[group, b]
            source, target = codes[r, b * width : (b + 1) * width], out[r, b * width : (b + 1) * width]
            for c in range(len(source)):
                target[c] = numbers[source[c]] * scale


@kernel(_INT4_WORDS, _SCALES, WEIGHTS_BYTES, F2)
def _from_int4(first, last, codes, scales, zeros, out):
    """Items are rows."""
    groups = scales.shape[1]
    for r in range(first, last):
        width = codes.shape[1] // max(1, groups)
        for g in range(groups):
            scale, zero = scales[r, g], np.int32(zeros[r, g])
            source, target = codes[r, g * width : (g + 1) * width], out[r, 8 * g * width : 8 * (g + 1) * width]
            for w in range(width):
                for i in range(8):
                    target[8 * w + i] = np.float32((source[w] >> 4 * i & 15) - zero) * scale


@kernel(WEIGHTS_BYTES, _SCALES, WEIGHTS_F1, F2)
def _from_e2m1(first, last, codes, scales, numbers, out):
    """Items are rows."""
    groups = scales.shape[1]
    for r in range(first, last):
        width = codes.shape[1] // max(1, groups)
        for g in range(groups):
            scale = scales[r, g]
            source, target = codes[r, g * width : (g + 1) * width], out[r, 2 * g * width : 2 * (g + 1) * width]
            for i in range(width):
                target[2 * i] = numbers[source[i] & 15] * scale
                target[2 * i + 1] = numbers[source[i] >> 4] * scale


@kernel(_U16, _U16_OUT)
def _largest_16(first, last, words, out):
    """Items are `_CHUNK` words."""
    for chunk in range(first, last):
        part, largest = words[chunk * _CHUNK : (chunk + 1) * _CHUNK], np.uint16(0)
        for i in range(len(part)):
            largest = max(largest, np.uint16(part[i] & 0x7FFF))
        out[chunk] = largest


@kernel(_U32, _U32_OUT)
def _largest_32(first, last, words, out):
    """Items are `_CHUNK` words."""
    for chunk in range(first, last):
        part, largest = words[chunk * _CHUNK : (chunk + 1) * _CHUNK], np.uint32(0)
        for i in range(len(part)):
            largest = max(largest, np.uint32(part[i] & 0x7FFFFFFF))
        out[chunk] = largest
