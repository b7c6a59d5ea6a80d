"""Registers from memory and to memory. Addresses are int64 (``array.ctypes.data``); nothing need be aligned."""

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    constant,
    declare,
    f32x8,
    f32x32,
    f32xL,
    i8x32,
    i8xL,
    i32xL,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
    write,
)
from pymla.cpu.machine.lanes import (
    bfloat16_as_float32,
    read_lanes,
    read_number,
    read_strided,
    truncated,
    write_lanes,
)
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES


@helper
def address(array):
    """Where an array's first element is, int64."""
    return np.int64(array.ctypes.data)


def _reading(kind):
    """Emits the load of a register type or LLVM type."""
    target = kind if isinstance(kind, ir.Type) else ir_type(kind)
    return lambda builder, address: read(builder, address, target)


def _halves(count):
    """Emits the load of IEEE halves as float32."""
    halves, floats = ir.VectorType(F16, count), ir.VectorType(F32, count)
    return lambda builder, address: builder.fpext(read(builder, address, halves), floats)


def _bfloats(count):
    """Emits the load of bfloat16 as float32."""
    shorts, words, floats = (ir.VectorType(kind, count) for kind in (I16, I32, F32))

    def emit(builder, address):
        bits = builder.zext(read(builder, address, shorts), words)
        return builder.bitcast(builder.shl(bits, constant(words, 16)), floats)

    return emit


# Numbers


@operation(types.float32, types.int64, emit=_reading(F32))
def load_f32(address):
    """A float32 from memory."""
    return read_number(address, np.float32)


@operation(types.float32, types.int64, emit=lambda b, address: b.fpext(read(b, address, F16), F32))
def load_f16(address):
    """An IEEE half from memory as float32 (vcvtph2ps)."""
    return np.float32(read_number(address, np.float16))


def _load_bf16(builder, address):
    bits = builder.zext(read(builder, address, I16), I32)
    return builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), F32)


@operation(types.float32, types.int64, emit=_load_bf16)
def load_bf16(address):
    """A bfloat16 from memory as float32."""
    return bfloat16_as_float32(read_lanes(address, np.uint16, 1))[0]


@operation(types.int16, types.int64, emit=_reading(I16))
def load_i16(address):
    """An int16 from memory."""
    return read_number(address, np.int16)


@operation(types.int32, types.int64, emit=_reading(I32))
def load_i32(address):
    """An int32 from memory."""
    return read_number(address, np.int32)


@operation(types.float32, types.int64, emit=lambda b, address: b.sitofp(read(b, address, I8), F32))
def load_i8_as_f32(address):
    """An int8 from memory as float32."""
    return np.float32(read_number(address, np.int8))


@operation(types.void, types.int64, types.float32, emit=write)
def store_f32(address, value):
    """A float32 to memory."""
    write_lanes(address, np.float32(value))


@operation(types.void, types.int64, types.int16, emit=write)
def store_i16(address, value):
    """An int16 to memory."""
    write_lanes(address, np.int64(value).astype(np.int16))


@operation(types.void, types.int64, types.int32, emit=write)
def store_i32(address, value):
    """An int32 to memory."""
    write_lanes(address, np.int64(value).astype(np.int32))


@operation(
    types.void,
    types.int64,
    types.float32,
    emit=lambda builder, address, value: write(builder, address, builder.fptrunc(value, F16)),
)
def store_f16(address, value):
    """A float32 to memory as IEEE half, rounded to nearest even (vcvtps2ph)."""
    with np.errstate(over="ignore"):
        write_lanes(address, np.float16(value))


def _store_bf16(builder, address, value):
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(bits, ir.Constant(I32, 0x400000)), rounded)
    write(builder, address, builder.trunc(builder.lshr(chosen, ir.Constant(I32, 16)), I16))


@operation(types.void, types.int64, types.float32, emit=_store_bf16)
def store_bf16(address, value):
    """A float32 to memory as bfloat16, rounded to nearest even. NaN stays NaN."""
    bits = int(np.float32(value).view(np.uint32))
    bits = bits | 0x400000 if np.isnan(value) else bits + 0x7FFF + (bits >> 16 & 1)
    write_lanes(address, np.uint16(bits >> 16 & 0xFFFF))


# Registers as they lie in memory


@operation(f32x8, types.int64, emit=_reading(f32x8))
def load_f32x8(address):
    """Eight float32 from memory."""
    return read_lanes(address, np.float32, 8)


@operation(f32x32, types.int64, emit=_reading(f32x32))
def load_f32x32(address):
    """Thirty-two float32 from memory."""
    return read_lanes(address, np.float32, 32)


