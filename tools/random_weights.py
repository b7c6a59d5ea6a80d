"""Blocks of random weights in every type, drawn as bits: a quantiser would take hours for a large model.

Codes and the small integer scales of a block are any bits. The floats that they are multiplied by (`ggml.SCALES`) are
set afterwards, so that the weights have the standard deviation that is asked for.
"""

import functools
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from pymla import ggml
from pymla.reference.formats import dequantise_rows
from pymla.reference.quant import quantise

#: Bytes that are drawn at a time.
CHUNK_BYTES = 8 << 20

#: Blocks that a type's weights are measured on.
_SAMPLE = 1024

#: Types with a code of -128, which no quantiser writes, and the byte that it is.
_LOWEST_CODE = {
    **dict.fromkeys((ggml.Q8_0, ggml.Q8_KV, ggml.Q8_0_R8, ggml.Q8_KV_R8, ggml.Q8_K_R8), 0x80),
    ggml.Q8_K_R16: 0,
}
#: Types of -1, 0 and 1 with a scale for a row, which cannot balance codes of 2 as scales of both signs would.
_TERNARY = (ggml.IQ2_BN, ggml.IQ2_BN_R4)


def bits_of(seed: int, name: str) -> np.random.SFC64:
    """Random bits of a tensor. SFC64 gives 2.7 GB/s, more than a disk takes."""
    return np.random.SFC64(np.random.SeedSequence([seed, *name.encode()]))


def normal(seed: int, name: str, size: int) -> np.ndarray:
    """Standard normal numbers of a tensor."""
    return np.random.Generator(bits_of(seed, name)).standard_normal(size, np.float32)


def random_blocks(seed: int, name: str, shape: Sequence[int], qtype: int, std: float) -> Iterator[np.ndarray]:
    """Bytes of a tensor of mean 0 and standard deviation `std`, in pieces: uint8 arrays (n, bytes).

    Parameters
    ----------
    seed : int
    name : str
        Of the tensor: another name gives other weights.
    shape : sequence of int
        NumPy order: rows have ``shape[-1]`` weights.
    qtype : int
        Any type of docs/types.md.
    std : float

    Raises
    ------
    PymlaError
        The type's block does not fit the rows.
    """
    bits, unit = bits_of(seed, name), ggml.unit_bytes(qtype, shape[-1])
    units = ggml.tensor_bytes(qtype, tuple(shape)) // unit
    step = max(1, CHUNK_BYTES // unit)
    for start in range(0, units, step):
        count = min(step, units - start)
        plain = ggml.plain_type(qtype)
        if plain in ggml.FLOATS:
            yield _floats(bits, count * unit, plain, std)
        else:
            yield _set_scales(_codes(bits, count, unit, qtype), qtype, std)


def _raw(bits: np.random.SFC64, count: int, width: int) -> np.ndarray:
    """`count` rows of `width` random bytes."""
    nbytes = count * width
    return bits.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes].reshape(count, width)


@functools.cache
def _quantiles() -> np.ndarray:
    """65,536 equally probable values of the normal distribution: random 16-bit integers pick from them."""
    normal = statistics.NormalDist()
    values = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    return (values / values.std()).astype(np.float32)


