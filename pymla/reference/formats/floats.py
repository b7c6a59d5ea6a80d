"""Types of plain floats: a block is a single weight."""

import numpy as np

from pymla.reference.formats.format import Format


def _from_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float32)


def _to_f32(weights: np.ndarray) -> np.ndarray:
    return weights.view(np.uint8)


def _from_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float16).astype(np.float32)


def _to_f16(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float16).view(np.uint8)


def _from_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(weights: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, halves to even; NaN stays NaN."""
    bits = weights.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, bits >> 16 | 64, rounded).astype(np.uint16).view(np.uint8)


F32 = Format(_from_f32, _to_f32)
F16 = Format(_from_f16, _to_f16)
BF16 = Format(_from_bf16, _to_bf16)
