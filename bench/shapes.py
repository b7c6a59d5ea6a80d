"""Inputs of the benchmarks, in the sizes of DeepSeek-V2-Lite."""

from itertools import cycle

import numpy as np
from cases import random_qtensor

from pymla.cpu.limits import STREAM_BYTES
from pymla.tensor import QTensor

HIDDEN, HEADS, RANK, NOPE, ROPE, V = 2048, 16, 512, 128, 64, 128
EXPERTS, USED, INNER = 64, 6, 1408

#: Rows and columns of the model's matrices.
MATRICES = {
    "query": (HEADS * (NOPE + ROPE), HIDDEN),
    "latent": (RANK + ROPE, HIDDEN),
    "kv_b": (HEADS * (NOPE + V), RANK),
    "attention output": (HIDDEN, HEADS * V),
    "dense up": (10944, HIDDEN),
    "dense down": (HIDDEN, 10944),
    "shared up": (2 * INNER, HIDDEN),
    "shared down": (HIDDEN, 2 * INNER),
    "output": (102400, HIDDEN),
}

#: Bytes of weights that are gone through before one is used again: they come from memory, as in a whole model.
COLD = STREAM_BYTES


def normal(*shape, seed=0):
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def matrix(qtype, *shape):
    """A random matrix, or several; rows repeat after 512, so that large ones are made quickly."""
    rows = int(np.prod(shape[:-1]))
    some = random_qtensor(qtype, min(rows, 512), shape[-1]).data
    data = np.resize(some, (rows, some.shape[1]))
    return QTensor(qtype, data.reshape(*shape[:-1], -1))


def copies(w):
    """A matrix, and so many copies that together they do not fit the processor's caches."""
    count = max(1, -(-COLD // w.data.nbytes))
    return [w, *(QTensor(w.qtype, w.data.copy()) for _ in range(count - 1))]


def cold(w):
    """The same without an end."""
    return cycle(copies(w))
