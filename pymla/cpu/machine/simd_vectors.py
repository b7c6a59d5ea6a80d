"""Codes that come in vectors (`pymla.vectors`): registers of codes from a codebook, by index and signs.

`load_codes_for` and `load_codes_32_for` make the same operations as in `pymla.cpu.machine.simd_planes`. A table of
eight or four bytes for each entry stands in the kernel's constants; each vector of a register is a load from there.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.machine.intrinsics import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    LITERAL,
    constant,
    f32x16,
    i8x32,
    i8xL,
    operation,
    read,
    shuffle,
    splat,
)
from pymla.cpu.machine.lanes import read_lanes
from pymla.cpu.machine.orders import COLUMNS, EIGHTS, RUNS, columns_of
from pymla.cpu.machine.simd_bits import address_at, divided_by, times_constant
from pymla.cpu.machine.simd_fields import emit_words, emit_words_32, numpy_words
from pymla.cpu.machine.simd_vectors_512 import (
    HAS_VBMI,
    constant_array,
    emit_columns,
    emit_eights,
    emit_found,
    emit_fours,
)

#: Entries of the largest codebook that is looked up in registers for one row.
_MOST_ALONE = 512


def load_codes_for(qtype, vectors, offset, order=COLUMNS):
    """Make ``load_codes(address, r)``: the codes of the r-th register of 256 weights, `offset` more than they are, int8
    or uint8. `r` is a literal; the block begins at the address."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, r):
        if order == COLUMNS and HAS_VBMI and len(codebook(vectors.name)) <= _MOST_ALONE:
            return emit_columns(builder, vectors, offset, address, nbytes, r)
        if order == EIGHTS and HAS_VBMI and codebook(vectors.name).shape[1] == 4:
            return emit_fours(builder, vectors, offset, address, nbytes, RUNS[r])
        eights = [column // 8 for column in columns_of(order, r)[::8]]
        return _emit_codes(builder, vectors, offset, _All(builder, address, nbytes), eights)

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256, by index and signs."""
        codes = _numpy_codes(vectors, read_lanes(address, np.uint8, nbytes)[None])[0]
        return (codes[columns_of(order, r)].astype(np.int16) + offset).astype(np.int8)

    return load_codes


def look_up_four_for(qtype, vectors):
    """Make ``look_up(a, b, c, d)`` of four rows, whose blocks begin at these addresses: what `load_found_for` takes of
    the first two rows, two registers, and of the last two."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, a, b, c, d):
        return emit_found(builder, vectors, [[a, b], [c, d]])

    @operation(types.UniTuple(i8xL, 4), *[types.int64] * 4, emit=emit)
    def look_up(a, b, c, d):
        """Bits of codes of 256 weights of four rows."""
        table = codebook(vectors.name)
        numbers = np.searchsorted(np.unique(table), table)
        found = []
        for pair in ((a, b), (c, d)):
            blocks = np.stack([read_lanes(address, np.uint8, nbytes) for address in pair])
            entries = numbers[numpy_words(vectors.indices, blocks, 32).reshape(-1)]
            for bit in (1, 0):
                found.append(np.packbits(entries >> bit & 1, axis=1, bitorder="little")[:, 0].view(np.int8))
        return tuple(found)

    return look_up


def load_found_for(qtype, vectors, offset):
    """Make two functions ``load_eights(high, low, address, r)``, for the first and the second of two rows: `load_codes`
    in the order `EIGHTS`, of what `look_up_four_for` found."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def make(which):
        def emit(builder, high, low, address, r):
            return emit_eights(builder, vectors, offset, high, low, which, address, nbytes, RUNS[r])

        @operation(i8xL, i8xL, i8xL, types.int64, LITERAL, emit=emit)
        def load_eights(high, low, address, r):
            """Codes of weights of 256, of bits of them and of signs."""
            bits = [np.unpackbits(each.view(np.uint8)[32 * which :][:32], bitorder="little") for each in (high, low)]
            levels = np.append(np.unique(codebook(vectors.name)), 0)[2 * bits[0] + bits[1]].astype(np.int8)
            codes = _numpy_signed(vectors, levels[None], read_lanes(address, np.uint8, nbytes)[None])[0]
            return (codes[columns_of(EIGHTS, r)].astype(np.int16) + offset).astype(np.int8)

        return load_eights

    return make(0), make(1)


def load_codes_32_for(qtype, vectors):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, block):
        whole, sub = divided_by(builder, block, 8)
        address = builder.add(address, times_constant(builder, whole, nbytes))
        return _emit_codes(builder, vectors, 0, _Some(builder, address, sub), range(4))

    @operation(i8x32, types.int64, types.int64, emit=emit)
    def load_codes_32(address, block):
        """Codes of 32 weights, by index and signs."""
        codes = _numpy_codes(vectors, read_lanes(address + block // 8 * nbytes, np.uint8, nbytes)[None])[0]
        return codes[32 * (block % 8) : 32 * (block % 8 + 1)]

    return load_codes_32


class _All:
    """Reads numbers of any vectors of 256 weights."""

    def __init__(self, builder, address, nbytes):
        self.builder, self.address, self.nbytes = builder, address, nbytes

    def words(self, fields, count):
        """The numbers of the `count` vectors of 32 weights, for all such blocks: int16 lanes."""
        return emit_words(self.builder, fields, self.address, range(8 * count), self.nbytes)


class _Some:
    """Reads numbers of the vectors of 32 weights, which begin at a number known when the kernel runs."""

    def __init__(self, builder, address, sub):
        self.builder, self.address, self.sub = builder, address, sub

    def words(self, fields, count):
        """The numbers of the `count` vectors: int16 lanes."""
        return emit_words_32(self.builder, fields, self.address, self.sub, count)


def _emit_codes(builder, vectors, offset, source, eights):
    """The codes of runs of eight weights, by their number."""
    table = codebook(vectors.name)
    size = table.shape[1]
    index = source.words(vectors.indices, 32 // size)
    numbers = [eight * (8 // size) + i for eight in eights for i in range(8 // size)]
    factor, plus = (8, offset - 1) if vectors.down else (1, offset)
    table = (factor * table.astype(np.int16) + plus).astype(np.int8)
    codes = _looked_up(builder, table, index, numbers)
    if vectors.down:
        return builder.add(codes, _moved_up(builder, source.words((vectors.down,), 4), eights))
    signs = _signs(builder, vectors.signs, source)
    bits = builder.trunc(_picked(builder, signs, eights), ir.VectorType(I8, len(eights)))
    is_negative = builder.bitcast(bits, ir.VectorType(I1, codes.type.count))
    return builder.select(is_negative, builder.sub(constant(codes.type, 2 * offset), codes), codes)


def _moved_up(builder, down, eights):
    """2 in the eight bytes of vectors that are not moved down, 0 in the others."""
    wide = ir.VectorType(I64, len(eights))
    is_down = builder.icmp_unsigned("!=", builder.zext(_picked(builder, down, eights), wide), constant(wide, 0))
    moved = builder.select(is_down, constant(wide, 0), constant(wide, 0x0202020202020202))
    return builder.bitcast(moved, ir.VectorType(I8, 8 * len(eights)))


def _picked(builder, words, lanes):
    """Some lanes of a register."""
    return words if list(lanes) == list(range(words.type.count)) else shuffle(builder, words, words, lanes)


def _signs(builder, field, source):
    """Signs of runs of eight weights, in the low bytes of int16 lanes."""
    signs = source.words((field,), 4)
    if field.bits == 8:
        return signs
    # The last sign is the parity of the others.
    parity = signs
    for shift in (4, 2, 1):
        parity = builder.xor(parity, builder.lshr(parity, constant(signs.type, shift)))
    return builder.or_(signs, builder.shl(parity, constant(signs.type, 7)))


def _looked_up(builder, table, index, numbers):
    """The entries of a table, int8 (entries, 8 or 4), whose indices are in some lanes of a register."""
    size = table.shape[1]
    element = ir.IntType(8 * size)
    words = np.ascontiguousarray(table).view(f"<u{size}")[:, 0]
    kept = constant_array(builder, element, words)
    result = ir.Constant(ir.VectorType(element, len(numbers)), ir.Undefined)
    for lane, number in enumerate(numbers):
        chosen = builder.zext(builder.extract_element(index, ir.Constant(I32, number)), I64)
        entry = builder.load(builder.gep(kept, [ir.Constant(I64, 0), chosen], inbounds=True))
        result = builder.insert_element(result, entry, ir.Constant(I32, lane))
    return builder.bitcast(result, ir.VectorType(I8, size * len(numbers)))


def _half_of_nibbles(builder, word):
    """The half, as float32, whose bits are the highest nibbles of four words of 16 bits."""
    bits = ir.Constant(I64, 0)
    for i in range(4):
        moved = builder.lshr(word, ir.Constant(I64, 12 + 12 * i))
        bits = builder.or_(bits, builder.and_(moved, ir.Constant(I64, 15 << 4 * i)))
    return builder.fpext(builder.bitcast(builder.trunc(bits, I16), F16), F32)


def _numpy_scales_iq1_m(words):
    """The scales of IQ1_M, float32 (16,), of four words of 16 bits."""
    wide = words.astype(np.int32)
    half = np.bitwise_or.reduce(wide >> 12 << np.arange(0, 16, 4)).astype(np.uint16).view(np.float16)
    numbers = wide[:, None] >> np.arange(0, 12, 3) & 7
    return np.float32(half) * (numbers.reshape(-1) / 4 + 1 / 8).astype(np.float32)


#: Where the scales of IQ1_M are: four words of 16 bits, each with four of 3 bits and, above them, bits of the half.
_IQ1_M_SCALES = 48


def _emit_load_scales_iq1_m(builder, row, address):
    word = read(builder, address_at(builder, address, _IQ1_M_SCALES), I64)
    words = builder.bitcast(word, ir.VectorType(I16, 4))
    numbers = builder.zext(shuffle(builder, words, words, [i // 4 for i in range(16)]), ir.VectorType(I32, 16))
    numbers = builder.lshr(numbers, ir.Constant(numbers.type, [0, 3, 6, 9] * 4))
    numbers = builder.and_(numbers, constant(numbers.type, 7))
    floats = builder.sitofp(numbers, ir.VectorType(F32, 16))
    floats = builder.fadd(builder.fmul(floats, constant(floats.type, 0.25)), constant(floats.type, 0.125))
    return builder.fmul(splat(builder, _half_of_nibbles(builder, word), 16), floats)


@operation(f32x16, types.int64, types.int64, emit=_emit_load_scales_iq1_m)
def load_scales_iq1_m(row, address):
    """The scales, float32, of the small blocks of a block of IQ1_M."""
    return _numpy_scales_iq1_m(read_lanes(address + _IQ1_M_SCALES, np.uint16, 4))


def _emit_load_scale_iq1_m(builder, row, address, block):
    whole, sub = divided_by(builder, block, 8)
    address = address_at(
        builder, builder.add(address, times_constant(builder, whole, ggml.BLOCK_BYTES[ggml.IQ1_M])), _IQ1_M_SCALES
    )
    half = _half_of_nibbles(builder, read(builder, address, I64))
    at, first = divided_by(builder, sub, 2)
    word = builder.zext(read(builder, builder.add(address, times_constant(builder, at, 2)), I16), I32)
    word = builder.lshr(word, builder.trunc(times_constant(builder, first, 6), I32))
    found = []
    for i in range(2):
        number = builder.and_(builder.lshr(word, ir.Constant(I32, 3 * i)), ir.Constant(I32, 7))
        number = builder.sitofp(number, F32)
        number = builder.fadd(builder.fmul(number, ir.Constant(F32, 0.25)), ir.Constant(F32, 0.125))
        found.append(builder.fmul(half, number))
    return found


@operation(types.UniTuple(types.float32, 2), *[types.int64] * 3, emit=_emit_load_scale_iq1_m)
def load_scale_iq1_m(row, address, block):
    """The scales, two float32, of the sixteens of the weights from ``32 * block`` on, of IQ1_M."""
    address += block // 8 * ggml.BLOCK_BYTES[ggml.IQ1_M] + _IQ1_M_SCALES
    scales = _numpy_scales_iq1_m(read_lanes(address, np.uint16, 4))
    return scales[2 * (block % 8)], scales[2 * (block % 8) + 1]


def _numpy_codes(vectors, blocks):
    """Codes of blocks of 256 weights, uint8 (n, bytes), as int8 (n, 256)."""
    table = codebook(vectors.name)
    codes = table[numpy_words(vectors.indices, blocks, 256 // table.shape[1])].reshape(-1, 256)
    return _numpy_signed(vectors, codes, blocks)


def _numpy_signed(vectors, codes, blocks):
    """The same of what the codebook has for them, int8 (n, 256)."""
    if vectors.down:
        down = np.repeat(numpy_words((vectors.down,), blocks, 32), 8, axis=1)
        return (8 * codes + 1 - 2 * down).astype(np.int8)
    signs = numpy_words((vectors.signs,), blocks, 32)
    bits = signs[..., None] >> np.arange(8) & 1
    if vectors.signs.bits == 7:
        bits[..., 7] = bits[..., :7].sum(axis=-1) & 1
    return np.where(bits.reshape(-1, 256) == 1, -codes, codes)
