"""Codes that come from a random number generator (`pymla.trellis`): registers of levels.

`load_codes_for` and `load_codes_32_for` make the same operations as in `pymla.cpu.machine.simd_planes`. Numbers are
computed in lanes of int32, one for each weight, whose levels become bytes of lanes.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.cpu.machine.intrinsics import (
    I8,
    I32,
    LITERAL,
    constant,
    declare,
    dpbusd,
    i8x32,
    i8xL,
    operation,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes
from pymla.cpu.machine.orders import COLUMNS, columns_of
from pymla.cpu.machine.simd_bits import divided_by, load_bytes, times_constant
from pymla.cpu.machine.simd_fields import emit_words, emit_words_32, numpy_words
from pymla.cpu.runtime.isa import VNNI
from pymla.trellis import FACTOR, MIDDLE, OFFSET, SIX_BITS


def load_codes_for(qtype, trellis, offset, order=COLUMNS):
    """Make ``load_codes(address, r)``: the codes of the r-th register of 256 weights, `offset` more than they are, int8
    or uint8. `r` is a literal; the block begins at the address."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, r):
        columns = columns_of(order, r)
        index = emit_words(builder, trellis.indices, address, range(256 // trellis.group), nbytes)
        moved = None
        if trellis.moved:
            moved = emit_words(builder, (trellis.moved,), address, range(8), nbytes)
        signs = None
        if trellis.signs:
            places = [trellis.signs.place(column) for column in columns]
            found = load_bytes(builder, address, [byte for byte, _ in places], nbytes)
            signs = builder.and_(found, ir.Constant(found.type, [1 << bit for _, bit in places]))
        return _emit_codes(builder, trellis, offset, index, moved, signs, columns)

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256, from a generator."""
        codes = _numpy_codes(trellis, read_lanes(address, np.uint8, nbytes)[None])[0]
        return (codes[columns_of(order, r)].astype(np.int16) + offset).astype(np.int8)

    return load_codes


def load_codes_32_for(qtype, trellis):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, block):
        whole, sub = divided_by(builder, block, 8)
        address = builder.add(address, times_constant(builder, whole, nbytes))
        index = emit_words_32(builder, trellis.indices, address, sub, 32 // trellis.group)
        moved = emit_words_32(builder, (trellis.moved,), address, sub, 1) if trellis.moved else None
        signs = None
        if trellis.signs:
            # The weights from 32 * sub on have bit `sub` of 32 bytes.
            found = load_bytes(builder, address, range(trellis.signs.at, trellis.signs.at + 32), nbytes)
            bit = builder.shl(ir.Constant(I8, 1), builder.trunc(sub, I8))
            signs = builder.and_(found, splat(builder, bit, 32))
        return _emit_codes(builder, trellis, 0, index, moved, signs, range(32))

    @operation(i8x32, types.int64, types.int64, emit=emit)
    def load_codes_32(address, block):
        """Codes of 32 weights, from a generator."""
        codes = _numpy_codes(trellis, read_lanes(address + block // 8 * nbytes, np.uint8, nbytes)[None])[0]
        return codes[32 * (block % 8) : 32 * (block % 8 + 1)]

    return load_codes_32


def _emit_codes(builder, trellis, offset, index, moved, signs, columns):
    """The codes at some columns of indices, int16 lanes. `moved` has the bits of blocks of 32 weights, or is None, and
    `signs` a byte for each column that is not 0 where its code is negative, or is None."""
    codes = ir.VectorType(I8, len(columns))
    starts, total = _starts(builder, trellis, index, moved, columns[::4]), None
    # Of four columns side by side, which share a start, the last one comes first: its sum moves up by three bytes.
    for place in reversed(range(4)):
        powers = [_power(column % trellis.group + 1) for column in columns[place::4]]
        numbers = builder.mul(starts, ir.Constant(starts.type, powers))
        if total:
            total = builder.shl(total, constant(total.type, 8))
        total = _add_sums(builder, total, builder.and_(numbers, constant(numbers.type, SIX_BITS)))
    result = builder.bitcast(total, codes)
    if signs is None:
        return builder.add(result, constant(codes, _signed_byte(offset - MIDDLE))) if offset != MIDDLE else result
    # Levels from -126 to 126 lose their sign.
    level = builder.sub(result, constant(codes, MIDDLE))
    magnitude = declare(builder, f"llvm.abs.v{codes.count}i8", codes, [codes, ir.IntType(1)])
    level = builder.call(magnitude, [level, ir.Constant(ir.IntType(1), 0)])
    is_negative = builder.icmp_unsigned("!=", signs, constant(codes, 0))
    level = builder.select(is_negative, builder.sub(constant(codes, 0), level), level)
    return builder.add(level, constant(codes, _signed_byte(offset))) if offset else level


def _signed_byte(number):
    return (number + 128) % 256 - 128


def _starts(builder, trellis, index, moved, columns):
    """The starts of the generator at some columns, int32 lanes."""
    words = ir.VectorType(I32, len(columns))
    lanes = [number for column in columns for number in (column // trellis.group, index.type.count)]
    picked = shuffle(builder, index, constant(index.type, 0), lanes)
    starts = builder.add(builder.bitcast(picked, words), constant(words, OFFSET))
    if moved is None:
        return starts
    lanes = [number for column in columns for number in (column // 32, moved.type.count)]
    bits = builder.bitcast(shuffle(builder, moved, constant(moved.type, 0), lanes), words)
    return builder.add(starts, builder.mul(bits, constant(words, trellis.moved_by)))


def _power(exponent):
    """A power of the factor, as an int32."""
    return (pow(FACTOR, exponent, 2**32) + 2**31) % 2**32 - 2**31


def _add_sums(builder, total, numbers):
    """The sums of the four bytes of numbers, and a total, int32 lanes, or None for 0."""
    kind = numbers.type
    if VNNI and kind.count >= 8:
        return dpbusd(builder, total or constant(kind, 0), numbers, constant(ir.VectorType(I8, 4 * kind.count), 1))
    sums = builder.lshr(builder.mul(numbers, constant(kind, 0x01010101)), constant(kind, 24))
    return builder.or_(total, sums) if total else sums


def _numpy_codes(trellis, blocks):
    """Codes of blocks of 256 weights, uint8 (n, bytes), as int8 (n, 256)."""
    starts = numpy_words(trellis.indices, blocks, 256 // trellis.group).astype(np.int64) + OFFSET
    if trellis.moved:
        starts += np.repeat(numpy_words((trellis.moved,), blocks, 8), 32 // trellis.group, axis=1) * trellis.moved_by
    powers = np.array([pow(FACTOR, i + 1, 2**32) for i in range(trellis.group)], np.uint64)
    numbers = (starts[..., None].astype(np.uint64) * powers).astype(np.uint32) & np.uint32(SIX_BITS)
    levels = numbers[..., None].view(np.uint8).sum(axis=-1, dtype=np.int16).reshape(len(blocks), 256) - MIDDLE
    if trellis.signs:
        is_negative = numpy_words((trellis.signs,), blocks, 256) == 1
        levels = np.where(is_negative, -np.abs(levels), np.abs(levels))
    return levels.astype(np.int8)
