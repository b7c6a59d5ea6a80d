"""Codes of which a byte has five (`pymla.trits`): registers of digits from 0 to 2, which are the codes and 1.

`load_codes_for` and `load_codes_32_for` make the same operations as in `pymla.cpu.machine.simd_planes`.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.cpu.machine.intrinsics import (
    I8,
    I64,
    LITERAL,
    constant,
    declare,
    i8x32,
    i8xL,
    operation,
    read,
    shuffle,
)
from pymla.cpu.machine.lanes import read_lanes
from pymla.cpu.machine.orders import COLUMNS, FOURS, columns_of
from pymla.cpu.machine.simd_bits import address_at, divided_by, load_bytes, times_constant
from pymla.cpu.machine.simd_vectors_512 import HAS_VBMI, shifted, shuffle_two

_BYTES = ir.VectorType(I8, 64)


def load_codes_for(qtype, trits, order=COLUMNS):
    """Make ``load_codes(address, r)``: the r-th register of the digits of 256 weights, or with `FOURS` of 128. `r` is a
    literal; blocks begin at the address."""
    size, nbytes = ggml.BLOCK_SIZE[qtype], ggml.BLOCK_BYTES[qtype]
    total = (128 if order == FOURS else 256) // size * nbytes

    def places_of(r):
        columns = (divmod(column, size) for column in columns_of(order, r))
        return [(nbytes * block + trits.digits[i][0], trits.digits[i][1]) for block, i in columns]

    def emit(builder, address, r):
        places = places_of(r)
        if HAS_VBMI and order != FOURS:
            return _picked_digits(builder, address, places, total)
        return _digits(builder, load_bytes(builder, address, [byte for byte, _ in places], total), places)

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Digits of weights of 256."""
        return _numpy_digits(read_lanes(address, np.uint8, total), places_of(r))

    return load_codes


def load_codes_32_for(qtype, trits):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    subs, nbytes = ggml.BLOCK_SIZE[qtype] // 32, ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, block):
        whole, sub = divided_by(builder, block, subs)
        address, result = builder.add(address, times_constant(builder, whole, nbytes)), None
        for i in range(subs):
            places = trits.digits[32 * i : 32 * i + 32]
            digits = _digits(builder, load_bytes(builder, address, [byte for byte, _ in places], nbytes), places)
            is_it = builder.icmp_unsigned("==", sub, ir.Constant(I64, i))
            result = builder.select(is_it, digits, result) if result else digits
        return builder.sub(result, constant(result.type, 1))

    @operation(i8x32, types.int64, types.int64, emit=emit)
    def load_codes_32(address, block):
        """Codes of 32 weights."""
        sub = block % subs
        places = trits.digits[32 * sub : 32 * sub + 32]
        return _numpy_digits(read_lanes(address + block // subs * nbytes, np.uint8, nbytes), places) - np.int8(1)

    return load_codes_32


def _digits(builder, packed, places):
    """A digit of each of some bytes."""
    kind = packed.type
    product = builder.mul(packed, ir.Constant(kind, [3**n for _, n in places]))
    # Three times a number carries over 256 once from 86 on, and twice from 171 on.
    carried = [builder.icmp_unsigned(">", product, constant(kind, most)) for most in (85, 170)]
    return builder.add(*(builder.zext(each, kind) for each in carried))


def _picked_digits(builder, address, places, total):
    """The same with VBMI: tables give all digits of all bytes, four of them in fields of 2 bits and the last one apart;
    the bytes are put in their places, and the fields moved down."""
    low = read(builder, address, ir.VectorType(I8, 32))
    high = read(builder, address_at(builder, address, total - 32), ir.VectorType(I8, 32))
    packed = shuffle(builder, low, high, range(64))
    digits = _digits_of(np.arange(256), np.arange(5)[:, None])
    first, last = (digits[:4] << 2 * np.arange(4)[:, None]).sum(axis=0), digits[4]
    tables = [_look_up_256(builder, packed, table) for table in (first, last)]
    at = [byte if byte < 32 else byte + 64 - total for byte, _ in places]
    found = shuffle_two(builder, *tables, [byte + 64 * (n == 4) for byte, (_, n) in zip(at, places, strict=True)])
    words = builder.bitcast(found, ir.VectorType(I64, 8))
    moved = shifted(builder, words, [8 * (i % 8) + 2 * (n % 4) for i, (_, n) in enumerate(places)])
    return builder.and_(moved, constant(_BYTES, 3))


def _look_up_256(builder, numbers, table):
    """Bytes of a table of 256, by number."""
    pick = declare(builder, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [_BYTES] * 3)
    parts = [ir.Constant(_BYTES, [int(each) for each in table[i : i + 64]]) for i in range(0, 256, 64)]
    low, high = (builder.call(pick, [parts[i], numbers, parts[i + 1]]) for i in (0, 2))
    return builder.select(builder.icmp_signed("<", numbers, constant(_BYTES, 0)), high, low)


def _digits_of(numbers, n):
    return (numbers * 3**n % 256 * 3) >> 8


def _numpy_digits(packed, places):
    at, n = np.array(places).T
    return _digits_of(packed[at].astype(np.int64), n).astype(np.int8)
