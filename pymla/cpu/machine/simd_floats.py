"""Arithmetic on registers of float32."""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F32,
    I32,
    constant,
    declare,
    elementwise,
    f32x8,
    f32x32,
    f32xL,
    operation,
    reduced,
    reduction,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import combined, fused
from pymla.cpu.runtime.isa import LANES


@operation(f32x8, types.float32, emit=lambda builder, value: splat(builder, value, 8))
def splat_f32(value):
    """One float32 in eight lanes (vbroadcastss)."""
    return np.full(8, value, np.float32)


@operation(f32x32, types.float32, emit=lambda builder, value: splat(builder, value, 32))
def splat_f32x32(value):
    """One float32 in thirty-two lanes."""
    return np.full(32, value, np.float32)


@operation(f32xL, types.float32, emit=lambda builder, value: splat(builder, value, LANES))
def splat_f32xL(value):
    """One float32 in `LANES` lanes."""
    return np.full(LANES, value, np.float32)


def _splat_sixteens(builder, low, high):
    return shuffle(builder, splat(builder, low, 16), splat(builder, high, 16), range(32))


@operation(f32x32, types.float32, types.float32, emit=_splat_sixteens)
def splat_sixteens(low, high):
    """One float32 in the first sixteen lanes, another one in the last sixteen."""
    return np.repeat(np.array([low, high], np.float32), 16)


def _fma(builder, x, y, z):
    name = f"llvm.fma.v{x.type.count}f32"
    return builder.call(declare(builder, name, x.type, [x.type] * 3), [x, y, z])


@elementwise(_fma)
def fma(x, y, z):
    """``x * y + z``, rounded once (vfmadd)."""
    return fused(x, y, z)


@elementwise(lambda builder, x, y: builder.fadd(x, y))
def add(x, y):
    """``x + y`` (vaddps)."""
    return x + y


@elementwise(lambda builder, x, y: builder.fsub(x, y))
def sub(x, y):
    """``x - y`` (vsubps)."""
    return x - y


@elementwise(lambda builder, x, y: builder.fmul(x, y))
def mul(x, y):
    """``x * y`` (vmulps)."""
    return x * y


@elementwise(lambda builder, x, y: builder.fdiv(x, y))
def div(x, y):
    """``x / y`` (vdivps)."""
    return x / y


def _larger(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@elementwise(_larger)
def larger(x, y):
    """The larger of two; of NaN and a number, `y` (vmaxps)."""
    return np.where(x > y, x, y)


def _farther(builder, x, y):
    words = ir.VectorType(I32, x.type.count)
    a, b = builder.bitcast(x, words), builder.bitcast(y, words)
    return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), x.type)


@elementwise(_farther)
def farther(x, y):
    """The larger of two numbers that are not negative; NaN counts as larger than any (vpmaxsd on their bits)."""
    return np.maximum(x.view(np.int32), y.view(np.int32)).view(np.float32)


def _where_positive(builder, x, y):
    zero = constant(x.type, 0.0)
    return builder.select(builder.fcmp_ordered(">", x, zero), y, zero)


@elementwise(_where_positive)
def where_positive(x, y):
    """`y` where `x` is above 0, else 0."""
    return np.where(x > 0, y, np.float32(0))


def _hadamard(builder, x):
    distance = 1
    while distance < LANES:
        partners = shuffle(builder, x, x, [lane ^ distance for lane in range(LANES)])
        signs = ir.Constant(x.type, [-1.0 if lane & distance else 1.0 for lane in range(LANES)])
        x = _fma(builder, x, signs, partners)
        distance *= 2
    return x


@operation(f32xL, f32xL, emit=_hadamard)
def hadamard(x):
    """The lanes times the Hadamard matrix of `LANES` rows of 1 and -1, by sums and differences of two lanes whose
    numbers differ in one bit, the lowest bit first (vpermilps, vfmadd)."""
    lanes, distance = np.arange(LANES), 1
    while distance < LANES:
        x = x[lanes ^ distance] + np.where(lanes & distance, -x, x)
        distance *= 2
    return x


def _first_lanes(builder, x, count, y):
    lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    inside = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, I32), LANES))
    return builder.select(inside, x, y)


@operation(f32xL, f32xL, types.int64, f32xL, emit=_first_lanes)
def first_lanes(x, count, y):
    """`x` in the first `count` lanes, which may be none or all, and `y` in the others."""
    return np.where(np.arange(LANES) < count, x, y)


def _rounding(name):
    """Emits an LLVM intrinsic of one float register."""

    def emit(builder, x):
        return builder.call(declare(builder, f"llvm.{name}.v{x.type.count}f32", x.type, [x.type]), [x])

    return emit


@elementwise(_rounding("fabs"))
def absolute(x):
    """The absolute value: without the sign."""
    return np.abs(x)


@elementwise(_rounding("rint"))
def round_even(x):
    """The nearest whole number, halves to even (vroundps, vrndscaleps)."""
    return np.rint(x)


@elementwise(_rounding("round"))
def round_away(x):
    """The nearest whole number, halves away from zero."""
    return np.copysign(np.floor(np.abs(x.astype(np.float64)) + 0.5), x).astype(np.float32)


#: Bounds of the argument of `exp`, whose results are normal numbers.
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -87.3, 88.3
#: ln 2 in two parts, of which the first has so few bits that its product with a whole number is exact.
_LN2, _LN2_REST = 0.693359375, -2.12194440e-4
_LOG2E = 1.44269504088896341
#: Adding 1.5 * 2**23 leaves the whole part of a number in the low bits, which then move into the exponent.
_WHOLE = 12582912.0
#: Coefficients of the polynomial for ``e ** f``, from Cephes, and for ``2 ** f``; the highest power first.
_EXP = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
_EXP2 = 1.32647261e-3, 9.67151299e-3, 5.55073358e-2, 2.40222424e-1, 6.93147004e-1, 1.0


