"""A step and a cache as kernels of attention take them, and reading their indices.

Indices lie on the device, where no check sees them before a kernel runs. So every index is read through a function
here: one that is out of range counts as the last one in range, and no kernel reads outside the cache, the tables or the
keys, whatever a step holds. Kernels read positions and tables themselves, so that a recorded step can be replayed.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cuda.machine.ptx import valid_index
from pymla.cuda.memory import DeviceArray
from pymla.cuda.runtime.array_types import I1, I2, I64
from pymla.cuda.runtime.jit import device
from pymla.errors import PymlaError
from pymla.pages import PAGE, Step
from pymla.tensor import QTensor


class StepArrays(NamedTuple):
    """The arrays of a `pymla.pages.Step` that attention reads."""

    positions: DeviceArray  # int32 (T,)
    seq_of: DeviceArray  # int32 (T,)
    tables: DeviceArray  # int32 (B, pages)

    @classmethod
    def of(cls, step: Step) -> "StepArrays":
        return cls(step.positions, step.seq_of, step.block_tables)

    @property
    def longest(self) -> int:
        """Positions that the tables have room for."""
        return self.tables.shape[1] * PAGE


class CachePair(NamedTuple):
    """Two arrays of rows that the same slots address: latent and rope parts, or keys and values."""

    first: int  # address
    second: int
    pages: int

    @classmethod
    def of(cls, first: QTensor, second: QTensor) -> "CachePair":
        return cls(first.data.address, second.data.address, len(first.data) // PAGE)


STEP = types.NamedTuple((I1, I1, I2), StepArrays)
CACHE = types.NamedUniTuple(I64, 3, CachePair)
#: Results as kernels write them (`place`).
PLACE = types.UniTuple(I64, 3)


def place(out: DeviceArray) -> tuple[int, int, int]:
    """Results float32 (T, H, v) as kernels write them: the address, and bytes from token to token and head to head.

    `out` may be part of an array with more tokens and heads: the last axis is contiguous.
    """
    token, head, item = out.strides
    if out.dtype != np.float32 or item != 4 or token % 8 or head % 8 or out.address % 8:
        raise PymlaError(
            f"out is {out.dtype} with strides {out.strides} at byte {out.address}; "
            "float32 at multiples of 8 bytes, contiguous along the last axis, is expected"
        )
    return out.address, token, head


@device
def seen_by(step, t):
    """Positions that token t sees: from 1 to all that the tables have room for."""
    return valid_index(step.positions[t], step.tables.shape[1] * PAGE) + 1


@device
def sequence_of(step, t):
    """The row of the tables for token t."""
    return valid_index(step.seq_of[t], step.tables.shape[0])


@device
def first_slot(step, sequence, page, cache):
    """The first slot of a page of a sequence."""
    return valid_index(step.tables[sequence, page], cache.pages) * PAGE


@device
def sequence_run(seq_of, begin, end, number):
    """The tokens of a sequence, the one with a number among those of tokens `begin` to `end`: the first, and the one
    behind the last; none where there are fewer sequences."""
    start = stop = begin
    for _ in range(number + 1):
        start = stop
        while stop < end and seq_of[stop] == seq_of[start]:
            stop += 1
    return start, stop
