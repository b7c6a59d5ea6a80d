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
    f32x16,
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
from pymla.cpu.machine.lanes import read_lanes, read_number
from pymla.cpu.machine.simd_bytes import add_pairs, row_sums
from pymla.cpu.machine.simd_panels import rowsL
from pymla.cpu.machine.simd_vectors_512 import HAS_VBMI, shifted
from pymla.cpu.runtime.isa import LANES, VNNI


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
    words = _words(builder, x, y, size, [header - 4], 2)
    lanes = [word for block in range(4) for word in [2 * block, 2 * block + 1] * 4]
    return builder.bitcast(shuffle(builder, words, words, lanes), ir_type(i8x64))


@operation(i8x64, i8x64, i8x64, LITERAL, LITERAL, emit=_fifth_bits_4)
def fifth_bits_4(x, y, size, header):
    """The words of fifth bits of such blocks, the last four bytes of their headers: a word fills a quarter."""
    words = np.ascontiguousarray(_blocks(x, y, size)[:, header - 4 : header]).view(np.int32)
    return words.repeat(4).view(np.int8)


def _add_fifth_bits_64(builder, nibbles, words, half):
    bits = [16 * half + i for i in range(16)] * 4  # of each code, in its block's word
    if HAS_VBMI:
        moved = shifted(builder, words, [bit - 4 for bit in bits])
        return builder.or_(nibbles, builder.and_(moved, constant(moved.type, 16)))
    own = shuffle(builder, words, words, [i // 8 * 8 + bit // 8 for i, bit in enumerate(bits)])
    own = builder.and_(own, ir.Constant(own.type, [1 << bit % 8 for bit in bits]))
    mask = builder.icmp_unsigned("!=", own, constant(own.type, 0))
    return builder.or_(nibbles, builder.select(mask, constant(own.type, 16), constant(own.type, 0)))


@operation(i8x64, i8x64, i8x64, LITERAL, emit=_add_fifth_bits_64)
def add_fifth_bits_64(nibbles, words, half):
    """Codes of four blocks: of nibbles, a quarter of the register for each block, and of the words of `fifth_bits_4`,
    whose first sixteen bits are those of `half` 0 (a literal), the others those of `half` 1 (vpmultishiftqb)."""
    places = (16 * half + np.arange(16, dtype=np.uint64)).reshape(2, 8)
    bits = words.view(np.uint64).reshape(4, 2, 1) >> places & np.uint64(1)
    return nibbles | (16 * bits).astype(np.int8).reshape(-1)


def _halves_4(builder, x, y, size):
    words = _words(builder, x, y, size, [0, 0], 1)
    return builder.fpext(builder.bitcast(words, ir.VectorType(F16, 8)), ir_type(f32x8))


@operation(f32x8, i8x64, i8x64, LITERAL, emit=_halves_4)
def halves_4(x, y, size):
    """The IEEE halves at the beginning of such blocks as float32, twice."""
    halves = np.ascontiguousarray(_blocks(x, y, size)[:, :2]).view(np.float16)
    return np.tile(halves[:, 0], 2).astype(np.float32)


def _load_pairs_4(builder, address, size):
    pairs = None
    for block in range(4):
        own = splat(builder, read(builder, builder.add(address, ir.Constant(I64, size * block)), I32), 8)
        here = ir.Constant(ir.VectorType(ir.IntType(1), 8), [i // 2 == block for i in range(8)])
        pairs = own if pairs is None else builder.select(here, own, pairs)
    return builder.fpext(builder.bitcast(pairs, ir.VectorType(F16, 16)), ir_type(f32x16))


@operation(f32x16, types.int64, LITERAL, emit=_load_pairs_4)
def load_pairs_4(address, size):
    """The two IEEE halves at the beginning of each of four blocks of `size` bytes, a literal, as float32: twice in a
    quarter of the lanes. Loads that fill lanes take none of the units that move bytes, which products keep busy."""
    pairs = [read_lanes(address + size * block, np.float16, 2) for block in range(4)]
    return np.tile(np.array(pairs, np.float32), 2).reshape(-1)


@operation(f32x16, f32x16, emit=lambda builder, x: shuffle(builder, x, x, [i // 2 * 2 for i in range(16)]))
def even_lanes(x):
    """Every second of sixteen float32, from the first one on, twice (vmovsldup)."""
    return x[::2].repeat(2)


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
