"""Blocks of random weights in every type, drawn as bits: a quantiser would take hours for a large model."""

import functools
import statistics
from collections.abc import Iterator

import numpy as np

from pymla import ggml
from pymla.reference.quant import quantise

#: Bytes that are drawn at a time.
CHUNK_BYTES = 8 << 20


def bits_of(seed: int, name: str) -> np.random.SFC64:
    """Random bits of a tensor. SFC64 gives 2.7 GB/s, more than a disk takes."""
    return np.random.SFC64(np.random.SeedSequence([seed, *name.encode()]))


def normal(seed: int, name: str, size: int) -> np.ndarray:
    """Standard normal numbers of a tensor."""
    return np.random.Generator(bits_of(seed, name)).standard_normal(size, np.float32)


def random_blocks(seed: int, name: str, count: int, qtype: int, std: float) -> Iterator[np.ndarray]:
    """Bytes of `count` weights of mean 0 and standard deviation `std`, in pieces."""
    bits = bits_of(seed, name)
    fill = _FILL[qtype]
    blocks = count // ggml.BLOCK_SIZE[qtype]
    step = CHUNK_BYTES // ggml.BLOCK_BYTES[qtype]
    for start in range(0, blocks, step):
        yield fill(bits, min(step, blocks - start), qtype, std)


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


def _floats(bits: np.random.SFC64, count: int, qtype: int, std: float) -> np.ndarray:
    width = ggml.BLOCK_BYTES[qtype]
    table = quantise(_quantiles() * np.float32(std), qtype).view(np.dtype(f"u{width}"))
    return table[_raw(bits, count, 2).view(np.uint16)[:, 0]]


def _scales(size: float, signed: bool) -> np.ndarray:
    """256 block scales of root mean square `size`, from half to three halves of it."""
    scales = np.linspace(0.5, 1.5, 256)
    if signed:
        scales[1::2] *= -1
    return (scales * size / np.sqrt(np.mean(scales**2))).astype(np.float16)


# The codes are uniform. Their mean is half a step below zero, which would give every matrix one direction that it
# amplifies far above the others; scales of random sign cancel it, and real files have scales of both signs too.


def _blocks(
    bits: np.random.SFC64, count: int, qtype: int, std: float, mean_square: float, minimum: float | None = None
) -> np.ndarray:
    """Blocks of uniform codes of a mean square, or of a variance where each block has a minimum in units of its
    scale."""
    blocks = _raw(bits, count, ggml.BLOCK_BYTES[qtype])
    d = _scales(std / np.sqrt(mean_square), signed=minimum is None)[blocks[:, 0]]
    halves = [d]
    if minimum is not None:
        halves.append((d.astype(np.float32) * np.float32(minimum)).astype(np.float16))
    blocks[:, : 2 * len(halves)] = np.stack(halves, axis=1).view(np.uint8)
    return blocks


def _blocks_q8_0(bits: np.random.SFC64, count: int, qtype: int, std: float) -> np.ndarray:
    blocks = _raw(bits, count, 34)
    d = _scales(std / np.sqrt(127 * 128 / 3), signed=True)[blocks[:, 0]]
    codes = blocks[:, 2:].view(np.int8)
    np.maximum(codes, -127, out=codes)  # no quantiser writes -128
    blocks[:, :2] = d[:, None].view(np.uint8)
    return blocks


def _blocks_q6_k(bits: np.random.SFC64, count: int, qtype: int, std: float) -> np.ndarray:
    blocks = _raw(bits, count, 210)
    scales = blocks[:, 192:208]
    # From ±64 to ±127; 341.5 is the mean square of the codes -32..31.
    scales[...] = np.where(scales & 1, 64 + (scales >> 2), 192 - (scales >> 2))
    mean_square = np.mean(np.arange(64, 128) ** 2)
    d = _scales(std / np.sqrt(341.5 * mean_square), signed=True)[blocks[:, 208]]
    blocks[:, 208:] = d[:, None].view(np.uint8)
    return blocks


_FILL = {
    ggml.F32: _floats,
    ggml.F16: _floats,
    ggml.BF16: _floats,
    ggml.Q4_0: functools.partial(_blocks, mean_square=21.5),  # of -8..7
    ggml.Q4_1: functools.partial(_blocks, mean_square=21.25, minimum=-7.5),  # the variance of 0..15
    ggml.Q8_0: _blocks_q8_0,
    ggml.Q6_K: _blocks_q6_k,
}
