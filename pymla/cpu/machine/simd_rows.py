"""Registers of a word for each of four rows."""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import I32, I64, Vector, ir_type, operation, read, splat, write
from pymla.cpu.machine.lanes import read_lanes, read_strided, write_lanes

i32x4 = Vector("i32", 4)


@operation(i32x4, types.int64, emit=lambda builder, value: splat(builder, builder.trunc(value, I32), 4))
def four_words(value):
    """The low 32 bits of a number for every row."""
    return np.full(4, np.int64(value).astype(np.int32))


@operation(i32x4, types.int64, emit=lambda builder, address: read(builder, address, ir_type(i32x4)))
def load_quads(address):
    """Four words from memory, one behind the other."""
    return read_lanes(address, np.int32, 4)


def _load_apart(builder, address, stride):
    words = ir.Constant(ir_type(i32x4), ir.Undefined)
    for i in range(4):
        at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
        words = builder.insert_element(words, read(builder, at, I32), ir.Constant(I32, i))
    return words


@operation(i32x4, types.int64, types.int64, emit=_load_apart)
def load_apart(address, stride):
    """Four words from memory, `stride` bytes from one to the next."""
    return read_strided(address, np.int32, 4, stride)


def _xor_moved(builder, acc, words, right, left, mask):
    right, left, mask = (splat(builder, builder.trunc(each, I32), 4) for each in (right, left, mask))
    return builder.xor(acc, builder.and_(builder.shl(builder.lshr(words, right), left), mask))


@operation(i32x4, i32x4, i32x4, types.int64, types.int64, types.int64, emit=_xor_moved)
def xor_moved(acc, words, right, left, mask):
    """``acc ^ (words >> right << left & mask)``; shifts are from 0 to 31."""
    moved = words.view(np.uint32) >> np.uint32(right) << np.uint32(left)
    return acc ^ (moved & np.uint32(mask & 0xFFFFFFFF)).view(np.int32)


def _store_apart(builder, address, stride, words):
    for i in range(4):
        at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
        write(builder, at, builder.extract_element(words, ir.Constant(I32, i)))


@operation(types.void, types.int64, types.int64, i32x4, emit=_store_apart)
def store_apart(address, stride, words):
    """The words of four rows to memory, `stride` bytes from one to the next."""
    for i in range(4):
        write_lanes(address + stride * i, words[i])
