"""Ternary types of ik_llama.cpp for BitNet models: a row begins with its scale, which here stands before every block.

ik_llama.cpp's `dequantize_row_iq1_bn` and `dequantize_row_iq2_bn` leave the scale out, and its rows begin elsewhere;
its products apply it, as is done here.
"""

import numpy as np

from pymla.reference.formats.bits import planes
from pymla.reference.formats.format import Codes, coded, format_of_codes, load_half
from pymla.reference.formats.ik_quants import load_float
from pymla.reference.formats.ternary import trits


def _iq1_bn(blocks: np.ndarray) -> Codes:
    """Sixteen weights are five digits of each of three bytes, and one digit of the block's last byte."""
    # Digits lie lowest first here, and `trits` takes the highest first.
    fives = trits(blocks[:, 2:14])[:, ::-1].swapaxes(1, 2).reshape(-1, 4, 15)
    ones = trits(blocks[:, 14:])[:, :0:-1]
    return coded(load_half(blocks, 0), np.concatenate([fives, ones], axis=-1).astype(np.int8) - 1)


def _iq2_bn(blocks: np.ndarray) -> Codes:
    return coded(load_float(blocks), planes(blocks[:, 4:], 2).astype(np.int8) - 1)


IQ1_BN = format_of_codes(_iq1_bn)
IQ2_BN = format_of_codes(_iq2_bn)
