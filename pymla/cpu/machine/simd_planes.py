"""Bit planes (`pymla.planes`) in registers: codes of weights as bytes, and numbers of small blocks as int32.

The functions here make operations for planes. `load_codes_for` fills a register whose number is a literal, so that LLVM
sees where each byte comes from; `load_codes_32_for` takes 32 columns that begin anywhere.
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
    i16x16,
    ir_type,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes, read_number
from pymla.cpu.machine.orders import COLUMNS, FOURS, columns_of
from pymla.cpu.runtime import target
from pymla.cpu.runtime.isa import ISA, LANES, PYTHON
from pymla.planes import E4M3, E8M0, HALF, K_MINIMA, K_SCALES, ROW_FLOAT, ROW_HALF, Places, Plane

#: Bytes of a register, which are codes of as many weights.
REGISTER_BYTES = 4 * LANES
#: Whether one instruction moves fields of bytes anywhere else in them.
_GFNI = LANES == 16 and not PYTHON and "gfni" in target.features()


# Reading bytes that lie anywhere


def _load_bytes(builder, address, wanted, total, begin=0):
    """Bytes at literal distances from an address, in a register: of one or two loads, none of which reaches over the
    `total` bytes that are there. Loads of whole registers begin at `begin` where they can, so that they are shared."""
    windows = _windows(wanted, total, begin)
    if len(windows) > 2:
        half = len(wanted) // 2
        parts = [_load_bytes(builder, address, each, total) for each in (wanted[:half], wanted[half:])]
        return shuffle(builder, *parts, range(len(wanted)))
    loads = [read(builder, _moved(builder, address, start), ir.VectorType(I8, size)) for start, size in windows]
    lanes = []
    for at in wanted:
        behind = 0
        for start, size in windows:
            if start <= at < start + size:
                lanes.append(behind + at - start)
                break
            behind += size
    if lanes == list(range(loads[0].type.count)):
        return loads[0]
    if len(loads) == 1:
        loads[0] = _as_loaded(builder, loads[0])
    return shuffle(builder, loads[0], loads[-1], lanes)


def _as_loaded(builder, value):
    """A register that was loaded as a whole. LLVM would load the bytes that are used, piece by piece, and put them
    together by more instructions."""
    if LANES != 16 or value.type.count != REGISTER_BYTES:
        return value
    kept = builder.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=False)
    kept.attributes.add("readnone")  # so that registers that are made of one load share it
    return kept


def _windows(wanted, total, begin):
    """Loads, as (first byte, size), that together have the bytes: one of no more than 8 bytes, or as few of a register
    as will do."""
    first, last = min(wanted), max(wanted)
    if last - first < 8:
        return [(first, last - first + 1)]
    size = next(each for each in (REGISTER_BYTES, 32, 16, 8, 4, 2, 1) if each <= min(REGISTER_BYTES, total))
    if begin + size <= total and begin <= first and last < begin + size:
        return [(begin, size)]
    if begin + 2 * size <= total and begin <= first and last < begin + 2 * size:
        return [(begin, size), (begin + size, size)]
    starts = []
    for at in sorted(set(wanted)):
        if not starts or at >= starts[-1] + size:
            starts.append(at)
    if len(starts) == 1 and size == REGISTER_BYTES:
        return [(first, last + 1 - first)]
    return [(min(start, total - size), size) for start in starts]


# Codes


def _fields(builder, packed, shifts, bits, place):
    """A field of every byte, `bits` wide and from bit ``shifts[i]`` on in byte i, moved to bit `place`."""
    count, mask = packed.type.count, ((1 << bits) - 1) << place
    if bits == 8:
        return packed
    for size in (8, 4):
        groups = [shifts[i : i + size] for i in range(0, count, size)]
        if all(len(set(group)) == 1 for group in groups):
            return _fields_of_words(builder, packed, [group[0] for group in groups], bits, place)
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


def _fields_of_words(builder, packed, shifts, bits, place):
    """The same where the bytes of a word, of 8 or 4, have their fields at one bit."""
    mask = ((1 << bits) - 1) << place
    if set(shifts) == {place}:
        return builder.and_(packed, constant(packed.type, mask))
    wide = ir.VectorType(ir.IntType(8 * packed.type.count // len(shifts)), len(shifts))
    if _GFNI and packed.type.count == 64 and len(shifts) == 8:
        # Row 7 - j of a matrix of bits has the bit of the byte that becomes bit j.
        rows = [sum(1 << (shift + j - place) << 8 * (7 - j) for j in range(place, place + bits)) for shift in shifts]
        matrices = builder.bitcast(ir.Constant(wide, rows), packed.type)
        move = declare(builder, "llvm.x86.vgf2p8affineqb.512", packed.type, [packed.type, packed.type, I8])
        return builder.call(move, [packed, matrices, ir.Constant(I8, 0)])
    moved = builder.bitcast(packed, wide)
    if all(shift >= place for shift in shifts):
        moved = builder.lshr(moved, ir.Constant(wide, [shift - place for shift in shifts]))
    elif all(shift <= place for shift in shifts):
        moved = builder.shl(moved, ir.Constant(wide, [place - shift for shift in shifts]))
    else:
        moved = builder.shl(builder.lshr(moved, ir.Constant(wide, shifts)), constant(wide, place))
    return builder.and_(builder.bitcast(moved, packed.type), constant(packed.type, mask))


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
        return (numbers.astype(np.int16) + self.add).astype(np.int8)


def _numbers(planes, blocks, columns):
    """The numbers that planes of blocks (n, bytes) hold at some columns, counted over all blocks: uint8."""
    size = len(columns)
    result = np.zeros(size, np.uint8)
    for plane in planes:
        for i, (block, column) in enumerate(columns):
            byte, shift = plane.place(column)
            result[i] |= (blocks[block, byte] >> shift & ((1 << plane.bits) - 1)) << plane.shift
    return result


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
        found = _load_bytes(builder, address, [byte for byte, _ in places], total, begin)
        return found, [bit for _, bit in places]

    def emit(builder, address, r):
        columns, numbers = columns_of(order, r), None
        for plane in codes.planes:
            part = _fields(builder, *packed(builder, plane, address, columns), plane.bits, plane.shift)
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
        result = finish.numpy(_numbers(codes.planes, blocks, columns))
        if codes.variants and moves:
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
    wanted = [byte for byte, _ in places]
    packed = _load_bytes(builder, builder.add(address, start), wanted, max(wanted) + 1)
    if in_run > 1 and plane.bits < 8:
        shift = splat(builder, _times(builder, field, plane.bits * max(1, 32 // plane.run)), 4)
        packed = builder.bitcast(builder.lshr(builder.bitcast(packed, shift.type), shift), packed.type)
    return _fields(builder, packed, [shift for _, shift in places], plane.bits, plane.shift)


def load_codes_32_for(qtype, layout):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    nbytes, finish = ggml.BLOCK_BYTES[qtype], _Finish(layout, 0)
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
            bits = [_number(builder, (codes.variants,), address, _moved(builder, first, i)) for i in range(small)]
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


def _k_numbers(builder, address, minima):
    """`_all_numbers` of the eight scales or minima of Q4_K and Q5_K: they are put together in two words, for which the
    processor has instructions to spare while it multiplies registers."""

    def bytes_of(number):
        return ir.Constant(I64, number * 0x0101010101010101)

    first = read(builder, _moved(builder, address, 4), I64)
    last = builder.zext(read(builder, _moved(builder, address, 12), I32), I64)
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
    """Half of the unsigned numbers E4M3 with bias 7 of bytes as int32: float32. 127 is 0, and the top bit of other
    bytes counts for nothing."""
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
        return _halves(builder, _moved(builder, address, layout.scale_at), lanes)
    blocks, small = 256 // size, size // layout.each
    if layout.scale == HALF:
        places = [nbytes * (i // small) + layout.scale_at for i in range(lanes)]
        if LANES == 16:
            wanted = [place + byte for place in places for byte in (0, 1)]
            halves = builder.bitcast(_load_bytes(builder, address, wanted, nbytes * blocks), ir.VectorType(F16, lanes))
        else:
            halves = ir.Constant(ir.VectorType(I16, lanes), ir.Undefined)
            for i, place in enumerate(places):
                half = read(builder, _moved(builder, address, place), I16)
                halves = builder.insert_element(halves, half, ir.Constant(I32, i))
            halves = builder.bitcast(halves, ir.VectorType(F16, lanes))
        return builder.fpext(halves, ir.VectorType(F32, lanes))
    count = small if layout.scale == E4M3 else 1
    wanted = [nbytes * block + layout.scale_at + i for block in range(blocks) for i in range(count)]
    codes = _load_bytes(builder, address, wanted, nbytes * blocks)
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
        words = read(builder, _moved(builder, address, places[0][0] - 7), ir.VectorType(I64, 8))
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
        numbers = builder.fneg(_halves(builder, _moved(builder, address, layout.minimum_at), lanes))
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
        is_second = builder.icmp_signed("!=", bits, _like(bits, 0))
        first, second = (constant(scales.type, float(each)) for each in (-offset, codes.moved - offset))
        return builder.fmul(scales, builder.select(is_second, second, first))

    @operation(_register(lanes), _register(lanes), types.int64, emit=emit)
    def moved_scales(scales, address):
        """Scales times what is added to codes."""
        bits = _numpy_numbers((codes.variants,), _numpy_blocks(qtype, address), lanes)[0]
        return scales * (codes.moved * bits.astype(np.float32) - offset)

    return moved_scales


def load_integers_for(qtype, scales):
    """Make ``load_integers(address)``: the scales or minima, integers, of the sixteen small blocks of a block of 256
    weights, int16."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address):
        numbers = None
        for plane in scales.planes:
            places = [plane.place(i) for i in range(16)]
            packed = _load_bytes(builder, address, [byte for byte, _ in places], nbytes)
            part = _fields(builder, packed, [bit for _, bit in places], plane.bits, plane.shift)
            numbers = builder.or_(numbers, part) if numbers else part
        wide = builder.zext(numbers, ir_type(i16x16))
        return builder.sub(wide, constant(wide.type, scales.minus)) if scales.minus else wide

    @operation(i16x16, types.int64, emit=emit)
    def load_integers(address):
        """Integers of small blocks."""
        return _numpy_values(scales, _numpy_blocks(qtype, address), 16)[0].astype(np.int16)

    return load_integers


def load_half_for(at):
    """Make ``load_half(address)``: the half at byte `at` in eight lanes, as float32."""

    @operation(f32x8, types.int64, emit=lambda builder, address: _halves(builder, _moved(builder, address, at), 8))
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
