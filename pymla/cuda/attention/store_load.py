"""Moving rows into and out of the cache: each thread takes a value."""

import functools

import numpy as np
from numba import cuda

from pymla import ggml
from pymla.cuda.attention.cache_rows import CACHE_ROWS
from pymla.cuda.attention.mixed_rows import mixed
from pymla.cuda.attention.tiles import THREADS
from pymla.cuda.machine.ptx import valid_index
from pymla.cuda.runtime.array_types import I1, I32, STRIDED2, addresses
from pymla.cuda.runtime.jit import kernel
from pymla.pages import PAGE, READ

#: ggml types of the rows that are stored, by their NumPy type.
SOURCES = {"float32": ggml.F32, "float16": ggml.F16}


@functools.cache
def store_kernel(qtype, source):
    """The kernel that writes rows of "float32" or "float16" in a cache type."""
    read, write = CACHE_ROWS[SOURCES[source]].one, CACHE_ROWS[qtype].write

    @kernel(
        addresses(2), I32, I1, addresses(3),
        variant=f"{ggml.NAME[SOURCES[source]]},{ggml.NAME[qtype]}".lower(), max_threads=THREADS,
    )  # fmt: skip
    def store(source, width, slots, cache):
        """`source`: address and bytes from row to row; `cache`: the same, and slots. Grid: tokens, columns."""
        t, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        slot = slots[t]
        # Whole warps are inside, wherever a row has blocks of 32.
        if i < width and valid_index(slot, cache[2]) == slot:
            write(cache[0] + slot * cache[1], i, read(source[0] + t * source[1], i))

    return store


@functools.cache
def load_kernel(qtype):
    """The kernel that reads rows of a cache type as float32."""
    read, is_mixed = CACHE_ROWS[qtype].one, CACHE_ROWS[qtype].mixed

    @kernel(addresses(3), I1, STRIDED2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def load(cache, block_table, out):
        """`cache`: address, bytes from row to row, and slots. Grid: positions, columns."""
        p, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if i < out.shape[1]:
            slot = valid_index(block_table[p // PAGE], cache[2] // PAGE) * PAGE + p % PAGE
            x = read(cache[0] + slot * cache[1], i)
            # Blocks of 32 columns are warps.
            out[p, i] = mixed(x, i & 31) * np.float32(READ) if is_mixed else x

    return load
