"""float32 as int32 of the same order, so that the largest of many scores are found by comparing integers.

The bits of a float32 that is not negative are ordered as the numbers are; of a negative one, all bits but the sign are
flipped.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    I1,
    I32,
    I64,
    constant,
    declare,
    f32xL,
    i32xL,
    ir_type,
    operation,
    reduced,
    splat,
    write,
)
from pymla.cpu.machine.lanes import write_lanes
from pymla.cpu.runtime.isa import LANES

#: The smallest int32, which no float32 becomes.
LOWEST = -(1 << 31)

_POSITIVE_BITS = (1 << 31) - 1


def _store_ordered(builder, address, value):
    least = constant(value.type, float("-inf"))
    value = builder.select(builder.fcmp_ordered(">", value, least), value, least)
    bits = builder.bitcast(builder.fadd(value, constant(value.type, 0.0)), ir_type(i32xL))
    flipped = builder.and_(builder.ashr(bits, constant(bits.type, 31)), constant(bits.type, _POSITIVE_BITS))
    write(builder, address, builder.xor(bits, flipped))


@operation(types.void, types.int64, f32xL, emit=_store_ordered)
def store_ordered(address, value):
    """`LANES` float32 to memory as int32 of the same order. NaN counts as minus infinity, and -0 as 0."""
    value = np.where(value > -np.inf, value, np.float32(-np.inf)) + np.float32(0)
    bits = value.view(np.int32)
    write_lanes(address, bits ^ (bits >> 31 & _POSITIVE_BITS))


@operation(i32xL, types.int64, emit=lambda builder, value: splat(builder, builder.trunc(value, I32), LANES))
def splat_i32xL(value):
    """The low 32 bits of a number in `LANES` lanes (vpbroadcastd)."""
    return np.full(LANES, np.int64(value).astype(np.int32))


def _add_at_least(builder, acc, x, least):
    return builder.sub(acc, builder.sext(builder.icmp_signed(">=", x, least), acc.type))


@operation(i32xL, i32xL, i32xL, i32xL, emit=_add_at_least)
def add_at_least(acc, x, least):
    """`acc`, and 1 more in the lanes where ``x >= least`` (vpcmpd, vpsubd)."""
    return acc + (x >= least)


def _lanes_at_least(builder, x, least):
    bits = builder.bitcast(builder.icmp_signed(">=", x, least), ir.IntType(LANES))
    return builder.zext(bits, I64)


@operation(types.int64, i32xL, i32xL, emit=_lanes_at_least)
def lanes_at_least(x, least):
    """A number whose bit i says whether lane i of `x` is at least that of `least` (vpcmpd, kmovd)."""
    return np.int64(sum(1 << i for i in np.flatnonzero(x >= least).tolist()))


def _sum_of_lanes(builder, x):
    return builder.sext(reduced(builder, x, builder.add), I64)


@operation(types.int64, i32xL, emit=_sum_of_lanes)
def sum_of_lanes(x):
    """The sum of `LANES` int32, which is one."""
    return np.int64(x.sum(dtype=np.int32))


def _lowest_bit(builder, bits):
    count = declare(builder, "llvm.cttz.i64", I64, [I64, I1])
    return builder.call(count, [bits, ir.Constant(I1, 1)])


@operation(types.int64, types.int64, emit=_lowest_bit)
def lowest_bit(bits):
    """The number of the lowest bit that is set; one at least is (tzcnt)."""
    return np.int64((int(bits) & -int(bits)).bit_length() - 1)
