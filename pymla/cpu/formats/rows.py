"""A row of any type as float32, and float32 as a row of a cache's type."""

import functools

import numpy as np

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.machine.simd import load_f32, splat_f32x32, store_f32, store_f32x8, store_f32x32
from pymla.cpu.runtime.compiling import helper


@functools.cache
def dequantise_row_for(qtype):
    """A function ``(row, out, columns)``: a row of weights or of the cache as float32; addresses, and a number."""
    form = FORMATS[qtype]
    add_block, load_one, load_eight, size = form.add_block, form.load_one, form.load_eight, form.number_bytes
    if load_one is None:

        @helper
        def dequantise_row(row, out, columns):
            for block in range(columns // 32):
                store_f32x32(out + 128 * block, add_block(row, block, np.float32(1), splat_f32x32(np.float32(0))))

    else:

        @helper
        def dequantise_row(row, out, columns):
            whole = columns // 8 * 8
            for i in range(0, whole, 8):
                store_f32x8(out + 4 * i, load_eight(row + size * i))
            for i in range(whole, columns):
                store_f32(out + 4 * i, load_one(row + size * i))

    return dequantise_row


@functools.cache
def write_row_for(qtype):
    """A function ``(x, row, columns)``: float32 values at the address `x` as a row of a type that a cache may have. It
    writes the bytes of ``reference.quant.quantise``."""
    form, block_bytes = FORMATS[qtype], ggml.BLOCK_BYTES[qtype]
    write_block, store_one = form.write_block, form.store_one
    if store_one is None:

        @helper
        def write_row(x, row, columns):
            for block in range(columns // 32):
                write_block(x + 128 * block, row + block_bytes * block)

    else:

        @helper
        def write_row(x, row, columns):
            for i in range(columns):
                store_one(row + block_bytes * i, load_f32(x + 4 * i))

    return write_row
