"""Values of cache rows of every type: one, or four neighbours, at a time.

The functions give device functions for a type; a row is its address. For products on tensor cores rows go through
shared memory instead (`pymla.cuda.attention.tiles`).
"""

import numpy as np

from pymla import ggml
from pymla.cuda.formats import FLOATS, code_values, unaligned_word
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import device

__all__ = ["read_four", "read_one", "write_one"]


def read_one(qtype):
    """A device function (row, i): value i, as float32."""
    if qtype == ggml.Q8_0:
        return _read_q8_0
    one, _, nbytes = FLOATS[qtype]

    @device
    def read(row, i):
        return one(row + nbytes * i)

    return read


def read_four(qtype):
    """A device function (row, i): values 4 i to 4 i + 3, as float32."""
    if qtype == ggml.Q8_0:
        return _read_four_q8_0
    _, four, nbytes = FLOATS[qtype]

    @device
    def read(row, i):
        return four(row + 4 * nbytes * i)

    return read


def write_one(qtype):
    """A device function (row, i, x) that rounds x to value i. A warp writes a block of q8_0 together, lane by lane."""
    return _WRITE[qtype]


@device
def _read_q8_0(row, i):
    block = row + 34 * (i >> 5)
    return ptx.load_f16(block) * ptx.to_f32(ptx.load_i8(block + 2 + (i & 31)))


@device
def _read_four_q8_0(row, i):
    block = row + 34 * (i >> 3)
    d = ptx.load_f16(block)
    x0, x1, x2, x3 = code_values(unaligned_word(block + 2 + 4 * (i & 7)))
    return d * x0, d * x1, d * x2, d * x3


@device
def _write_f32(row, i, x):
    ptx.store_f32(row + 4 * i, x)


@device
def _write_f16(row, i, x):
    ptx.store_f16(row + 2 * i, x)


@device
def _write_bf16(row, i, x):
    ptx.store_bf16(row + 2 * i, x)


@device
def _write_q8_0(row, i, x):
    block = row + 34 * (i >> 5)
    d = ptx.div(ptx.warp_max(abs(x)), np.float32(127))
    inverse = ptx.div(np.float32(1), d) if d > np.float32(0) else np.float32(0)
    scaled = x * inverse
    # ggml rounds halves away from zero.
    code = int(abs(scaled) + np.float32(0.5))
    ptx.store_u8(block + 2 + (i & 31), code if scaled > np.float32(0) else -code)
    if i & 31 == 0:
        ptx.store_f16(block, d)


_WRITE = {ggml.F32: _write_f32, ggml.F16: _write_f16, ggml.BF16: _write_bf16, ggml.Q8_0: _write_q8_0}