def _exp(builder, x):
    vector = x.type

    def number(value):
        return constant(vector, float(np.float32(value)))

    def fused(a, b, c):
        return _fma(builder, a, b, c)

    x = builder.select(builder.fcmp_ordered("<", x, number(_SMALLEST_EXPONENT)), number(_SMALLEST_EXPONENT), x)
    x = builder.select(builder.fcmp_ordered(">", x, number(_LARGEST_EXPONENT)), number(_LARGEST_EXPONENT), x)
    magic = number(_WHOLE)
    shifted = fused(x, number(_LOG2E), magic)
    whole = builder.fsub(shifted, magic)
    f = fused(whole, number(-_LN2), x)
    f = fused(whole, number(-_LN2_REST), f)
    polynomial = number(_EXP[0])
    for coefficient in _EXP[1:]:
        polynomial = fused(polynomial, f, number(coefficient))
    polynomial = fused(builder.fmul(f, f), polynomial, builder.fadd(f, number(1.0)))
    wide = ir.VectorType(I32, vector.count)
    exponent = builder.shl(builder.add(builder.bitcast(shifted, wide), constant(wide, 127)), constant(wide, 23))
    return builder.fmul(polynomial, builder.bitcast(exponent, vector))


@elementwise(_exp)
def exp(x):
    """``e ** x``, to two units of the last place; from 1e-38 for small x to 1e38 for large x. NaN stays NaN.

    ``x = n ln 2 + f``; the polynomial for ``e ** f`` is that of the Cephes library's `expf` (S. Moshier).
    """

    def number(value):
        return np.full_like(x, value)

    x = np.where(x < np.float32(_SMALLEST_EXPONENT), np.float32(_SMALLEST_EXPONENT), x)
    x = np.where(x > np.float32(_LARGEST_EXPONENT), np.float32(_LARGEST_EXPONENT), x)
    shifted = fused(x, number(_LOG2E), number(_WHOLE))
    whole = shifted - number(_WHOLE)
    f = fused(whole, number(-_LN2_REST), fused(whole, number(-_LN2), x))
    polynomial = number(_EXP[0])
    for coefficient in _EXP[1:]:
        polynomial = fused(polynomial, f, number(coefficient))
    polynomial = fused(f * f, polynomial, f + number(1))
    return polynomial * (shifted.view(np.int32) + 127 << 23).view(np.float32)


def _exp2(builder, x):
    vector = x.type

    def number(value):
        return constant(vector, float(np.float32(value)))

    x = builder.select(builder.fcmp_ordered("<", x, number(-126)), number(-126), x)
    shifted = builder.fadd(x, number(_WHOLE))
    f = builder.fsub(x, builder.fsub(shifted, number(_WHOLE)))
    polynomial = number(_EXP2[0])
    for coefficient in _EXP2[1:]:
        polynomial = _fma(builder, polynomial, f, number(coefficient))
    wide = ir.VectorType(I32, vector.count)
    exponent = builder.shl(builder.bitcast(shifted, wide), constant(wide, 23))
    return builder.bitcast(builder.add(builder.bitcast(polynomial, wide), exponent), vector)


@elementwise(_exp2)
def exp2(x):
    """``2 ** x`` for x up to 127, to three units of the last place; from 1e-38 for small x. NaN stays NaN.

    ``x = n + f``; the polynomial for ``2 ** f``, -1/2 ≤ f ≤ 1/2, has the smallest largest error (found by reweighted
    least squares).
    """
    x = np.where(x < -126, np.float32(-126), x)
    shifted = x + np.float32(_WHOLE)
    f = x - (shifted - np.float32(_WHOLE))
    polynomial = np.full_like(x, _EXP2[0])
    for coefficient in _EXP2[1:]:
        polynomial = fused(polynomial, f, np.full_like(x, coefficient))
    return (polynomial.view(np.int32) + (shifted.view(np.int32) << 23)).view(np.float32)


# Registers to numbers


@reduction(lambda builder, x: reduced(builder, x, builder.fadd))
def total(x):
    """The sum of all lanes: the upper half is added to the lower half, until one lane is left."""
    return combined(x, np.add)


def _totals(builder, a, b, c, d):
    def add_shuffled(x, y, first, second):
        return builder.fadd(shuffle(builder, x, y, first), shuffle(builder, x, y, second))

    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    ab, cd = (add_shuffled(x, y, even, odd) for x, y in ((a, b), (c, d)))
    halves = add_shuffled(ab, cd, even, odd)
    sums = add_shuffled(halves, halves, range(4), range(4, 8))
    return [builder.extract_element(sums, ir.Constant(I32, i)) for i in range(4)]


@operation(types.UniTuple(types.float32, 4), f32x8, f32x8, f32x8, f32x8, emit=_totals)
def totals(a, b, c, d):
    """The sums of all lanes of each of four registers: neighbours are added, then pairs, then halves (vhaddps)."""
    return tuple(combined(x.reshape(2, 2, 2).transpose(2, 1, 0).reshape(-1), np.add) for x in (a, b, c, d))


def _largest(builder, x):
    return reduced(builder, x, lambda a, b: _larger(builder, a, b))


@reduction(_largest)
def largest(x):
    """The largest of all lanes."""
    return combined(x, larger.py_func)


def _farthest(builder, x):
    words = builder.bitcast(x, ir.VectorType(I32, x.type.count))
    word = reduced(builder, words, lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b))
    return builder.bitcast(word, F32)


@reduction(_farthest)
def farthest(x):
    """The largest of all lanes, none of which is negative; NaN counts as larger than any."""
    return combined(x, farther.py_func)
