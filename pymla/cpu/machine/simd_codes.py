"""Codes of 8 bits and fewer in registers: nibbles unpacked, bits moved, bytes picked."""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    I8,
    I32,
    LITERAL,
    constant,
    declare,
    elementwise,
    f32x16,
    f32x32,
    i8x32,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.lanes import read_lanes


def _load_nibbles(builder, address):
    packed = read(builder, address, ir.VectorType(I8, 16))
    both = builder.bitcast(shuffle(builder, packed, packed, list(range(16)) * 2), ir.VectorType(I32, 8))
    shifts = ir.Constant(both.type, [0] * 4 + [4] * 4)
    return builder.and_(builder.bitcast(builder.lshr(both, shifts), ir_type(i8x32)), constant(ir_type(i8x32), 15))


@operation(i8x32, types.int64, emit=_load_nibbles)
def load_nibbles(address):
    """Thirty-two codes of 4 bits from memory: the low halves of sixteen bytes come first, then the high halves."""
    packed = read_lanes(address, np.uint8, 16)
    return np.concatenate([packed & 15, packed >> 4]).view(np.int8)


def _load_nibbles_f32(builder, address, zero):
    if LANES != 16:
        codes = _load_nibbles(builder, address)
        codes = builder.sub(codes, constant(codes.type, zero))
        return builder.sitofp(codes, ir_type(f32x32))
    # A table in a register has all sixteen values; its instruction looks at the lowest 4 bits of a lane.
    words = ir.VectorType(I32, 16)
    table = ir.Constant(ir_type(f32x16), [float(code - zero) for code in range(16)])
    pick = declare(builder, "llvm.x86.avx512.permvar.sf.512", table.type, [table.type, words])
    packed = builder.zext(read(builder, address, ir.VectorType(I8, 16)), words)
    low, high = packed, builder.lshr(packed, constant(words, 4))
    return shuffle(builder, *(builder.call(pick, [table, codes]) for codes in (low, high)), range(32))


@operation(f32x32, types.int64, LITERAL, emit=_load_nibbles_f32)
def load_nibbles_f32(address, zero):
    """Thirty-two codes as `load_nibbles` has them less a zero point, a literal,, as float32 (vpermps with 16 lanes)."""
    return (load_nibbles.py_func(address) - np.int8(zero)).astype(np.float32)


def _bytes_to_f32(builder, x):
    return builder.sitofp(x, ir_type(f32x32))


@operation(f32x32, i8x32, emit=_bytes_to_f32)
def bytes_to_f32(x):
    """Thirty-two int8 as float32 (vpmovsxbd, vcvtdq2ps)."""
    return x.astype(np.float32)


def _load_pair(builder, first, second):
    sixteen = ir.VectorType(I8, 16)
    return shuffle(builder, read(builder, first, sixteen), read(builder, second, sixteen), list(range(32)))


@operation(i8x32, types.int64, types.int64, emit=_load_pair)
def load_pair(first, second):
    """Sixteen bytes from one address, then sixteen from another (vinserti128)."""
    return np.concatenate([read_lanes(first, np.int8, 16), read_lanes(second, np.int8, 16)])


def _load_eights(builder, *addresses):
    a, b, c, d = (read(builder, each, ir.VectorType(I8, 8)) for each in addresses)
    return shuffle(builder, shuffle(builder, a, b, range(16)), shuffle(builder, c, d, range(16)), range(32))


@operation(i8x32, *[types.int64] * 4, emit=_load_eights)
def load_eights(a, b, c, d):
    """Eight bytes from each of four addresses."""
    return np.concatenate([read_lanes(each, np.int8, 8) for each in (a, b, c, d)])


@elementwise(lambda builder, x: builder.and_(x, constant(x.type, 15)))
def low_nibbles(x):
    """The lower 4 bits of every byte."""
    return x & np.int8(15)


@elementwise(lambda builder, x: builder.lshr(x, constant(x.type, 4)))
def high_nibbles(x):
    """The upper 4 bits of every byte, from 0 to 15."""
    return (x.view(np.uint8) >> 4).view(np.int8)


@elementwise(lambda builder, x, y: builder.or_(x, y))
def bit_or(x, y):
    """``x | y``, bit by bit."""
    return x | y


def _bits_2(builder, x, shift):
    shift = splat(builder, builder.trunc(shift, I8), x.type.count)
    two = builder.and_(builder.lshr(x, shift), constant(x.type, 3))
    return builder.shl(two, constant(x.type, 4))


@elementwise(_bits_2)
def bits_2(x, shift):
    """Two bits of every byte, from bit `shift` on, moved to bits 4 and 5."""
    return ((x.view(np.uint8) >> np.uint8(shift) & 3) << 4).view(np.int8)


def _subtract_i8(builder, x, value):
    return builder.sub(x, splat(builder, builder.trunc(value, I8), x.type.count))


@elementwise(_subtract_i8)
def subtract_i8(x, value):
    """``x - value`` in every byte, wrapping."""
    return (x.astype(np.int16) - value).astype(np.int8)
