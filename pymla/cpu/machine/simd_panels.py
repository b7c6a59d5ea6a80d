"""Registers of panels as Numba values: `LANES` rows in the lanes of a register, four codes of each row side by side.

First, codes and scales of rows that lie apart come together in registers (`load_columns`, `gather_f16`); then panels of
codes meet activations (`dot4`, `dot8`).
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pymla.cpu.machine.intrinsics import (
    F16,
    I8,
    I16,
    I32,
    I64,
    Vector,
    constant,
    declare,
    dpbusd,
    elementwise,
    f32xL,
    i8x32,
    i8xL,
    i32xL,
    in_order,
    ir_type,
    operation,
    read,
    reduced,
    shuffle,
    splat,
    write,
)
from pymla.cpu.machine.isa import AMX, LANES, VNNI
from pymla.cpu.machine.simd_bytes import add_pairs, dot_signed, madd_bytes, sum_of_bytes

#: Sums of products with codes of 4 bits: a block of 32 fits the int16 lanes that `vpmaddubsw` makes.
sum4 = i32xL if VNNI else Vector("i16", 2 * LANES)
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


# Codes of 4 bits. `broadcast_i8xL` gives every row the same four activations.


@operation(i8xL, types.int64)
def broadcast_i8xL(builder, address):
    """Four bytes from memory, repeated."""
    return builder.bitcast(splat(builder, read(builder, address, I32), LANES), ir_type(i8xL))


@operation(types.void, types.int64, i8x32)
def store_start4(builder, address, codes):
    """What `start4` needs to take a zero point of 8 off: a word for 32 activations."""
    if VNNI:
        write(builder, address, builder.mul(sum_of_bytes(builder, codes), ir.Constant(I32, -8)))
        return
    pairs = madd_bytes(builder, constant(codes.type, 1), codes)
    minus_8 = ir.Constant(I16, -8)
    halves = []
    for i in (0, 1):
        half = shuffle(builder, pairs, pairs, list(range(i, 16, 2)))
        halves.append(builder.mul(reduced(builder, half, builder.add), minus_8))
    low, high = builder.zext(halves[0], I32), builder.zext(halves[1], I32)
    write(builder, address, builder.or_(low, builder.shl(high, ir.Constant(I32, 16))))


@operation(sum4, types.int64)
def start4(builder, address):
    """Sums of a block of 32 weights to begin with, so that codes from 0 to 15 count as -8 to 7."""
    word = splat(builder, read(builder, address, I32), LANES)
    return builder.bitcast(word, ir_type(sum4))


#: The sum of two registers that `start4` gave.
add_starts = operation(sum4, sum4, sum4)(lambda builder, x, y: builder.add(x, y))
zero4 = operation(sum4)(lambda builder: constant(ir_type(sum4), 0))


@operation(sum4, sum4, i8xL, i8xL)
def dot4(builder, acc, codes, activations):
    """Add products with codes from 0 to 15. After 8 of them, 32 weights of a row, the sums are in range again."""
    if VNNI:
        return in_order(builder, dpbusd(builder, acc, codes, activations))
    return in_order(builder, builder.add(acc, madd_bytes(builder, codes, activations)))


@operation(f32xL, sum4)
def finish4(builder, acc):
    """The sums as float32."""
    return builder.sitofp(acc if VNNI else add_pairs(builder, acc), ir_type(f32xL))


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
    return in_order(builder, dot_signed(builder, acc, codes, activations))


finish8 = operation(f32xL, i32xL)(lambda builder, x: builder.sitofp(x, ir_type(f32xL)))
