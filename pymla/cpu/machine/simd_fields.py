"""Numbers of up to 16 bits from the blocks of types that are no bit planes (`pymla.vectors`): registers of int16."""

import numpy as np
from llvmlite import ir

from pymla.cpu.machine.intrinsics import I16, constant, read, splat
from pymla.cpu.machine.simd_bits import address_at, divided_by, load_bytes, times_constant
from pymla.vectors import Field


def emit_words(builder, fields, address, numbers, total):
    """The numbers that several fields have, in lanes of int16. No byte behind the `total` bytes at the address is
    read."""
    return _combined(builder, [(each, address, None) for each in fields], numbers, total)


def emit_words_32(builder, fields, address, sub, count):
    """The numbers of the `count` vectors of the 32 weights from ``32 * sub`` on, of which `sub` is a value."""
    moved = [(each, *_moved_by(builder, each, address, sub, count)) for each in fields]
    return _combined(builder, moved, range(count), None)


def _combined(builder, fields, numbers, total):
    result = None
    for field, address, moved in fields:
        part = _field(builder, field, address, [field.place(number) for number in numbers], total, moved)
        result = builder.or_(result, part) if result else part
    return result


def _moved_by(builder, field, address, sub, count):
    """How numbers of 32 weights lie that begin at a number known when the kernel runs: as the first ones, behind
    another address, and so many bits further on, None for no bits."""
    if isinstance(field, Field):
        # Words are not shared by blocks of 32 weights.
        return builder.add(address, times_constant(builder, sub, count // field.per * field.stride)), None
    groups = field.run // count
    whole, rest = divided_by(builder, sub, groups * field.fields)
    place, group = divided_by(builder, rest, groups)
    address = builder.add(
        builder.add(address, times_constant(builder, whole, field.run)), times_constant(builder, group, count)
    )
    return address, builder.trunc(times_constant(builder, place, field.bits), I16)


def _field(builder, field, address, places, total, moved):
    words = ir.VectorType(I16, len(places))
    at, shifts = [byte for byte, _ in places], [bit for _, bit in places]
    total = max(at) + 2 if total is None else total
    if max(shifts) + field.bits > 8:
        value = _two_bytes(builder, address, at, total)
    else:
        value = builder.zext(load_bytes(builder, address, at, total), words)
    if any(shifts):
        value = builder.lshr(value, ir.Constant(words, shifts))
    if moved is not None:
        value = builder.lshr(value, splat(builder, moved, len(places)))
    if field.bits < 16 and (any(shifts) or moved is not None or field.bits != 8):
        value = builder.and_(value, constant(words, (1 << field.bits) - 1))
    return builder.shl(value, constant(words, field.shift)) if field.shift else value


def _two_bytes(builder, address, at, total):
    """The words of 16 bits that begin at some bytes."""
    count = len(at)
    if list(at) == list(range(at[0], at[0] + 2 * count, 2)):
        return read(builder, address_at(builder, address, at[0]), ir.VectorType(I16, count))
    # Numbers of the last byte do not reach into one behind it.
    wanted = [byte for first in at for byte in (first, min(first + 1, total - 1))]
    return builder.bitcast(load_bytes(builder, address, wanted, total), ir.VectorType(I16, count))


def numpy_words(fields, blocks, count):
    """The same of all blocks, uint8 (n, bytes): the first `count` numbers, int32 (n, count)."""
    padded = np.pad(blocks, ((0, 0), (0, 1))).astype(np.int32)
    result = np.zeros((len(blocks), count), np.int32)
    for field in fields:
        at, shifts = np.array([field.place(number) for number in range(count)]).T
        words = padded[:, at] | padded[:, at + 1] << 8
        result |= (words >> shifts & (1 << field.bits) - 1) << field.shift
    return result
