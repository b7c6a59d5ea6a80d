"""Registers of panels as Numba values: `LANES` rows in the lanes of a register, four codes of each row side by side.

First, codes and scales of rows that lie apart come together in registers (`load_columns`, `gather_f16`); then panels of
codes meet activations (`dot4`, `dot8`).
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
from pymla.cpu.machine.lanes import add_dots, read_lanes, read_number, write_lanes
from pymla.cpu.machine.simd_bytes import add_pairs, dot_signed, madd_bytes, sum_of_bytes
from pymla.cpu.runtime.isa import AMX, LANES, VNNI

#: Sums of products with codes of 4 bits: a block of 32 fits the int16 lanes that `vpmaddubsw` makes.
sum4 = i32xL if VNNI else Vector("i16", 2 * LANES)
#: The same as an array, for the NumPy functions.
_SUM4 = np.dtype((np.int32, LANES)) if VNNI else np.dtype((np.int16, 2 * LANES))
#: Addresses of the rows of a panel.
rowsL = types.UniTuple(types.int64, LANES)


def _panel_rows(builder, row, stride, count):
    last = builder.sub(count, ir.Constant(I64, 1))
    numbers = (ir.Constant(I64, i) for i in range(LANES))
    numbers = (builder.select(builder.icmp_signed("<", i, last), i, last) for i in numbers)
    return [builder.add(row, builder.mul(i, stride)) for i in numbers]


@operation(rowsL, types.int64, types.int64, types.int64, emit=_panel_rows)
def panel_rows(row, stride, count):
    """Addresses of the `LANES` rows of a panel, `stride` bytes apart; rows past `count` repeat the last row."""
    return tuple(row + min(i, count - 1) * stride for i in range(LANES))


def _addresses(builder, rows, offset):
    return [builder.add(builder.extract_value(rows, i), offset) for i in range(LANES)]


def _of_fours(builder, a, b, lanes):
    """Lanes of each four of two registers; those of the second have numbers from 4 on."""
    order = [lane + 4 * i if lane < 4 else LANES + lane - 4 + 4 * i for i in range(LANES // 4) for lane in lanes]
    return shuffle(builder, a, b, order)


def _joined(builder, parts):
    """One register of two or four."""
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        parts = [shuffle(builder, a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _load_columns(builder, rows, offset):
    sixteens = [read(builder, each, ir.VectorType(I32, 4)) for each in _addresses(builder, rows, offset)]
    # Each register has every fourth row; then the fours of its lanes are transposed.
    registers = [_joined(builder, sixteens[i::4]) for i in range(4)]
    pairs = []
    for a, b in (registers[:2], registers[2:]):
        pairs.append((_of_fours(builder, a, b, [0, 4, 1, 5]), _of_fours(builder, a, b, [2, 6, 3, 7])))
    columns = []
    for a, b in zip(*pairs, strict=True):
        columns += _of_fours(builder, a, b, [0, 1, 4, 5]), _of_fours(builder, a, b, [2, 3, 6, 7])
    return [builder.bitcast(column, ir_type(i8xL)) for column in columns]


@operation(types.UniTuple(i8xL, 4), rowsL, types.int64, emit=_load_columns)
def load_columns(rows, offset):
    """Sixteen bytes of each row of a panel, from `offset` on, as four registers: bytes 0 to 3 of every row, then 4 to
    7, and so on (vpunpckldq, vpunpcklqdq)."""
    words = np.array([read_lanes(row + offset, np.int32, 4) for row in rows])
    return tuple(np.ascontiguousarray(column).view(np.int8) for column in words.T)


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
    """Emits the gather of IEEE halves, the bits from `shift` on of an int32 of each row."""

    def emit(builder, rows, offset):
        words = _words(builder, rows, offset)
        halves = builder.trunc(builder.lshr(words, constant(words.type, shift)), ir.VectorType(I16, LANES))
        return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, LANES)), ir_type(f32xL))

    return emit


@operation(f32xL, rowsL, types.int64, emit=_gather_halves(0))
def gather_f16(rows, offset):
    """An IEEE half of each row of a panel, at `offset`, as float32. Four bytes of each row are read."""
    return np.array([read_number(row + offset, np.float16) for row in rows], np.float32)


@operation(f32xL, rowsL, types.int64, emit=_gather_halves(16))
def gather_second_f16(rows, offset):
    """The second of two IEEE halves of each row of a panel, at `offset`, as float32."""
    return gather_f16.py_func(rows, offset + 2)


def _gather_i8(builder, rows, offset):
    return builder.sitofp(_gathered(builder, rows, offset, I8), ir_type(f32xL))


@operation(f32xL, rowsL, types.int64, emit=_gather_i8)
def gather_i8(rows, offset):
    """An int8 of each row of a panel, at `offset`, as float32."""
    return np.array([read_number(row + offset, np.int8) for row in rows], np.float32)


# Codes of 4 bits. `broadcast_i8xL` gives every row the same four activations.


def _broadcast_i8xL(builder, address):
    return builder.bitcast(splat(builder, read(builder, address, I32), LANES), ir_type(i8xL))


@operation(i8xL, types.int64, emit=_broadcast_i8xL)
def broadcast_i8xL(address):
    """Four bytes from memory, repeated (vpbroadcastd)."""
    return np.tile(read_lanes(address, np.int8, 4), LANES)


def _store_start4(builder, address, codes):
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


@operation(types.void, types.int64, i8x32, emit=_store_start4)
def store_start4(address, codes):
    """For 32 activations, write the word to memory from which `start4` takes a zero point of 8 off: -8 times their sum,
    int32; without VNNI two int16, of the pairs with even and with odd numbers."""
    sums = codes.reshape(-1, 4) if VNNI else codes.reshape(-1, 2, 2)
    sums = sums.sum(axis=(0, -1), dtype=np.int32) * -8
    write_lanes(address, sums if VNNI else sums.astype(np.int16))


def _start4(builder, address):
    word = splat(builder, read(builder, address, I32), LANES)
    return builder.bitcast(word, ir_type(sum4))


@operation(sum4, types.int64, emit=_start4)
def start4(address):
    """Sums of a block of 32 weights to begin with, so that codes from 0 to 15 count as -8 to 7: the word of
    `store_start4` in every lane."""
    return np.full(LANES, read_number(address, np.int32)).view(_SUM4.base)


def _times_eighths(builder, starts, eighths):
    # The words are multiples of 8. Those without VNNI, int16, stay in range: 16 * 16 * 127 is less than 2 ** 15.
    return builder.mul(builder.ashr(starts, constant(starts.type, 3), flags=["exact"]), constant(starts.type, eighths))


@operation(sum4, sum4, LITERAL, emit=_times_eighths)
def times_eighths(starts, eighths):
    """Of what `start4` gave an eighth, times a literal from 1 to 16, or to 128 with VNNI: what takes off another zero
    point than 8."""
    return starts // 8 * eighths


@operation(sum4, emit=lambda builder: constant(ir_type(sum4), 0))
def zero4():
    """Sums of a block of 32 weights to begin with where codes have no zero point."""
    return np.zeros(_SUM4.shape, _SUM4.base)


def _dot4(builder, acc, codes, activations):
    if VNNI:
        return in_order(builder, dpbusd(builder, acc, codes, activations))
    return in_order(builder, builder.add(acc, madd_bytes(builder, codes, activations)))


@operation(sum4, sum4, i8xL, i8xL, emit=_dot4)
def dot4(acc, codes, activations):
    """Add products with codes from 0 to 15, or to 255 with VNNI. After 8 of them, 32 weights of a row, the sums are in
    range again (vpdpbusd or vpmaddubsw)."""
    return add_dots(acc, codes.view(np.uint8), activations)


def _finish4(builder, acc):
    return builder.sitofp(acc if VNNI else add_pairs(builder, acc), ir_type(f32xL))


@operation(f32xL, sum4, emit=_finish4)
def finish4(acc):
    """The sums of `dot4` as float32, one for each row."""
    return acc.reshape(LANES, -1).sum(axis=1, dtype=np.int32).astype(np.float32)


# Codes of 8 bits: signed where there is no VNNI; unsigned, 128 more, where there is.


@elementwise(lambda builder, codes: builder.xor(codes, constant(codes.type, -128)) if VNNI else codes)
def panel_codes8(codes):
    """Signed codes as `dot8` takes them: 128 more with VNNI, else as they are."""
    return codes ^ np.int8(-128) if VNNI else codes


def _start8(builder, address):
    if not VNNI:
        return constant(ir_type(i32xL), 0)
    offset = builder.mul(builder.sext(read(builder, address, I16), I32), ir.Constant(I32, -128))
    return splat(builder, offset, LANES)


@operation(i32xL, types.int64, emit=_start8)
def start8(address):
    """Sums to begin with, from the sum of the activations, int16, at `address`: with VNNI -128 times it, else 0."""
    return np.full(LANES, int(read_number(address, np.int16)) * -128 if VNNI else 0, np.int32)


def _dot8(builder, acc, codes, activations):
    if VNNI:
        return in_order(builder, dpbusd(builder, acc, codes, activations))
    return in_order(builder, dot_signed(builder, acc, codes, activations))


@operation(i32xL, i32xL, i8xL, i8xL, emit=_dot8)
def dot8(acc, codes, activations):
    """Add products with codes that `panel_codes8` gave (vpdpbusd; or vpsignb and vpmaddubsw)."""
    return add_dots(acc, codes.view(np.uint8) if VNNI else codes, activations)


@operation(f32xL, i32xL, emit=lambda builder, x: builder.sitofp(x, ir_type(f32xL)))
def finish8(x):
    """`LANES` int32 as float32 (vcvtdq2ps)."""
    return x.astype(np.float32)
