"""Codes of weights in registers, in the order of the columns: their products with activations, and the scales of small
blocks in the lanes of their products (`pymla.cpu.formats.decoded`)."""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    I16,
    I64,
    LITERAL,
    dpbusd,
    elementwise,
    f32x8,
    f32x16,
    f32xL,
    i8xL,
    i32xL,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
    write,
)
from pymla.cpu.machine.lanes import add_dots, read_lanes, write_lanes
from pymla.cpu.machine.simd_512 import halve_lanes
from pymla.cpu.machine.simd_bytes import add_pairs, dot_signed, madd_bytes
from pymla.cpu.runtime.isa import LANES, VNNI


def _dot_unsigned(builder, acc, codes, activations):
    if VNNI:
        return dpbusd(builder, acc, codes, activations)
    return builder.add(acc, add_pairs(builder, madd_bytes(builder, codes, activations)))


@operation(i32xL, i32xL, i8xL, i8xL, emit=_dot_unsigned)
def dot_unsigned(acc, codes, activations):
    """Add products of codes from 0 to 255 with activations; without VNNI from 0 to 127, because int16 sums of two
    products saturate (vpdpbusd, or vpmaddubsw and vpmaddwd)."""
    return add_dots(acc, codes.view(np.uint8), activations)


@operation(i32xL, i32xL, i8xL, i8xL, emit=dot_signed)
def dot_signed_codes(acc, codes, activations):
    """Add products of codes from -128 to 127 with activations, in registers of 32 bytes (vpsignb, vpmaddubsw,
    vpmaddwd)."""
    return add_dots(acc, codes, activations)


def _add_i8(builder, codes, number):
    return builder.add(codes, splat(builder, builder.trunc(number, codes.type.element), codes.type.count))


@elementwise(_add_i8)
def add_i8(codes, number):
    """``codes + number`` in every byte, wrapping."""
    return (codes.astype(np.int16) + number).astype(np.int8)


def _spread_32(builder, scales, r):
    return shuffle(builder, scales, scales, [(LANES * r + i) // 8 for i in range(LANES)])


@operation(f32xL, f32x8, LITERAL, emit=_spread_32)
def spread_32(scales, r):
    """Of the scales of eight blocks of 32, those of the r-th register of codes, each in the lanes of its products. `r`
    is a literal (vpermps)."""
    return np.repeat(scales, 8)[LANES * r : LANES * (r + 1)]


def _spread_16(builder, scales, r):
    return shuffle(builder, scales, scales, [(LANES * r + i) // 4 for i in range(LANES)])


@operation(f32xL, f32x16, LITERAL, emit=_spread_16)
def spread_16(scales, r):
    """`spread_32` of the scales of sixteen blocks of 16."""
    return np.repeat(scales, 4)[LANES * r : LANES * (r + 1)]


def _load_f32x8_pairs(builder, address):
    eight = read(builder, address, ir_type(f32x8))
    return shuffle(builder, eight, eight, [i // 2 for i in range(16)])


@operation(f32x16, types.int64, emit=_load_f32x8_pairs)
def load_f32x8_pairs(address):
    """Eight float32 from memory, each in two lanes."""
    return np.repeat(read_lanes(address, np.float32, 8), 2)


def _load_i16_as_f32(builder, address):
    return builder.sitofp(read(builder, address, ir.VectorType(I16, 16)), ir_type(f32x16))


@operation(f32x16, types.int64, emit=_load_i16_as_f32)
def load_i16_as_f32(address):
    """Sixteen int16 from memory as float32 (vpmovsxwd, vcvtdq2ps)."""
    return read_lanes(address, np.int16, 16).astype(np.float32)


@operation(types.void, types.int64, f32x16, emit=write)
def store_f32x16(address, value):
    """Sixteen float32 to memory."""
    write_lanes(address, value)


@operation(f32x8, f32xL, emit=lambda builder, x: x if LANES == 8 else halve_lanes(builder, x))
def folded_products(x):
    """Eight sums of the lanes of products: of both halves, where there are sixteen."""
    return x if LANES == 8 else x[:8] + x[8:]


def _halves(builder, low, high):
    return shuffle(builder, splat(builder, low, 4), splat(builder, high, 4), range(8))


@operation(f32x8, types.float32, types.float32, emit=_halves)
def splat_fours(low, high):
    """One float32 in the first four lanes, another one in the last four."""
    return np.repeat(np.array([low, high], np.float32), 4)


def _splat_quarters(builder, *numbers):
    low, high = (
        shuffle(builder, splat(builder, numbers[i], 8), splat(builder, numbers[i + 1], 8), [*range(4), *range(8, 12)])
        for i in (0, 2)
    )
    return shuffle(builder, low, high, range(16))


@operation(f32x16, *[types.float32] * 4, emit=_splat_quarters)
def splat_quarters(a, b, c, d):
    """Four float32, each in a quarter of sixteen lanes."""
    return np.repeat(np.array([a, b, c, d], np.float32), 4)


def _with_aligned_stack(builder, address):
    with builder.goto_entry_block():
        memory = builder.alloca(ir.VectorType(I64, 8))
    memory.align = 64
    # The highest bit of an address is 0, which LLVM does not know: it keeps the memory.
    return builder.add(address, builder.lshr(builder.ptrtoint(memory, I64), ir.Constant(I64, 63)))


@operation(types.int64, types.int64, emit=_with_aligned_stack)
def with_aligned_stack(address):
    """The same address, in a function whose stack is aligned to 64 bytes: registers of 64 bytes that LLVM keeps there
    then do not reach over two lines of the cache, which would take twice as long."""
    return address