@operation(f32xL, types.int64, emit=_reading(f32xL))
def load_f32xL(address):
    """`LANES` float32 from memory."""
    return read_lanes(address, np.float32, LANES)


@operation(i32xL, types.int64, emit=_reading(i32xL))
def load_i32xL(address):
    """`LANES` int32 from memory."""
    return read_lanes(address, np.int32, LANES)


@operation(i8x32, types.int64, emit=_reading(i8x32))
def load_i8x32(address):
    """Thirty-two bytes from memory."""
    return read_lanes(address, np.int8, 32)


@operation(i8xL, types.int64, emit=_reading(i8xL))
def load_i8xL(address):
    """4 * `LANES` bytes from memory."""
    return read_lanes(address, np.int8, 4 * LANES)


@operation(types.void, types.int64, f32x8, emit=write)
def store_f32x8(address, value):
    """Eight float32 to memory."""
    write_lanes(address, value)


@operation(types.void, types.int64, f32x32, emit=write)
def store_f32x32(address, value):
    """Thirty-two float32 to memory."""
    write_lanes(address, value)


@operation(types.void, types.int64, f32xL, emit=write)
def store_f32xL(address, value):
    """`LANES` float32 to memory."""
    write_lanes(address, value)


@operation(types.void, types.int64, i8x32, emit=write)
def store_i8x32(address, value):
    """Thirty-two bytes to memory."""
    write_lanes(address, value)


@operation(types.void, types.int64, i8xL, emit=write)
def store_i8xL(address, value):
    """4 * `LANES` bytes to memory."""
    write_lanes(address, value)


# Other numbers as float32


@operation(f32x8, types.int64, emit=_halves(8))
def load_f16x8(address):
    """Eight IEEE halves from memory as float32 (vcvtph2ps)."""
    return read_lanes(address, np.float16, 8).astype(np.float32)


@operation(f32x32, types.int64, emit=_halves(32))
def load_f16x32(address):
    """Thirty-two IEEE halves from memory as float32."""
    return read_lanes(address, np.float16, 32).astype(np.float32)


@operation(f32x8, types.int64, emit=_bfloats(8))
def load_bf16x8(address):
    """Eight bfloat16 from memory as float32."""
    return bfloat16_as_float32(read_lanes(address, np.uint16, 8))


@operation(f32x32, types.int64, emit=_bfloats(32))
def load_bf16x32(address):
    """Thirty-two bfloat16 from memory as float32."""
    return bfloat16_as_float32(read_lanes(address, np.uint16, 32))


def _load_u8x8(builder, address):
    return builder.uitofp(read(builder, address, ir.VectorType(I8, 8)), ir_type(f32x8))


@operation(f32x8, types.int64, emit=_load_u8x8)
def load_u8x8(address):
    """Eight bytes from 0 to 255 from memory as float32."""
    return read_lanes(address, np.uint8, 8).astype(np.float32)


@operation(
    f32xL,
    types.int64,
    emit=lambda b, address: b.uitofp(read(b, address, ir.VectorType(I16, LANES)), ir.VectorType(F32, LANES)),
)
def load_u16xL(address):
    """`LANES` uint16 from memory as float32 (vpmovzxwd, vcvtdq2ps)."""
    return read_lanes(address, np.uint16, LANES).astype(np.float32)


def _load_f32x4(builder, address):
    four = read(builder, address, ir.VectorType(F32, 4))
    return shuffle(builder, four, constant(four.type, 0.0), list(range(8)))


@operation(f32x8, types.int64, emit=_load_f32x4)
def load_f32x4(address):
    """Four float32 from memory, then four zeros."""
    return np.concatenate([read_lanes(address, np.float32, 4), np.zeros(4, np.float32)])


def _load_f32x4_twice(builder, address):
    four = read(builder, address, ir.VectorType(F32, 4))
    return shuffle(builder, four, four, [0, 1, 2, 3] * 2)


@operation(f32x8, types.int64, emit=_load_f32x4_twice)
def load_f32x4_twice(address):
    """Four float32 from memory, twice (vbroadcastf128)."""
    return np.tile(read_lanes(address, np.float32, 4), 2)


@operation(f32x8, types.int64, emit=lambda builder, address: splat(builder, read(builder, address, F32), 8))
def broadcast_f32x8(address):
    """One float32 from memory in eight lanes (vbroadcastss)."""
    return np.full(8, read_number(address, np.float32))


@operation(f32xL, types.int64, emit=lambda builder, address: splat(builder, read(builder, address, F32), LANES))
def broadcast_f32xL(address):
    """One float32 from memory in `LANES` lanes (vbroadcastss)."""
    return np.full(LANES, read_number(address, np.float32))


