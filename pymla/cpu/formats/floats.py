"""Types of plain floats for kernels: products are taken in float32."""

import numpy as np

from pymla import ggml
from pymla.cpu.formats.format import Format
from pymla.cpu.machine.simd import (
    fma,
    load_bf16,
    load_bf16x8,
    load_bf16x32,
    load_f16,
    load_f16x8,
    load_f16x32,
    load_f32,
    load_f32x8,
    load_f32x32,
    splat_f32,
    splat_f32x32,
    store_bf16,
    store_f16,
    store_f32,
    total,
)
from pymla.cpu.memory import fetch_ahead
from pymla.cpu.runtime.compiling import helper, inlined


def _format(qtype, load_one, load_eight, load_32, store_one):
    """The row of `FORMATS` of a float type, from the functions that read and write it."""
    size = ggml.BLOCK_BYTES[qtype]

    @inlined
    def add_block(row, block, weight, acc):
        return fma(load_32(row + 32 * size * block), splat_f32x32(weight), acc)

    @helper
    def dot_row(row, x, columns):
        a = splat_f32(np.float32(0))
        b = splat_f32(np.float32(0))
        for _ in range(columns // 16):
            fetch_ahead(row, 16 * size)
            a = fma(load_eight(row), load_f32x8(x), a)
            b = fma(load_eight(row + 8 * size), load_f32x8(x + 32), b)
            row, x = row + 16 * size, x + 64
        rest = np.float32(0)
        for _ in range(columns % 16):
            rest += load_one(row) * load_f32(x)
            row += size
            x += 4
        return total(a) + total(b) + rest

    return Format(
        add_block,
        dot_row=dot_row,
        bytes_256=256 * size,
        load_one=load_one,
        load_eight=load_eight,
        store_one=store_one,
    )


F32 = _format(ggml.F32, load_f32, load_f32x8, load_f32x32, store_f32)
F16 = _format(ggml.F16, load_f16, load_f16x8, load_f16x32, store_f16)
BF16 = _format(ggml.BF16, load_bf16, load_bf16x8, load_bf16x32, store_bf16)
