"""Operations of the search for scales (`pymla.cpu.quantise`): sixteen candidates in the lanes of a register, and codes
to memory.

Registers have sixteen lanes at every level, so that all levels find the same scales.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    constant,
    declare,
    f32x8,
    f32x16,
    ir_type,
    operation,
    read,
    reduced,
    shuffle,
    splat,
    write,
)
from pymla.cpu.machine.lanes import combined, fused, read_lanes, read_number, truncated, write_lanes
from pymla.cpu.machine.simd_decoded import store_f32x16

__all__ = [
    "broadcast_f32x16",
    "clipped",
    "first_lane",
    "lane_value",
    "load_f32x16",
    "ramp",
    "ramp_of_fours",
    "ramp_of_halves",
    "ramps_of_four",
    "smaller",
    "smallest",
    "splat_f32x16",
    "store_as_bytes",
    "store_bf16x8",
    "store_f16x8",
    "store_f32x16",
    "store_high_pairs",
    "store_nibbles",
    "store_sixteenths",
]


@operation(f32x16, types.float32, emit=lambda builder, value: splat(builder, value, 16))
def splat_f32x16(value):
    """One float32 in sixteen lanes."""
    return np.full(16, value, np.float32)


@operation(f32x16, types.int64, emit=lambda builder, address: splat(builder, read(builder, address, F32), 16))
def broadcast_f32x16(address):
    """One float32 from memory in sixteen lanes."""
    return np.full(16, read_number(address, np.float32))


@operation(f32x16, types.int64, emit=lambda builder, address: read(builder, address, ir_type(f32x16)))
def load_f32x16(address):
    """Sixteen float32 from memory."""
    return read_lanes(address, np.float32, 16)


def _ramp(numbers):
    """Emits ``first + numbers * step``, rounded once."""
    lanes = [float(number) for number in numbers]

    def emit(builder, first, step):
        fma = declare(builder, "llvm.fma.v16f32", ir_type(f32x16), [ir_type(f32x16)] * 3)
        by_lane = ir.Constant(ir_type(f32x16), lanes)
        return builder.call(fma, [splat(builder, step, 16), by_lane, splat(builder, first, 16)])

    return emit


def _numpy_ramp(numbers, first, step):
    return fused(np.full(16, step, np.float32), numbers.astype(np.float32), np.full(16, first, np.float32))


@operation(f32x16, types.float32, types.float32, emit=_ramp(range(16)))
def ramp(first, step):
    """``first + lane * step``."""
    return _numpy_ramp(np.arange(16), first, step)


@operation(f32x16, types.float32, types.float32, emit=_ramp([lane % 4 for lane in range(16)]))
def ramps_of_four(first, step):
    """``first + lane % 4 * step``: with `ramp_of_fours`, all pairs of four numbers and four others."""
    return _numpy_ramp(np.arange(16) % 4, first, step)


@operation(f32x16, types.float32, types.float32, emit=_ramp([lane // 4 for lane in range(16)]))
def ramp_of_fours(first, step):
    """``first + lane // 4 * step``."""
    return _numpy_ramp(np.arange(16) // 4, first, step)


def _ramp_of_halves(builder, first, step, second, second_step):
    low = _ramp(range(16))(builder, first, step)
    high = _ramp([lane % 8 for lane in range(16)])(builder, second, second_step)
    is_low = ir.Constant(ir.VectorType(I1, 16), [lane < 8 for lane in range(16)])
    return builder.select(is_low, low, high)


@operation(f32x16, *[types.float32] * 4, emit=_ramp_of_halves)
def ramp_of_halves(first, step, second, second_step):
    """``first + lane * step`` in the first eight lanes, ``second + (lane - 8) * second_step`` in the others."""
    low, high = _numpy_ramp(np.arange(16), first, step), _numpy_ramp(np.arange(16) % 8, second, second_step)
    return np.where(np.arange(16) < 8, low, high)


def _smaller(builder, x, y):
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


@operation(f32x16, f32x16, f32x16, emit=_smaller)
def smaller(x, y):
    """The smaller of two; of NaN and a number, `y` (vminps)."""
    return np.where(x < y, x, y)


@operation(types.float32, f32x16, emit=lambda builder, x: reduced(builder, x, lambda a, b: _smaller(builder, a, b)))
def smallest(x):
    """The smallest of all lanes."""
    return combined(x, smaller.py_func)


def _first_lane(builder, x, value):
    equal = builder.bitcast(builder.fcmp_ordered("==", x, splat(builder, value, 16)), I16)
    count = declare(builder, "llvm.cttz.i16", I16, [I16, I1])
    number = builder.zext(builder.call(count, [equal, ir.Constant(I1, 0)]), I64)
    return builder.and_(number, ir.Constant(I64, 15))


@operation(types.int64, f32x16, types.float32, emit=_first_lane)
def first_lane(x, value):
    """The number of the first lane that equals a value; 0 where none does."""
    return int(np.argmax(x == value))


@operation(
    types.float32,
    f32x16,
    types.int64,
    emit=lambda builder, x, lane: builder.extract_element(x, builder.trunc(lane, I32)),
)
def lane_value(x, lane):
    """The number in a lane, from 0 to 15."""
    return x[lane]


def _clipped(builder, x, top):
    words = ir.VectorType(I32, 16)
    bits, most, zero = builder.bitcast(x, words), builder.bitcast(top, words), constant(words, 0)
    bits = builder.select(builder.icmp_signed("<", bits, most), bits, most)
    return builder.bitcast(builder.select(builder.icmp_signed(">", bits, zero), bits, zero), x.type)


@operation(f32x16, f32x16, f32x16, emit=_clipped)
def clipped(x, top):
    """`x`, but at least 0 and at most `top`, which is not negative (vpminsd, vpmaxsd on their bits, which order such
    numbers as the numbers do: the units that multiply floats are free meanwhile)."""
    return np.maximum(np.minimum(x.view(np.int32), top.view(np.int32)), 0).view(np.float32)


# Codes and floats to memory


def _store_as_bytes(builder, address, value):
    write(builder, address, builder.trunc(builder.fptosi(value, ir.VectorType(I32, 16)), ir.VectorType(I8, 16)))


@operation(types.void, types.int64, f32x16, emit=_store_as_bytes)
def store_as_bytes(address, value):
    """Sixteen float32, whole numbers from -128 to 255, to memory as bytes."""
    write_lanes(address, truncated(value, np.int8))


def _store_nibbles(builder, address, low, high):
    words = ir.VectorType(I32, 16)
    low, high = builder.fptosi(low, words), builder.fptosi(high, words)
    both = builder.or_(builder.and_(low, constant(words, 15)), builder.shl(high, constant(words, 4)))
    write(builder, address, builder.trunc(both, ir.VectorType(I8, 16)))


@operation(types.void, types.int64, f32x16, f32x16, emit=_store_nibbles)
def store_nibbles(address, low, high):
    """The lowest four bits of thirty-two whole numbers from 0 to 255 to sixteen bytes: those of `low` in low nibbles,
    those of `high` in high ones."""
    low, high = truncated(low, np.int32), truncated(high, np.int32)
    write_lanes(address, (low & 15 | high << 4).astype(np.int8))


def _store_sixteenths(builder, address, low, high):
    words, shorts = ir.VectorType(I32, 16), []
    for value in (low, high):
        bit = builder.and_(builder.fptosi(value, words), constant(words, 16))
        shorts.append(builder.bitcast(builder.icmp_signed("!=", bit, constant(words, 0)), I16))
    write(builder, address, shorts[0])
    write(builder, builder.add(address, ir.Constant(I64, 2)), shorts[1])


@operation(types.void, types.int64, f32x16, f32x16, emit=_store_sixteenths)
def store_sixteenths(address, low, high):
    """The fifth bit of thirty-two whole numbers from 0 to 255 to four bytes, that of the first number lowest."""
    codes = truncated(np.concatenate([low, high]), np.int32)
    write_lanes(address, np.packbits(codes >> 4 & 1, bitorder="little"))


def _store_high_pairs(builder, address, low, high):
    words = ir.VectorType(I32, 16)
    low, high = (builder.lshr(builder.fptosi(each, words), constant(words, 4)) for each in (low, high))
    pairs = builder.or_(low, builder.shl(high, constant(words, 2)))
    first, second = (shuffle(builder, pairs, pairs, range(at, at + 8)) for at in (0, 8))
    nibbles = builder.or_(first, builder.shl(second, constant(first.type, 4)))
    write(builder, address, builder.trunc(nibbles, ir.VectorType(I8, 8)))


@operation(types.void, types.int64, f32x16, f32x16, emit=_store_high_pairs)
def store_high_pairs(address, low, high):
    """The fifth and sixth bit of thirty-two whole numbers from 0 to 63 to eight bytes: byte i has those of numbers i,
    i + 16, i + 8 and i + 24, from its lowest bits on."""
    pairs = truncated(low, np.int32) >> 4 | truncated(high, np.int32) >> 4 << 2
    write_lanes(address, (pairs[:8] | pairs[8:] << 4).astype(np.int8))


@operation(
    types.void,
    types.int64,
    f32x8,
    emit=lambda builder, address, value: write(builder, address, builder.fptrunc(value, ir.VectorType(F16, 8))),
)
def store_f16x8(address, value):
    """Eight float32 to memory as IEEE halves, rounded to nearest even (vcvtps2ph)."""
    with np.errstate(over="ignore"):
        write_lanes(address, value.astype(np.float16))


def _store_bf16x8(builder, address, value):
    words = ir.VectorType(I32, 8)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
    rounded = builder.add(bits, builder.add(odd, constant(words, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(bits, constant(words, 0x400000)), rounded)
    write(builder, address, builder.trunc(builder.lshr(chosen, constant(words, 16)), ir.VectorType(I16, 8)))


@operation(types.void, types.int64, f32x8, emit=_store_bf16x8)
def store_bf16x8(address, value):
    """Eight float32 to memory as bfloat16, rounded to nearest even. NaN stays NaN."""
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = np.where(np.isnan(value), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
    write_lanes(address, (rounded >> 16).astype(np.uint16))