# Scales of blocks, which lie apart


def _gather(builder, address, stride, element, count):
    """Numbers from memory, `stride` bytes from one to the next."""
    gathered = ir.Constant(ir.VectorType(element, count), ir.Undefined)
    for i in range(count):
        at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
        gathered = builder.insert_element(gathered, read(builder, at, element), ir.Constant(I32, i))
    return gathered


def _to_floats(builder, halves):
    """Bits of eight IEEE halves as float32."""
    return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, 8)), ir_type(f32x8))


def _load_scales(builder, address, stride):
    return _to_floats(builder, _gather(builder, address, stride, I16, 8))


@operation(f32x8, types.int64, types.int64, emit=_load_scales)
def load_scales(address, stride):
    """Eight IEEE halves from memory, `stride` bytes from one to the next, as float32 (vpinsrw, vcvtph2ps)."""
    return read_strided(address, np.float16, 8, stride).astype(np.float32)


def _load_scales_4(builder, address, stride):
    halves = ir.Constant(ir.VectorType(I16, 8), ir.Undefined)
    for i in range(4):
        at = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
        halves = builder.insert_element(halves, read(builder, at, I16), ir.Constant(I32, i))
    return _to_floats(builder, shuffle(builder, halves, halves, [0, 1, 2, 3] * 2))


@operation(f32x8, types.int64, types.int64, emit=_load_scales_4)
def load_scales_4(address, stride):
    """Four IEEE halves from memory, `stride` bytes from one to the next, as float32, twice."""
    return np.tile(read_strided(address, np.float16, 4, stride).astype(np.float32), 2)


def _load_scales_and_minima(builder, address, stride):
    pairs = _gather(builder, address, stride, I32, 8)
    both = pairs, builder.lshr(pairs, constant(pairs.type, 16))
    return [_to_floats(builder, builder.trunc(each, ir.VectorType(I16, 8))) for each in both]


@operation(types.UniTuple(f32x8, 2), types.int64, types.int64, emit=_load_scales_and_minima)
def load_scales_and_minima(address, stride):
    """Eight pairs of IEEE halves from memory, `stride` bytes from one to the next, as float32: a register of the first
    halves and one of the second."""
    first, second = (read_strided(address + at, np.float16, 8, stride) for at in (0, 2))
    return first.astype(np.float32), second.astype(np.float32)


# Floats as other numbers to memory


def _store_truncated(kind):
    """Emits the store of eight float32 as integers."""

    def emit(builder, address, value):
        write(builder, address, builder.trunc(builder.fptosi(value, ir.VectorType(I32, 8)), ir.VectorType(kind, 8)))

    return emit


@operation(types.void, types.int64, f32x8, emit=_store_truncated(I16))
def store_as_i16(address, value):
    """Eight float32, from -32768 to 32767, to memory as int16, rounded towards zero. NaN becomes any number."""
    write_lanes(address, truncated(value, np.int16))


@operation(types.void, types.int64, f32x8, emit=_store_truncated(I8))
def store_as_i8(address, value):
    """Eight float32, whole numbers from -128 to 255, to memory as bytes. NaN becomes any number."""
    write_lanes(address, truncated(value, np.int8))


def _store_as_u16(builder, address, value):
    words = builder.fptosi(value, ir.VectorType(I32, LANES))
    write(builder, address, builder.trunc(words, ir.VectorType(I16, LANES)))


@operation(types.void, types.int64, f32xL, emit=_store_as_u16)
def store_as_u16xL(address, value):
    """`LANES` float32, whole numbers from 0 to 65535, to memory as uint16. NaN becomes any number."""
    write_lanes(address, truncated(value, np.uint16))


def _store_transposed(builder, address, *rows):
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


@operation(types.void, types.int64, *[f32x8] * 8, emit=_store_transposed)
def store_transposed(address, a, b, c, d, e, f, g, h):
    """An 8 × 8 matrix of float32, given by rows, to memory by columns, 64 bytes from one to the next."""
    for i, column in enumerate(np.array([a, b, c, d, e, f, g, h]).T):
        write_lanes(address + 64 * i, column)


def _prefetch_l2(builder, address):
    pointer = I8.as_pointer()
    fetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32, I32, I32])
    reads, level, data = (ir.Constant(I32, each) for each in (0, 2, 1))
    builder.call(fetch, [builder.inttoptr(address, pointer), reads, level, data])


@operation(types.void, types.int64, emit=_prefetch_l2)
def prefetch_l2(address):
    """Prefetch the 64 bytes at an address into the second-level cache (prefetcht1)."""
