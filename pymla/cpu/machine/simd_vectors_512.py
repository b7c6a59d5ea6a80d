"""Codes that come in vectors (`pymla.vectors`) from a codebook that registers hold: processors with VBMI and GFNI.

An entry is a word of 16 bits, which has a field for each of its eight or four codes. `vpermi2w` takes one of 64 entries
by the low six bits of an index, for 32 vectors at once. Words of 64 bits then have the fields of a block of 32 weights,
or of half of it, and other words its signs; of these a register of eight codes of each block is made (the order
`EIGHTS`), and `vpermb` makes a code of a field and its sign.

Fields of 2 bits, and signs, become bits of the code's byte by a product of matrices of bits (`vgf2p8affineqb`): the
words are the matrices, of which it takes a column for each byte, and for the last of eight signs of which seven are
stored the sum of seven columns. Fields of 4 bits are moved by `vpmultishiftqb`.
"""

import numpy as np
from llvmlite import ir

from pymla.codebooks import codebook
from pymla.cpu.machine.intrinsics import I1, I8, I16, I32, I64, constant, declare, read, shuffle
from pymla.cpu.machine.simd_planes import _moved
from pymla.cpu.runtime import target
from pymla.cpu.runtime.isa import LANES, PYTHON

_BYTES, _WORDS, _QWORDS = (ir.VectorType(element, 512 // element.width) for element in (I8, I16, I64))
#: Entries of the largest codebook of which registers are faster than loads.
_MOST = 1024


#: Whether the processor that is compiled for has the instructions.
HAS_VBMI = LANES == 16 and not PYTHON and {"avx512vbmi", "gfni"} <= target.features()


def can_hold(vectors):
    """Whether `emit_codes` takes a type."""
    return HAS_VBMI and vectors.signs is not None and len(codebook(vectors.name)) <= _MOST


def emit_codes(builder, vectors, offset, address, nbytes, eights):
    """The codes of eight runs of eight weights, by their number, `offset` more than they are."""
    make = _emit_pairs if codebook(vectors.name).shape[1] == 8 else _emit_nibbles
    runs = [eight % 4 for eight in eights]
    if len(set(runs)) == 1:
        return make(builder, vectors, offset, address, nbytes, runs[0])
    parts = [builder.bitcast(make(builder, vectors, offset, address, nbytes, run), _QWORDS) for run in range(4)]
    block = eights[0] // 4
    lanes = [block, block + 8, block, block + 8, block + 1, block + 9, block + 1, block + 9]
    low, high = (shuffle(builder, parts[i], parts[i + 1], lanes) for i in (0, 2))
    return builder.bitcast(shuffle(builder, low, high, [0, 1, 10, 11, 4, 5, 14, 15]), _BYTES)


def _emit_pairs(builder, vectors, offset, address, nbytes, run):
    """The codes of a run of eight weights of each block, of vectors of eight: fields of 2 bits. The bits of a code
    stand in a byte of an entry each."""
    table = codebook(vectors.name)
    levels = sorted(set(table.reshape(-1).tolist()))
    numbers = np.searchsorted(levels, table)
    entries = [np.packbits(numbers >> bit & 1, axis=1, bitorder="little")[:, 0].astype(int) for bit in (1, 0)]
    index, masks = _indices(builder, vectors.indices, address, 0, 4)
    words = _looked_up(builder, entries[0] | entries[1] << 8, index, masks)
    # Bits of the runs 3, 2, 1 and 0, from the lowest bit on.
    codes = _columns(builder, words, 8)
    signs = _signs(builder, vectors.signs, address, nbytes, {0: 2, 1: 0, 2: 5, 3: 4})
    if run >= 2:
        both, bits, sign = _merged(builder, codes, signs, 0x0F), (6 - 2 * run, 7 - 2 * run), 7 - run
    else:
        both, bits, sign = _merged(builder, codes, signs, 0xF0), (4, 5), 0
        if run == 0:
            both = _shifted_right(builder, both, 2)
    return look_up_64(builder, both, _levels(levels, offset, bits, sign))


def _emit_nibbles(builder, vectors, offset, address, nbytes, run):
    """The same of vectors of four: fields of 4 bits."""
    table = codebook(vectors.name)
    levels = sorted(set(table.reshape(-1).tolist()))
    entries = (np.searchsorted(levels, table) << 4 * np.arange(4)).sum(axis=1)
    words = _looked_up(builder, entries, *_indices(builder, vectors.indices, address, run // 2, 8))
    place, sign = ((0, 3), (0, 4), (0, 5), (3, 0))[run]
    codes = shifted(builder, words, [32 * (run % 2) + 4 * i - place for i in range(8)] * 8)
    signs = _signs(builder, vectors.signs, address, nbytes, {0: 3, 1: 4, 2: 5, 3: 0})
    both = _merged(builder, codes, signs, 7 << place)
    return look_up_64(builder, both, _levels(levels, offset, range(place, place + 3), sign))


def _levels(levels, offset, bits, sign):
    """The table for `look_up_64` of bytes that have some bits of a number, the lowest first, and a sign."""
    numbers = np.arange(64)
    level = sum((numbers >> bit & 1) << i for i, bit in enumerate(bits))
    magnitudes = np.array([*levels, 0])[np.minimum(level, len(levels))]
    return np.where(numbers >> sign & 1, -magnitudes, magnitudes) + offset


def _columns(builder, words, count):
    """Transposed matrices of bits: the i-th byte of a word of 64 bits has bit i of its bytes, of the first one in its
    highest bit. With a `count` of 7 the last byte has the sums of the others, modulo 2."""
    columns = [1 << i for i in range(8)] if count == 8 else [*(1 << i for i in range(7)), 127]
    product = declare(builder, "llvm.x86.vgf2p8affineqb.512", _BYTES, [_BYTES, _BYTES, I8])
    given = [ir.Constant(_BYTES, columns * 8), builder.bitcast(words, _BYTES)]
    return builder.call(product, [*given, ir.Constant(I8, 0)])


def shifted(builder, words, bits):
    """Bytes that begin at some bits, a bit for each byte, of their word of 64 bits."""
    control = ir.Constant(_BYTES, [bit % 64 for bit in bits])
    move = declare(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, [_BYTES, _BYTES])
    return builder.call(move, [control, builder.bitcast(words, _BYTES)])


def _shifted_right(builder, codes, bits):
    """Words of 64 bits moved right."""
    return builder.bitcast(builder.lshr(builder.bitcast(codes, _QWORDS), constant(_QWORDS, bits)), _BYTES)


def look_up_64(builder, numbers, table):
    """Bytes of a table of 64, by the low six bits of bytes."""
    pick = declare(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, [_BYTES, _BYTES])
    return builder.call(pick, [ir.Constant(_BYTES, [int(entry) for entry in table]), numbers])


def _merged(builder, low, high, mask):
    """The bits of a mask from bytes of one register, the others from another one."""
    words = ir.VectorType(I32, 16)
    merge = declare(builder, "llvm.x86.avx512.pternlog.d.512", words, [words] * 3 + [I32])
    given = [builder.bitcast(each, words) for each in (constant(_BYTES, mask), low, high)]
    return builder.bitcast(builder.call(merge, [*given, ir.Constant(I32, 0xCA)]), _BYTES)


def _indices(builder, fields, address, half, count):
    """Of the `count` vectors of each block of 32 weights, the first or second four: the low bits of indices in words,
    and the bits from the ninth on, where these lie apart, as masks."""
    low = fields[0]
    at = [low.place(count * block + 4 * half + i)[0] for block in range(8) for i in range(4)]
    if low.bits > 8:
        return read(builder, _moved(builder, address, low.at), _WORDS), []
    if at == list(range(at[0], at[0] + 32)):
        found = read(builder, _moved(builder, address, at[0]), ir.VectorType(I8, 32))
        index = builder.zext(found, _WORDS)
    else:
        found = read(builder, _moved(builder, address, low.at), _BYTES)
        lanes = [lane for byte in at for lane in (byte - low.at, 64)]
        index = builder.bitcast(shuffle(builder, found, constant(_BYTES, 0), lanes), _WORDS)
    if len(fields) == 1:
        return index, []
    high = fields[1]
    bits = read(builder, _moved(builder, address, high.at), I64)
    pick = declare(builder, "llvm.x86.bmi.pext.64", I64, [I64, I64])
    masks = []
    for bit in range(high.bits):
        places = [high.place(count * block + 4 * half + i) for block in range(8) for i in range(4)]
        mask = sum(1 << 8 * (byte - high.at) + first + bit for byte, first in places)
        picked = builder.trunc(builder.call(pick, [bits, ir.Constant(I64, mask)]), I32)
        masks.append(builder.bitcast(picked, ir.VectorType(I1, 32)))
    return index, masks


def _looked_up(builder, entries, index, masks):
    """Words of a table by indices, whose bits from the ninth on may stand apart."""
    pick = declare(builder, "llvm.x86.avx512.vpermi2var.hi.512", _WORDS, [_WORDS] * 3)
    halves = [ir.Constant(_WORDS, entries[i : i + 32].tolist()) for i in range(0, len(entries), 32)]
    found = [builder.call(pick, [low, index, high]) for low, high in zip(halves[::2], halves[1::2], strict=True)]
    bit = 64
    while len(found) > 1:
        if bit < 256 or not masks:
            is_set = builder.icmp_unsigned("!=", builder.and_(index, constant(_WORDS, bit)), constant(_WORDS, 0))
        else:
            is_set = masks[bit.bit_length() - 9]
        found = [builder.select(is_set, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def _signs(builder, field, address, nbytes, places):
    """Bytes that have in a bit the sign of their code, for each run of eight weights of a block: bit
    ``places[run]``."""
    width = 4 // field.per * field.stride
    base = min(field.at, nbytes - 8 * width)
    words = read(builder, _moved(builder, address, base), ir.VectorType(ir.IntType(8 * width), 8))
    at = {7 - bit: field.place(run) for run, bit in places.items()}
    if field.bits == 8:
        found = builder.bitcast(words, ir.VectorType(I8, 8 * width))
        lanes = [block * width + at.get(i, (base, 0))[0] - base for block in range(8) for i in range(8)]
        return _columns(builder, shuffle(builder, found, found, lanes), 8)
    words = builder.zext(words, _QWORDS) if width < 8 else words
    begins = [8 * (byte - base) + bit for byte, bit in (at.get(i, (base, 0)) for i in range(8))]
    return _columns(builder, shifted(builder, words, begins * 8), 7)
