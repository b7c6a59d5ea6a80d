"""Bit planes (`pymla.planes`) in registers: codes of weights as bytes.

The functions here make operations for planes. `load_codes_for` fills a register whose number is a literal, so that LLVM
sees where each byte comes from; `load_codes_32_for` takes 32 columns that begin anywhere.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.cpu.machine.intrinsics import (
    I8,
    LITERAL,
    constant,
    i8x32,
    i8xL,
    operation,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes
from pymla.cpu.machine.orders import COLUMNS, FOURS, columns_of
from pymla.cpu.machine.simd_bits import (
    address_at,
    bit_fields,
    divided_by,
    load_bytes,
    look_up_table,
    numpy_numbers,
    times_constant,
)
from pymla.cpu.machine.simd_scales import emit_sixteen, number_at, numpy_sixteen
from pymla.planes import Plane


class _Finish:
    """What becomes of the numbers that planes hold: the codes of weights, `offset` more."""

    def __init__(self, layout, offset):
        codes = layout.codes
        self.add = offset - codes.minus
        self.table = [(level + offset + 128) % 256 - 128 for level in codes.levels]
        self.flip = codes.signed
        if codes.signed:
            self.add = offset - 128
        self.add = (self.add + 128) % 256 - 128

    def emit(self, builder, numbers):
        if self.flip:
            numbers = builder.xor(numbers, constant(numbers.type, -128))
        if self.table:
            return look_up_table(builder, numbers, self.table)
        return builder.add(numbers, constant(numbers.type, self.add)) if self.add else numbers

    def numpy(self, numbers):
        if self.flip:
            numbers = numbers ^ 128
        if self.table:
            return np.array(self.table, np.int8)[numbers]
        return (numbers.astype(np.int16) + self.add).astype(np.int8)


def load_codes_for(qtype, layout, offset, order=COLUMNS, moves=True):
    """Make ``load_codes(address, r)``: the codes of the r-th register of 256 weights, or with `FOURS` of 128, `offset`
    more than they are, int8 or uint8. `r` is a literal; blocks begin at the address. Without `moves`, levels are those
    of the first variant."""
    size, nbytes, finish = ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype], _Finish(layout, offset)
    codes, total = layout.codes, (128 if order == FOURS else 256) // size * nbytes

    def place(plane, column):
        """The byte behind the address, and the bit of it, at which a plane has a number."""
        byte, bit = plane.place(column % size if plane is not codes.variants else column % size // layout.each)
        return column // size * nbytes + byte, bit

    def packed(builder, plane, address, columns):
        """The bytes that have the numbers of some columns, and the bits of them."""
        places = [place(plane, column) for column in columns]
        begin = plane.at if isinstance(plane, Plane) else 0
        found = load_bytes(builder, address, [byte for byte, _ in places], total, begin)
        return found, [bit for _, bit in places]

    def emit(builder, address, r):
        columns, numbers = columns_of(order, r), None
        for plane in codes.planes:
            part = bit_fields(builder, *packed(builder, plane, address, columns), plane.bits, plane.shift)
            numbers = builder.or_(numbers, part) if numbers else part
        result = finish.emit(builder, numbers)
        if codes.variants and moves:
            found, bits = packed(builder, codes.variants, address, columns)
            tested = builder.and_(found, ir.Constant(found.type, [1 << bit for bit in bits]))
            is_set = builder.icmp_unsigned("!=", tested, constant(found.type, 0))
            moved = builder.select(is_set, constant(found.type, codes.moved), constant(found.type, 0))
            result = builder.add(result, moved)
        return result

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256 that planes hold."""
        blocks = read_lanes(address, np.uint8, total).reshape(-1, nbytes)
        columns = [divmod(column, size) for column in columns_of(order, r)]
        result = finish.numpy(numpy_numbers(codes.planes, blocks, columns))
        if codes.variants and moves:
            small = [(block, column // layout.each) for block, column in columns]
            result = result + (codes.moved * numpy_numbers((codes.variants,), blocks, small)).astype(np.int8)
        return result

    return load_codes


def load_multiples_for(qtype, layout, offset):
    """Make ``load_multiples(address, r)``: the codes of the r-th register of a block of 256 weights, each times the
    integer scale of its sixteen weights, `offset` more, int8 or uint8. `r` is a literal. The type has no levels."""
    codes, scales, nbytes = layout.codes, layout.scales, ggml.BLOCK_BYTES[qtype]

    def bits(r):
        """The bits of a code: the number of each, where its plane begins, and of each column the byte and its bit."""
        for plane in codes.planes:
            places = [plane.place(column) for column in columns_of(COLUMNS, r)]
            for bit in range(plane.bits):
                yield plane.shift + bit, plane.at, [byte for byte, _ in places], [first + bit for _, first in places]

    def emit(builder, address, r):
        scale = emit_sixteen(builder, qtype, scales, address)
        scale = builder.sub(scale, constant(scale.type, scales.minus)) if scales.minus else scale
        scale = shuffle(builder, scale, scale, [column // 16 for column in columns_of(COLUMNS, r)])
        result = constant(scale.type, offset)
        if codes.minus:
            result = builder.sub(result, builder.mul(scale, constant(scale.type, codes.minus)))
        for number, begin, wanted, shifts in bits(r):
            packed = load_bytes(builder, address, wanted, nbytes, begin)
            tested = builder.and_(packed, ir.Constant(packed.type, [1 << shift for shift in shifts]))
            is_set = builder.icmp_unsigned("!=", tested, constant(packed.type, 0))
            power = builder.mul(scale, constant(scale.type, 1 << number))
            result = builder.add(result, builder.select(is_set, power, constant(scale.type, 0)))
        return result

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_multiples(address, r):
        """Codes of weights that planes hold, times integer scales."""
        columns = columns_of(COLUMNS, r)
        block = read_lanes(address, np.uint8, nbytes).reshape(1, -1)
        numbers = numpy_numbers(codes.planes, block, [(0, column) for column in columns]).astype(int) - codes.minus
        scale = numpy_sixteen(qtype, scales, address)[[column // 16 for column in columns]].astype(int)
        return (numbers * scale + offset).astype(np.uint8).view(np.int8)

    return load_multiples


def _plane_32(builder, plane, address, sub):
    """The fields that a plane of a block has of the 32 columns from ``32 * sub`` on."""
    # Columns of a run of bytes, in groups of 32: the group chooses bytes of the run, or a field of them.
    groups, in_run = max(1, plane.run // 32), max(1, plane.run * plane.fields // 32)
    whole, rest = divided_by(builder, sub, in_run)
    field, group = divided_by(builder, rest, groups)
    start = times_constant(builder, whole, plane.run if in_run > 1 else 4 * plane.bits)
    start = builder.add(start, times_constant(builder, group, 32))
    places = [plane.place(column) for column in range(32)]
    wanted = [byte for byte, _ in places]
    packed = load_bytes(builder, builder.add(address, start), wanted, max(wanted) + 1)
    if in_run > 1 and plane.bits < 8:
        shift = splat(builder, times_constant(builder, field, plane.bits * max(1, 32 // plane.run)), 4)
        packed = builder.bitcast(builder.lshr(builder.bitcast(packed, shift.type), shift), packed.type)
    return bit_fields(builder, packed, [shift for _, shift in places], plane.bits, plane.shift)


def load_codes_32_for(qtype, layout):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    nbytes, finish = ggml.BLOCK_BYTES[qtype], _Finish(layout, 0)
    codes, subs = layout.codes, ggml.BLOCK_SIZE[qtype] // 32

    def emit(builder, address, block):
        whole, sub = divided_by(builder, block, subs)
        address = builder.add(address, times_constant(builder, whole, nbytes))
        numbers = None
        for plane in codes.planes:
            part = _plane_32(builder, plane, address, sub)
            numbers = builder.or_(numbers, part) if numbers else part
        result = finish.emit(builder, numbers)
        if codes.variants:
            small = 32 // layout.each
            first = times_constant(builder, sub, small)
            bits = [number_at(builder, (codes.variants,), address, address_at(builder, first, i)) for i in range(small)]
            moved = [builder.mul(builder.trunc(bit, I8), ir.Constant(I8, codes.moved)) for bit in bits]
            halves = [splat(builder, each, 32) for each in moved]
            lanes = [i if i < 32 // small else 32 + i for i in range(32)]
            result = builder.add(result, shuffle(builder, halves[0], halves[-1], lanes))
        return result

    @operation(i8x32, types.int64, types.int64, emit=emit)
    def load_codes_32(address, block):
        """Codes of 32 weights that planes hold."""
        blocks = read_lanes(address + block // subs * nbytes, np.uint8, nbytes).reshape(1, -1)
        columns = [(0, 32 * (block % subs) + i) for i in range(32)]
        result = finish.numpy(numpy_numbers(codes.planes, blocks, columns))
        if codes.variants:
            small = [(0, column // layout.each) for _, column in columns]
            result = result + (codes.moved * numpy_numbers((codes.variants,), blocks, small)).astype(np.int8)
        return result

    return load_codes_32
