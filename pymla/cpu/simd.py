"""Vector registers as Numba values, so that kernels are plain Python over them.

``f32x8`` is eight float32, ``i8x32`` thirty-two int8, and so on. A kernel keeps them in local variables; LLVM keeps
those in registers. The levels of `pymla.cpu.isa` are behind one interface, and all give the same integers.

Products of int8 come in two shapes. Rows of weights use 32 codes in the order of the file (`dot_i8`, `dot_u7`). Panels
(`pymla.cpu.panels`) hold `LANES` rows in the lanes of a register, four codes of each row side by side, and take the
functions on ``Panel`` registers, whose width the level decides.

Addresses are int64 (``array.ctypes.data``). Loads and stores need no alignment.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.intrinsics import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    Vector,
    constant,
    declare,
    dpbusd,
    elementwise,
    f32x8,
    f32x16,
    f32x32,
    i8x32,
    i16x16,
    i32x8,
    in_order,
    ir_type,
    loader,
    operation,
    read,
    reduction,
    shuffle,
    splat,
    storer,
    write,
)
from pymla.cpu.isa import AMX, ISA, LANES, VNNI

f32xL = Vector("f32", LANES)
i32xL = Vector("i32", LANES)
i8xL = Vector("i8", 4 * LANES)
#: Sums of products with codes of up to 6 bits in rows.
row_sums = i32x8 if VNNI else i16x16
#: Sums of products with codes of 4 bits in panels: a block of 32 fits the int16 lanes that `vpmaddubsw` makes.
sum4 = i32xL if VNNI else Vector("i16", 2 * LANES)


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


#: Addresses of the rows of a panel.
rowsL = types.UniTuple(types.int64, LANES)


@intrinsic
def panel_rows(typingctx, row, stride, count):
    """Addresses of the rows of a panel, `stride` bytes apart; where there are fewer, of the last one again."""

    def codegen(context, builder, signature, args):
        row, stride, count = args
        last = builder.sub(count, ir.Constant(I64, 1))
        numbers = (ir.Constant(I64, i) for i in range(LANES))
        numbers = (builder.select(builder.icmp_signed("<", i, last), i, last) for i in numbers)
        return context.make_tuple(builder, rowsL, [builder.add(row, builder.mul(i, stride)) for i in numbers])

    return rowsL(types.int64, types.int64, types.int64), codegen


def _addresses(builder, rows, offset):
    return [builder.add(builder.extract_value(rows, i), offset) for i in range(LANES)]


@intrinsic
def load_columns(typingctx, rows, offset):
    """Sixteen bytes of each row of a panel, as four registers: bytes 0 to 3 of every row, then 4 to 7, and so on."""
    result = types.UniTuple(i8xL, 4)

    def of_fours(builder, a, b, lanes):
        """Lanes of each four of two registers; those of the second have numbers from 4 on."""
        order = [lane + 4 * i if lane < 4 else LANES + lane - 4 + 4 * i for i in range(LANES // 4) for lane in lanes]
        return shuffle(builder, a, b, order)

    def joined(builder, parts):
        """One register of two or four."""
        while len(parts) > 1:
            lanes = range(2 * parts[0].type.count)
            parts = [shuffle(builder, a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def codegen(context, builder, signature, args):
        sixteens = [read(builder, each, ir.VectorType(I32, 4)) for each in _addresses(builder, *args)]
        # Each register has every fourth row; then the fours of its lanes are transposed.
        registers = [joined(builder, sixteens[i::4]) for i in range(4)]
        pairs = []
        for a, b in (registers[:2], registers[2:]):
            pairs.append((of_fours(builder, a, b, [0, 4, 1, 5]), of_fours(builder, a, b, [2, 6, 3, 7])))
        columns = []
        for a, b in zip(*pairs, strict=True):
            columns += of_fours(builder, a, b, [0, 1, 4, 5]), of_fours(builder, a, b, [2, 3, 6, 7])
        columns = [builder.bitcast(column, ir_type(i8xL)) for column in columns]
        return context.make_tuple(builder, result, columns)

    return result(rowsL, types.int64), codegen


def _gathered(builder, rows, offset, element):
    """An element of each row of a panel."""
    gathered = ir.Constant(ir.VectorType(element, LANES), ir.Undefined)
    for i, at in enumerate(_addresses(builder, rows, offset)):
        gathered = builder.insert_element(gathered, read(builder, at, element), ir.Constant(I32, i))
    return gathered


def _words(builder, rows, offset):
    """An int32 of each row of a panel."""
    if not AMX:
        return _gathered(builder, rows, offset, I32)
    # One instruction, a third faster than sixteen. Not on every processor: on AMD's it takes longer.
    words, mask = ir.VectorType(I32, LANES), ir.VectorType(ir.IntType(1), LANES)
    first, from_first = builder.extract_value(rows, 0), ir.Constant(words, ir.Undefined)
    for i in range(LANES):
        distance = builder.trunc(builder.sub(builder.extract_value(rows, i), first), I32)
        from_first = builder.insert_element(from_first, distance, ir.Constant(I32, i))
    base = builder.inttoptr(builder.add(first, offset), I8.as_pointer())
    gather = declare(builder, "llvm.x86.avx512.mask.gather.dpi.512", words, [words, base.type, words, mask, I32])
    return builder.call(gather, [constant(words, 0), base, from_first, constant(mask, 1), ir.Constant(I32, 1)])


def _gather_halves(shift):
    """Gathers IEEE halves, the bits from `shift` on of int32, as float32."""

    @operation(f32xL, rowsL, types.int64)
    def gather(builder, rows, offset):
        words = _words(builder, rows, offset)
        halves = builder.trunc(builder.lshr(words, constant(words.type, shift)), ir.VectorType(I16, LANES))
        return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, LANES)), ir_type(f32xL))

    return gather


#: The first and the second one of the IEEE halves in four bytes of each row of a panel, as float32.
gather_f16, gather_second_f16 = _gather_halves(0), _gather_halves(16)


@operation(f32xL, rowsL, types.int64)
def gather_i8(builder, rows, offset):
    """An int8 of each row of a panel as float32."""
    return builder.sitofp(_gathered(builder, rows, offset, I8), ir_type(f32xL))


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


def _reduced(builder, value, combine):
    """Halves combined with halves, so that the order does not depend on compiler flags."""
    count = value.type.count
    while count > 1:
        count //= 2
        low = shuffle(builder, value, value, list(range(count)))
        high = shuffle(builder, value, value, list(range(count, 2 * count)))
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


@reduction
def total(builder, x):
    """The sum of all lanes."""
    return _reduced(builder, x, builder.fadd)


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
    return _reduced(builder, x, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@reduction
def farthest(builder, x):
    """The largest of all lanes, none of which is negative; NaN counts as larger than any."""
    word = _reduced(
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


# Products of bytes


def _madd_bytes(builder, unsigned, signed):
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


def _add_pairs(builder, words):
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


def _dot_signed(builder, acc, a, b):
    # |a| as unsigned bytes times b with a's sign: pairs sum up to 2 * 128 * 127, which an int16 holds.
    unsigned, signed = _with_sign(builder, a, a), _with_sign(builder, b, a)
    if VNNI and acc.type.count == 8:
        return dpbusd(builder, acc, unsigned, signed)
    return builder.add(acc, _add_pairs(builder, _madd_bytes(builder, unsigned, signed)))


@operation(i32x8, i32x8, i8x32, i8x32)
def dot_i8(builder, acc, a, b):
    """``acc[i] += a[4i] b[4i] + … + a[4i+3] b[4i+3]`` on signed bytes, exact.

    `b` must lie between -127 and 127 (`quantise_activations` sees to it); `a` may also be -128.
    """
    return _dot_signed(builder, acc, a, b)


@operation(i32x8, i32x8, i8x32, i8x32)
def dot_u7(builder, acc, a, b):
    """`dot_i8` for `a` from 0 to 127: sums of two products fit an int16 as they are."""
    if VNNI:
        return dpbusd(builder, acc, a, b)
    return builder.add(acc, _add_pairs(builder, _madd_bytes(builder, a, b)))


zero_i32x8 = operation(i32x8)(lambda builder: constant(ir_type(i32x8), 0))
to_f32 = operation(f32x8, i32x8)(lambda builder, x: builder.sitofp(x, ir_type(f32x8)))


# Eight blocks of 32 codes at a time: halves of a register hold parts of two, and in the end each lane has one.


zero_sums = operation(row_sums)(lambda builder: constant(ir_type(row_sums), 0))


@operation(row_sums, row_sums, i8x32, i8x32)
def dot_u6(builder, acc, a, b):
    """Add products of `a` from 0 to 63 with `b` from -127 to 127: twice at most, eight times where `a` is under 16."""
    if VNNI:
        return dpbusd(builder, acc, a, b)
    return builder.add(acc, _madd_bytes(builder, a, b))


def _sum_blocks(sums):
    @operation(i32x8, sums, sums, sums, sums)
    def sum_blocks(builder, a, b, c, d):
        """Sums of blocks 0 to 7; `a` has those of 0 and 4 in its halves, `b` of 1 and 5, and so on."""
        doubles = ir_type(i32x8)

        def add_shuffled(x, y, first, second):
            x, y = builder.bitcast(x, doubles), builder.bitcast(y, doubles)
            first, second = shuffle(builder, x, y, first), shuffle(builder, x, y, second)
            return builder.add(builder.bitcast(first, a.type), builder.bitcast(second, a.type))

        ab = add_shuffled(a, b, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
        cd = add_shuffled(c, d, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
        all_four = add_shuffled(ab, cd, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])
        return all_four if a.type == doubles else _add_pairs(builder, all_four)

    return sum_blocks


#: For sums of `dot_u6`, and of `dot_i8`.
sum_blocks, sum_blocks_i32 = _sum_blocks(row_sums), _sum_blocks(i32x8)


@operation(i16x16, types.int64)
def load_i8_as_i16(builder, address):
    """Sixteen int8 from memory as int16."""
    return builder.sext(read(builder, address, ir.VectorType(I8, 16)), ir_type(i16x16))


load_i16x16 = loader(i16x16)


@operation(i32x8, i16x16, i16x16)
def dot_i16(builder, a, b):
    """``a[2i] b[2i] + a[2i+1] b[2i+1]``."""
    return dot_pairs_i16(builder, a, b)


@intrinsic(prefer_literal=True)
def add_times(typingctx, acc, sums, scales, k):
    """Add `sums`, int32, times the k-th of eight int16 in each half of `scales`; `k` is a literal."""
    lanes = [k.literal_value] * 8 + [8 + k.literal_value] * 8

    def codegen(context, builder, signature, args):
        acc, sums, scales, _ = args
        scale = shuffle(builder, scales, scales, lanes)
        if VNNI:
            wide = builder.sext(shuffle(builder, scale, scale, list(range(0, 16, 2))), acc.type)
            return builder.add(acc, builder.mul(sums, wide))
        return builder.add(acc, dot_pairs_i16(builder, sums, scale))

    return i32x8(i32x8, row_sums, i16x16, k), codegen


times_32 = operation(i32x8, i32x8)(lambda builder, x: builder.shl(x, constant(x.type, 5)))
subtract_i32 = operation(i32x8, i32x8, i32x8)(lambda builder, x, y: builder.sub(x, y))


def _sum_sixteens(builder, codes):
    """The sum of the first sixteen of thirty-two signed bytes in each of four int32, of the others in four more."""
    ones = constant(codes.type, 1)
    if VNNI:
        fours = dpbusd(builder, constant(ir_type(i32x8), 0), ones, codes)
    else:
        fours = dot_pairs_i16(builder, _madd_bytes(builder, ones, codes), constant(ir_type(i16x16), 1))
    twos = builder.add(fours, shuffle(builder, fours, fours, [1, 0, 3, 2, 5, 4, 7, 6]))
    return builder.add(twos, shuffle(builder, twos, twos, [2, 3, 0, 1, 6, 7, 4, 5]))


@operation(types.void, types.int64, i8x32)
def store_sum16(builder, address, codes):
    """The sums of the first and of the second sixteen of thirty-two signed bytes, as int16 to memory."""
    sums = _sum_sixteens(builder, codes)
    write(builder, address, builder.trunc(shuffle(builder, sums, sums, [0, 4]), ir.VectorType(I16, 2)))


def _sum_i8x32(builder, codes):
    sums = _sum_sixteens(builder, codes)
    low, high = (builder.extract_element(sums, ir.Constant(I32, i)) for i in (0, 4))
    return builder.add(low, high)


#: The sum of thirty-two signed bytes.
sum_i8x32 = operation(types.int32, i8x32)(_sum_i8x32)


# Panel registers. `broadcast_i8xL` gives every row the same four activations.


@operation(i8xL, types.int64)
def broadcast_i8xL(builder, address):
    """Four bytes from memory, repeated."""
    return builder.bitcast(splat(builder, read(builder, address, I32), LANES), ir_type(i8xL))


@operation(types.void, types.int64, i8x32)
def store_start4(builder, address, codes):
    """What `start4` needs to take a zero point of 8 off: a word for 32 activations."""
    if VNNI:
        write(builder, address, builder.mul(_sum_i8x32(builder, codes), ir.Constant(I32, -8)))
        return
    pairs = _madd_bytes(builder, constant(codes.type, 1), codes)
    minus_8 = ir.Constant(I16, -8)
    halves = []
    for i in (0, 1):
        half = shuffle(builder, pairs, pairs, list(range(i, 16, 2)))
        halves.append(builder.mul(_reduced(builder, half, builder.add), minus_8))
    low, high = builder.zext(halves[0], I32), builder.zext(halves[1], I32)
    write(builder, address, builder.or_(low, builder.shl(high, ir.Constant(I32, 16))))


@operation(sum4, types.int64)
def start4(builder, address):
    """Sums of a block of 32 weights to begin with, so that codes from 0 to 15 count as -8 to 7."""
    word = splat(builder, read(builder, address, I32), LANES)
    return builder.bitcast(word, ir_type(sum4))


zero4 = operation(sum4)(lambda builder: constant(ir_type(sum4), 0))


@operation(sum4, sum4, i8xL, i8xL)
def dot4(builder, acc, codes, activations):
    """Add products with codes from 0 to 15. After 8 of them, 32 weights of a row, the sums are in range again."""
    if VNNI:
        return in_order(builder, dpbusd(builder, acc, codes, activations))
    return in_order(builder, builder.add(acc, _madd_bytes(builder, codes, activations)))


@operation(f32xL, sum4)
def finish4(builder, acc):
    """The sums as float32."""
    return builder.sitofp(acc if VNNI else _add_pairs(builder, acc), ir_type(f32xL))


# Codes of 8 bits: signed where there is no VNNI; unsigned, 128 more, where there is.


@elementwise
def panel_codes8(builder, codes):
    """Signed codes as `dot8` wants them."""
    return builder.xor(codes, constant(codes.type, -128)) if VNNI else codes


@operation(i32xL, types.int64)
def start8(builder, address):
    """Sums to begin with, from the sum of the activations, int16, at `address`."""
    if not VNNI:
        return constant(ir_type(i32xL), 0)
    offset = builder.mul(builder.sext(read(builder, address, I16), I32), ir.Constant(I32, -128))
    return splat(builder, offset, LANES)


@operation(i32xL, i32xL, i8xL, i8xL)
def dot8(builder, acc, codes, activations):
    """Add products with codes that `panel_codes8` gave."""
    if VNNI:
        return in_order(builder, dpbusd(builder, acc, codes, activations))
    return in_order(builder, _dot_signed(builder, acc, codes, activations))


finish8 = operation(f32xL, i32xL)(lambda builder, x: builder.sitofp(x, ir_type(f32xL)))
