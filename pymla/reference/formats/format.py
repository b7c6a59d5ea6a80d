"""What a type of tensors is in NumPy, and what several families of types share."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Convert = Callable[[np.ndarray], np.ndarray]


class Format(NamedTuple):
    """The functions of a type. Both take and return arrays with one block in each row."""

    dequantise: Convert  # uint8 (n, block_bytes) → float32 (n, block_size)
    quantise: Convert | None = None  # float32 (n, block_size) → uint8 (n, block_bytes); None: not defined here
    codes: Callable[[np.ndarray], "Codes"] | None = None  # uint8 (n, block_bytes) → integers and their scales


class Codes(NamedTuple):
    """Weights of blocks as integers: ``scale * code``, or ``scale * code + minimum``.

    Scales and minima are of equally many neighbouring codes each.
    """

    scales: np.ndarray  # float32 (n, s)
    codes: np.ndarray  # int8 (n, block_size)
    minima: np.ndarray | None = None  # float32 (n, s)

    def weights(self) -> np.ndarray:
        """Float32 (n, block_size). A product is rounded before its minimum is added."""
        codes = self.codes.reshape(*self.scales.shape, self.codes.shape[1] // self.scales.shape[1]).astype(np.float32)
        weights = self.scales[..., None] * codes
        if self.minima is not None:
            weights += self.minima[..., None]
        return weights.reshape(self.codes.shape)


def coded(scales: np.ndarray, codes: np.ndarray, minima: np.ndarray | None = None) -> Codes:
    """Codes of any integer type and any shape (n, ...), in the order of the weights."""
    return Codes(scales, codes.reshape(len(codes), math.prod(codes.shape[1:])).astype(np.int8), minima)


def format_of_codes(convert: Callable[[np.ndarray], Codes], quantise: Convert | None = None) -> Format:
    """The format of a type of integers: `convert` takes blocks, uint8 (n, block_bytes)."""
    return Format(lambda blocks: convert(blocks).weights(), quantise, convert)


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
