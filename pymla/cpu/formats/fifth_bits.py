"""Codes of 5 bits in registers: a nibble of each code, and a word for 32 codes, whose bit i is the fifth bit of code i.

Operations as those of `pymla.cpu.machine.simd`: machine code for kernels, NumPy for Python.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F16,
    I16,
    I32,
    I64,
    LITERAL,
    constant,
    f32x8,
    i8x32,
    i8x64,
    i8xL,
    i32x8,
    i32xL,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.isa import LANES, VNNI
from pymla.cpu.machine.lanes import read_lanes, read_number
from pymla.cpu.machine.simd_bytes import add_pairs, row_sums
from pymla.cpu.machine.simd_panels import rowsL


def _add_bits(builder, nibbles, bits):
    count = nibbles.type.count
    mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), count))
    return builder.or_(nibbles, builder.select(mask, constant(nibbles.type, 16), constant(nibbles.type, 0)))


def _added(nibbles, bits):
    mask = np.unpackbits(np.array([bits]).view(np.uint8), bitorder="little")
    return nibbles | (16 * mask).astype(np.int8)


@operation(i8x32, i8x32, types.int32, emit=_add_bits)
def add_fifth_bits_32(nibbles, bits):
    """Codes of thirty-two nibbles and a bit for each."""
    return _added(nibbles, bits)


@operation(i8x64, i8x64, types.int64, emit=_add_bits)
def add_fifth_bits_64(nibbles, value):
    """Codes of sixty-four nibbles and a bit of `value` for each."""
    return _added(nibbles, value)


def _load_fifth_bits_2(builder, first, second):
    words = (builder.bitcast(read(builder, at, I32), ir.VectorType(I16, 2)) for at in (first, second))
    words = shuffle(builder, *words, [0, 2, 1, 3])
    halves = builder.bitcast(words, ir.VectorType(I32, 2))
    return [builder.extract_element(halves, ir.Constant(I32, i)) for i in (0, 1)]


@operation(types.UniTuple(types.int32, 2), types.int64, types.int64, emit=_load_fifth_bits_2)
def load_fifth_bits_2(first, second):
    """Bits of the first sixteen codes of two blocks, whose words are at two addresses, and of their last sixteen."""
    words = np.array([read_lanes(at, np.int16, 2) for at in (first, second)])
    return tuple(words.T.copy().view(np.int32)[:, 0])


def _words(builder, x, y, size, first, count):
    """int16 lanes of four blocks of `size` bytes, whose first and last 64 bytes are `x` and `y`: `count` of each block,
    from byte `first` on, then the next `count`, and so on, for each number of bytes `first`."""
    lanes = ir.VectorType(I16, 32)
    at = [size * block + start + 2 * i for start in first for block in range(4) for i in range(count)]
    at = [each // 2 if each < 64 else 32 + (each - (4 * size - 64)) // 2 for each in at]
    return shuffle(builder, builder.bitcast(x, lanes), builder.bitcast(y, lanes), at)


def _blocks(x, y, size):
    """The bytes of such blocks, (4, size), for the NumPy functions."""
    return np.concatenate([x, y[128 - 4 * size :]]).reshape(4, size)


def _quarters(builder, x, y, size, header):
    return builder.bitcast(_words(builder, x, y, size, [header], 8), ir_type(i8x64))


@operation(i8x64, i8x64, i8x64, LITERAL, LITERAL, emit=_quarters)
def quarters(x, y, size, header):
    """The sixteen bytes behind the header of each of four blocks of `size` bytes, whose first and last 64 bytes are `x`
    and `y`."""
    return np.ascontiguousarray(_blocks(x, y, size)[:, header:]).reshape(-1)


def _fifth_bits_4(builder, x, y, size, header):
    words = _words(builder, x, y, size, [header - 4, header - 2], 1)
    both = builder.bitcast(words, ir.VectorType(I64, 2))
    return [builder.extract_element(both, ir.Constant(I32, i)) for i in (0, 1)]


@operation(types.UniTuple(types.int64, 2), i8x64, i8x64, LITERAL, LITERAL, emit=_fifth_bits_4)
def fifth_bits_4(x, y, size, header):
    """The fifth bits of such blocks, the last four bytes of their headers: those of the first sixteen codes of the four
    blocks, and those of the last sixteen."""
    words = np.ascontiguousarray(_blocks(x, y, size)[:, header - 4 : header]).view(np.int16)
    return tuple(words.T.copy().view(np.int64)[:, 0])


def _halves_4(builder, x, y, size, offset):
    words = _words(builder, x, y, size, [offset, offset], 1)
    return builder.fpext(builder.bitcast(words, ir.VectorType(F16, 8)), ir_type(f32x8))


@operation(f32x8, i8x64, i8x64, LITERAL, LITERAL, emit=_halves_4)
def halves_4(x, y, size, offset):
    """The IEEE halves at byte `offset` of such blocks as float32, twice."""
    halves = np.ascontiguousarray(_blocks(x, y, size)[:, offset : offset + 2]).view(np.float16)
    return np.tile(halves[:, 0], 2).astype(np.float32)


def _gather_words(builder, rows, offset):
    words = ir.Constant(ir.VectorType(I32, LANES), ir.Undefined)
    for i in range(LANES):
        at = builder.add(builder.extract_value(rows, i), offset)
        words = builder.insert_element(words, read(builder, at, I32), ir.Constant(I32, i))
    return words


@operation(i32xL, rowsL, types.int64, emit=_gather_words)
def gather_words(rows, offset):
    """An int32 of each row of a panel, at `offset`."""
    return np.array([read_number(row + offset, np.int32) for row in rows])


def _add_bits_of_rows(builder, nibbles, words, shift):
    four = builder.lshr(words, splat(builder, builder.trunc(shift, I32), LANES))
    # A product puts bit i of four into bit 4 of byte i; no two of its terms have a bit in common.
    four = builder.mul(builder.and_(four, constant(words.type, 15)), constant(words.type, 0x02040810))
    bits = builder.and_(four, constant(words.type, 0x10101010))
    return builder.or_(nibbles, builder.bitcast(bits, ir_type(i8xL)))


@operation(i8xL, i8xL, i32xL, types.int64, emit=_add_bits_of_rows)
def add_fifth_bits_of_rows(nibbles, words, shift):
    """Codes of four columns of a panel: of their nibbles, and of each row's word, whose bits from `shift` on are those
    of the four columns."""
    bits = words.view(np.uint32)[:, None] >> (shift + np.arange(4)).astype(np.uint32) & 1
    return nibbles | (16 * bits).astype(np.int8).reshape(-1)


@operation(i32x8, row_sums, emit=lambda builder, sums: sums if VNNI else add_pairs(builder, sums))
def sums_as_i32(sums):
    """Sums of products from `simd_bytes.dot_u6` as int32: without VNNI, pairs of int16 are added."""
    return sums if VNNI else sums.astype(np.int32).reshape(-1, 2).sum(axis=1, dtype=np.int32)
