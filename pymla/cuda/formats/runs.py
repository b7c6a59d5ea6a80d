"""Runs of blocks that kernels copy to shared memory while they compute (``cp.async``).

A run is copied in the pieces of 16 bytes that lie around it. The first and the last piece may hold bytes of other rows,
or of no row: allocations are multiples of 512 bytes (`pymla.cuda.memory`).
"""

from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cuda.machine.ptx import cp_async_16
from pymla.cuda.runtime.jit import device


class Run(NamedTuple):
    """Blocks of 32 weights of a row that follow each other."""

    blocks: int
    nbytes: int
    pieces: int  # of 16 bytes, where they lie anywhere

    @classmethod
    def of(cls, qtype, blocks):
        """`blocks` blocks of a type, or as few more as its own blocks take."""
        blocks = max(blocks, ggml.BLOCK_SIZE[qtype] // 32)
        nbytes = ggml.row_bytes(qtype, 32 * blocks) - ggml.ROW_HEADER[qtype]
        # Runs begin at any byte of 16, or at an even one.
        last = 15 if ggml.BLOCK_BYTES[qtype] % 2 else 14
        return cls(blocks, nbytes, -(-(nbytes + last) // 16))


def copying(run, step):
    """A device function (to, start, nbytes, first): begins to copy the first `nbytes` bytes of a run at address `start`
    to shared memory. Of the pieces of 16 bytes that hold them it copies those from number `first`, which is below
    `step`, on, `step` apart. The first byte comes to ``to + start % 16``, where `to` is a multiple of 16."""
    most = -(-run.pieces // step)

    @device
    def copy(to, start, nbytes, first):
        skip = start & 15
        for k in range(most):
            piece = 16 * (first + step * k)
            # 32 bits are enough, and half as many instructions.
            if np.int32(piece) < np.int32(skip + nbytes):
                cp_async_16(to + piece, start - skip + piece, 16)

    return copy
