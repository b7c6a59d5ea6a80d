"""Codes of two types of ik_llama.cpp whose layouts have no other like them: IQ4_KSS, and IQ2_KL.

The functions are those of a `pymla.cpu.formats.decoded.Decoder`; those that make ``load_codes`` take the order.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.codebooks import PAIRS
from pymla.cpu.machine.intrinsics import (
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    LITERAL,
    constant,
    f32x8,
    i8x32,
    i8xL,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes, read_number
from pymla.cpu.machine.orders import COLUMNS, columns_of
from pymla.cpu.machine.simd_bits import address_at, bit_fields, divided_by, load_bytes, look_up_table, times_constant
from pymla.cpu.machine.simd_fields import emit_words, emit_words_32, numpy_words
from pymla.cpu.machine.simd_vectors_512 import HAS_VBMI, look_up_64, shuffle_two, times_matrices
from pymla.planes import IQ4_LEVELS, Plane

# IQ4_KSS: eight words of 16 bits for 32 weights. The lowest bits of the words are a number, of which the lowest bit
# moves levels up by 4 and the others are a scale. A word without its own lowest bit, xor half of it, has four nibbles,
# which lie as in IQ4_XS.

_KSS_BYTES, _KSS_MOVED = ggml.BLOCK_BYTES[ggml.IQ4_KSS], 4
_KSS_NIBBLES = Plane(0, 4, 16)


def _kss_codes(builder, found, is_moved, shifts, offset):
    """Codes of bytes of whole words, at their bits `shifts`."""
    words = builder.bitcast(found, ir.VectorType(I16, found.type.count // 2))
    even = builder.and_(words, constant(words.type, -2))
    even = builder.xor(even, builder.lshr(even, constant(words.type, 1)))
    nibbles = bit_fields(builder, builder.bitcast(even, found.type), shifts, 4, 0)
    codes = look_up_table(builder, nibbles, [(level + offset + 128) % 256 - 128 for level in IQ4_LEVELS])
    moved = builder.select(is_moved, constant(codes.type, _KSS_MOVED), constant(codes.type, 0))
    return builder.add(codes, moved)


def load_codes_iq4_kss(offset, order=COLUMNS):
    """Make ``load_codes(address, r)`` of IQ4_KSS: codes, `offset` more than they are."""

    def emit(builder, address, r):
        columns = columns_of(order, r)
        places = [_KSS_NIBBLES.place(column) for column in columns]
        found = load_bytes(builder, address, [byte for byte, _ in places], _KSS_BYTES)
        first = load_bytes(builder, address, [column // 32 * 16 for column in columns], _KSS_BYTES)
        is_moved = builder.icmp_unsigned("!=", builder.and_(first, constant(first.type, 1)), constant(first.type, 0))
        return _kss_codes(builder, found, is_moved, [bit for _, bit in places], offset)

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256, of IQ4_KSS."""
        codes, _ = _numpy_kss(read_lanes(address, np.uint8, _KSS_BYTES))
        return (codes[columns_of(order, r)] + offset).astype(np.int8)

    return load_codes


