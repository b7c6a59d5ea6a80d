"""What a type of tensors is in NumPy, and what several families of types share."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Convert = Callable[[np.ndarray], np.ndarray]


class Format(NamedTuple):
    """The functions of a type. Both take and return arrays with one block in each row."""

    dequantise: Convert  # uint8 (n, block_bytes) → float32 (n, block_size)
    quantise: Convert | None = None  # float32 (n, block_size) → uint8 (n, block_bytes); None: not defined here


def load_half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The IEEE half at byte `at` of every block, uint8 (n, block_bytes), as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def half_bytes(values: np.ndarray) -> np.ndarray:
    """Float32 (n, 1) as the bytes of IEEE halves, uint8 (n, 2)."""
    return values.astype(np.float16).view(np.uint8)


def inverse(d: np.ndarray) -> np.ndarray:
    """``1 / d`` in float32, and 0 where `d` is 0."""
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d).astype(np.float32)
