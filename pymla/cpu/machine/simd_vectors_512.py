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
    make = _emit_eights if codebook(vectors.name).shape[1] == 8 else _emit_fours
    runs = [eight % 4 for eight in eights]
    if len(set(runs)) == 1:
        return make(builder, vectors, offset, address, nbytes, runs[0])
    parts = [builder.bitcast(make(builder, vectors, offset, address, nbytes, run), _QWORDS) for run in range(4)]
    block = eights[0] // 4
    lanes = [block, block + 8, block, block + 8, block + 1, block + 9, block + 1, block + 9]
    low, high = (shuffle(builder, parts[i], parts[i + 1], lanes) for i in (0, 2))
    return builder.bitcast(shuffle(builder, low, high, [0, 1, 10, 11, 4, 5, 14, 15]), _BYTES)


def _emit_eights(builder, vectors, offset, address, nbytes, run):
    """The codes of a run of eight weights of each block, of vectors of eight: fields of 2 bits. The bits of a code stand
    in a byte of an entry each."""
    table = codebook(vectors.name)
    levels = sorted(set(table.reshape(-1).tolist()))
    numbers = np.searchsorted(levels, table)
    entries = [np.packbits(numbers >> bit & 1, axis=1, bitorder="little")[:, 0].astype(int) for bit in (1, 0)]
    words = _looked_up(builder, address, entries[0] | entries[1] << 8, *_indices(builder, vectors.index, address))
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


def _emit_fours(builder, vectors, offset, address, nbytes, run):
    """The same of vectors of four. A byte of an entry has two bits of each code, another byte the third ones."""
    table = codebook(vectors.name)
    levels = sorted(set(table.reshape(-1).tolist()))
    numbers = np.searchsorted(levels, table)
    low, high = _looked_up_fours(builder, vectors.index, address, numbers)
    # Where the bits of a code and its sign stand, so that no two runs need the same bit for their signs.
    place, sign = ((0, 3), (0, 4), (0, 5), (3, 0))[run]
    first = [8 * (2 * run + i // 4) for i in range(8)]
    low = shifted(builder, low, [at + 2 * (i % 4) - place for i, at in enumerate(first)] * 8)
    high = shifted(builder, high, [at + i % 4 - place - 2 for i, at in enumerate(first)] * 8)
    codes = _merged(builder, low, high, 3 << place)
    signs = _signs(builder, vectors.signs, address, nbytes, {0: 3, 1: 4, 2: 5, 3: 0})
    both = _merged(builder, codes, signs, 7 << place)
    return look_up_64(builder, both, _levels(levels, offset, range(place, place + 3), sign))


def _looked_up_fours(builder, fields, address, numbers):
    """The bytes of the entries of 64 vectors of four: two bits of each of their `numbers`, and the third ones."""
    index = read(builder, _moved(builder, address, fields[0].at), _BYTES)
    masks = [builder.icmp_signed("<", index, constant(_BYTES, 0))]
    if len(fields) == 2:
        masks.append(builder.bitcast(read(builder, _moved(builder, address, fields[1].at), I64), ir.VectorType(I1, 64)))
    bytes_of = (numbers & 3) << 2 * np.arange(4), numbers >> 2 << np.arange(4)
    return [_looked_up(builder, address, entries.sum(axis=1), index, masks) for entries in bytes_of]


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


def _indices(builder, fields, address):
    """The indices of 32 vectors of eight in words, of which higher bits may be wrong, and masks of their bits from the
    seventh on."""
    low = fields[0]
    at = [low.place(number)[0] - low.at for number in range(32)]
    if low.bits > 8:
        index = read(builder, _moved(builder, address, low.at), _WORDS)
    elif at == list(range(32)):
        index = builder.zext(read(builder, _moved(builder, address, low.at), ir.VectorType(I8, 32)), _WORDS)
    else:
        found = read(builder, _moved(builder, address, low.at), _BYTES)
        lanes = [lane for byte in at for lane in (byte, 64)]
        index = builder.bitcast(shuffle(builder, found, constant(_BYTES, 0), lanes), _WORDS)
    masks = []
    for bit in range(6, low.bits):
        tested = builder.and_(index, constant(_WORDS, 1 << bit))
        masks.append(builder.icmp_unsigned("!=", tested, constant(_WORDS, 0)))
    for high in fields[1:]:
        bits = read(builder, _moved(builder, address, high.at), I64)
        for bit in range(high.bits):
            places = [high.place(number) for number in range(32)]
            mask = sum(1 << 8 * (byte - high.at) + first + bit for byte, first in places)
            pick = declare(builder, "llvm.x86.bmi.pext.64", I64, [I64, I64])
            picked = builder.trunc(builder.call(pick, [bits, ir.Constant(I64, mask)]), I32)
            masks.append(builder.bitcast(picked, ir.VectorType(I1, 32)))
    return index, masks


def _looked_up(builder, address, entries, index, masks):
    """Entries of a table, words or bytes, by indices: by as many low bits as two registers of entries take, and by masks
    of the bits above these.

    Every second register of entries is in memory, at an address that LLVM does not know to be the same for all rows: it
    would otherwise take the loads out of the loop, and keep all of the table on the stack.
    """
    kind = index.type
    name = f"llvm.x86.avx512.vpermi2var.{'hi' if kind == _WORDS else 'qi'}.512"
    pick = declare(builder, name, kind, [kind] * 3)
    parts = [entries[i : i + kind.count].tolist() for i in range(0, len(entries), kind.count)]
    kept = constant_array(builder, kind.element, sum(parts[1::2], []))
    base = builder.add(builder.ptrtoint(kept, I64), builder.lshr(address, ir.Constant(I64, 63)))
    found = []
    for i, part in enumerate(parts[::2]):
        other = read(builder, _moved(builder, base, 64 * i), kind)
        found.append(builder.call(pick, [ir.Constant(kind, part), index, other]))
    for is_set in masks:
        found = [builder.select(is_set, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return builder.bitcast(found[0], _QWORDS)


def constant_array(builder, element, numbers):
    """A pointer to integers that stand in the kernel's constants."""
    value = ir.Constant(ir.ArrayType(element, len(numbers)), numbers)
    module = builder.module
    array = ir.GlobalVariable(module, value.type, module.get_unique_name("codebook"))
    array.linkage, array.global_constant, array.unnamed_addr, array.initializer = "internal", True, True, value
    array.align = 64
    return array


def _signs(builder, field, address, nbytes, places):
    """Bytes that have in a bit the sign of their code, for each run of eight weights of a block: bit ``places[run]``."""
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
