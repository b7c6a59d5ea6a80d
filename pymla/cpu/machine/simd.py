"""Vector registers as Numba values, so that kernels are plain Python over them.

``f32x8`` is eight float32, ``i8x32`` thirty-two int8, and so on. A kernel keeps them in local variables; LLVM keeps
those in registers. The levels of `pymla.cpu.machine.isa` are behind one interface, and all give the same integers.

Here are memory, arithmetic in float32, and codes. Products of codes have modules of their own:
`pymla.cpu.machine.simd_bytes` for rows of weights, `pymla.cpu.machine.simd_panels` for panels,
`pymla.cpu.machine.simd_words` for attention. An ``L`` in a name stands for the lanes of the level's widest register,
`LANES`.

Addresses are int64 (``array.ctypes.data``). Loads and stores need no alignment.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.machine.intrinsics import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    constant,
    declare,
    elementwise,
    f32x8,
    f32x16,
    f32x32,
    f32xL,
    i8x32,
    i8xL,
    i32xL,
    ir_type,
    loader,
    operation,
    read,
    reduced,
    reduction,
    shuffle,
    splat,
    storer,
    write,
)
from pymla.cpu.machine.isa import LANES

# Memory


@numba.njit
def address(array):
    """Where an array's first element is, int64."""
    return np.int64(array.ctypes.data)


load_f32x8, load_i8x32, load_f32xL, load_i8xL = map(loader, (f32x8, i8x32, f32xL, i8xL))
load_f32x32, load_i32xL = loader(f32x32), loader(i32xL)
store_f32x8, store_f32x32, store_f32xL, store_i8xL = map(storer, (f32x8, f32x32, f32xL, i8xL))
store_f32, store_i16, store_i32 = map(storer, (types.float32, types.int16, types.int32))
load_f32 = operation(types.float32, types.int64)(lambda b, address: read(b, address, F32))
load_f16 = operation(types.float32, types.int64)(lambda b, address: b.fpext(read(b, address, F16), F32))
load_i16 = operation(types.int16, types.int64)(lambda b, address: read(b, address, I16))
load_i32 = operation(types.int32, types.int64)(lambda b, address: read(b, address, I32))
load_i8_as_f32 = operation(types.float32, types.int64)(lambda b, address: b.sitofp(read(b, address, I8), F32))


@operation(types.float32, types.int64)
def load_bf16(builder, address):
    """A bfloat16 from memory as float32."""
    bits = builder.zext(read(builder, address, I16), I32)
    return builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), F32)


def _load_halves(vector):
    """Loads IEEE halves as float32."""
    halves = ir.VectorType(F16, vector.count)
    return operation(vector, types.int64)(lambda b, address: b.fpext(read(b, address, halves), ir_type(vector)))


load_f16x8, load_f16x32 = map(_load_halves, (f32x8, f32x32))


@operation(f32x8, types.int64, types.int64)
def load_scales(builder, address, stride):
    """Eight IEEE halves as float32, `stride` bytes from one to the next."""
    halves = ir.Constant(ir.VectorType(I16, 8), ir.Undefined)
    for i in range(8):
        at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
        halves = builder.insert_element(halves, read(builder, at, I16), ir.Constant(I32, i))
    return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, 8)), ir_type(f32x8))


@intrinsic
def load_scales_and_minima(typingctx, address, stride):
    """Eight pairs of IEEE halves, `stride` bytes from one to the next, as two registers of float32."""
    result = types.UniTuple(f32x8, 2)

    def codegen(context, builder, signature, args):
        address, stride = args
        words = ir.VectorType(I32, 8)
        pairs = ir.Constant(words, ir.Undefined)
        for i in range(8):
            at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
            pairs = builder.insert_element(pairs, read(builder, at, I32), ir.Constant(I32, i))
        both = pairs, builder.lshr(pairs, constant(words, 16))
        halves = (builder.trunc(each, ir.VectorType(I16, 8)) for each in both)
        floats = [builder.fpext(builder.bitcast(each, ir.VectorType(F16, 8)), ir_type(f32x8)) for each in halves]
        return context.make_tuple(builder, result, floats)

    return result(types.int64, types.int64), codegen


@operation(f32x8, types.int64, types.int64)
def load_scales_4(builder, address, stride):
    """Four such halves, twice."""
    halves = ir.Constant(ir.VectorType(I16, 8), ir.Undefined)
    for i in range(4):
        at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
        halves = builder.insert_element(halves, read(builder, at, I16), ir.Constant(I32, i))
    halves = shuffle(builder, halves, halves, [0, 1, 2, 3] * 2)
    return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, 8)), ir_type(f32x8))


@operation(f32x8, types.int64)
def load_u8x8(builder, address):
    """Eight bytes without a sign from memory as float32."""
    return builder.uitofp(read(builder, address, ir.VectorType(I8, 8)), ir_type(f32x8))


