"""Searches: which of many lanes has the largest number."""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import I1, I32, I64, declare, f32xL, operation, shuffle
from pymla.cpu.machine.lanes import combined
from pymla.cpu.machine.simd_floats import larger
from pymla.cpu.runtime.isa import LANES


def _larger(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _larger_halves(builder, x, y, run):
    """Of registers with numbers in runs of ``2 * run`` lanes: the larger of both halves of each run, those of `x`
    first."""
    low = [2 * run * number + i for number in range(LANES // (2 * run)) for i in range(run)]
    low += [LANES + lane for lane in low]
    return _larger(builder, shuffle(builder, x, y, low), shuffle(builder, x, y, [lane + run for lane in low]))


def _largest_four(builder, a, b, c, d):
    ab, cd = (_larger_halves(builder, x, y, LANES // 2) for x, y in ((a, b), (c, d)))
    lanes, distance = _larger_halves(builder, ab, cd, LANES // 4), LANES // 8
    while distance:
        lanes = _larger(builder, lanes, shuffle(builder, lanes, lanes, [lane ^ distance for lane in range(LANES)]))
        distance //= 2
    return [builder.extract_element(lanes, ir.Constant(I32, LANES // 4 * i)) for i in range(4)]


@operation(types.UniTuple(types.float32, 4), *[f32xL] * 4, emit=_largest_four)
def largest_four(a, b, c, d):
    """The largest of all lanes of each of four registers: upper halves with lower halves, until a lane is left
    (vpermt2ps, vmaxps)."""
    return tuple(combined(x, larger.py_func) for x in (a, b, c, d))


def _lanes_at_least(builder, x, y):
    bits = builder.bitcast(builder.fcmp_ordered(">=", x, y), ir.IntType(LANES))
    return builder.zext(bits, I64)


@operation(types.int64, f32xL, f32xL, emit=_lanes_at_least)
def lanes_at_least(x, y):
    """A bit for each lane, the lowest for the first one: whether ``x >= y`` (vcmpps)."""
    return np.int64(sum(1 << lane for lane in np.flatnonzero(x >= y).tolist()))


def _lowest_bit(builder, bits):
    count = declare(builder, "llvm.cttz.i64", I64, [I64, I1])
    return builder.call(count, [bits, ir.Constant(I1, 0)])


@operation(types.int64, types.int64, emit=_lowest_bit)
def lowest_bit(bits):
    """The number of the lowest bit that is set; 64 if none is (tzcnt)."""
    return np.int64((int(bits) & -int(bits)).bit_length() - 1 if bits else 64)
