"""Bytes that lie anywhere, fields of bits in them, and tables of bytes: LLVM IR that operations on codes need, and
arithmetic on addresses."""

import numpy as np
from llvmlite import ir

from pymla.cpu.machine.intrinsics import (
    I8,
    I64,
    constant,
    declare,
    read,
    shuffle,
)
from pymla.cpu.runtime import target
from pymla.cpu.runtime.isa import ISA, LANES, PYTHON

#: Bytes of a register, which are codes of as many weights.
REGISTER_BYTES = 4 * LANES
#: Whether one instruction moves fields of bytes anywhere else in them.
_GFNI = LANES == 16 and not PYTHON and "gfni" in target.features()


# Reading bytes that lie anywhere


def load_bytes(builder, address, wanted, total, begin=0):
    """Bytes at literal distances from an address, in a register: of one or two loads, none of which reaches over the
    `total` bytes that are there. Loads of whole registers begin at `begin` where they can, so that they are shared."""
    windows = _windows(wanted, total, begin)
    if len(windows) > 2:
        half = len(wanted) // 2
        parts = [load_bytes(builder, address, each, total) for each in (wanted[:half], wanted[half:])]
        return shuffle(builder, *parts, range(len(wanted)))
    loads = [read(builder, address_at(builder, address, start), ir.VectorType(I8, size)) for start, size in windows]
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


# Fields and tables


def bit_fields(builder, packed, shifts, bits, place):
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


def look_up_table(builder, codes, table):
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


def numpy_numbers(planes, blocks, columns):
    """The numbers that planes of blocks (n, bytes) hold at some columns, counted over all blocks: uint8."""
    size = len(columns)
    result = np.zeros(size, np.uint8)
    for plane in planes:
        for i, (block, column) in enumerate(columns):
            byte, shift = plane.place(column)
            result[i] |= (blocks[block, byte] >> shift & ((1 << plane.bits) - 1)) << plane.shift
    return result


def constant_like(value, number):
    """A constant of a value's type, number or register."""
    return constant(value.type, number) if isinstance(value.type, ir.VectorType) else ir.Constant(value.type, number)


# Arithmetic on addresses


def divided_by(builder, value, by):
    """The quotient and the remainder by a power of two."""
    return builder.udiv(value, ir.Constant(I64, by)), builder.urem(value, ir.Constant(I64, by))


def times_constant(builder, value, factor):
    """A number of bytes or of blocks times a number that is known now."""
    return builder.mul(value, ir.Constant(I64, factor))


def address_at(builder, value, distance):
    """The address so many bytes behind another one."""
    return builder.add(value, ir.Constant(I64, distance))
