"""Trellis types of ik_llama.cpp: levels come from a random number generator, which an index starts.

A group of eight or four weights has an index of 13 to 16 bits. The generator multiplies it modulo ``2 ** 32`` once for
every weight; a level is the sum of the four bytes of the number, six bits of each, less 126: an integer from -126 to
126. A row begins with a float, which here stands before every block. Layouts follow ``iqk_quantize.cpp`` of
ik_llama.cpp, commit 8337e4cd.
"""

import numpy as np

from pymla.reference.formats.bits import load, planes
from pymla.reference.formats.format import Codes, coded, format_of_codes
from pymla.reference.formats.ik_quants import load_float
from pymla.reference.formats.iq_quants import IQ4_VALUES

_FACTOR = np.uint32(0xCBAC1FED)
_OFFSET = 4096
_SIX_BITS_OF_BYTES = np.uint32(0x3F3F3F3F)


def levels(starts: np.ndarray, count: int) -> np.ndarray:
    """Levels of `count` weights for each start: uint32 (..., groups) become int16 (..., groups, count)."""
    powers = np.cumprod(np.full(count, _FACTOR))  # modulo 2 ** 32
    numbers = starts[..., None] * powers.astype(np.uint32) & _SIX_BITS_OF_BYTES
    return numbers[..., None].view(np.uint8).sum(axis=-1, dtype=np.int16) - np.int16(126)


def _starts(indices: np.ndarray, offset: np.ndarray | int = _OFFSET) -> np.ndarray:
    return indices.astype(np.uint32) + np.asarray(offset, np.uint32)


def _iq1_kt(blocks: np.ndarray) -> Codes:
    heads, low, high = np.split(blocks[:, 4:], [8, 40], axis=-1)
    top = planes(heads[..., None], 1)[:, :, 4:].reshape(-1, 32).astype(np.uint16)
    indices = low | planes(high, 4).reshape(-1, 32).astype(np.uint16) << 8 | top << 12
    scales = load_float(blocks) * IQ4_VALUES[heads & 15].astype(np.float32)
    return coded(scales, levels(_starts(indices), 8))


def _iq2_kt(blocks: np.ndarray) -> Codes:
    scales = load_float(blocks) * IQ4_VALUES[planes(blocks[:, 4:8], 4)].reshape(-1, 8).astype(np.float32)
    return coded(scales, levels(_starts(load(blocks, 8, 32, np.uint16)), 8))


def _iq3_kt(blocks: np.ndarray) -> Codes:
    """Levels are magnitudes; signs are bits of their own."""
    scales = load_float(blocks) * planes(blocks[:, 4:8], 4).reshape(-1, 8).astype(np.float32)
    magnitudes = np.abs(levels(_starts(load(blocks, 8, 32, np.uint16)), 8)).reshape(-1, 256)
    is_negative = planes(blocks[:, 72:], 1).reshape(-1, 256) == 1
    return coded(scales, np.where(is_negative, -magnitudes, magnitudes))


def _iq4_kt(blocks: np.ndarray) -> Codes:
    """A word for 32 weights has a bit that moves the generator's start, a scale, and the top three bits of indices."""
    words, low, high = load(blocks, 4, 8, np.uint32), blocks[:, 36:100], planes(blocks[:, 100:], 4).reshape(-1, 64)
    top = (words[..., None] >> np.arange(8, 32, 3, dtype=np.uint32) & 7).reshape(-1, 64)
    indices = low | high.astype(np.uint32) << 8 | top << 12
    offset = np.repeat(_OFFSET + (words & 1) * np.uint32(32768), 8, axis=-1)
    scales = load_float(blocks) * ((words >> 1 & 127).astype(np.float32) - 64)
    return coded(scales, levels(_starts(indices, offset), 4))


IQ1_KT = format_of_codes(_iq1_kt)
IQ2_KT = format_of_codes(_iq2_kt)
IQ3_KT = format_of_codes(_iq3_kt)
IQ4_KT = format_of_codes(_iq4_kt)
