"""Words of attention as Numba values: codes as operands of the scores and of the values.

A word has `WORD` codes of a column of K. One operand's codes are from 0 to 255 where there is VNNI (`BIAS` more), the
other's have a sign.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    I8,
    I16,
    I32,
    I64,
    LITERAL,
    constant,
    declare,
    dpbusd,
    f32xL,
    i8xL,
    i32xL,
    in_order,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
    write,
)
from pymla.cpu.machine.lanes import add_dots, read_lanes, read_number, truncated, write_lanes
from pymla.cpu.machine.simd_bytes import dot_pairs_i16
from pymla.cpu.runtime.isa import ISA, LANES, VNNI

#: Columns of K in a word of attention's panels: bytes where VNNI multiplies them, else 16 bits. VNNI has one
#: instruction for signed bytes times unsigned ones; elsewhere int16 is as fast, and as exact.
WORD = 4 if VNNI else 2
#: Added to the codes that VNNI takes as unsigned.
BIAS = 128 if VNNI else 0
#: The dtype of a code in a word.
_CODE = np.int8 if VNNI else np.int16


def _store_codes(builder, address, value):
    codes = builder.fptosi(value, ir.VectorType(I32, LANES))
    write(builder, address, builder.trunc(codes, ir.VectorType(I8 if VNNI else I16, LANES)))


@operation(types.void, types.int64, f32xL, emit=_store_codes)
def store_codes(address, value):
    """`LANES` float32, whole numbers, to memory as codes: bytes with VNNI, else int16. NaN becomes any number."""
    write_lanes(address, truncated(value, _CODE))


def _words(builder, columns):
    """Registers of columns as words: int32 or int16 lanes, of which the low bits count."""
    bits = 32 // WORD
    words = ir.VectorType(I32, columns[0].type.count)
    packed = []
    for group in (columns[i : i + WORD] for i in range(0, len(columns), WORD)):
        word = None
        for i, column in enumerate(group):
            code = builder.and_(builder.fptosi(column, words), constant(words, (1 << bits) - 1))
            code = builder.shl(code, constant(words, bits * i))
            word = code if word is None else builder.or_(word, code)
        packed.append(word)
    return packed


def _store_words(builder, address, stride, *columns):
    for i, word in enumerate(_words(builder, columns)):
        write(builder, builder.add(address, builder.mul(stride, ir.Constant(I64, i))), word)


@operation(types.void, types.int64, types.int64, f32xL, f32xL, f32xL, f32xL, emit=_store_words)
def store_words(address, stride, a, b, c, d):
    """Whole numbers of four columns to memory as words, `stride` bytes from one register of words to the next. NaN
    becomes any number."""
    codes = [truncated(column, _CODE) for column in (a, b, c, d)]
    for i in range(0, 4, WORD):
        write_lanes(address + stride * (i // WORD), np.stack(codes[i : i + WORD], axis=1))


@operation(i32xL, emit=lambda builder: constant(ir_type(i32xL), 0))
def zero_words():
    """`LANES` int32 that are 0."""
    return np.zeros(LANES, np.int32)


def _add_i16_products(builder, acc, a, b):
    """``acc`` plus sums of two products of int16, by multiplying and adding."""
    words = ir.VectorType(I16, 2 * LANES)
    products = dot_pairs_i16(builder, builder.bitcast(a, words), builder.bitcast(b, words))
    return in_order(builder, builder.add(acc, products))


def _dot_words(builder, acc, a, b):
    if VNNI:
        return in_order(builder, dpbusd(builder, acc, a, b))
    return _add_i16_products(builder, acc, a, b)


@operation(i32xL, i32xL, i8xL, i8xL, emit=_dot_words)
def dot_words(acc, a, b):
    """Add the products of words, of which `a` has the `BIAS` (vpdpbusd or vpmaddwd)."""
    return add_dots(acc, a.view(np.uint8 if VNNI else np.int16), b.view(_CODE))


def _dot_i16_words(builder, acc, a, b):
    if VNNI:
        name = f"llvm.x86.avx512.vpdpwssd.{32 * LANES}"
        a, b = builder.bitcast(a, acc.type), builder.bitcast(b, acc.type)
        return in_order(builder, builder.call(declare(builder, name, acc.type, [acc.type] * 3), [acc, a, b]))
    return _add_i16_products(builder, acc, a, b)


@operation(i32xL, i32xL, i8xL, i8xL, emit=_dot_i16_words)
def dot_i16_words(acc, a, b):
    """Add the products of words of two int16; sums must stay within int32 (vpdpwssd or vpmaddwd)."""
    return add_dots(acc, a.view(np.int16), b.view(np.int16))


def _widen(builder, address, codes):
    value = read(builder, codes, ir.VectorType(I8, 32))
    write(builder, address, builder.sext(builder.xor(value, constant(value.type, -128)), ir.VectorType(I16, 32)))


@operation(types.void, types.int64, types.int64, emit=_widen)
def widen(address, codes):
    """Thirty-two bytes at the address `codes`, 128 more than the codes, to memory as codes of 16 bits."""
    write_lanes(address, read_lanes(codes, np.uint8, 32).astype(np.int16) - np.int16(128))


def _unpack_codes(builder, target, codes, bits):
    """The nibbles of sixteen bytes, and behind them words whose bit i is the next bit of code i."""
    nibbles = read(builder, codes, ir.VectorType(I8, 16))
    low = builder.and_(nibbles, constant(nibbles.type, 15))
    high = builder.lshr(nibbles, constant(nibbles.type, 4))
    value = builder.shl(shuffle(builder, low, high, range(32)), constant(ir.VectorType(I8, 32), 8 - bits))
    for plane in range(bits - 4):
        word = read(builder, builder.add(codes, ir.Constant(I64, 16 + 4 * plane)), I32)
        there = builder.bitcast(word, ir.VectorType(ir.IntType(1), 32))
        bit = constant(value.type, 1 << 12 - bits + plane)
        value = builder.or_(value, builder.select(there, bit, constant(value.type, 0)))
    write(builder, target, value)


@operation(types.void, types.int64, types.int64, LITERAL, emit=_unpack_codes)
def unpack_codes(target, codes, bits):
    """Thirty-two codes of 4 to 6 bits at the address `codes` to memory as bytes, whose highest bits they are. Nibbles
    lie as in Q4_0; then, for each further bit, comes a word with that bit of every code."""
    nibbles = read_lanes(codes, np.uint8, 16)
    value = np.concatenate([nibbles & 15, nibbles >> 4]) << 8 - bits
    for plane in range(bits - 4):
        there = np.unpackbits(read_lanes(codes + 16 + 4 * plane, np.uint8, 4), bitorder="little")
        value |= there << np.uint8(12 - bits + plane)
    write_lanes(target, value)


def _scale_words(builder, words, factors):
    """int16 times int16 / 32768, rounded."""
    if ISA != "portable":
        name = "llvm.x86.avx512.pmul.hr.sw.512" if words.type.count == 32 else "llvm.x86.avx2.pmul.hr.sw"
        return builder.call(declare(builder, name, words.type, [words.type] * 2), [words, factors])
    wide = ir.VectorType(I32, words.type.count)
    product = builder.add(builder.mul(builder.sext(words, wide), builder.sext(factors, wide)), constant(wide, 1 << 14))
    return builder.trunc(builder.ashr(product, constant(wide, 15)), words.type)


def _store_rescaled(builder, panel, row_0, row_1, row_2, row_3, factors, stride):
    # Numbers at a time, and lanes of a store: a panel's.
    count, lanes = (32, 16) if LANES == 16 else (16, 8)
    words = ir.VectorType(I16, count)
    scale = []
    for i in range(4):
        at = builder.add(factors, builder.mul(stride, ir.Constant(I64, i)))
        scale.append(splat(builder, read(builder, at, I16), count))
    for first in range(0, 32, count):
        rows = []
        for row, factor in zip((row_0, row_1, row_2, row_3), scale, strict=True):
            codes = read(builder, builder.add(row, ir.Constant(I64, first)), ir.VectorType(I8, count))
            codes = builder.xor(codes, constant(codes.type, -128))
            rows.append(_scale_words(builder, builder.sext(codes, words), factor))
        if WORD == 4:
            low, eight = constant(words, 255), constant(words, 8)
            rows = [builder.or_(builder.and_(a, low), builder.shl(b, eight)) for a, b in (rows[:2], rows[2:])]
        for i, (a, b) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
            for j in range(0, count, lanes):
                order = [lane for k in range(j, j + lanes) for lane in (k, count + k)]
                offset = 4 * LANES * i + (first + j) // lanes * (4 * LANES * 32 // WORD)
                write(builder, builder.add(panel, ir.Constant(I64, offset)), shuffle(builder, a, b, order))


@operation(types.void, *[types.int64] * 7, emit=_store_rescaled)
def store_rescaled(panel, row_0, row_1, row_2, row_3, factors, stride):
    """Thirty-two codes of each of four rows, bytes that are 128 more than the codes, times int16 / 32768, rounded, to
    memory as words of as many lanes of panels (vpmulhrsw).

    The int16 lie at `factors`, `stride` bytes from row to row. `LANES` columns of the rows are a panel, whose word i
    has the codes of rows `WORD` * i on; the next panel is 32 / `WORD` registers behind.
    """
    scaled = []
    for i, row in enumerate((row_0, row_1, row_2, row_3)):
        codes = read_lanes(row, np.uint8, 32).astype(np.int32) - 128
        scaled.append((codes * read_number(factors + stride * i, np.int16) + (1 << 14) >> 15).astype(_CODE))
    for i in range(0, 4, WORD):
        for j in range(0, 32, LANES):
            word = np.stack([row[j : j + LANES] for row in scaled[i : i + WORD]], axis=1)
            write_lanes(panel + 4 * LANES * (i // WORD) + j // LANES * (4 * LANES * 32 // WORD), word)
