"""Activations become int8 with a scale per 32 of them, once for all matrices that read them."""

import numpy as np
from numba import cuda, types

from pymla.cuda.machine.ptx import (
    as_f32,
    as_word,
    div,
    dp4a,
    group_max,
    group_sum,
    load_f32x4,
    nearest_int,
    store_f32x2,
    store_u32,
    to_f32,
)
from pymla.cuda.matmul.operands import THREADS
from pymla.cuda.runtime.jit import device, kernel

#: Blocks of 32 activations that a block of threads quantises: eight lanes take one.
BLOCKS = THREADS // 8


@kernel(types.int64, types.int64, types.int64, types.int64, max_threads=THREADS)
def quantise_activations(x, codes, scales, blocks):
    """`blocks` of 32 activations, counted over all tokens, as int8 (`reference.quant.quantise_activations`)."""
    i, part = cuda.blockIdx.x * BLOCKS + cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
    x0, x1, x2, x3 = load_f32x4(x + 128 * min(i, blocks - 1) + 16 * part)
    quantise_four(x0, x1, x2, x3, codes + 32 * i + 4 * part, scales + 8 * i, part, i < blocks)


@device
def quantise_four(x0, x1, x2, x3, codes, scales, part, inside):
    """Four of the 32 activations of eight neighbouring lanes, of which this is number `part`: the address of its codes,
    that of the block's two numbers, and whether they are written."""
    # Magnitudes compare as their bits do, and NaN is above all of them: it becomes the scale.
    largest = max(max(_magnitude(x0), _magnitude(x1)), max(_magnitude(x2), _magnitude(x3)))
    maximum = as_f32(group_max(largest, 8))
    scale = div(maximum, np.float32(127))
    inverse = div(np.float32(127), maximum) if maximum != np.float32(0) else np.float32(0)
    c0, c1 = nearest_int(x0 * inverse) & 255, nearest_int(x1 * inverse) & 255
    c2, c3 = nearest_int(x2 * inverse) & 255, nearest_int(x3 * inverse) & 255
    word = c0 | c1 << 8 | c2 << 16 | c3 << 24
    total = group_sum(dp4a(word, 0x01010101, 0), 8)
    if inside:
        store_u32(codes, word)
        if part == 0:
            store_f32x2(scales, scale, to_f32(total) * scale)


@device
def _magnitude(x):
    return as_word(x) & 0x7FFFFFFF