def _floats(bits: np.random.SFC64, nbytes: int, qtype: int, std: float) -> np.ndarray:
    """`nbytes` bytes of a float type, a weight in each row."""
    width = ggml.BLOCK_BYTES[qtype]
    table = quantise(_quantiles() * np.float32(std), qtype).view(np.dtype(f"u{width}"))
    return table[_raw(bits, nbytes // width, 2).view(np.uint16)[:, 0]]


def _codes(bits: np.random.SFC64, count: int, width: int, qtype: int) -> np.ndarray:
    """`count` blocks, or rows with a header, of `width` bytes: codes that occur, and any bits where scales belong."""
    units = _raw(bits, count, width)
    if qtype in _LOWEST_CODE:
        units += units == _LOWEST_CODE[qtype]
    if qtype in _TERNARY:
        pairs = units[:, ggml.ROWS_TOGETHER[qtype] * ggml.ROW_HEADER[qtype] :]
        pairs &= ~(pairs << 1 & pairs & 0xAA)  # 3 becomes 1
    if qtype == ggml.Q8_KV:  # behind the scale is the sum of the row's codes
        units[:, 4:8].view(np.int32)[:, 0] = units[:, 8:].view(np.int8).sum(axis=1, dtype=np.int32)
    return units


def _set_scales(units: np.ndarray, qtype: int, std: float) -> np.ndarray:
    """The same units with scales, and minima, for weights of a standard deviation."""
    size, minimum = _measured(qtype)
    return put_scales(units, qtype, _table(ggml.SCALES[qtype].kind, std / size, signed=not _has_minima(qtype)), minimum)


def _has_minima(qtype: int) -> bool:
    scales = ggml.SCALES[ggml.plain_type(qtype)]
    return (scales.kind, scales.numbers) == ("f16", 2)


def put_scales(units: np.ndarray, qtype: int, table: np.ndarray, minimum: float) -> np.ndarray:
    """Set the scales of blocks, or of rows with a header: each is picked from 256 by the byte where it begins.

    Parameters
    ----------
    units : uint8 array (n, ``ggml.unit_bytes``), which is written to and returned
    qtype : int
    table : array (256,) of the dtype of ``ONE[ggml.SCALES[qtype].kind]``
    minimum : float
        Minima in units of their scales, of a type with minima.
    """
    kind, first, count = ggml.SCALES[qtype]
    scales = count // 2 if _has_minima(qtype) else count
    chosen = table[units[:, first : first + scales]]
    if kind == "nibbles":
        words = units[:, first : first + 8].view(np.uint16)
        words &= 0x0FFF
        words |= chosen.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) << 12
        return units
    if _has_minima(qtype):
        chosen = np.concatenate([chosen, (chosen.astype(np.float32) * np.float32(minimum)).astype(np.float16)], axis=1)
    raw = chosen.view(np.uint8)
    units[:, first : first + raw.shape[1]] = raw
    return units


#: The number 1 as the scales of a block have it.
ONE = {
    "f16": np.float16(1),
    "f32": np.float32(1),
    "nibbles": np.float16(1),
    "e8m0": np.uint8(127),
    "e4m3": np.uint8(0x38),
}


# Codes are uniform, and the mean of most is half a step below zero, which would give every matrix one direction that it
# amplifies far above the others; scales of random sign cancel it, and real files have scales of both signs too.


def _table(kind: str, size: float, signed: bool) -> np.ndarray:
    """256 scales of root mean square `size`: floats from half to three halves of it, or the two numbers of 8 bits that
    are next to it, as often as it takes."""
    if kind in ("e8m0", "e4m3"):
        numbers = _eight_bits(kind)
        below = int(np.searchsorted(numbers, size, "right")) - 1
        low, high = numbers[below : below + 2] ** 2
        above = round(256 * (size**2 - low) / (high - low))
        return np.repeat(np.array([below + 1, below], np.uint8), [above, 256 - above])
    scales = np.linspace(0.5, 1.5, 256)
    if signed:
        scales[1::2] *= -1
    return (scales * size / np.sqrt(np.mean(scales**2))).astype(ONE[kind].dtype)


@functools.cache
def _eight_bits(kind: str) -> np.ndarray:
    """The scales that bytes stand for, ascending, but infinity and NaN."""
    qtype, codes = {"e8m0": (ggml.MXFP4, 255), "e4m3": (ggml.NVFP4, 127)}[kind]
    blocks = np.full((codes, ggml.BLOCK_BYTES[qtype]), 0x22, np.uint8)  # codes of 1
    blocks[:, : ggml.SCALES[qtype].numbers] = np.arange(codes)[:, None]
    return dequantise_rows(blocks, qtype, ggml.BLOCK_SIZE[qtype])[:, 0].astype(np.float64)


@functools.cache
def _measured(qtype: int) -> tuple[float, float]:
    """The standard deviation of weights whose scales are 1, and the minimum that makes their mean 0."""
    columns = ggml.BLOCK_SIZE[qtype] * (4 if ggml.ROW_HEADER[qtype] else 1)
    width = ggml.unit_bytes(qtype, columns)
    units = _codes(bits_of(0, "sample"), _SAMPLE, width, qtype)
    one = np.full(256, ONE[ggml.SCALES[qtype].kind])

    def weights(table: np.ndarray, minimum: float) -> np.ndarray:
        data = put_scales(units.copy(), qtype, table, minimum).reshape(-1, ggml.row_bytes(qtype, columns))
        return dequantise_rows(data, qtype, columns).astype(np.float64)

    minimum = 0.0
    if _has_minima(qtype):
        # The mean of the scales' part, and of the minima's.
        mean = weights(one, 0).mean()
        minimum = float(mean / (mean - weights(one, 1).mean()))
    return float(np.sqrt(np.mean(weights(one, minimum) ** 2))), minimum
