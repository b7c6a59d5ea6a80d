"""The likeliest token of a row."""

import numpy as np
from numba import cuda

from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import F2, I2
from pymla.cuda.runtime.jit import kernel
from pymla.cuda.sampling.rows import INFINITY, SEGMENT, THREADS, row_maximum, row_normaliser


@kernel(F2, F2, F2, I2, max_threads=THREADS)
def greedy(logits, maxima, sums, out):
    """A block for each row: the first segment with the row's maximum, and the first token with it there."""
    floats = cuda.shared.array(32, np.float32)
    best = cuda.shared.array(2, np.int32)
    t = cuda.blockIdx.x
    if cuda.threadIdx.x == 0:
        best[0] = maxima.shape[1]
        best[1] = logits.shape[1]
    most = row_maximum(maxima, t, floats)
    normaliser = row_normaliser(maxima, sums, t, most, floats)
    for s in range(cuda.threadIdx.x, maxima.shape[1], THREADS):
        if maxima[t, s] == most:
            cuda.atomic.min(best, 0, s)
            break
    cuda.syncthreads()
    first = best[0] * SEGMENT
    for i in range(first + cuda.threadIdx.x, min(first + SEGMENT, logits.shape[1]), THREADS):
        if logits[t, i] == most:
            cuda.atomic.min(best, 1, i)
            break
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        number = most > -INFINITY and most < INFINITY
        out[t, 0] = best[1] if number else -1
        out[t, 1] = ptx.as_word(most - normaliser)
