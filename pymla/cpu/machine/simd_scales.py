"""Scales and minima of small blocks (`pymla.planes.Scales`) in registers, as float32 or as integers.

The functions here make operations for a type: scales of all small blocks of 256 weights, and of 32 weights that begin
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
    constant,
    declare,
    f32x8,
    f32x16,
    i16x16,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes, read_number
from pymla.cpu.machine.simd_bits import (
    address_at,
    bit_fields,
    constant_like,
    divided_by,
    load_bytes,
    numpy_numbers,
    times_constant,
)
from pymla.cpu.runtime.isa import LANES
from pymla.planes import E4M3, E8M0, HALF, K_MINIMA, K_SCALES, ROW_FLOAT, ROW_HALF, Places


def _words(builder, address, places, nbytes):
    """The int32 word that holds each place, and the bit of it at which the place begins. No byte behind a block of
    `nbytes` bytes is read."""
    first, last = min(byte for byte, _ in places), max(byte for byte, _ in places)
    count = (last - first) // 4 + 1
    first = max(0, min(first, nbytes - 4 * count))
    words = read(builder, address_at(builder, address, first), ir.VectorType(I32, (last - first) // 4 + 1))
    picked = shuffle(builder, words, words, [(byte - first) // 4 for byte, _ in places])
    return picked, [(byte - first) % 4 * 8 + bit for byte, bit in places]


def _all_numbers(builder, planes, address, count, nbytes):
    """The numbers that planes of a block have for its small blocks, int32 lanes."""
    result = None
    for plane in planes:
        words, shifts = _words(builder, address, [plane.place(i) for i in range(count)], nbytes)
        value = builder.and_(
            builder.lshr(words, ir.Constant(words.type, shifts)), constant_like(words, (1 << plane.bits) - 1)
        )
        value = builder.shl(value, constant_like(value, plane.shift))
        result = builder.or_(result, value) if result else value
    return result


def _k_numbers(builder, address, minima):
    """`_all_numbers` of the eight scales or minima of Q4_K and Q5_K: they are put together in two words, for which the
    processor has instructions to spare while it multiplies registers."""

    def bytes_of(number):
        return ir.Constant(I64, number * 0x0101010101010101)

    first = read(builder, address_at(builder, address, 4), I64)
    last = builder.zext(read(builder, address_at(builder, address, 12), I32), I64)
    nibbles = builder.or_(last, builder.shl(last, ir.Constant(I64, 28)))
    low = builder.and_(first, bytes_of(0x3F))
    high = builder.and_(builder.lshr(first, ir.Constant(I64, 2)), bytes_of(0x30))
    high = builder.or_(high, builder.and_(nibbles, bytes_of(0x0F)))
    words = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
    for i, word in enumerate((low, high)):
        words = builder.insert_element(words, word, ir.Constant(I32, i))
    numbers = builder.bitcast(words, ir.VectorType(I8, 16))
    numbers = shuffle(builder, numbers, numbers, [8 * (i // 4) + 4 * minima + i % 4 for i in range(8)])
    return builder.zext(numbers, ir.VectorType(I32, 8))


def number_at(builder, planes, address, i):
    """The number that planes of a block have for small block `i`, int32."""
    result = None
    for plane in planes:
        byte, bit = _place(builder, plane, i)
        value = builder.zext(read(builder, builder.add(address, byte), I8), I32)
        value = builder.and_(builder.lshr(value, builder.trunc(bit, I32)), constant_like(value, (1 << plane.bits) - 1))
        value = builder.shl(value, constant_like(value, plane.shift))
        result = builder.or_(result, value) if result else value
    return result


def _place(builder, plane, i):
    """`Plane.place` of a number that is known when the kernel runs."""
    if isinstance(plane, Places):
        return [_chosen(builder, [place[j] for place in plane.places], i) for j in (0, 1)]
    whole, rest = divided_by(builder, i, plane.run * plane.fields)
    field, byte = divided_by(builder, rest, plane.run)
    if plane.order:
        field = _chosen(builder, plane.order, field)
    byte = builder.add(address_at(builder, byte, plane.at), times_constant(builder, whole, plane.run))
    return byte, times_constant(builder, field, plane.bits)


def _chosen(builder, values, i):
    """The i-th of up to eight bytes that are known now: they make a word."""
    word = ir.Constant(I64, sum(value << 8 * j for j, value in enumerate(values)))
    return builder.and_(builder.lshr(word, times_constant(builder, i, 8)), ir.Constant(I64, 255))


def _floats_like(value):
    """The float32 type with as many lanes as int32 values."""
    return ir.VectorType(F32, value.type.count) if isinstance(value.type, ir.VectorType) else F32


def _scale_values(builder, scales, numbers, negative):
    """Scales of the numbers that planes hold, float32. `negative` has a bit of the plane of signs, or is None."""
    if scales.levels:
        value = constant_like(numbers, scales.levels[0])
        for number, level in enumerate(scales.levels[1:], 1):
            is_it = builder.icmp_signed("==", numbers, constant_like(numbers, number))
            value = builder.select(is_it, constant_like(numbers, level), value)
    else:
        value = builder.sub(numbers, constant_like(numbers, scales.minus))
    if scales.signed:
        value = builder.sub(builder.xor(value, constant_like(value, 128)), constant_like(value, 128))
    floats = builder.sitofp(value, _floats_like(value))
    if scales.times != 1:
        floats = builder.fmul(floats, constant_like(floats, float(scales.times)))
    if scales.plus:
        floats = builder.fadd(floats, constant_like(floats, float(scales.plus)))
    if negative is not None:
        is_negative = builder.icmp_signed("!=", negative, constant_like(negative, 0))
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
    return numpy_numbers(planes, blocks, places).reshape(len(blocks), count)


def _half_e8m0(builder, codes):
    """Half of ``2 ** (e - 127)`` of bytes as int32: float32. The two smallest are subnormal numbers."""
    small = builder.shl(constant_like(codes, 0x200000), codes)
    power = builder.shl(builder.sub(codes, constant_like(codes, 1)), constant_like(codes, 23))
    bits = builder.select(builder.icmp_signed("<", codes, constant_like(codes, 2)), small, power)
    return builder.bitcast(bits, _floats_like(codes))


def _half_e4m3(builder, codes):
    """Half of the unsigned numbers E4M3 with bias 7 of bytes as int32: float32. 127 is 0, and the top bit of other
    bytes counts for nothing."""
    seven = builder.and_(codes, constant_like(codes, 127))
    bits = builder.add(builder.shl(seven, constant_like(codes, 20)), constant_like(codes, 119 << 23))
    number = builder.bitcast(bits, _floats_like(codes))
    small = builder.sitofp(seven, number.type)
    small = builder.fmul(small, constant_like(small, 2.0**-10))
    number = builder.select(builder.icmp_signed("<", seven, constant_like(codes, 8)), small, number)
    return builder.select(
        builder.icmp_signed("==", codes, constant_like(codes, 127)), constant_like(number, 0.0), number
    )


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


def _halves(builder, address, lanes):
    """A half from memory in so many lanes, as float32."""
    halves = builder.bitcast(splat(builder, read(builder, address, I16), lanes), ir.VectorType(F16, lanes))
    return builder.fpext(halves, ir.VectorType(F32, lanes))


def _float_numbers(builder, layout, qtype, row, address):
    """The float numbers of the small blocks of 256 weights."""
    lanes, size, nbytes = 256 // layout.each, ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype]
    if layout.scale == ROW_FLOAT:
        return splat(builder, read(builder, row, F32), lanes)
    if layout.scale == ROW_HALF:
        return _halves(builder, row, lanes)
    if size == 256:
        return _halves(builder, address_at(builder, address, layout.scale_at), lanes)
    blocks, small = 256 // size, size // layout.each
    if layout.scale == HALF:
        places = [nbytes * (i // small) + layout.scale_at for i in range(lanes)]
        if LANES == 16:
            wanted = [place + byte for place in places for byte in (0, 1)]
            halves = builder.bitcast(load_bytes(builder, address, wanted, nbytes * blocks), ir.VectorType(F16, lanes))
        else:
            halves = ir.Constant(ir.VectorType(I16, lanes), ir.Undefined)
            for i, place in enumerate(places):
                half = read(builder, address_at(builder, address, place), I16)
                halves = builder.insert_element(halves, half, ir.Constant(I32, i))
            halves = builder.bitcast(halves, ir.VectorType(F16, lanes))
        return builder.fpext(halves, ir.VectorType(F32, lanes))
    count = small if layout.scale == E4M3 else 1
    wanted = [nbytes * block + layout.scale_at + i for block in range(blocks) for i in range(count)]
    codes = load_bytes(builder, address, wanted, nbytes * blocks)
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
    """Float numbers times the scales of small blocks, None for 1."""
    return number if values is None else builder.fmul(number, values)


def _emit_values(builder, qtype, scales, address, lanes):
    """Scales or minima of all small blocks of a block of 256 weights; None where there are none."""
    if scales is None:
        return None
    nbytes = ggml.BLOCK_BYTES[qtype]
    if LANES == 16 and _is_small(scales):
        return _small_values(builder, scales, address, lanes, nbytes)
    if scales in (K_SCALES, K_MINIMA):
        numbers = _k_numbers(builder, address, scales is K_MINIMA)
    else:
        numbers = _all_numbers(builder, scales.planes, address, lanes, nbytes)
    negative = _all_numbers(builder, (scales.negative,), address, lanes, nbytes) if scales.negative else None
    return _scale_values(builder, scales, numbers, negative)


def _is_small(scales):
    """Whether a scale is a function of up to 4 bits that lie together."""
    first = scales.planes[0]
    return len(scales.planes) == 1 and first.bits <= 4 and first.shift == 0 and not scales.negative


def _small_values(builder, scales, address, lanes, nbytes):
    """`_emit_values` of such scales, by a table of sixteen float32: the instructions take the lowest 4 bits of a
    number."""
    plane = scales.planes[0]
    places = [plane.place(i) for i in range(lanes)]
    if places == [(places[0][0] + 8 * i, places[0][1]) for i in range(8)]:
        words = read(builder, address_at(builder, address, places[0][0] - 7), ir.VectorType(I64, 8))
        numbers = builder.lshr(words, constant(words.type, 56 + places[0][1]))
        numbers = builder.trunc(numbers, ir.VectorType(I32, 8))
    else:
        words, shifts = _words(builder, address, places, nbytes)
        numbers = builder.lshr(words, ir.Constant(words.type, shifts))
    table = [float(value) for value in _numpy_scales(scales, np.arange(16) % (1 << plane.bits), False)]
    floats = _floats_like(numbers)
    if lanes == 16:
        pick = declare(builder, "llvm.x86.avx512.permvar.sf.512", floats, [floats, numbers.type])
        return builder.call(pick, [ir.Constant(floats, table), numbers])
    pick = declare(builder, "llvm.x86.avx512.vpermi2var.ps.256", floats, [floats, numbers.type, floats])
    return builder.call(pick, [ir.Constant(floats, table[:8]), numbers, ir.Constant(floats, table[8:])])


def load_scales_for(qtype, layout):
    """Make ``load_scales(row, address)``: the scales, float32, of the small blocks of 256 weights whose blocks begin at
    `address`, in a row that begins at `row`."""
    lanes = 256 // layout.each

    def emit(builder, row, address):
        numbers = _float_numbers(builder, layout, qtype, row, address)
        return _products(builder, numbers, _emit_values(builder, qtype, layout.scales, address, lanes))

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
        numbers = builder.fneg(_halves(builder, address_at(builder, address, layout.minimum_at), lanes))
        return _products(builder, numbers, _emit_values(builder, qtype, layout.minima, address, lanes))

    @operation(_register(lanes), types.int64, emit=emit)
    def load_minima(address):
        """Minima of small blocks."""
        blocks = _numpy_blocks(qtype, address)
        return (-_numpy_halves(blocks, layout.minimum_at) * _numpy_values(layout.minima, blocks, lanes)).reshape(-1)

    return load_minima


def moved_scales_for(qtype, layout, offset):
    """Make ``moved_scales(scales, address)``: the scales of the small blocks of 256 weights times what is added to
    their codes, which are `offset` too large and those of the first variant."""
    lanes, nbytes, codes = 256 // layout.each, ggml.BLOCK_BYTES[qtype], layout.codes

    def emit(builder, scales, address):
        bits = _all_numbers(builder, (codes.variants,), address, lanes, nbytes)
        is_second = builder.icmp_signed("!=", bits, constant_like(bits, 0))
        first, second = (constant(scales.type, float(each)) for each in (-offset, codes.moved - offset))
        return builder.fmul(scales, builder.select(is_second, second, first))

    @operation(_register(lanes), _register(lanes), types.int64, emit=emit)
    def moved_scales(scales, address):
        """Scales times what is added to codes."""
        bits = _numpy_numbers((codes.variants,), _numpy_blocks(qtype, address), lanes)[0]
        return scales * (codes.moved * bits.astype(np.float32) - offset)

    return moved_scales


def emit_sixteen(builder, qtype, scales, address):
    """The numbers that planes of a block of 256 weights have for its sixteen small blocks, bytes."""
    numbers = None
    for plane in scales.planes:
        places = [plane.place(i) for i in range(16)]
        packed = load_bytes(builder, address, [byte for byte, _ in places], ggml.BLOCK_BYTES[qtype])
        part = bit_fields(builder, packed, [bit for _, bit in places], plane.bits, plane.shift)
        numbers = builder.or_(numbers, part) if numbers else part
    return numbers


def load_integers_for(qtype, scales):
    """Make ``load_integers(address)``: the scales or minima, integers, of the sixteen small blocks of a block of 256
    weights, int16."""

    def emit(builder, address):
        wide = builder.zext(emit_sixteen(builder, qtype, scales, address), ir_type(i16x16))
        return builder.sub(wide, constant(wide.type, scales.minus)) if scales.minus else wide

    @operation(i16x16, types.int64, emit=emit)
    def load_integers(address):
        """Integers of small blocks."""
        return numpy_sixteen(qtype, scales, address).astype(np.int16)

    return load_integers


def numpy_sixteen(qtype, scales, address):
    """The scales or minima of the sixteen small blocks of a block of 256 weights, by NumPy."""
    return _numpy_values(scales, _numpy_blocks(qtype, address), 16)[0]


def load_half_for(at):
    """Make ``load_half(address)``: the half at byte `at` in eight lanes, as float32."""

    @operation(f32x8, types.int64, emit=lambda builder, address: _halves(builder, address_at(builder, address, at), 8))
    def load_half(address):
        """A half."""
        return np.full(8, read_number(address + at, np.float16), np.float32)

    return load_half


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
        whole, sub = divided_by(builder, block, subs)
        address = builder.add(address, times_constant(builder, whole, nbytes))
        found = []
        for i in range(small):
            each = address_at(builder, times_constant(builder, sub, small), i)
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
        whole, sub = divided_by(builder, block, 8)
        address = builder.add(address, times_constant(builder, whole, nbytes))
        number = builder.fneg(_half(builder, address_at(builder, address, layout.minimum_at)))
        found = []
        for i in range(small):
            each = address_at(builder, times_constant(builder, sub, small), i)
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
    negative = number_at(builder, (scales.negative,), address, i) if scales.negative else None
    return _scale_values(builder, scales, number_at(builder, scales.planes, address, i), negative)


def _float_number(builder, layout, row, address, i):
    """The float number that the scale of a small block is a multiple of."""
    if layout.scale == ROW_FLOAT:
        return read(builder, row, F32)
    if layout.scale == ROW_HALF:
        return _half(builder, row)
    at = address_at(builder, address, layout.scale_at)
    if layout.scale == HALF:
        return _half(builder, at)
    at = builder.add(at, i) if layout.scale == E4M3 else at
    return _BYTE_FLOATS[layout.scale](builder, builder.zext(read(builder, at, I8), I32))
