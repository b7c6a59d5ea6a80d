"""Values of tensors that no sound file has: NaN, infinity, and zeros where a download has not written yet.

Float types are checked weight by weight, quantised types by the scales of their blocks (`ggml.SCALES`): a weight is
NaN, infinite or zero if the scale of its block is. Where a row's header has the scale, the row is the block; where rows
lie together, a block has a part of all of them.

Zeros are harder to judge, because sound files have some. Rows of tokens that only pad the vocabulary, and experts
without use, are zero, but as whole rows. Weights too small for float16 become zero one by one, but keep their signs, or
the codes beside a scale that is zero. A hole in a file has zero bytes only, and begins and ends at a multiple of 4,096
bytes or wherever a download stopped, which is the end of a row in few cases of a hundred. So a tensor has a hole if its
weights are zero throughout, or if a run of zero bytes, `HOLE_BYTES` in whole blocks, begins or ends inside a row or
inside a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.files.gguf_reader import TensorInfo

#: The shortest run of zero bytes that counts as a hole, in as many blocks as fit.
HOLE_BYTES = 512

#: Places of a tensor that `may_have_hole` looks at.
SAMPLES = 16

#: Bytes that `scan` works on at a time.
CHUNK_BYTES = 4 << 20


class _Bits(NamedTuple):
    """Floats as unsigned integers of their size."""

    dtype: str
    magnitude: int  # mask without the sign
    infinity: int  # magnitudes from here on are infinite or NaN


_FLOAT16 = _Bits("<u2", 0x7FFF, 0x7C00)
#: By the kind of `ggml.Scales`.
_BITS = {
    "f32": _Bits("<u4", 0x7FFFFFFF, 0x7F800000),
    "f16": _FLOAT16,
    "nibbles": _FLOAT16,
    "bf16": _Bits("<u2", 0x7FFF, 0x7F80),
    # The smallest number stands for zero: only blocks of zeros have it.
    "e8m0": _Bits("u1", 0xFF, 0xFF),
    # The sign counts for nothing, and llama.cpp reads NaN as zero.
    "e4m3": _Bits("u1", 0x7F, 0x80),
}


def block_bytes(info: TensorInfo) -> int:
    """Bytes of a block as they are counted here."""
    return ggml.unit_bytes(info.qtype, info.shape[-1])


def blocks_of_row(info: TensorInfo) -> int:
    """Blocks in a row, or in as many rows as lie together."""
    return ggml.ROWS_TOGETHER[info.qtype] * ggml.row_bytes(info.qtype, info.shape[-1]) // block_bytes(info)


class Scan(NamedTuple):
    """The result of `scan`. Blocks are counted from the tensor's first on; those of float types are single weights."""

    blocks: int
    not_finite: int  # blocks that hold NaN or infinity
    first_not_finite: int | None
    zero: int  # blocks whose scales are zero
    empty: list[tuple[int, int]]  # runs of `HOLE_BYTES` or more of blocks without a bit: first, behind the last

    @property
    def is_zero(self) -> bool:
        """Whether all weights are zero."""
        return self.zero == self.blocks

    def hole(self, info: TensorInfo) -> tuple[int, int] | None:
        """The blocks of the first hole in the tensor that was looked at."""
        if self.is_zero:
            return 0, self.blocks
        row = blocks_of_row(info)
        for first, stop in self.empty:
            if first % row or stop % row or _is_torn(info, first, stop):
                return first, stop
        return None


def scan(info: TensorInfo, progress: Callable[[int], None] | None = None) -> Scan:
    """Check all of a tensor, `CHUNK_BYTES` at a time.

    Parameters
    ----------
    info : TensorInfo
        Of any type of docs/types.md.
    progress : called with the bytes done, before the first chunk and after each
    """
    size, infinity = block_bytes(info), _BITS[ggml.SCALES[info.qtype].kind].infinity
    blocks, step = info.data.size // size, max(1, CHUNK_BYTES // size)
    empty = _Runs(min(_hole_blocks(size), blocks))
    not_finite, first, zero = 0, None, 0
    report = progress or (lambda done: None)
    report(0)
    for start in range(0, blocks, step):
        data = info.data[start * size : (start + step) * size].reshape(-1, size)
        magnitudes = _magnitudes(data, info.qtype)
        if magnitudes.max() >= infinity:
            found = np.flatnonzero((magnitudes >= infinity).any(axis=1))
            not_finite += len(found)
            first = start + int(found[0]) if first is None else first
        without = _zero_blocks(magnitudes)
        if without.any():
            zero += int(without.sum())
            without[without] = ~data[without].any(axis=1)
            empty.add(start, without)
        report(min(start + step, blocks) * size)
    return Scan(blocks, not_finite, first, zero, empty.found())


