"""Codes that come in vectors (`pymla.vectors`): registers of codes from a codebook, by index and signs.

`load_codes_for` and `load_codes_32_for` make the same operations as in `pymla.cpu.machine.simd_planes`. A table of eight
or four bytes for each entry stands in the kernel's constants; each vector of a register is a load from there.
"""

import numpy as np
from llvmlite import ir
from numba import types

from pymla import ggml
from pymla.codebooks import codebook
from pymla.cpu.machine import simd_vectors_512
from pymla.cpu.machine.intrinsics import (
    I1,
    I8,
    I32,
    I64,
    LITERAL,
    constant,
    i8x32,
    i8xL,
    operation,
    shuffle,
)
from pymla.cpu.machine.lanes import read_lanes
from pymla.cpu.machine.orders import COLUMNS, columns_of
from pymla.cpu.machine.simd_fields import emit_words, emit_words_32, numpy_words
from pymla.cpu.machine.simd_planes import _divided, _times


def load_codes_for(qtype, vectors, offset, order=COLUMNS):
    """Make ``load_codes(address, r)``: the codes of the r-th register of 256 weights, `offset` more than they are, int8
    or uint8. `r` is a literal; the block begins at the address."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, r):
        eights = [column // 8 for column in columns_of(order, r)[::8]]
        if simd_vectors_512.can_hold(vectors):
            return simd_vectors_512.emit_codes(builder, vectors, offset, address, nbytes, eights)
        return _emit_codes(builder, vectors, offset, _All(builder, address, nbytes), eights)

    @operation(i8xL, types.int64, LITERAL, emit=emit)
    def load_codes(address, r):
        """Codes of weights of 256, by index and signs."""
        codes = _numpy_codes(vectors, read_lanes(address, np.uint8, nbytes)[None])[0]
        return (codes[columns_of(order, r)].astype(np.int16) + offset).astype(np.int8)

    return load_codes


def load_codes_32_for(qtype, vectors):
    """Make ``load_codes_32(address, block)``: the codes, int8, of the weights from ``32 * block`` on; a row's blocks
    begin at the address."""
    nbytes = ggml.BLOCK_BYTES[qtype]

    def emit(builder, address, block):
        whole, sub = _divided(builder, block, 8)
        address = builder.add(address, _times(builder, whole, nbytes))
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
    entries, size = table.shape
    index = source.words(vectors.index, 32 // size)
    numbers = [eight * (8 // size) + i for eight in eights for i in range(8 // size)]
    factor, plus = (8, offset - 1) if vectors.down else (1, offset)
    table = (factor * table.astype(np.int16) + plus).astype(np.int8)
    codes = _looked_up(builder, table, index, numbers)
    if vectors.down:
        # Codes of vectors that are not moved down are 2 larger.
        is_down = builder.trunc(
            _picked(builder, source.words((vectors.down,), 4), eights), ir.VectorType(I1, len(eights))
        )
        wide = ir.VectorType(I64, len(eights))
        moved = builder.select(is_down, constant(wide, 0), constant(wide, 0x0202020202020202))
        return builder.add(codes, builder.bitcast(moved, codes.type))
    signs = _signs(builder, vectors.signs, source)
    bits = builder.trunc(_picked(builder, signs, eights), ir.VectorType(I8, len(eights)))
    is_negative = builder.bitcast(bits, ir.VectorType(I1, codes.type.count))
    return builder.select(is_negative, builder.sub(constant(codes.type, 2 * offset), codes), codes)


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
    kept = constant_array(builder, element, [int(word) for word in words])
    result = ir.Constant(ir.VectorType(element, len(numbers)), ir.Undefined)
    for lane, number in enumerate(numbers):
        chosen = builder.zext(builder.extract_element(index, ir.Constant(I32, number)), I64)
        entry = builder.load(builder.gep(kept, [ir.Constant(I64, 0), chosen], inbounds=True))
        result = builder.insert_element(result, entry, ir.Constant(I32, lane))
    return builder.bitcast(result, ir.VectorType(I8, size * len(numbers)))


def constant_array(builder, element, numbers):
    """A pointer to integers that stand in the kernel's constants."""
    value = ir.Constant(ir.ArrayType(element, len(numbers)), numbers)
    module = builder.module
    for known in module.global_values:
        if isinstance(known, ir.GlobalVariable) and known.initializer is value:
            return known
    array = ir.GlobalVariable(module, value.type, module.get_unique_name("codebook"))
    array.linkage, array.global_constant, array.unnamed_addr, array.initializer = "internal", True, True, value
    array.align = 64
    return array


def _numpy_codes(vectors, blocks):
    """Codes of blocks of 256 weights, uint8 (n, bytes), as int8 (n, 256)."""
    table = codebook(vectors.name)
    codes = table[numpy_words(vectors.index, blocks, 256 // table.shape[1])].reshape(-1, 256)
    if vectors.down:
        down = np.repeat(numpy_words((vectors.down,), blocks, 32), 8, axis=1)
        return (8 * codes + 1 - 2 * down).astype(np.int8)
    signs = numpy_words((vectors.signs,), blocks, 32)
    bits = signs[..., None] >> np.arange(8) & 1
    if vectors.signs.bits == 7:
        bits[..., 7] = bits[..., :7].sum(axis=-1) & 1
    return np.where(bits.reshape(-1, 256) == 1, -codes, codes)