def _kss_address(builder, address, block):
    """Where the sixteen bytes of the weights from ``32 * block`` on begin."""
    return builder.add(address, times_constant(builder, block, _KSS_BYTES // 8))


def _emit_kss_32(builder, address, block):
    address = _kss_address(builder, address, block)
    sixteen = read(builder, address, ir.VectorType(I8, 16))
    found = shuffle(builder, sixteen, sixteen, [*range(16), *range(16)])
    bit = builder.trunc(read(builder, address, I8), I1)
    return _kss_codes(builder, found, splat(builder, bit, 32), [0] * 16 + [4] * 16, 0)


@operation(i8x32, types.int64, types.int64, emit=_emit_kss_32)
def load_codes_32_iq4_kss(address, block):
    """Codes of 32 weights, of IQ4_KSS."""
    codes, _ = _numpy_kss(read_lanes(address + block * (_KSS_BYTES // 8), np.uint8, _KSS_BYTES // 8))
    return codes.astype(np.int8)


def _emit_kss_scales(builder, row, address):
    words = read(builder, address, ir.VectorType(I16, 64))
    bits = builder.bitcast(builder.trunc(words, ir.VectorType(I1, 64)), I64)
    # As a register of two words it does not go through memory.
    two = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
    bits = builder.and_(bits, ir.Constant(I64, 0xFEFEFEFEFEFEFEFE))
    two = builder.bitcast(builder.insert_element(two, bits, ir.Constant(I32, 0)), ir.VectorType(I8, 16))
    numbers = builder.zext(shuffle(builder, two, two, range(8)), ir.VectorType(I32, 8))
    numbers = builder.sub(numbers, constant(numbers.type, 127))
    return builder.fmul(splat(builder, read(builder, row, F32), 8), builder.sitofp(numbers, ir.VectorType(F32, 8)))


@operation(f32x8, types.int64, types.int64, emit=_emit_kss_scales)
def load_scales_iq4_kss(row, address):
    """Scales of eight blocks of 32 weights, of IQ4_KSS."""
    return read_number(row, np.float32) * _numpy_kss(read_lanes(address, np.uint8, _KSS_BYTES))[1]


def _emit_kss_scale(builder, row, address, block):
    words = read(builder, _kss_address(builder, address, block), ir.VectorType(I16, 8))
    bits = builder.bitcast(builder.trunc(words, ir.VectorType(I1, 8)), I8)
    number = builder.and_(builder.zext(bits, I32), ir.Constant(I32, 254))
    number = builder.sitofp(builder.sub(number, ir.Constant(I32, 127)), F32)
    return [builder.fmul(read(builder, row, F32), number)] * 2


@operation(types.UniTuple(types.float32, 2), *[types.int64] * 3, emit=_emit_kss_scale)
def load_scale_iq4_kss(row, address, block):
    """The scale of 32 weights, twice, of IQ4_KSS."""
    _, scales = _numpy_kss(read_lanes(address + block * (_KSS_BYTES // 8), np.uint8, _KSS_BYTES // 8))
    scale = read_number(row, np.float32) * scales[0]
    return scale, scale


def _numpy_kss(packed):
    """Codes, int16, and scales, float32, of 32 weights for sixteen bytes."""
    words = packed.view(np.uint16).reshape(-1, 8)
    numbers = np.packbits((words & 1).astype(bool), axis=-1, bitorder="little")[:, 0]
    even = words & np.uint16(0xFFFE)
    found = (even ^ even >> 1).view(np.uint8)
    codes = np.array(IQ4_LEVELS, np.int16)[np.stack([found & 15, found >> 4], axis=1)].reshape(-1, 32)
    codes += np.int16(_KSS_MOVED) * (numbers & 1)[:, None]
    return codes.reshape(-1), (numbers & 254).astype(np.float32) - 127


# IQ2_KL: a code of 5 bits for two neighbouring weights.

_BYTES = ir.VectorType(I8, 64)
_KL_BYTES = ggml.BLOCK_BYTES[ggml.IQ2_KL]
_KL_INDEX = (Plane(6, 4, 16), Plane(70, 1, 16, 4))


def _kl_codes(builder, index, offset):
    """Codes, `offset` more than they are, of indices of pairs, int16 lanes."""
    # The numbers of the first weights are indices, those of the second ones 32 more.
    both = builder.or_(index, builder.shl(index, constant(index.type, 8)))
    both = builder.or_(both, constant(index.type, 32 << 8))
    numbers = builder.bitcast(both, ir.VectorType(I8, 2 * index.type.count))
    return look_up_table(builder, numbers, _kl_table(offset))


def _kl_table(offset):
    """The codes of pairs by index: the first ones, then the second ones."""
    return [int(level) + offset for level in np.array(PAIRS).T.reshape(-1)]


def _kl_codes_512(builder, address, columns, offset):
    """Codes at 64 columns, of which eight side by side are of one block of 32 weights, with VBMI and GFNI."""
    nibbles = read(builder, address_at(builder, address, _KL_INDEX[0].at), _BYTES)
    words = builder.bitcast(nibbles, ir.VectorType(I16, 32))
    upper = builder.bitcast(builder.lshr(words, constant(words.type, 4)), _BYTES)
    parts = [builder.and_(part, constant(_BYTES, 15)) for part in (nibbles, upper)]
    blocks, pairs = [column // 32 for column in columns], [column % 32 // 2 for column in columns]
    lanes = [16 * (block // 2) + 64 * (block % 2) + pair for block, pair in zip(blocks, pairs, strict=True)]
    low = shuffle_two(builder, *parts, lanes)
    bits = read(builder, address_at(builder, address, _KL_INDEX[1].at), ir.VectorType(I8, 16))
    # Bit i of the byte of a pair is that of block i: it becomes bit 4.
    high = times_matrices(builder, shuffle(builder, bits, bits, pairs), [1 << block + 24 for block in blocks[::8]])
    second = ir.Constant(_BYTES, [32 * (column % 2) for column in columns])
    return look_up_64(builder, builder.or_(builder.or_(low, high), second), _kl_table(offset))


def load_codes_iq2_kl(offset, order=COLUMNS):
    """Make ``load_codes(address, r)`` of IQ2_KL: codes, `offset` more than they are."""

    def emit(builder, address, r):
        columns = columns_of(order, r)
        if HAS_VBMI:
            return _kl_codes_512(builder, address, columns, offset)
        pairs = [column // 2 for column in columns[::2]]
        return _kl_codes(builder, emit_words(builder, _KL_INDEX, address, pairs, _KL_BYTES), offset)

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256, of IQ2_KL."""
        return (_numpy_kl(address)[columns_of(order, r)].astype(np.int16) + offset).astype(np.int8)

    return load_codes


def _emit_kl_32(builder, address, block):
    whole, sub = divided_by(builder, block, 8)
    address = builder.add(address, times_constant(builder, whole, _KL_BYTES))
    return _kl_codes(builder, emit_words_32(builder, _KL_INDEX, address, sub, 16), 0)


@operation(i8x32, types.int64, types.int64, emit=_emit_kl_32)
def load_codes_32_iq2_kl(address, block):
    """Codes of 32 weights, of IQ2_KL."""
    return _numpy_kl(address + block // 8 * _KL_BYTES)[32 * (block % 8) : 32 * (block % 8 + 1)]


def _numpy_kl(address):
    """Codes of a block, int8 (256,)."""
    index = numpy_words(_KL_INDEX, read_lanes(address, np.uint8, _KL_BYTES)[None], 128)[0]
    return np.array(PAIRS, np.int8)[index].reshape(-1)
