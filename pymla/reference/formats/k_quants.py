"""K-quants: super-blocks of 256 weights with a scale, and smaller blocks with integer scales of their own."""

import numpy as np

from pymla.reference.formats.format import Format, load_half


def _dequantise_q6_k(blocks: np.ndarray) -> np.ndarray:
    low, high, scales = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208]
    low, high = low.reshape(-1, 2, 1, 2, 32), high.reshape(-1, 2, 1, 32)
    # A half of 128 weights has 64 bytes of low nibbles and 32 bytes that hold four times the two high bits.
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    codes = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scale = load_half(blocks, 208) * scales.view(np.int8).astype(np.float32)
    return (scale[..., None] * codes).reshape(len(blocks), 256)


Q6_K = Format(_dequantise_q6_k)
