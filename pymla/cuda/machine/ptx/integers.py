"""Integers: dot products of bytes, and moving bytes and bits."""

import operator

from llvmlite import ir

from pymla.cuda.machine.ptx.instruction import I32, I64, LLVM, instruction, signed_bytes, unsigned_bytes, word_of


def _dot(a, b, c):
    return word_of(int(c) + sum(map(operator.mul, a, b)))


@instruction(I32, I32, I32, I32, asm="dp4a.s32.s32 $0, $1, $2, $3;")
def dp4a(a, b, c):
    """``c + Σ a[i] * b[i]`` over four signed bytes."""
    return _dot(signed_bytes(a), signed_bytes(b), c)


@instruction(I32, I32, I32, I32, asm="dp4a.u32.s32 $0, $1, $2, $3;")
def dp4a_us(a, b, c):
    """``c + Σ a[i] * b[i]``, the bytes of `a` unsigned, those of `b` signed."""
    return _dot(unsigned_bytes(a), signed_bytes(b), c)


@instruction(I32, I32, I32, I32, asm="prmt.b32 $0, $1, $2, $3;")
def prmt(a, b, selector):
    """Four of the eight bytes of `a` (0 to 3) and `b` (4 to 7): byte i is number ``selector >> 4 * i & 7``; with bit 3
    set, its sign bit eight times."""
    source, result = unsigned_bytes(a) + unsigned_bytes(b), 0
    for i in range(4):
        nibble = int(selector) >> 4 * i
        byte = source[nibble & 7]
        result |= (byte if not nibble & 8 else 0xFF * (byte >> 7)) << 8 * i
    return word_of(result)


@instruction(I64, I64, asm="mov.b64 $0, $1;")
def kept(address):
    """The same. The compiler cannot see through it, so that it keeps the address, where it would compute it, or parts
    of it, again at every use."""
    return address


@instruction(I32, I32, I32, I32, asm="shf.r.wrap.b32 $0, $1, $2, $3;")
def funnel_shift_r(low, high, shift):
    """32 bits of the 64 in ``high:low``, from bit ``shift & 31`` on."""
    return word_of(((int(high) & 0xFFFFFFFF) << 32 | int(low) & 0xFFFFFFFF) >> (int(shift) & 31))


def _unsigned_minimum(builder, values):
    last = builder.sub(values[1], ir.Constant(LLVM[I32], 1))
    return builder.select(builder.icmp_unsigned("<", values[0], last), values[0], last)


@instruction(I32, I32, I32, emit=_unsigned_minimum)
def valid_index(index, count):
    """An index of an array of `count` elements, at least one: `index` where it is from 0 to below `count`, and the last
    index otherwise. One instruction (``min.u32``): a negative number is a large one without its sign."""
    return min(int(index) & 0xFFFFFFFF, int(count) - 1)