def samples(info: TensorInfo) -> tuple[np.ndarray, int]:
    """Pieces that `may_have_hole` looks at: the first block of each, and their length in blocks. A small tensor is one
    piece."""
    size = block_bytes(info)
    blocks, length = info.data.size // size, _hole_blocks(size)
    if blocks <= SAMPLES * length:
        return np.zeros(1, np.int64), blocks
    return (blocks - length) * np.arange(SAMPLES) // (SAMPLES - 1), length


def may_have_hole(info: TensorInfo) -> bool:
    """Whether the weights are zero in one of `SAMPLES` pieces of `HOLE_BYTES`, spread evenly over the tensor from its
    first to its last bytes. A small tensor is looked at as a whole."""
    starts, length = samples(info)
    if len(starts) == 1:
        return scan(info).hole(info) is not None
    size = block_bytes(info)
    data = info.data.reshape(-1, size)[starts[:, None] + np.arange(length)].reshape(-1, size)
    zero = _zero_blocks(_magnitudes(data, info.qtype))
    return bool(zero.reshape(SAMPLES, length).all(axis=1).any())


def _is_torn(info: TensorInfo, first: int, stop: int) -> bool:
    """Whether zero bytes go on beyond a run of blocks, into a part of the next one. Eight of them for each row, within
    a block that has other bytes, are hardly ever codes."""
    start, end, beyond = first * block_bytes(info), stop * block_bytes(info), 8 * ggml.ROWS_TOGETHER[info.qtype]
    outside = info.data[max(0, start - beyond) : start], info.data[end : end + beyond]
    return any(len(each) == beyond and not each.any() for each in outside)


def _hole_blocks(size: int) -> int:
    """Blocks of `size` bytes that are a hole if they are zero."""
    return max(1, HOLE_BYTES // size)


def _magnitudes(data: np.ndarray, qtype: int) -> np.ndarray:
    """The scales of blocks (n, block_bytes) without their signs: (n, scales), unsigned."""
    kind, first, count = ggml.SCALES[qtype]
    dtype, magnitude, _ = _BITS[kind]
    if kind == "nibbles":
        nibbles = data[:, first : first + 8].view(dtype) >> 12 << np.array([0, 4, 8, 12], dtype)
        return np.bitwise_or.reduce(nibbles, axis=1, keepdims=True) & magnitude
    return data[:, first : first + count * np.dtype(dtype).itemsize].view(dtype) & magnitude


def _zero_blocks(magnitudes: np.ndarray) -> np.ndarray:
    """Which blocks are zero throughout, by their scales: bool (n,)."""
    return (magnitudes == 0).all(axis=1) if magnitudes.shape[1] > 1 else magnitudes[:, 0] == 0


class _Runs:
    """Runs of at least `least` true values in an array that comes piece by piece."""

    def __init__(self, least: int):
        self._least = least
        self._runs: list[tuple[int, int]] = []

    def add(self, start: int, flags: np.ndarray) -> None:
        """The values from `start` on."""
        if not flags.any():
            return
        edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
        ends = [[0]] * bool(flags[0]), [[len(flags)]] * bool(flags[-1])
        first, stop = np.concatenate([*ends[0], edges, *ends[1]]).astype(np.int64).reshape(-1, 2).T
        # Most tensors of 16-bit floats have single zeros; only a run at an end of the piece may go on in the next.
        kept = (stop - first >= self._least) | (first == 0) | (stop == len(flags))
        for run in zip((first[kept] + start).tolist(), (stop[kept] + start).tolist(), strict=True):
            joined = self._runs and self._runs[-1][1] == run[0]
            self._runs.append((self._runs.pop()[0], run[1]) if joined else run)

    def found(self) -> list[tuple[int, int]]:
        """The runs: first, behind the last."""
        return [(first, stop) for first, stop in self._runs if stop - first >= self._least]
