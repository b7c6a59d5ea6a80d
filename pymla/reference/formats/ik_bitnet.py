"""Ternary types of ik_llama.cpp for BitNet models: a row begins with its scale, which here stands before every block.

ik_llama.cpp's `dequantize_row_iq1_bn` and `dequantize_row_iq2_bn` leave the scale out, and its rows begin elsewhere;
its products apply it, as is done here.
"""

import numpy as np

from pymla.reference.formats.bits import blockwise, planes
from pymla.reference.formats.format import Format, load_half
from pymla.reference.formats.ik_quants import load_float
from pymla.reference.formats.ternary import trits


def _dequantise_iq1_bn(blocks: np.ndarray) -> np.ndarray:
    """Sixteen weights are five digits of each of three bytes, and one digit of the block's last byte."""
    # Digits lie lowest first here, and `trits` takes the highest first.
    fives = trits(blocks[:, 2:14])[:, ::-1].swapaxes(1, 2).reshape(-1, 4, 15)
    ones = trits(blocks[:, 14:])[:, :0:-1]
    return blockwise(load_half(blocks, 0), np.concatenate([fives, ones], axis=-1).astype(np.int8) - 1)


def _dequantise_iq2_bn(blocks: np.ndarray) -> np.ndarray:
    return blockwise(load_float(blocks), planes(blocks[:, 4:], 2).astype(np.int8) - 1)


IQ1_BN = Format(_dequantise_iq1_bn)
IQ2_BN = Format(_dequantise_iq2_bn)