def _load_bfloats(vector):
    """Loads bfloat16 as float32."""

    @operation(vector, types.int64)
    def load(builder, address):
        wide = ir.VectorType(I32, vector.count)
        bits = builder.zext(read(builder, address, ir.VectorType(I16, vector.count)), wide)
        return builder.bitcast(builder.shl(bits, constant(wide, 16)), ir_type(vector))

    return load


load_bf16x8, load_bf16x32 = map(_load_bfloats, (f32x8, f32x32))
#: Thirty-two int8 as float32.
bytes_to_f32 = operation(f32x32, i8x32)(lambda builder, x: builder.sitofp(x, ir_type(f32x32)))


@operation(types.void, types.int64, types.float32)
def store_f16(builder, address, value):
    """A float32 as IEEE half to memory, rounded to nearest even."""
    write(builder, address, builder.fptrunc(value, F16))


@operation(types.void, types.int64, types.float32)
def store_bf16(builder, address, value):
    """A float32 as bfloat16 to memory, rounded to nearest even. NaN stays NaN."""
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(bits, ir.Constant(I32, 0x400000)), rounded)
    write(builder, address, builder.trunc(builder.lshr(chosen, ir.Constant(I32, 16)), I16))


@operation(types.void, types.int64, f32x8)
def store_as_i16(builder, address, value):
    """Eight float32, from -32768 to 32767, as int16 to memory, rounded towards zero. NaN becomes any number."""
    write(builder, address, builder.trunc(builder.fptosi(value, ir.VectorType(I32, 8)), ir.VectorType(I16, 8)))


@operation(types.void, types.int64, f32x8)
def store_as_i8(builder, address, value):
    """Eight float32, whole numbers from -128 to 255, as bytes to memory. NaN becomes any number."""
    write(builder, address, builder.trunc(builder.fptosi(value, ir.VectorType(I32, 8)), ir.VectorType(I8, 8)))


@operation(types.void, types.int64, *[f32x8] * 8)
def store_transposed(builder, address, *rows):
    """An 8 × 8 matrix of float32, given by rows, to memory by columns, 16 values from one to the next."""
    # Pairs, then fours, then halves: each step doubles the run of rows that lie side by side.
    pairs = []
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        pairs.append(shuffle(builder, a, b, [0, 8, 1, 9, 4, 12, 5, 13]))
        pairs.append(shuffle(builder, a, b, [2, 10, 3, 11, 6, 14, 7, 15]))
    fours = []
    for a, b in ((0, 2), (1, 3), (4, 6), (5, 7)):
        fours.append(shuffle(builder, pairs[a], pairs[b], [0, 1, 8, 9, 4, 5, 12, 13]))
        fours.append(shuffle(builder, pairs[a], pairs[b], [2, 3, 10, 11, 6, 7, 14, 15]))
    for i in range(4):
        for half, order in enumerate(([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])):
            at = builder.add(address, ir.Constant(I64, 64 * (i + 4 * half)))
            write(builder, at, shuffle(builder, fours[i], fours[i + 4], order))


def _prefetch(builder, address, level):
    pointer = I8.as_pointer()
    fetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32, I32, I32])
    read, data = ir.Constant(I32, 0), ir.Constant(I32, 1)
    builder.call(fetch, [builder.inttoptr(address, pointer), read, ir.Constant(I32, level), data])


#: Ask the second-level cache for the 64 bytes at an address.
prefetch_l2 = operation(types.void, types.int64)(lambda builder, address: _prefetch(builder, address, 2))


# Float registers


splat_f32 = operation(f32x8, types.float32)(lambda builder, value: splat(builder, value, 8))
splat_f32x32 = operation(f32x32, types.float32)(lambda builder, value: splat(builder, value, 32))
splat_f32xL = operation(f32xL, types.float32)(lambda builder, value: splat(builder, value, LANES))
broadcast_f32x8 = operation(f32x8, types.int64)(lambda b, address: splat(b, read(b, address, F32), 8))
broadcast_f32xL = operation(f32xL, types.int64)(lambda b, address: splat(b, read(b, address, F32), LANES))


@operation(f32x32, types.float32, types.float32)
def splat_sixteens(builder, low, high):
    """One number in the first sixteen lanes, another in the others."""
    return shuffle(builder, splat(builder, low, 16), splat(builder, high, 16), range(32))


@operation(f32x8, types.int64)
def load_f32x4(builder, address):
    """Four float32 from memory, then zeros."""
    four = read(builder, address, ir.VectorType(F32, 4))
    return shuffle(builder, four, constant(four.type, 0.0), list(range(8)))


@operation(f32x8, types.int64)
def load_f32x4_twice(builder, address):
    """Four float32 from memory, twice."""
    four = read(builder, address, ir.VectorType(F32, 4))
    return shuffle(builder, four, four, [0, 1, 2, 3] * 2)


