"""Codes that come in vectors (`pymla.vectors`) from a codebook that registers hold: processors with VBMI and GFNI.

The bytes of entries are looked up one by one: `vpermi2b` takes one of 128 by the low seven bits of an index, for 64
vectors at once. These are all vectors of 256 weights where vectors have four codes. Where they have eight, two rows
fill a register, and two such registers share what is loaded of the table.

Words of 64 bits then have the bits of the codes of a block of 32 weights, and other words its signs; of these a
register of eight codes of each block is made (the order `EIGHTS`), and `vpermb` makes a code of its bits and its sign.
Bits of a code, and signs, come into the code's byte by a product of matrices of bits (`vgf2p8affineqb`): the words are
the matrices, of which it takes a column for each byte, and for the last of eight signs of which seven are stored the
sum of seven columns. Codes of vectors of four are moved by `vpmultishiftqb`.
"""

import hashlib

import numpy as np
from llvmlite import ir

from pymla.codebooks import codebook
from pymla.cpu.machine.intrinsics import I1, I8, I16, I32, I64, constant, declare, in_order, read, shuffle
from pymla.cpu.machine.simd_bits import address_at
from pymla.cpu.runtime import target
from pymla.cpu.runtime.isa import LANES, PYTHON

_BYTES, _DWORDS, _QWORDS = (ir.VectorType(element, 512 // element.width) for element in (I8, I32, I64))

#: Whether the processor that is compiled for has the instructions.
HAS_VBMI = LANES == 16 and not PYTHON and {"avx512vbmi", "gfni"} <= target.features()

#: Where the numbers for `look_up_64` have their bits, of vectors of eight: of the codes and of the sign, for runs 2 and
#: 3 of eight weights of a block; those of the runs 0 and 1 stand two bits higher.
_CODE_BITS, _SIGN_BITS = {2: (1, 5), 3: (0, 4)}, {0: 5, 1: 4, 2: 3, 3: 2}
_CODE_MASK, _TWO_RUNS = 0x33, 2


def emit_columns(builder, vectors, offset, address, nbytes, r):
    """The codes of the r-th 64 columns, `offset` more than they are."""
    if codebook(vectors.name).shape[1] == 8:
        found = emit_found(builder, vectors, [[address, address]])
        parts = [emit_eights(builder, vectors, offset, *found, 0, address, nbytes, run) for run in range(4)]
    else:
        parts = [emit_fours(builder, vectors, offset, address, nbytes, run) for run in range(4)]
    parts = [builder.bitcast(part, _QWORDS) for part in parts]
    lanes = [2 * r, 2 * r + 8, 2 * r, 2 * r + 8, 2 * r + 1, 2 * r + 9, 2 * r + 1, 2 * r + 9]
    low, high = (shuffle(builder, parts[i], parts[i + 1], lanes) for i in (0, 2))
    return builder.bitcast(shuffle(builder, low, high, [0, 1, 10, 11, 4, 5, 14, 15]), _BYTES)


def emit_found(builder, vectors, pairs):
    """What `emit_eights` takes of vectors of eight, for each pair of rows, whose addresses are given: a register with
    the higher bits of the codes of the 32 vectors of both, a byte for each vector, and a register with the lower
    bits."""
    table = codebook(vectors.name)
    numbers = np.searchsorted(_levels_of(table), table)
    planes = [np.packbits(numbers >> bit & 1, axis=1, bitorder="little")[:, 0] for bit in (1, 0)]
    indices = [_indices(builder, vectors.indices, pair) for pair in pairs]
    base = _table(builder, pairs[0][0], np.concatenate(planes))
    found = [_looked_up(builder, base, len(table), i * len(table), indices) for i in range(2)]
    return [register for pair in zip(*found, strict=True) for register in pair]


def emit_eights(builder, vectors, offset, high, low, which, address, nbytes, run):
    """The codes, `offset` more than they are, of a run of eight weights of each block, of vectors of eight. `high` and
    `low` are of `emit_found`, `which` is which of the two rows is meant, and `address` that of its block."""
    # A word of 64 bits for a block: the higher bits of its four vectors, and the lower ones.
    lanes = [lane for block in range(8 * which, 8 * which + 8) for lane in (block, 16 + block)]
    codes = _columns(builder, shuffle(builder, *(builder.bitcast(each, _DWORDS) for each in (high, low)), lanes))
    signs = _signs(builder, vectors.down or vectors.signs, address, nbytes, _SIGN_BITS)
    if run >= 2:
        both = _merged(builder, codes, signs, _CODE_MASK)
    else:
        both = _shifted_right(builder, _merged(builder, codes, signs, _CODE_MASK << _TWO_RUNS), _TWO_RUNS)
    levels, bits, sign = _levels_of(codebook(vectors.name)), _CODE_BITS[run | 2], _SIGN_BITS[run | 2]
    return look_up_64(builder, both, _levels(levels, offset, bits, sign, bool(vectors.down)))


def _levels_of(table):
    return sorted(set(table.reshape(-1).tolist()))


def emit_fours(builder, vectors, offset, address, nbytes, run):
    """The same of vectors of four. A byte of an entry has two bits of each code, another byte the third ones."""
    table = codebook(vectors.name)
    levels = _levels_of(table)
    numbers = np.searchsorted(levels, table)
    low, high = _looked_up_fours(builder, vectors.indices, address, numbers)
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
    index = read(builder, address_at(builder, address, fields[0].at), _BYTES)
    masks = [builder.icmp_signed("<", index, constant(_BYTES, 0))]
    if len(fields) == 2:
        masks.append(
            builder.bitcast(read(builder, address_at(builder, address, fields[1].at), I64), ir.VectorType(I1, 64))
        )
    bytes_of = (numbers & 3) << 2 * np.arange(4), numbers >> 2 << np.arange(4)
    planes = [entries.sum(axis=1).astype(np.uint8) for entries in bytes_of]
    base = _table(builder, address, np.concatenate(planes))
    return [_looked_up(builder, base, len(numbers), i * len(numbers), [(index, masks)])[0] for i in range(2)]


def _levels(levels, offset, bits, sign, is_moved=False):
    """The table for `look_up_64` of bytes that have some bits of the number of a level, the lowest first, and a sign.
    With `is_moved` codes are eight times the level and 1, or less 1 in place of a negative sign."""
    numbers = np.arange(64)
    level = sum((numbers >> bit & 1) << i for i, bit in enumerate(bits))
    codes, is_set = np.array([*levels, 0])[np.minimum(level, len(levels))], numbers >> sign & 1
    return (8 * codes + 1 - 2 * is_set if is_moved else np.where(is_set, -codes, codes)) + offset


def _columns(builder, words, columns=range(8)):
    """Transposed matrices of bits: byte i of a word of 64 bits has column ``columns[i]`` of bits of its bytes, of the
    first byte in its highest bit. Column 8 is the sum of the first seven ones, modulo 2."""
    masks = [127 if column == 8 else 1 << column for column in columns]
    return times_matrices(builder, ir.Constant(_BYTES, masks * 8), words)


def times_matrices(builder, codes, matrices):
    """Products of bytes, as vectors of bits, and of matrices of bits, one for eight bytes: bit i of a product is the
    sum, modulo 2, of the bits that the byte has in common with byte ``7 - i`` of the matrix."""
    if not isinstance(matrices, ir.Value):
        matrices = ir.Constant(_QWORDS, matrices)
    product = declare(builder, "llvm.x86.vgf2p8affineqb.512", _BYTES, [_BYTES, _BYTES, I8])
    return builder.call(product, [codes, builder.bitcast(matrices, _BYTES), ir.Constant(I8, 0)])


def shuffle_two(builder, a, b, lanes):
    """`shuffle` of bytes of two registers in one instruction, where LLVM might take several."""
    pick = declare(builder, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [_BYTES] * 3)
    return builder.call(pick, [a, ir.Constant(_BYTES, list(lanes)), b])


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


def _indices(builder, fields, addresses):
    """The low bytes of the indices of the 32 vectors of two rows, and masks of their bits from the eighth on."""
    low, *others = fields
    index = _bytes_of_two(builder, addresses, [low.place(number)[0] for number in range(32)])
    masks = [builder.icmp_signed("<", index, constant(_BYTES, 0))]
    for bit in range(8, low.bits):
        words = ir.VectorType(I16, 32)
        rows = [read(builder, address_at(builder, address, low.at), words) for address in addresses]
        rows = [builder.and_(row, constant(words, 1 << bit)) for row in rows]
        is_set = [builder.icmp_unsigned("!=", row, constant(words, 0)) for row in rows]
        masks.append(shuffle(builder, *is_set, range(64)))
    for field in others:
        for bit in range(field.bits):
            places = [field.place(number) for number in range(32)]
            places = [(byte, place + bit) for byte, place in places]
            masks.append(_bits_of_two(builder, addresses, [(at + place // 8, place % 8) for at, place in places]))
    return index, masks


def _bytes_of_two(builder, addresses, at):
    """32 bytes of blocks of two rows."""
    first = at[0]
    size = 32 if at[-1] - first < 32 else 64
    rows = [read(builder, address_at(builder, address, first), ir.VectorType(I8, size)) for address in addresses]
    return shuffle(builder, *rows, [size * row + byte - first for row in range(2) for byte in at])


def _bits_of_two(builder, addresses, places):
    """32 bits of blocks of two rows, as a mask (`pext`)."""
    pick = declare(builder, "llvm.x86.bmi.pext.64", I64, [I64, I64])
    bits, count = None, 0
    for address in addresses:
        for first in sorted({places[0][0] + (byte - places[0][0]) // 8 * 8 for byte, _ in places}):
            mask = sum(1 << 8 * (byte - first) + bit for byte, bit in places if first <= byte < first + 8)
            word = read(builder, address_at(builder, address, first), I64)
            picked = builder.shl(builder.call(pick, [word, ir.Constant(I64, mask)]), ir.Constant(I64, count))
            bits, count = builder.or_(bits, picked) if bits else picked, count + mask.bit_count()
    return builder.bitcast(bits, ir.VectorType(I1, 64))


def _looked_up(builder, base, count, first, indices):
    """Of `count` entries of a table of bytes, from its byte `first` on, those of each of several indices: by their low
    seven bits, and by masks of the bits above these."""
    if count == 128:
        parts = [read(builder, address_at(builder, base, at), _BYTES) for at in (first, first + 64)]
        pick = declare(builder, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [_BYTES] * 3)
        found = [builder.call(pick, [parts[0], index, parts[1]]) for index, _ in indices]
        # What is loaded serves all indices at once: LLVM would do one after the other, and keep it on the stack.
        return found if len(found) == 1 else [in_order(builder, each) for each in found]
    half = count // 2
    lows, highs = (_looked_up(builder, base, half, at, indices) for at in (first, first + half))
    masks = [masks[half.bit_length() - 8] for _, masks in indices]
    return [builder.select(*each) for each in zip(masks, highs, lows, strict=True)]


def _table(builder, address, entries):
    """The address of a table in the kernel's constants. LLVM does not know that it is the same whatever the address of
    the weights is, which is never negative: it would otherwise load the table before the loop, and keep it on the
    stack."""
    kept = builder.ptrtoint(constant_array(builder, I8, entries), I64)
    is_negative = builder.icmp_signed("<", address, ir.Constant(I64, 0))
    return builder.select(is_negative, ir.Constant(I64, 0), kept)


def constant_array(builder, element, numbers):
    """A pointer to unsigned integers, a NumPy array, that stand in the kernel's constants, once."""
    module, name = builder.module, f"table.{hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}"
    if name in module.globals:
        return module.globals[name]
    value = ir.Constant(ir.ArrayType(element, len(numbers)), numbers.tolist())
    array = ir.GlobalVariable(module, value.type, name)
    array.linkage, array.global_constant, array.unnamed_addr, array.initializer = "internal", True, True, value
    array.align = 64
    return array


def _signs(builder, field, address, nbytes, places):
    """Bytes that have in a bit the sign of their code, for each run of eight weights of a block: bit ``places[run]``;
    of signs that eight codes share in each of the bytes."""
    width = 4 // field.per * field.stride
    base = min(field.at, nbytes - 8 * width)
    words = read(builder, address_at(builder, address, base), ir.VectorType(ir.IntType(8 * width), 8))
    at = {7 - bit: field.place(run) for run, bit in places.items()}
    if field.bits == 8:
        found = builder.bitcast(words, ir.VectorType(I8, 8 * width))
        lanes = [block * width + at.get(i, (base, 0))[0] - base for block in range(8) for i in range(8)]
        return _columns(builder, shuffle(builder, found, found, lanes))
    words = builder.zext(words, _QWORDS) if width < 8 else words
    begins = [8 * (byte - base) + bit for byte, bit in (at.get(i, (base, 0)) for i in range(8))]
    columns = [*range(7), 8] if field.bits == 7 else [0] * 8
    return _columns(builder, shifted(builder, words, begins * 8), columns)
