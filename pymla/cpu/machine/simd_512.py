"""Registers of 64 bytes, for rows of weights where the processor has them (`pymla.cpu.formats.legacy_512`).

Each quarter of a register belongs to one of four blocks of 32 weights: sixteen codes, or four sums of products; or each
eighth to one of eight.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F16,
    I8,
    I16,
    I32,
    I64,
    LITERAL,
    constant,
    declare,
    dpbusd,
    f32x8,
    f32x16,
    i8x64,
    i16x16,
    i32x16,
    ir_type,
    operation,
    read,
    shuffle,
)
from pymla.cpu.machine.lanes import add_dots, read_lanes

# Bytes of blocks. Blocks of eight lie in two or three registers that were loaded one after the other.


@operation(i8x64, types.int64, emit=lambda builder, address: read(builder, address, ir_type(i8x64)))
def load_i8x64(address):
    """Sixty-four bytes from memory."""
    return read_lanes(address, np.int8, 64)


def _first_quarters_20(builder, x, y):
    return shuffle(builder, x, y, [20 * (i // 16) + 4 + i % 16 for i in range(64)])


@operation(i8x64, i8x64, i8x64, emit=_first_quarters_20)
def first_quarters_20(x, y):
    """The last sixteen bytes of each of four blocks of 20 bytes; `x` and `y` are the first and the second 64 bytes of
    eight blocks (vpermt2b)."""
    return np.concatenate([x, y])[:80].reshape(4, 20)[:, 4:].reshape(-1)


def _last_quarters_20(builder, x, y):
    at = [80 + 20 * (i // 16) + 4 + i % 16 for i in range(64)]
    return shuffle(builder, x, y, [each - 64 if each < 128 else each - 32 for each in at])


@operation(i8x64, i8x64, i8x64, emit=_last_quarters_20)
def last_quarters_20(x, y):
    """The last sixteen bytes of each of the other four of eight blocks of 20 bytes; `x` and `y` are the bytes from 64
    and from 96 on, of which the second 32 follow those of `x`."""
    return np.concatenate([x, y[32:]])[16:].reshape(4, 20)[:, 4:].reshape(-1)


def _halves_18(builder, x, y):
    words = ir.VectorType(I16, 32)
    lanes = [32 * (i // 4) + 9 * (i % 4) for i in range(8)]
    halves = shuffle(builder, builder.bitcast(x, words), builder.bitcast(y, words), lanes)
    return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, 8)), ir_type(f32x8))


@operation(f32x8, i8x64, i8x64, emit=_halves_18)
def halves_18(x, y):
    """The IEEE half at the beginning of each of eight blocks of 18 bytes as float32: four of them begin in `x`, the
    others in `y` (vpermt2w, vcvtph2ps)."""
    return np.concatenate([each.view(np.float16)[:28:9] for each in (x, y)]).astype(np.float32)


def _eighths_18(builder, x, y):
    return shuffle(builder, x, y, [64 * (i // 32) + 18 * (i // 8 % 4) + 2 + i % 8 for i in range(64)])


@operation(i8x64, i8x64, i8x64, emit=_eighths_18)
def eighths_18(x, y):
    """Eight bytes, from the third on, of each of eight blocks of 18 bytes: four of them begin in `x`, the others in
    `y` (vpermt2b)."""
    return np.concatenate([each[18 * i + 2 : 18 * i + 10] for each in (x, y) for i in range(4)])


def _load_quarters(builder, address, size, offset):
    # Two loads have all of them: one begins with the first block's bytes, the other ends with the last block's.
    first, second = offset, offset + 3 * size - 48
    wanted = [size * (i // 16) + i % 16 for i in range(64)]
    lanes = [at if at < 64 else 64 + first + at - second for at in wanted]
    loads = (builder.add(address, ir.Constant(I64, at)) for at in (first, second))
    return shuffle(builder, *(read(builder, at, ir_type(i8x64)) for at in loads), lanes)


@operation(i8x64, types.int64, LITERAL, LITERAL, emit=_load_quarters)
def load_quarters(address, size, offset):
    """Sixteen bytes from `offset` on of each of four blocks of `size` bytes in memory; both are literals (vpermt2b)."""
    return np.concatenate([read_lanes(address + offset + size * i, np.int8, 16) for i in range(4)])


def _even_quarters(builder, x, y):
    return shuffle(builder, x, y, [32 * (i // 16) + i % 16 for i in range(64)])


@operation(i8x64, i8x64, i8x64, emit=_even_quarters)
def even_quarters(x, y):
    """The first and the third quarter of two registers (vpermt2q)."""
    return np.concatenate([x, y]).reshape(4, 32)[:, :16].reshape(-1)


def _odd_quarters(builder, x, y):
    return shuffle(builder, x, y, [32 * (i // 16) + 16 + i % 16 for i in range(64)])


@operation(i8x64, i8x64, i8x64, emit=_odd_quarters)
def odd_quarters(x, y):
    """The second and the fourth quarter of two registers (vpermt2q)."""
    return np.concatenate([x, y]).reshape(4, 32)[:, 16:].reshape(-1)


def _load_bits_2(builder, address):
    sixteen = read(builder, address, ir.VectorType(I32, 4))
    words = ir.VectorType(I32, 16)
    four = shuffle(builder, sixteen, sixteen, [0, 1, 2, 3] * 4)
    rotate = declare(builder, "llvm.fshl.v16i32", words, [words] * 3)
    amounts = ir.Constant(words, [4] * 4 + [2] * 4 + [0] * 4 + [30] * 4)
    rotated = builder.call(rotate, [four, four, amounts])
    return builder.and_(builder.bitcast(rotated, ir_type(i8x64)), constant(ir_type(i8x64), 0x30))


@operation(i8x64, types.int64, emit=_load_bits_2)
def load_bits_2(address):
    """Sixteen bytes from memory, of four codes of 2 bits each: quarter i has the i-th codes, at bits 4 and 5
    (vprolvd)."""
    packed = read_lanes(address, np.uint8, 16)
    return np.concatenate([(packed >> 2 * i & 3) << 4 for i in range(4)]).view(np.int8)


@operation(i8x64, i8x64, emit=lambda builder, x: builder.xor(x, constant(x.type, -128)))
def flip_sign_bits(x):
    """128 more in every byte, which makes signed codes unsigned ones (vpxor)."""
    return x ^ np.int8(-128)


@operation(i8x64, emit=lambda builder: constant(ir_type(i8x64), -128))
def all_128():
    """128, without a sign, in every byte."""
    return np.full(64, -128, np.int8)


# Products and their scales


@operation(i32x16, emit=lambda builder: constant(ir_type(i32x16), 0))
def zero_i32x16():
    """Sixteen int32 that are 0."""
    return np.zeros(16, np.int32)


@operation(f32x16, emit=lambda builder: constant(ir_type(f32x16), 0.0))
def zero_f32x16():
    """Sixteen float32 that are 0."""
    return np.zeros(16, np.float32)


@operation(i32x16, i32x16, i8x64, i8x64, emit=dpbusd)
def dot_u8x64(acc, unsigned, signed):
    """``acc[i] += Σ unsigned[4i+j] * signed[4i+j]``, j < 4 (vpdpbusd)."""
    return add_dots(acc, unsigned.view(np.uint8), signed)


@operation(f32x16, i32x16, emit=lambda builder, x: builder.sitofp(x, ir_type(f32x16)))
def to_f32x16(x):
    """Sixteen int32 as float32 (vcvtdq2ps)."""
    return x.astype(np.float32)


@operation(i32x16, i32x16, i32x16, emit=lambda builder, x, y: builder.sub(x, y))
def subtract_i32x16(x, y):
    """``x - y`` of sixteen int32 (vpsubd)."""
    return x - y


def _spread(builder, x, half):
    return shuffle(builder, x, x, [4 * half + i // 4 for i in range(16)])


@operation(f32x16, f32x8, LITERAL, emit=_spread)
def spread(x, half):
    """The first four of eight float32, or with `half` 1 (a literal) the last four, each in a quarter of the lanes
    (vpermps)."""
    return np.repeat(x[4 * half : 4 * half + 4], 4)


@operation(f32x16, f32x8, emit=lambda builder, x: shuffle(builder, x, x, [i // 2 for i in range(16)]))
def spread_pairs(x):
    """Eight float32, each in two lanes (vpermps)."""
    return np.repeat(x, 2)


def _load_starts(builder, address):
    wide = builder.zext(read(builder, address, ir.VectorType(I32, 8)), ir.VectorType(I64, 8))
    return builder.bitcast(wide, ir_type(i32x16))


@operation(i32x16, types.int64, emit=_load_starts)
def load_starts(address):
    """Eight int32 from memory, each in the first of two lanes; the second is 0 (vpmovzxdq)."""
    return read_lanes(address, np.uint32, 8).astype(np.uint64).view(np.int32)


def _load_firsts(builder, address, factor):
    four = read(builder, address, ir.VectorType(I32, 4))
    four = builder.mul(four, constant(four.type, factor))
    return shuffle(builder, four, constant(four.type, 0), [4 if i % 4 else i // 4 for i in range(16)])


@operation(i32x16, types.int64, LITERAL, emit=_load_firsts)
def load_firsts(address, factor):
    """Four int32 from memory, times a literal, each in the first lane of a quarter; the other lanes are 0."""
    result = np.zeros((4, 4), np.int32)
    result[:, 0] = read_lanes(address, np.int32, 4) * factor
    return result.reshape(-1)


def _load_seconds(builder, address):
    four = read(builder, address, ir.VectorType(ir.FloatType(), 4))
    return shuffle(builder, four, constant(four.type, 0.0), [i // 4 if i % 4 == 1 else 4 for i in range(16)])


@operation(f32x16, types.int64, emit=_load_seconds)
def load_seconds(address):
    """Four float32 from memory, each in the second lane of a quarter; the other lanes are 0."""
    result = np.zeros((4, 4), np.float32)
    result[:, 1] = read_lanes(address, np.float32, 4)
    return result.reshape(-1)


def halve_lanes(builder, x):
    """Emits the sum of both halves of sixteen float32."""
    low, high = (shuffle(builder, x, x, range(8 * i, 8 * i + 8)) for i in (0, 1))
    return builder.fadd(low, high)


@operation(f32x8, f32x16, emit=halve_lanes)
def halve(x):
    """The sum of both halves of sixteen float32."""
    return x[:8] + x[8:]


def _times_scales_8(builder, low, high, address):
    words = ir.VectorType(I16, 32)
    pack = declare(builder, "llvm.x86.avx512.packssdw.512", words, [low.type] * 2)
    scales = read(builder, address, ir.VectorType(I8, 8))
    scales = builder.sext(shuffle(builder, scales, scales, [i // 4 for i in range(32)]), words)
    multiply = declare(builder, "llvm.x86.avx512.pmaddw.d.512", low.type, [words] * 2)
    return builder.call(multiply, [builder.call(pack, [low, high]), scales])


@operation(i32x16, i32x16, i32x16, types.int64, emit=_times_scales_8)
def times_scales_8(low, high, address):
    """Sums of products of four blocks times int8 scales from memory, of which each block has two behind each other.

    Each block has four sums for its first sixteen codes (`low`) and four for its second (`high`), which saturate to
    int16. A quarter of the result belongs to each block; a lane has two products (vpackssdw, vpmaddwd).
    """
    both = np.concatenate([low.reshape(4, 1, 4), high.reshape(4, 1, 4)], axis=1).clip(-32768, 32767)
    products = both * read_lanes(address, np.int8, 8).astype(np.int32).reshape(4, 2, 1)
    return products.reshape(-1, 2).sum(axis=1).astype(np.int32)


def _halves_of_blocks(builder, scales, half):
    return shuffle(builder, scales, scales, [i // 2 * 2 + half for i in range(16)])


@operation(f32x16, f32x16, LITERAL, emit=_halves_of_blocks)
def halves_of_blocks(scales, half):
    """Of the scales of sixteen blocks of 16 every second one, the first or, with `half` 1 (a literal), the second of
    the halves of eight blocks of 32, each in two lanes (vpermps)."""
    return np.repeat(scales[half::2], 2)


def _times_integers(builder, first, second, integers):
    words = ir.VectorType(I16, 32)
    pack = declare(builder, "llvm.x86.avx512.packssdw.512", words, [first.type] * 2)
    multiply = declare(builder, "llvm.x86.avx512.pmaddw.d.512", first.type, [words] * 2)
    order = [4 * lane + each for lane in range(4) for each in (0, 0, 2, 2, 1, 1, 3, 3)]
    scales = shuffle(builder, integers, integers, order)
    return builder.call(multiply, [builder.call(pack, [first, second]), scales])


@operation(i32x16, i32x16, i32x16, i16x16, emit=_times_integers)
def times_integers(first, second, integers):
    """Products of eight blocks of 32 times the integer scales of their halves.

    Two lanes of `first` belong to each block, with products of its first sixteen codes, and two of `second`; none of
    them is over 32767. A quarter of the result has those of a block, of the next one, and of both second halves
    (vpackssdw, vpmaddwd).
    """
    scales = integers.reshape(4, 2, 2).astype(np.int32)
    both = np.stack([each.reshape(4, 2, 2).sum(axis=2, dtype=np.int32) for each in (first, second)], axis=2)
    return (both * scales).transpose(0, 2, 1).reshape(-1)


def _twice_in_quarters(builder, x):
    return shuffle(builder, x, x, [i // 4 * 2 + i % 2 for i in range(16)])


@operation(f32x16, f32x8, emit=_twice_in_quarters)
def twice_in_quarters(x):
    """Of eight float32 two in each quarter of sixteen lanes, twice (vpermps)."""
    return x.reshape(4, 1, 2).repeat(2, axis=1).reshape(-1)
