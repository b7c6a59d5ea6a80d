"""Products of bytes as Numba values, for rows of weights: 32 codes in the order of the file.

The functions that take a `builder` emit IR; `pymla.cpu.machine.simd_panels` and `pymla.cpu.machine.simd_words` use them
as well.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    I8,
    I16,
    I32,
    LITERAL,
    constant,
    declare,
    dpbusd,
    f32x8,
    i8x32,
    i16x16,
    i32x8,
    ir_type,
    operation,
    read,
    shuffle,
    write,
)
from pymla.cpu.machine.isa import ISA, VNNI
from pymla.cpu.machine.lanes import add_dots, read_lanes, write_lanes

#: Sums of products with codes of up to 6 bits: int32 of four products each by VNNI, else int16 of two.
row_sums = i32x8 if VNNI else i16x16


def madd_bytes(builder, unsigned, signed):
    """int16 sums of two products each; the caller sees to it that none is over 32767."""
    words = ir.VectorType(I16, unsigned.type.count // 2)
    if ISA != "portable":
        multiply = declare(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [unsigned.type, signed.type])
        return builder.call(multiply, [unsigned, signed])
    wide = ir.VectorType(I16, unsigned.type.count)
    product = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    even, odd = (shuffle(builder, product, product, list(range(i, wide.count, 2))) for i in (0, 1))
    return builder.add(even, odd)


def dot_pairs_i16(builder, a, b):
    """int32 sums of two products of int16 each."""
    doubles = ir.VectorType(I32, a.type.count // 2)
    if ISA != "portable":
        multiply = declare(builder, "llvm.x86.avx2.pmadd.wd", doubles, [a.type, a.type])
        return builder.call(multiply, [a, b])
    wide = ir.VectorType(I32, a.type.count)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (shuffle(builder, product, product, list(range(i, wide.count, 2))) for i in (0, 1))
    return builder.add(even, odd)


def add_pairs(builder, words):
    """int32 sums of two int16 each."""
    return dot_pairs_i16(builder, words, constant(words.type, 1))


def _with_sign(builder, value, sign):
    """`value` times the sign of `sign`, by bytes."""
    if ISA != "portable":
        psign = declare(builder, "llvm.x86.avx2.psign.b", value.type, [value.type] * 2)
        return builder.call(psign, [value, sign])
    zero = constant(value.type, 0)
    signed = builder.select(builder.icmp_signed("<", sign, zero), builder.sub(zero, value), value)
    return builder.select(builder.icmp_signed("==", sign, zero), zero, signed)


def dot_signed(builder, acc, a, b):
    """``acc`` plus sums of four products of signed bytes each; no byte of `b` is -128."""
    # |a| as unsigned bytes times b with a's sign: pairs sum up to 2 * 128 * 127, which an int16 holds.
    unsigned, signed = _with_sign(builder, a, a), _with_sign(builder, b, a)
    if VNNI and acc.type.count == 8:
        return dpbusd(builder, acc, unsigned, signed)
    return builder.add(acc, add_pairs(builder, madd_bytes(builder, unsigned, signed)))


@operation(i32x8, i32x8, i8x32, i8x32, emit=dot_signed)
def dot_i8(acc, a, b):
    """``acc[i] += a[4i] b[4i] + … + a[4i+3] b[4i+3]`` on signed bytes, exact (vpsignb, then vpdpbusd or vpmaddubsw).

    `b` must lie between -127 and 127 (`quantise_activations` sees to it); `a` may also be -128.
    """
    return add_dots(acc, a, b)


def _dot_u7(builder, acc, a, b):
    if VNNI:
        return dpbusd(builder, acc, a, b)
    return builder.add(acc, add_pairs(builder, madd_bytes(builder, a, b)))


@operation(i32x8, i32x8, i8x32, i8x32, emit=_dot_u7)
def dot_u7(acc, a, b):
    """`dot_i8` for `a` from 0 to 127: sums of two products fit an int16 as they are (vpdpbusd or vpmaddubsw)."""
    return add_dots(acc, a, b)


@operation(i32x8, emit=lambda builder: constant(ir_type(i32x8), 0))
def zero_i32x8():
    """Eight int32 that are 0."""
    return np.zeros(8, np.int32)


@operation(f32x8, i32x8, emit=lambda builder, x: builder.sitofp(x, ir_type(f32x8)))
def to_f32(x):
    """Eight int32 as float32 (vcvtdq2ps)."""
    return x.astype(np.float32)


# Eight blocks of 32 codes at a time: halves of a register hold parts of two, and in the end each lane has one.


@operation(row_sums, emit=lambda builder: constant(ir_type(row_sums), 0))
def zero_sums():
    """Sums of no products."""
    return np.zeros(8, np.int32) if VNNI else np.zeros(16, np.int16)


def _dot_u6(builder, acc, a, b):
    if VNNI:
        return dpbusd(builder, acc, a, b)
    return builder.add(acc, madd_bytes(builder, a, b))


@operation(row_sums, row_sums, i8x32, i8x32, emit=_dot_u6)
def dot_u6(acc, a, b):
    """Add products of `a` from 0 to 63 with `b` from -127 to 127: twice at most, eight times where `a` is under 16, as
    an int16 holds no more (vpdpbusd or vpmaddubsw)."""
    return add_dots(acc, a, b)


def _sum_blocks(builder, a, b, c, d):
    doubles = ir_type(i32x8)

    def add_shuffled(x, y, first, second):
        x, y = builder.bitcast(x, doubles), builder.bitcast(y, doubles)
        first, second = shuffle(builder, x, y, first), shuffle(builder, x, y, second)
        return builder.add(builder.bitcast(first, a.type), builder.bitcast(second, a.type))

    ab = add_shuffled(a, b, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
    cd = add_shuffled(c, d, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
    all_four = add_shuffled(ab, cd, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])
    return all_four if a.type == doubles else add_pairs(builder, all_four)


@operation(i32x8, row_sums, row_sums, row_sums, row_sums, emit=_sum_blocks)
def sum_blocks(a, b, c, d):
    """Sums of blocks 0 to 7 from sums of `dot_u6`: `a` has those of blocks 0 and 4 in its halves, `b` of 1 and 5, and
    so on."""
    halves = np.array([a, b, c, d]).reshape(4, 2, -1)
    return halves.sum(axis=2, dtype=np.int32).T.reshape(-1)


@operation(i32x8, i32x8, i32x8, i32x8, i32x8, emit=_sum_blocks)
def sum_blocks_i32(a, b, c, d):
    """`sum_blocks` for sums of `dot_i8`."""
    return sum_blocks.py_func(a, b, c, d)


def _load_i8_as_i16(builder, address):
    return builder.sext(read(builder, address, ir.VectorType(I8, 16)), ir_type(i16x16))


@operation(i16x16, types.int64, emit=_load_i8_as_i16)
def load_i8_as_i16(address):
    """Sixteen int8 from memory as int16 (vpmovsxbw)."""
    return read_lanes(address, np.int8, 16).astype(np.int16)


@operation(i16x16, types.int64, emit=lambda builder, address: read(builder, address, ir_type(i16x16)))
def load_i16x16(address):
    """Sixteen int16 from memory."""
    return read_lanes(address, np.int16, 16)


@operation(i32x8, i16x16, i16x16, emit=dot_pairs_i16)
def dot_i16(a, b):
    """``a[2i] b[2i] + a[2i+1] b[2i+1]`` (vpmaddwd)."""
    return add_dots(np.zeros(8, np.int32), a, b)


def _add_times(builder, acc, sums, scales, k):
    scale = shuffle(builder, scales, scales, [k] * 8 + [8 + k] * 8)
    if VNNI:
        wide = builder.sext(shuffle(builder, scale, scale, list(range(0, 16, 2))), acc.type)
        return builder.add(acc, builder.mul(sums, wide))
    return builder.add(acc, dot_pairs_i16(builder, sums, scale))


@operation(i32x8, i32x8, row_sums, i16x16, LITERAL, emit=_add_times)
def add_times(acc, sums, scales, k):
    """Add `sums` times the k-th of eight int16 in each half of `scales`; `k` is a literal (vpmulld or vpmaddwd)."""
    return add_dots(acc, sums, np.repeat(scales[k::8], len(sums) // 2))


@operation(i32x8, i32x8, emit=lambda builder, x: builder.shl(x, constant(x.type, 5)))
def times_32(x):
    """Eight int32 times 32 (vpslld)."""
    return x << 5


@operation(i32x8, i32x8, i32x8, emit=lambda builder, x, y: builder.sub(x, y))
def subtract_i32(x, y):
    """``x - y`` of eight int32 (vpsubd)."""
    return x - y


def _sum_sixteens(builder, codes):
    """The sum of the first sixteen of thirty-two signed bytes in each of four int32, of the others in four more."""
    ones = constant(codes.type, 1)
    if VNNI:
        fours = dpbusd(builder, constant(ir_type(i32x8), 0), ones, codes)
    else:
        fours = dot_pairs_i16(builder, madd_bytes(builder, ones, codes), constant(ir_type(i16x16), 1))
    twos = builder.add(fours, shuffle(builder, fours, fours, [1, 0, 3, 2, 5, 4, 7, 6]))
    return builder.add(twos, shuffle(builder, twos, twos, [2, 3, 0, 1, 6, 7, 4, 5]))


def _store_sum16(builder, address, codes):
    sums = _sum_sixteens(builder, codes)
    write(builder, address, builder.trunc(shuffle(builder, sums, sums, [0, 4]), ir.VectorType(I16, 2)))


@operation(types.void, types.int64, i8x32, emit=_store_sum16)
def store_sum16(address, codes):
    """The sums of the first and of the second sixteen of thirty-two signed bytes, to memory as int16."""
    write_lanes(address, codes.reshape(2, 16).sum(axis=1, dtype=np.int16))


def sum_of_bytes(builder, codes):
    """The sum of thirty-two signed bytes."""
    sums = _sum_sixteens(builder, codes)
    low, high = (builder.extract_element(sums, ir.Constant(I32, i)) for i in (0, 4))
    return builder.add(low, high)


@operation(types.int32, i8x32, emit=sum_of_bytes)
def sum_i8x32(codes):
    """The sum of thirty-two signed bytes, int32."""
    return codes.sum(dtype=np.int32)