@elementwise
def fma(builder, x, y, z):
    """``x * y + z``, rounded once."""
    name = f"llvm.fma.v{x.type.count}f32"
    return builder.call(declare(builder, name, x.type, [x.type] * 3), [x, y, z])


add = elementwise(lambda builder, x, y: builder.fadd(x, y))
sub = elementwise(lambda builder, x, y: builder.fsub(x, y))
mul = elementwise(lambda builder, x, y: builder.fmul(x, y))
div = elementwise(lambda builder, x, y: builder.fdiv(x, y))


@elementwise
def larger(builder, x, y):
    """The larger of two; of NaN and a number, `y`."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@elementwise
def farther(builder, x, y):
    """The larger of two numbers that are not negative; NaN counts as larger than any."""
    words = ir.VectorType(I32, x.type.count)
    a, b = builder.bitcast(x, words), builder.bitcast(y, words)
    return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), x.type)


@elementwise
def where_positive(builder, x, y):
    """`y` where `x` is above 0, else 0."""
    zero = constant(x.type, 0.0)
    return builder.select(builder.fcmp_ordered(">", x, zero), y, zero)


@operation(f32xL, f32xL, types.int64, f32xL)
def first_lanes(builder, x, count, y):
    """`x` in the first `count` lanes, which may be none or all, and `y` in the others."""
    lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    inside = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, I32), LANES))
    return builder.select(inside, x, y)


@elementwise
def absolute(builder, x):
    """Without the sign."""
    return builder.call(declare(builder, f"llvm.fabs.v{x.type.count}f32", x.type, [x.type]), [x])


@elementwise
def round_even(builder, x):
    """To the nearest whole number, halves to even."""
    return builder.call(declare(builder, f"llvm.rint.v{x.type.count}f32", x.type, [x.type]), [x])


@elementwise
def round_away(builder, x):
    """To the nearest whole number, halves away from zero."""
    name = f"llvm.round.v{x.type.count}f32"
    return builder.call(declare(builder, name, x.type, [x.type]), [x])


@elementwise
def exp(builder, x):
    """``e ** x``, to two units of the last place; from 1e-38 for small x to 1e38 for large x. NaN stays NaN.

    ``x = n ln 2 + f``; the polynomial for ``e ** f`` is that of the Cephes library's `expf` (S. Moshier).
    """
    vector = x.type
    fused = declare(builder, f"llvm.fma.v{vector.count}f32", vector, [vector] * 3)

    def number(value):
        return constant(vector, float(np.float32(value)))

    x = builder.select(builder.fcmp_ordered("<", x, number(-87.3)), number(-87.3), x)
    x = builder.select(builder.fcmp_ordered(">", x, number(88.3)), number(88.3), x)
    # Adding 1.5 * 2**23 leaves the whole part in the low bits, which then move into the exponent.
    magic = number(12582912.0)
    shifted = builder.call(fused, [x, number(1.44269504088896341), magic])
    whole = builder.fsub(shifted, magic)
    f = builder.call(fused, [whole, number(-0.693359375), x])
    f = builder.call(fused, [whole, number(2.12194440e-4), f])
    polynomial = number(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = builder.call(fused, [polynomial, f, number(coefficient)])
    polynomial = builder.call(fused, [builder.fmul(f, f), polynomial, builder.fadd(f, number(1.0))])
    wide = ir.VectorType(I32, vector.count)
    exponent = builder.shl(builder.add(builder.bitcast(shifted, wide), constant(wide, 127)), constant(wide, 23))
    return builder.fmul(polynomial, builder.bitcast(exponent, vector))


@elementwise
def exp2(builder, x):
    """``2 ** x`` for x up to 127, to three units of the last place; from 1e-38 for small x. NaN stays NaN.

    ``x = n + f``; the polynomial for ``2 ** f``, -1/2 ≤ f ≤ 1/2, has the smallest largest error (found by reweighted
    least squares).
    """
    vector = x.type
    fused = declare(builder, f"llvm.fma.v{vector.count}f32", vector, [vector] * 3)

    def number(value):
        return constant(vector, float(np.float32(value)))

    x = builder.select(builder.fcmp_ordered("<", x, number(-126)), number(-126), x)
    # Adding 1.5 * 2**23 leaves the whole part in the low bits, which then move into the exponent.
    shifted = builder.fadd(x, number(12582912.0))
    f = builder.fsub(x, builder.fsub(shifted, number(12582912.0)))
    polynomial = number(1.32647261e-3)
    for coefficient in (9.67151299e-3, 5.55073358e-2, 2.40222424e-1, 6.93147004e-1, 1.0):
        polynomial = builder.call(fused, [polynomial, f, number(coefficient)])
    wide = ir.VectorType(I32, vector.count)
    exponent = builder.shl(builder.bitcast(shifted, wide), constant(wide, 23))
    return builder.bitcast(builder.add(builder.bitcast(polynomial, wide), exponent), vector)


@reduction
def total(builder, x):
    """The sum of all lanes."""
    return reduced(builder, x, builder.fadd)


@intrinsic
def totals(typingctx, a, b, c, d):
    """The sums of all lanes of each of four registers of eight float32."""
    result = types.UniTuple(types.float32, 4)

    def codegen(context, builder, signature, args):
        def add_shuffled(x, y, first, second):
            return builder.fadd(shuffle(builder, x, y, first), shuffle(builder, x, y, second))

        even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
        ab, cd = (add_shuffled(x, y, even, odd) for x, y in (args[:2], args[2:]))
        halves = add_shuffled(ab, cd, even, odd)
        sums = add_shuffled(halves, halves, range(4), range(4, 8))
        lanes = [builder.extract_element(sums, ir.Constant(I32, i)) for i in range(4)]
        return context.make_tuple(builder, result, lanes)

    return result(a, b, c, d), codegen


@reduction
def largest(builder, x):
    """The largest of all lanes."""
    return reduced(builder, x, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@reduction
def farthest(builder, x):
    """The largest of all lanes, none of which is negative; NaN counts as larger than any."""
    word = reduced(
        builder,
        builder.bitcast(x, ir.VectorType(I32, x.type.count)),
        lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b),
    )
    return builder.bitcast(word, F32)


# Codes


def _nibbles(builder, address):
    packed = read(builder, address, ir.VectorType(I8, 16))
    both = builder.bitcast(shuffle(builder, packed, packed, list(range(16)) * 2), ir.VectorType(I32, 8))
    shifts = ir.Constant(both.type, [0] * 4 + [4] * 4)
    return builder.and_(builder.bitcast(builder.lshr(both, shifts), ir_type(i8x32)), constant(ir_type(i8x32), 15))


#: Thirty-two codes of 4 bits: the low halves of sixteen bytes come first, then the high halves.
load_nibbles = operation(i8x32, types.int64)(_nibbles)


@intrinsic(prefer_literal=True)
def load_nibbles_f32(typingctx, address, zero):
    """Thirty-two codes of 4 bits as `load_nibbles` has them, less a zero point (a literal), as float32."""
    zero_point = zero.literal_value

    def codegen(context, builder, signature, args):
        if LANES != 16:
            codes = _nibbles(builder, args[0])
            codes = builder.sub(codes, constant(codes.type, zero_point))
            return builder.sitofp(codes, ir_type(f32x32))
        # A table in a register has all sixteen values; its instruction looks at the lowest 4 bits of a lane.
        words = ir.VectorType(I32, 16)
        table = ir.Constant(ir_type(f32x16), [float(code - zero_point) for code in range(16)])
        pick = declare(builder, "llvm.x86.avx512.permvar.sf.512", table.type, [table.type, words])
        packed = builder.zext(read(builder, args[0], ir.VectorType(I8, 16)), words)
        low, high = packed, builder.lshr(packed, constant(words, 4))
        return shuffle(builder, *(builder.call(pick, [table, codes]) for codes in (low, high)), range(32))

    return f32x32(types.int64, zero), codegen


@operation(i8x32, types.int64, types.int64)
def load_pair(builder, first, second):
    """Sixteen bytes from one address, then sixteen from another."""
    sixteen = ir.VectorType(I8, 16)
    return shuffle(builder, read(builder, first, sixteen), read(builder, second, sixteen), list(range(32)))


@operation(i8x32, *[types.int64] * 4)
def load_eights(builder, *addresses):
    """Eight bytes from each of four addresses."""
    a, b, c, d = (read(builder, each, ir.VectorType(I8, 8)) for each in addresses)
    return shuffle(builder, shuffle(builder, a, b, range(16)), shuffle(builder, c, d, range(16)), range(32))


low_nibbles = elementwise(lambda builder, x: builder.and_(x, constant(x.type, 15)))
high_nibbles = elementwise(lambda builder, x: builder.lshr(x, constant(x.type, 4)))
bit_or = elementwise(lambda builder, x, y: builder.or_(x, y))


@elementwise
def bits_2(builder, x, shift):
    """Two bits of every byte, from bit `shift` on, moved to bits 4 and 5."""
    shift = splat(builder, builder.trunc(shift, I8), x.type.count)
    two = builder.and_(builder.lshr(x, shift), constant(x.type, 3))
    return builder.shl(two, constant(x.type, 4))


@elementwise
def subtract_i8(builder, x, value):
    """``x - value`` in every byte, wrapping."""
    return builder.sub(x, splat(builder, builder.trunc(value, I8), x.type.count))
