"""Bit planes (`pymla.planes`) in registers: codes of weights as bytes, and numbers of small blocks as int32.

The functions here make operations for planes. `load_codes_for` takes as many columns as a register has bytes, which
begin at a literal, so that LLVM sees where each byte comes from; `load_codes_32_for` takes 32 columns that begin
anywhere.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.cpu.machine.intrinsics import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LITERAL,
    constant,
    declare,
    f32x8,
    f32x16,
    i8x32,
    i8xL,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes, read_number
from pymla.cpu.runtime.isa import ISA, LANES
from pymla.planes import E4M3, E8M0, HALF, ROW_FLOAT, ROW_HALF, Places

#: Columns whose codes fill a register.
COLUMNS = 4 * LANES


# Reading bytes that lie anywhere


def _load_bytes(builder, address, wanted):
    """Bytes at literal distances from an address, in a register: each run of bytes that follow each other is one
    load."""
    runs = []
    for at in sorted(set(wanted)):
        if runs and at == runs[-1][-1] + 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    loaded, lanes = None, {}
    for run in runs:
        part = read(builder, _moved(builder, address, run[0]), ir.VectorType(I8, len(run)))
        behind = loaded.type.count if loaded else 0
        lanes |= {at: behind + i for i, at in enumerate(run)}
        loaded = _behind(builder, loaded, part) if loaded else part
    picked = [lanes[at] for at in wanted]
    if picked == list(range(loaded.type.count)):
        return loaded
    return shuffle(builder, loaded, loaded, picked)


def _behind(builder, x, y):
    """The lanes of two registers, those of `y` behind those of `x`."""
    m, n = x.type.count, y.type.count
    if n < m:
        y = shuffle(builder, y, y, [i % n for i in range(m)])
    elif m < n:
        x = shuffle(builder, x, x, [i % m for i in range(n)])
    most = max(m, n)
    return shuffle(builder, x, y, [*range(m), *range(most, most + n)])


# Codes


def _fields(builder, packed, shifts, bits, place):
    """A field of every byte, `bits` wide and from bit ``shifts[i]`` on in byte i, moved to bit `place`."""
    count, mask = packed.type.count, ((1 << bits) - 1) << place
    if bits == 8:
        return packed
    eights = [shifts[i : i + 8] for i in range(0, count, 8)]
    if all(len(set(eight)) == 1 for eight in eights):
        wide = ir.VectorType(I64, count // 8)
        by = [eight[0] - place for eight in eights]
        moved = builder.bitcast(packed, wide)
        # One direction at a time: fields that go up and others that go down are shifted down first.
        down, up = (place, by) if min(by) < 0 < max(by) else (0, by)
        if down:
            moved = builder.lshr(moved, ir.Constant(wide, [eight[0] for eight in eights]))
            moved = builder.shl(moved, constant(wide, place))
        elif min(up) < 0:
            moved = builder.shl(moved, ir.Constant(wide, [-each for each in up]))
        elif max(up) > 0:
            moved = builder.lshr(moved, ir.Constant(wide, up))
        return builder.and_(builder.bitcast(moved, packed.type), constant(packed.type, mask))
    if bits == 1:
        tested = builder.and_(packed, ir.Constant(packed.type, [1 << each for each in shifts]))
        is_set = builder.icmp_unsigned("!=", tested, constant(packed.type, 0))
        return builder.select(is_set, constant(packed.type, mask), constant(packed.type, 0))
    result = constant(packed.type, 0)
    for shift in sorted(set(shifts)):
        moved = builder.lshr(packed, constant(packed.type, shift))
        moved = builder.shl(moved, constant(packed.type, place))
        here = ir.Constant(packed.type, [mask if each == shift else 0 for each in shifts])
        result = builder.or_(result, builder.and_(moved, here))
    return result


def _look_up(builder, codes, table):
    """Entries of a table of bytes, of up to 64, by the numbers in a register."""
    if ISA == "portable":
        result = constant(codes.type, table[0])
        for number, entry in enumerate(table[1:], 1):
            is_it = builder.icmp_unsigned("==", codes, constant(codes.type, number))
            result = builder.select(is_it, constant(codes.type, entry), result)
        return result
    name = f"llvm.x86.{'avx2.pshuf.b' if codes.type.count == 32 else 'avx512.pshuf.b.512'}"
    pick = declare(builder, name, codes.type, [codes.type] * 2)
    sixteens = [(list(table[i : i + 16]) * 8)[:16] for i in range(0, len(table), 16)]
    # The instruction looks at the lowest 4 bits of a number, and at the highest, which is 0.
    parts = [builder.call(pick, [ir.Constant(codes.type, s * (codes.type.count // 16)), codes]) for s in sixteens]
    bit = 16
    while len(parts) > 1:
        is_set = builder.icmp_unsigned("!=", builder.and_(codes, constant(codes.type, bit)), constant(codes.type, 0))
        parts = [builder.select(is_set, high, low) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        bit *= 2
    return parts[0]


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
            return _look_up(builder, numbers, self.table)
        return builder.add(numbers, constant(numbers.type, self.add)) if self.add else numbers

    def numpy(self, numbers):
        if self.flip:
            numbers = numbers ^ 128
        if self.table:
            return np.array(self.table, np.int8)[numbers]
        return (numbers + self.add).astype(np.uint8).view(np.int8)


def _numbers(planes, blocks, columns):
    """The numbers that planes of blocks (n, bytes) hold at some columns, counted over all blocks: uint8."""
    size = len(columns)
    result = np.zeros(size, np.uint8)
    for plane in planes:
        for i, (block, column) in enumerate(columns):
            byte, shift = plane.place(column)
            result[i] |= (blocks[block, byte] >> shift & ((1 << plane.bits) - 1)) << plane.shift
    return result


def _columns(layout_size, first, count):
    """Columns as (block, column of the block)."""
    return [divmod(column, layout_size) for column in range(first, first + count)]


def load_codes_for(qtype, layout, offset):
    """Make ``load_codes(address, r)``: the codes of the r-th `COLUMNS` weights of 256, `offset` more than they are, int8
    or uint8. `r` is a literal; blocks begin at the address."""
    size, nbytes, finish = ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype], _Finish(layout, offset)
    codes = layout.codes

    def emit(builder, address, r):
        columns = _columns(size, COLUMNS * r, COLUMNS)
        numbers = None
        for plane in codes.planes:
            places = [plane.place(column) for _, column in columns]
            wanted = [nbytes * block + byte for (block, _), (byte, _) in zip(columns, places, strict=True)]
            packed = _load_bytes(builder, address, wanted)
            part = _fields(builder, packed, [shift for _, shift in places], plane.bits, plane.shift)
            numbers = builder.or_(numbers, part) if numbers else part
        result = finish.emit(builder, numbers)
        if codes.variants:
            small = [(block, column // layout.each) for block, column in columns]
            places = [codes.variants.place(each) for _, each in small]
            wanted = [nbytes * block + byte for (block, _), (byte, _) in zip(small, places, strict=True)]
            packed = _load_bytes(builder, address, wanted)
            tested = builder.and_(packed, ir.Constant(packed.type, [1 << shift for _, shift in places]))
            is_set = builder.icmp_unsigned("!=", tested, constant(packed.type, 0))
            moved = builder.select(is_set, constant(packed.type, codes.moved), constant(packed.type, 0))
            result = builder.add(result, moved)
        return result

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256 that planes hold."""
        blocks = read_lanes(address, np.uint8, 256 // size * nbytes).reshape(-1, nbytes)
        columns = _columns(size, COLUMNS * r, COLUMNS)
        result = finish.numpy(_numbers(codes.planes, blocks, columns))
        if codes.variants:
            small = [(block, column // layout.each) for block, column in columns]
            result = result + (codes.moved * _numbers((codes.variants,), blocks, small)).astype(np.int8)
        return result

    return load_codes


def _plane_32(builder, plane, address, sub):
    """The fields that a plane of a block has of the 32 columns from ``32 * sub`` on."""
    # Columns of a run of bytes, in groups of 32: the group chooses bytes of the run, or a field of them.
    groups, in_run = max(1, plane.run // 32), max(1, plane.run * plane.fields // 32)
    whole, rest = _divided(builder, sub, in_run)
    field, group = _divided(builder, rest, groups)
    start = _times(builder, whole, plane.run if in_run > 1 else 4 * plane.bits)
    start = builder.add(start, _times(builder, group, 32))
    places = [plane.place(column) for column in range(32)]
    packed = _load_bytes(builder, builder.add(address, start), [byte for byte, _ in places])
    if in_run > 1 and plane.bits < 8:
        shift = splat(builder, _times(builder, field, plane.bits * max(1, 32 // plane.run)), 4)
        packed = builder.bitcast(builder.lshr(builder.bitcast(packed, shift.type), shift), packed.type)
    return _fields(builder, packed, [shift for _, shift in places], plane.bits, plane.shift)


def load_codes_32_for(qtype, layout):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    size, nbytes, finish = ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype], _Finish(layout, 0)
    codes, subs = layout.codes, ggml.BLOCK_SIZE[qtype] // 32

    def emit(builder, address, block):
        whole, sub = _divided(builder, block, subs)
        address = builder.add(address, _times(builder, whole, nbytes))
        numbers = None
        for plane in codes.planes:
            part = _plane_32(builder, plane, address, sub)
            numbers = builder.or_(numbers, part) if numbers else part
        result = finish.emit(builder, numbers)
        if codes.variants:
            small = 32 // layout.each
            first = _times(builder, sub, small)
            bits = [
                _number(builder, (codes.variants,), address, _moved(builder, first, i))
                for i in range(small)
            ]
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
        result = finish.numpy(_numbers(codes.planes, blocks, columns))
        if codes.variants:
            small = [(0, column // layout.each) for _, column in columns]
            result = result + (codes.moved * _numbers((codes.variants,), blocks, small)).astype(np.int8)
        return result

    return load_codes_32


# Scales and minima of small blocks


def _words(builder, address, places, nbytes):
    """The int32 word that holds each place, and the bit of it at which the place begins. No byte behind a block of
    `nbytes` bytes is read."""
    first, last = min(byte for byte, _ in places), max(byte for byte, _ in places)
    count = (last - first) // 4 + 1
    first = max(0, min(first, nbytes - 4 * count))
    words = read(builder, _moved(builder, address, first), ir.VectorType(I32, (last - first) // 4 + 1))
    picked = shuffle(builder, words, words, [(byte - first) // 4 for byte, _ in places])
    return picked, [(byte - first) % 4 * 8 + bit for byte, bit in places]


def _all_numbers(builder, planes, address, count, nbytes):
    """The numbers that planes of a block have for its small blocks, int32 lanes."""
    result = None
    for plane in planes:
        words, shifts = _words(builder, address, [plane.place(i) for i in range(count)], nbytes)
        value = builder.and_(builder.lshr(words, ir.Constant(words.type, shifts)), _like(words, (1 << plane.bits) - 1))
        value = builder.shl(value, _like(value, plane.shift))
        result = builder.or_(result, value) if result else value
    return result


def _number(builder, planes, address, i):
    """The number that planes of a block have for small block `i`, int32."""
    result = None
    for plane in planes:
        byte, bit = _place(builder, plane, i)
        value = builder.zext(read(builder, builder.add(address, byte), I8), I32)
        value = builder.and_(builder.lshr(value, builder.trunc(bit, I32)), _like(value, (1 << plane.bits) - 1))
        value = builder.shl(value, _like(value, plane.shift))
        result = builder.or_(result, value) if result else value
    return result


def _place(builder, plane, i):
    """`Plane.place` of a number that is known when the kernel runs."""
    if isinstance(plane, Places):
        return [_chosen(builder, [place[j] for place in plane.places], i) for j in (0, 1)]
    whole, rest = _divided(builder, i, plane.run * plane.fields)
    field, byte = _divided(builder, rest, plane.run)
    if plane.order:
        field = _chosen(builder, plane.order, field)
    byte = builder.add(_moved(builder, byte, plane.at), _times(builder, whole, plane.run))
    return byte, _times(builder, field, plane.bits)


def _chosen(builder, values, i):
    """The i-th of up to eight bytes that are known now: they make a word."""
    word = ir.Constant(I64, sum(value << 8 * j for j, value in enumerate(values)))
    return builder.and_(builder.lshr(word, _times(builder, i, 8)), ir.Constant(I64, 255))


def _like(value, number):
    """A constant of a value's type, number or register."""
    return constant(value.type, number) if isinstance(value.type, ir.VectorType) else ir.Constant(value.type, number)


def _floats_like(value):
    """The float32 type with as many lanes as int32 values."""
    return ir.VectorType(F32, value.type.count) if isinstance(value.type, ir.VectorType) else F32


def _scale_values(builder, scales, numbers, negative):
    """Scales of the numbers that planes hold, float32. `negative` has a bit of the plane of signs, or is None."""
    if scales.levels:
        value = _like(numbers, scales.levels[0])
        for number, level in enumerate(scales.levels[1:], 1):
            is_it = builder.icmp_signed("==", numbers, _like(numbers, number))
            value = builder.select(is_it, _like(numbers, level), value)
    else:
        value = builder.sub(numbers, _like(numbers, scales.minus))
    if scales.signed:
        value = builder.sub(builder.xor(value, _like(value, 128)), _like(value, 128))
    floats = builder.sitofp(value, _floats_like(value))
    if scales.times != 1:
        floats = builder.fmul(floats, _like(floats, float(scales.times)))
    if scales.plus:
        floats = builder.fadd(floats, _like(floats, float(scales.plus)))
    if negative is not None:
        is_negative = builder.icmp_signed("!=", negative, _like(negative, 0))
        floats = builder.select(is_negative, builder.fneg(floats), floats)
    return floats


def _numpy_scales(scales, numbers, negative):
    """The same by NumPy."""
    numbers = numbers.astype(np.int64)
    value = np.array(scales.levels)[numbers] if scales.levels else numbers - scales.minus
    if scales.signed:
        value = (value ^ 128) - 128
    value = value * scales.times + scales.plus
    return np.where(negative, -value, value).astype(np.float32)


def _numpy_numbers(planes, blocks, count):
    """Numbers (blocks, count) that planes of blocks (n, bytes) hold."""
    places = [(block, i) for block in range(len(blocks)) for i in range(count)]
    return _numbers(planes, blocks, places).reshape(len(blocks), count)


def _half_e8m0(builder, codes):
    """Half of ``2 ** (e - 127)`` of bytes as int32: float32. The two smallest are subnormal numbers."""
    small = builder.shl(_like(codes, 0x200000), codes)
    power = builder.shl(builder.sub(codes, _like(codes, 1)), _like(codes, 23))
    bits = builder.select(builder.icmp_signed("<", codes, _like(codes, 2)), small, power)
    return builder.bitcast(bits, _floats_like(codes))


def _half_e4m3(builder, codes):
    """Half of the unsigned numbers E4M3 with bias 7 of bytes as int32: float32. 127 is 0, and the top bit of other bytes
    counts for nothing."""
    seven = builder.and_(codes, _like(codes, 127))
    bits = builder.add(builder.shl(seven, _like(codes, 20)), _like(codes, 119 << 23))
    number = builder.bitcast(bits, _floats_like(codes))
    small = builder.sitofp(seven, number.type)
    small = builder.fmul(small, _like(small, 2.0**-10))
    number = builder.select(builder.icmp_signed("<", seven, _like(codes, 8)), small, number)
    return builder.select(builder.icmp_signed("==", codes, _like(codes, 127)), _like(number, 0.0), number)


_BYTE_FLOATS = {E8M0: _half_e8m0, E4M3: _half_e4m3}


def _numpy_e4m3(codes):
    seven = (codes & 127).astype(np.float32)
    power = np.ldexp(1 + (codes & 7).astype(np.float32) / 8, (codes >> 3 & 15).astype(np.int32) - 8)
    return np.where(codes == 127, 0, np.where(codes & 127 < 8, seven / 1024, power)).astype(np.float32)


def _numpy_e8m0(codes):
    wide = codes.astype(np.uint32)
    bits = np.where(wide < 2, np.uint32(0x200000) << np.minimum(wide, 2), (np.maximum(wide, 1) - 1) << 23)
    return bits.astype(np.uint32).view(np.float32)


def _half(builder, address):
    return builder.fpext(read(builder, address, F16), F32)


def _float_numbers(builder, layout, qtype, row, address):
    """The float numbers of the small blocks of 256 weights, or one where all have the same."""
    if layout.scale in (ROW_FLOAT, ROW_HALF):
        return read(builder, row, F32) if layout.scale == ROW_FLOAT else _half(builder, row)
    size, nbytes = ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype]
    if size == 256:
        return _half(builder, _moved(builder, address, layout.scale_at))
    blocks, small = 256 // size, size // layout.each
    if layout.scale == HALF:
        halves = ir.Constant(ir.VectorType(I16, blocks), ir.Undefined)
        for i in range(blocks):
            half = read(builder, _moved(builder, address, nbytes * i + layout.scale_at), I16)
            halves = builder.insert_element(halves, half, ir.Constant(I32, i))
        halves = shuffle(builder, halves, halves, [i // small for i in range(blocks * small)])
        halves = builder.bitcast(halves, ir.VectorType(F16, halves.type.count))
        return builder.fpext(halves, ir.VectorType(F32, halves.type.count))
    count = small if layout.scale == E4M3 else 1
    wanted = [nbytes * block + layout.scale_at + i for block in range(blocks) for i in range(count)]
    codes = _load_bytes(builder, address, wanted)
    return _BYTE_FLOATS[layout.scale](builder, builder.zext(codes, ir.VectorType(I32, len(wanted))))


def _numpy_floats(layout, row, blocks, small):
    """The same by NumPy, (blocks, small)."""
    at = layout.scale_at
    if layout.scale == ROW_FLOAT:
        return np.full((len(blocks), small), read_number(row, np.float32))
    if layout.scale == ROW_HALF:
        return np.full((len(blocks), small), np.float32(read_number(row, np.float16)))
    if layout.scale == E4M3:
        return _numpy_e4m3(blocks[:, at : at + small])
    numbers = _numpy_e8m0(blocks[:, at : at + 1]) if layout.scale == E8M0 else _numpy_halves(blocks, at)
    return np.repeat(numbers, small, axis=1)


def _numpy_halves(blocks, at):
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _products(builder, number, values):
    """A float number, or one of each small block, times the scales of small blocks, None for 1."""
    if values is None:
        return number
    if isinstance(values.type, ir.VectorType) and not isinstance(number.type, ir.VectorType):
        number = splat(builder, number, values.type.count)
    return builder.fmul(number, values)


def _emit_values(builder, qtype, scales, address, lanes):
    """Scales or minima of all small blocks of a block of 256 weights; None where there are none."""
    if scales is None:
        return None
    nbytes = ggml.BLOCK_BYTES[qtype]
    numbers = _all_numbers(builder, scales.planes, address, lanes, nbytes)
    negative = _all_numbers(builder, (scales.negative,), address, lanes, nbytes) if scales.negative else None
    return _scale_values(builder, scales, numbers, negative)


def load_scales_for(qtype, layout):
    """Make ``load_scales(row, address)``: the scales, float32, of the small blocks of 256 weights whose blocks begin at
    `address`, in a row that begins at `row`."""
    lanes = 256 // layout.each

    def emit(builder, row, address):
        number = _float_numbers(builder, layout, qtype, row, address)
        result = _products(builder, number, _emit_values(builder, qtype, layout.scales, address, lanes))
        return result if isinstance(result.type, ir.VectorType) else splat(builder, result, lanes)

    @operation(_register(lanes), types.int64, types.int64, emit=emit)
    def load_scales(row, address):
        """Scales of small blocks."""
        blocks = _numpy_blocks(qtype, address)
        small = lanes // len(blocks)
        numbers = _numpy_floats(layout, row, blocks, small)
        return (numbers * _numpy_values(layout.scales, blocks, small)).astype(np.float32).reshape(-1)

    return load_scales


def load_minima_for(qtype, layout):
    """Make ``load_minima(address)``: the minima, float32, of the small blocks of a block of 256 weights."""
    lanes = 256 // layout.each

    def emit(builder, address):
        number = builder.fneg(_half(builder, _moved(builder, address, layout.minimum_at)))
        return _products(builder, number, _emit_values(builder, qtype, layout.minima, address, lanes))

    @operation(_register(lanes), types.int64, emit=emit)
    def load_minima(address):
        """Minima of small blocks."""
        blocks = _numpy_blocks(qtype, address)
        return (-_numpy_halves(blocks, layout.minimum_at) * _numpy_values(layout.minima, blocks, lanes)).reshape(-1)

    return load_minima


def _register(lanes):
    return f32x8 if lanes == 8 else f32x16


def _numpy_blocks(qtype, address, weights=256):
    size, nbytes = ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype]
    return read_lanes(address, np.uint8, max(1, weights // size) * nbytes).reshape(-1, nbytes)


def _numpy_values(scales, blocks, small):
    """Scales or minima as NumPy has them, (blocks, small), or 1."""
    if scales is None:
        return np.float32(1)
    negative = _numpy_numbers((scales.negative,), blocks, small) if scales.negative else False
    return _numpy_scales(scales, _numpy_numbers(scales.planes, blocks, small), negative)


def load_scale_for(qtype, layout):
    """Make ``load_scale(row, address, block)``: the scales, two float32, of the first and of the second sixteen weights
    from ``32 * block`` on; the blocks of the row begin at `address`."""
    subs, nbytes, small = ggml.BLOCK_SIZE[qtype] // 32, ggml.BLOCK_BYTES[qtype], 32 // layout.each

    def emit(builder, row, address, block):
        whole, sub = _divided(builder, block, subs)
        address = builder.add(address, _times(builder, whole, nbytes))
        found = []
        for i in range(small):
            each = _moved(builder, _times(builder, sub, small), i)
            number = _float_number(builder, layout, row, address, each)
            found.append(_products(builder, number, _emit_value(builder, layout.scales, address, each)))
        return [found[0], found[-1]]

    @operation(types.UniTuple(types.float32, 2), *[types.int64] * 3, emit=emit)
    def load_scale(row, address, block):
        """Scales of 32 weights."""
        blocks = _numpy_blocks(qtype, address + block // subs * nbytes, 1)
        numbers = _numpy_floats(layout, row, blocks, subs * small)
        values = (numbers * _numpy_values(layout.scales, blocks, subs * small)).astype(np.float32)[0]
        return values[block % subs * small], values[block % subs * small + small - 1]

    return load_scale


def load_minimum_for(qtype, layout):
    """Make ``load_minimum(address, block)``: the minima of the first and of the second sixteen weights from ``32 *
    block`` on, two float32; the blocks of the row begin at `address`."""
    nbytes, small = ggml.BLOCK_BYTES[qtype], 32 // layout.each

    def emit(builder, address, block):
        whole, sub = _divided(builder, block, 8)
        address = builder.add(address, _times(builder, whole, nbytes))
        number = builder.fneg(_half(builder, _moved(builder, address, layout.minimum_at)))
        found = []
        for i in range(small):
            each = _moved(builder, _times(builder, sub, small), i)
            found.append(_products(builder, number, _emit_value(builder, layout.minima, address, each)))
        return [found[0], found[-1]]

    @operation(types.UniTuple(types.float32, 2), types.int64, types.int64, emit=emit)
    def load_minimum(address, block):
        """Minima of 32 weights."""
        blocks = _numpy_blocks(qtype, address + block // 8 * nbytes)
        values = (-_numpy_halves(blocks, layout.minimum_at) * _numpy_values(layout.minima, blocks, 8 * small))[0]
        return values[block % 8 * small], values[block % 8 * small + small - 1]

    return load_minimum


def _emit_value(builder, scales, address, i):
    """The scale or the minimum of a small block; None where there are none."""
    if scales is None:
        return None
    negative = _number(builder, (scales.negative,), address, i) if scales.negative else None
    return _scale_values(builder, scales, _number(builder, scales.planes, address, i), negative)


def _float_number(builder, layout, row, address, i):
    """The float number that the scale of a small block is a multiple of."""
    if layout.scale == ROW_FLOAT:
        return read(builder, row, F32)
    if layout.scale == ROW_HALF:
        return _half(builder, row)
    at = _moved(builder, address, layout.scale_at)
    if layout.scale == HALF:
        return _half(builder, at)
    at = builder.add(at, i) if layout.scale == E4M3 else at
    return _BYTE_FLOATS[layout.scale](builder, builder.zext(read(builder, at, I8), I32))


# Arithmetic on addresses and numbers


def _divided(builder, value, by):
    """The quotient and the remainder by a power of two."""
    return builder.udiv(value, ir.Constant(I64, by)), builder.urem(value, ir.Constant(I64, by))


def _times(builder, value, factor):
    return builder.mul(value, ir.Constant(I64, factor))


def _moved(builder, value, distance):
    return builder.add(value, ir.Constant(I64, distance))
