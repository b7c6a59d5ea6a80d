"""The nearest levels of a table, which codes stand for, of sixteen numbers at once.

The levels are ascending, 2, 4, … 64 of them. A number is compared with the middle between the two levels that halve the
table, then with that of the half where it lies, and so on; an instruction picks a middle for each lane out of a
register of them. The portable level compares a number with all middles.
"""

import itertools
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from pymla.cpu.machine.intrinsics import (
    F16,
    F32,
    I8,
    I32,
    Operation,
    constant,
    declare,
    f32x16,
    operation,
    shuffle,
    write,
)
from pymla.cpu.machine.lanes import write_lanes
from pymla.cpu.runtime.isa import ISA, LANES

_FLOATS = ir.VectorType(F32, 16)
#: The largest IEEE half.
_LARGEST_HALF = 65504.0


class Nearest(NamedTuple):
    """Operations that are made for a table of levels."""

    level: Operation  # (x): the nearest level of every lane
    store_codes: Operation  # (address, x): the codes of these levels, to memory as bytes


def nearest_of(levels, codes):
    """Make the operations of a table. Of two levels that are equally near they take the lower one.

    Parameters
    ----------
    levels : sequence of numbers
        Ascending; their count is a power of two.
    codes : sequence of int
        The code of each.

    Returns
    -------
    Nearest
    """
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]

    @operation(f32x16, f32x16, emit=lambda builder, x: _pick(builder, x, middles, [float(each) for each in levels]))
    def level(x):
        """The nearest levels of a table."""
        return np.array(levels, np.float32)[_numpy_index(x, middles)]

    def emit_codes(builder, address, x):
        words = _pick(builder, x, middles, list(codes))
        write(builder, address, builder.trunc(words, ir.VectorType(I8, 16)))

    @operation(types.void, types.int64, f32x16, emit=emit_codes)
    def store_codes(address, x):
        """The codes of the nearest levels of a table to memory, as sixteen bytes."""
        write_lanes(address, np.array(codes, np.uint8)[_numpy_index(x, middles)])

    return Nearest(level, store_codes)


def _numpy_index(x, middles):
    """How many middles each number is above."""
    return (x[:, None] > np.array(middles, np.float32)).sum(axis=1)


def _pick(builder, x, middles, entries):
    """For each lane the entry, all of which are floats or all integers, of the nearest level."""
    if ISA == "portable":
        return _compared_with_all(builder, x, middles, entries)
    if LANES == 16:
        return _halved(builder, x, middles, entries)
    halves = [shuffle(builder, x, x, range(at, at + 8)) for at in (0, 8)]
    return shuffle(builder, *(_halved(builder, half, middles, entries) for half in halves), range(16))


def _vector_of(entries, count):
    """The type of a register of entries."""
    return ir.VectorType(F32 if isinstance(entries[0], float) else I32, count)


def _compared_with_all(builder, x, middles, entries):
    vector = _vector_of(entries, 16)
    picked = constant(vector, entries[0])
    for middle, entry in zip(middles, entries[1:], strict=True):
        is_above = builder.fcmp_ordered(">", x, constant(_FLOATS, middle))
        picked = builder.select(is_above, constant(vector, entry), picked)
    return picked


def _halved(builder, x, middles, entries):
    """`_pick` for `LANES` numbers. Bit k of an index is the result of comparison k, of which each halves the table."""
    words, steps = ir.VectorType(I32, LANES), len(entries).bit_length() - 1
    index = constant(words, 0)
    for k in range(steps):
        half = len(entries) >> k + 1
        table = [middles[_first_of_part(i, k, steps) + half - 1] for i in range(1 << k)]
        is_above = builder.fcmp_ordered(">", x, _look_up(builder, table, index))
        index = _with_bit(builder, index, is_above, 1 << k)
    return _look_up(builder, [entries[_first_of_part(i, steps, steps)] for i in range(len(entries))], index)


def _first_of_part(index, count, steps):
    """The first level of the part of a table that `count` comparisons, of `steps` that it takes, have left."""
    return sum(1 << steps - 1 - k for k in range(count) if index >> k & 1)


def _with_bit(builder, index, is_set, bit):
    if LANES == 16:
        return builder.select(is_set, builder.or_(index, constant(index.type, bit)), index)
    return builder.or_(index, builder.and_(builder.sext(is_set, index.type), constant(index.type, bit)))


def _look_up(builder, table, index):
    """Entries of a table, all floats or all integers, by the numbers in a register."""
    vector = _vector_of(table, LANES)
    if len(table) == 1:
        return constant(vector, table[0])
    parts = [(list(table[i : i + LANES]) * LANES)[:LANES] for i in range(0, len(table), LANES)]
    # The instructions move lanes of 32 bits, whatever they are.
    floats = ir.VectorType(F32, LANES)
    picked = _permuted(builder, [builder.bitcast(ir.Constant(vector, part), floats) for part in parts], index)
    bit = len(table) // len(picked)
    while len(picked) > 1:
        # As the sign of a number the bit needs no comparison.
        sign = builder.shl(index, constant(index.type, 32 - bit.bit_length()))
        is_set = builder.icmp_signed("<", sign, constant(index.type, 0))
        picked = [builder.select(is_set, high, low) for low, high in zip(picked[::2], picked[1::2], strict=True)]
        bit *= 2
    return builder.bitcast(picked[0], vector)


def _permuted(builder, parts, index):
    """Lanes of each of several registers, by the low bits of an index; of two registers together where an instruction
    takes two."""
    floats = parts[0].type
    if LANES == 8:
        pick = declare(builder, "llvm.x86.avx2.permps", floats, [floats, index.type])
        return [builder.call(pick, [part, index]) for part in parts]
    if len(parts) == 1:
        pick = declare(builder, "llvm.x86.avx512.permvar.sf.512", floats, [floats, index.type])
        return [builder.call(pick, [parts[0], index])]
    pick = declare(builder, "llvm.x86.avx512.vpermi2var.ps.512", floats, [floats, index.type, floats])
    return [builder.call(pick, [low, index, high]) for low, high in zip(parts[::2], parts[1::2], strict=True)]


# Scales


def _as_halves(builder, x):
    largest, lowest = constant(_FLOATS, _LARGEST_HALF), constant(_FLOATS, -_LARGEST_HALF)
    x = builder.select(builder.fcmp_ordered("<", x, largest), x, largest)
    x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
    return builder.fpext(builder.fptrunc(x, ir.VectorType(F16, 16)), _FLOATS)


@operation(f32x16, f32x16, emit=_as_halves)
def as_halves(x):
    """The nearest finite IEEE halves (vcvtps2ph, vcvtph2ps)."""
    x = np.where(x < _LARGEST_HALF, x, np.float32(_LARGEST_HALF))
    return np.where(x > -_LARGEST_HALF, x, np.float32(-_LARGEST_HALF)).astype(np.float16).astype(np.float32)
