"""Types of one or two bits: a scale for codes of which there are two, three or four."""

import numpy as np

from pymla.reference.formats.bits import fields, planes
from pymla.reference.formats.format import Codes, coded, format_of_codes, load_half

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def trits(packed: np.ndarray, count: int = 5) -> np.ndarray:
    """Digits 0, 1 and 2 of the numbers of five of them that bytes hold, highest first.

    A byte is the number times 256 / 243, rounded up: multiplied by a power of 3 modulo 256, its leading digit is what
    three times it carries over.

    Parameters
    ----------
    packed : uint8 array (..., m)
    count : int
        How many digits are taken of each.

    Returns
    -------
    uint8 array (..., count, m)
    """
    moved = packed[..., None, :] * _POWERS[:count, None]
    return (moved.astype(np.uint16) * 3 >> 8).astype(np.uint8)


def _tq1_0(blocks: np.ndarray) -> Codes:
    parts = (trits(blocks[:, :32]), trits(blocks[:, 32:48]), trits(blocks[:, 48:52], 4))
    codes = np.concatenate([part.reshape(len(blocks), part.shape[1] * part.shape[2]) for part in parts], axis=-1)
    return coded(load_half(blocks, 52), codes.astype(np.int8) - 1)


def _tq2_0(blocks: np.ndarray) -> Codes:
    codes = planes(blocks[:, :64].reshape(-1, 2, 32), 2)
    return coded(load_half(blocks, 64), codes.astype(np.int8) - 1)


def _q1_0(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), 2 * fields(blocks[:, 2:], 1).astype(np.int8) - 1)


def _q2_0(blocks: np.ndarray) -> Codes:
    return coded(load_half(blocks, 0), fields(blocks[:, 2:], 2).astype(np.int8) - 1)


TQ1_0 = format_of_codes(_tq1_0)
TQ2_0 = format_of_codes(_tq2_0)
Q1_0 = format_of_codes(_q1_0)
Q2_0 = format_of_codes(_q2_0)
