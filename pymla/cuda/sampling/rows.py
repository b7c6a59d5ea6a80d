"""Rows of logits: summaries of their segments, and sums and maxima that the threads of a block take together."""

import math

import numpy as np
from numba import cuda

from pymla.constants import LOG2E
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import F2
from pymla.cuda.runtime.jit import device, kernel

#: Logits that a warp summarises.
SEGMENT = 128

#: Threads of the block that chooses a row's token; a power of two.
THREADS = 512

#: Threads, and segments, of a block that summarises.
SUMMARY_THREADS, SUMMARY_WARPS = 128, 4

ZERO = np.float32(0)

INFINITY = np.float32(np.inf)

LOG2E_F32 = np.float32(LOG2E)

_LN2 = np.float32(math.log(2))

#: The low half of an int64.
WORD = 0xFFFFFFFF


@device
def _logit(logits, t, i):
    """A logit. NaN counts as +inf, tokens past the vocabulary as −inf."""
    if i >= logits.shape[1]:
        return -INFINITY
    x = logits[t, i]
    return x if x < INFINITY else INFINITY


@kernel(F2, F2, F2, max_threads=SUMMARY_THREADS)
def segments(logits, maxima, sums):
    """A warp for each segment: its maximum, and the sum of exp(logit − maximum)."""
    t, segment = cuda.blockIdx.y, cuda.blockIdx.x * SUMMARY_WARPS + (cuda.threadIdx.x >> 5)
    if segment >= maxima.shape[1]:
        return
    i = segment * SEGMENT + ptx.lane()
    x0, x1 = _logit(logits, t, i), _logit(logits, t, i + 32)
    x2, x3 = _logit(logits, t, i + 64), _logit(logits, t, i + 96)
    most = ptx.warp_max(max(max(x0, x1), max(x2, x3)))
    base = most if most > -INFINITY else ZERO
    total = ptx.exp2((x0 - base) * LOG2E_F32) + ptx.exp2((x1 - base) * LOG2E_F32)
    total += ptx.exp2((x2 - base) * LOG2E_F32) + ptx.exp2((x3 - base) * LOG2E_F32)
    total = ptx.warp_sum(total)
    if ptx.lane() == 0:
        maxima[t, segment] = most
        sums[t, segment] = total


@device
def block_max(x, parts):
    """The maximum over the block for all threads; `parts` float32 (32,) in shared memory."""
    x = ptx.warp_max(x)
    cuda.syncthreads()  # until the last result has been read
    if ptx.lane() == 0:
        parts[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    for i in range(THREADS >> 5):
        x = max(x, parts[i])
    return x


@device
def block_sum_f32(x, parts):
    """The sum over the block for all threads, always in the same order."""
    x = ptx.warp_sum(x)
    cuda.syncthreads()
    if ptx.lane() == 0:
        parts[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    total = ZERO
    for i in range(THREADS >> 5):
        total += parts[i]
    return total


@device
def block_sum(value, parts):
    """The sum of int64 over the block for all threads; `parts` int64 (32,) in shared memory."""
    mask = 16
    while mask:
        low, high = ptx.shfl_xor(value & WORD, mask), ptx.shfl_xor(value >> 32, mask)
        value += high << 32 | low & WORD
        mask >>= 1
    cuda.syncthreads()
    if ptx.lane() == 0:
        parts[cuda.threadIdx.x >> 5] = value
    cuda.syncthreads()
    total = 0
    for i in range(THREADS >> 5):
        total += parts[i]
    return total


@device
def row_maximum(maxima, t, parts):
    most = -INFINITY
    for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
        most = max(most, maxima[t, s])
    return block_max(most, parts)


@device
def row_normaliser(maxima, sums, t, most, parts):
    """The logarithm of the sum of exponentials of a row."""
    total = ZERO
    for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
        total += sums[t, s] * ptx.exp2((maxima[t, s] - most) * LOG2E_F32)
    return most + ptx.log2(block_sum_f32(total, parts)) * _LN2
