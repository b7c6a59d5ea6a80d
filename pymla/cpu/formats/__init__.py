"""What a ggml type is to a kernel: how to unpack rows for a panel, how to read and write numbers.

A type is a few functions and a row of `FORMATS`; its product of rows is in `rows`. Kernels are made for a type by a
factory that takes its functions from there, so that a program compiles those of the types that its file has.

Weights of a block are ``w = d * code + m`` with codes of at most 8 bits. Activations are ``x = scale * a``. So
``w · x = Σ_blocks scale * (d * Σ code * a + m * Σ a)``.

All addresses are int64; the functions run inside kernels.
"""

import functools
from typing import NamedTuple

import numpy as np

from pymla import ggml
from pymla.cpu.machine.isa import AMX, LANES
from pymla.cpu.machine.simd import (
    absolute,
    add,
    bit_or,
    bits_2,
    bytes_to_f32,
    farther,
    farthest,
    fma,
    high_nibbles,
    load_bf16,
    load_bf16x8,
    load_bf16x32,
    load_eights,
    load_f16,
    load_f16x8,
    load_f16x32,
    load_f32,
    load_f32x8,
    load_f32x32,
    load_i8_as_f32,
    load_i8x32,
    load_nibbles_f32,
    low_nibbles,
    mul,
    round_away,
    round_even,
    splat_f32,
    splat_f32x32,
    splat_sixteens,
    store_as_i8,
    store_bf16,
    store_f16,
    store_f32,
    store_f32x8,
    store_f32x32,
    store_f32xL,
    store_i8xL,
    subtract_i8,
)
from pymla.cpu.machine.simd_bytes import store_sum16, sum_i8x32
from pymla.cpu.machine.simd_panels import (
    gather_f16,
    gather_i8,
    gather_second_f16,
    load_columns,
    panel_codes8,
    store_start4,
)
from pymla.cpu.runtime.compiling import helper, inlined

F32, F16, BF16 = ggml.F32, ggml.F16, ggml.BF16
Q4_0, Q4_1, Q8_0, Q6_K = ggml.Q4_0, ggml.Q4_1, ggml.Q8_0, ggml.Q6_K


@inlined
def _q6_k_codes(block, group):
    """Codes of the `group`-th 32 weights of a Q6_K block, from -32 to 31.

    A half of 128 weights has 64 bytes of low nibbles and 32 bytes that each hold the two high bits of four weights.
    """
    nibbles = load_i8x32(block + 64 * (group // 4) + 32 * (group % 2))
    nibbles = low_nibbles(nibbles) if group % 4 < 2 else high_nibbles(nibbles)
    return _code_6(nibbles, load_i8x32(block + 128 + 32 * (group // 4)), 2 * (group % 4))


@inlined
def _q6_k_scales(block, group):
    """Scales of the two sixteens of a group."""
    d = load_f16(block + 208)
    scales = block + 192 + 2 * group
    return d * load_i8_as_f32(scales), d * load_i8_as_f32(scales + 1)


@helper
def _unpack_q4_0(rows, first, count, codes, scales, minima):
    """Blocks of 32 weights of the rows of a panel, unpacked, as for each quantised type.

    Parameters
    ----------
    rows : tuple of int
        Their addresses, from `simd_panels.panel_rows`.
    first, count : int
        The first block, a multiple of 8, and the number of blocks.
    codes : int
        Address for 8 registers a block: four columns' codes of each row, from 0 to 15 or as `simd_panels.panel_codes8`
        wants them.
    scales : int
        Address for float32 of the rows: a scale for each block of a type of 4 bits, one for 16 weights of a type of 8
        bits.
    minima : int
        Address for a minimum for each block, likewise, written where the type has them.
    """
    _unpack_4_bits(18, rows, first, count, codes, scales, minima)


@helper
def _unpack_q4_1(rows, first, count, codes, scales, minima):
    _unpack_4_bits(20, rows, first, count, codes, scales, minima)


@helper
def _unpack_q8_0(rows, first, count, codes, scales, minima):
    for block in range(first, first + count):
        at = 34 * block
        _store_codes8(codes, load_columns(rows, at + 2))
        _store_codes8(codes + 16 * LANES, load_columns(rows, at + 18))
        d = gather_f16(rows, at)
        store_f32xL(scales, d)
        store_f32xL(scales + 4 * LANES, d)
        codes, scales = codes + 32 * LANES, scales + 8 * LANES


@helper
def _unpack_q6_k(rows, first, count, codes, scales, minima):
    for block in range(first // 8, (first + count) // 8):
        _unpack_q6_k_block(rows, 210 * block, codes, scales)
        codes, scales = codes + 256 * LANES, scales + 64 * LANES


@helper
def _unpack_4_bits(size, rows, first, count, codes, scales, minima):
    for block in range(first, first + count):
        at = size * block
        a, b, c, d = load_columns(rows, at + size - 16)
        _store_codes4(size, codes, low_nibbles(a), low_nibbles(b), low_nibbles(c), low_nibbles(d))
        _store_codes4(size, codes + 16 * LANES, high_nibbles(a), high_nibbles(b), high_nibbles(c), high_nibbles(d))
        store_f32xL(scales, gather_f16(rows, at))
        if size == 20:
            store_f32xL(minima, gather_second_f16(rows, at))
        codes, scales, minima = codes + 32 * LANES, scales + 4 * LANES, minima + 4 * LANES


@helper
def _unpack_q6_k_block(rows, at, codes, scales):
    d = gather_second_f16(rows, at + 206)
    for i in range(16):
        store_f32xL(scales + 4 * LANES * i, mul(d, gather_i8(rows, at + 192 + i)))
    # A half of 128 weights has four times 16 bytes with a nibble of two weights each, and twice 16 bytes with two bits
    # of four weights each.
    for half in range(2):
        for i in range(4):
            a, b, c, d = load_columns(rows, at + 64 * half + 16 * i)
            e, f, g, h = load_columns(rows, at + 128 + 32 * half + 16 * (i % 2))
            target, shift = codes + 16 * LANES * (8 * half + i), i // 2 * 2
            _store_codes8(
                target,
                (
                    _code_6(low_nibbles(a), e, shift),
                    _code_6(low_nibbles(b), f, shift),
                    _code_6(low_nibbles(c), g, shift),
                    _code_6(low_nibbles(d), h, shift),
                ),
            )
            _store_codes8(
                target + 64 * LANES,
                (
                    _code_6(high_nibbles(a), e, shift + 4),
                    _code_6(high_nibbles(b), f, shift + 4),
                    _code_6(high_nibbles(c), g, shift + 4),
                    _code_6(high_nibbles(d), h, shift + 4),
                ),
            )


@helper
def _code_6(nibbles, high, shift):
    """Codes from -32 to 31 of nibbles and the two bits of `high` at `shift`."""
    return subtract_i8(bit_or(nibbles, bits_2(high, shift)), 32)


@helper
def _store_codes4(size, out, a, b, c, d):
    """Tiles of AMX take Q4_0's codes with their sign; elsewhere the zero point is where sums begin."""
    if AMX and size == 18:
        a, b, c, d = subtract_i8(a, 8), subtract_i8(b, 8), subtract_i8(c, 8), subtract_i8(d, 8)
    store_columns(out, (a, b, c, d))


@helper
def _store_codes8(out, codes):
    a, b, c, d = codes
    store_columns(out, (panel_codes8(a), panel_codes8(b), panel_codes8(c), panel_codes8(d)))


@helper
def store_columns(out, columns):
    """What `simd_panels.load_columns` gave to a panel: an address, and four registers."""
    a, b, c, d = columns
    store_i8xL(out, a)
    store_i8xL(out + 4 * LANES, b)
    store_i8xL(out + 8 * LANES, c)
    store_i8xL(out + 12 * LANES, d)


@inlined
def _add_f32(row, block, weight, acc):
    """`acc` plus ``weight`` times thirty-two weights of a row, from ``32 * block`` on, as for each type."""
    return fma(load_f32x32(row + 128 * block), splat_f32x32(weight), acc)


@inlined
def _add_f16(row, block, weight, acc):
    return fma(load_f16x32(row + 64 * block), splat_f32x32(weight), acc)


@inlined
def _add_bf16(row, block, weight, acc):
    return fma(load_bf16x32(row + 64 * block), splat_f32x32(weight), acc)


@inlined
def _add_q4_0(row, block, weight, acc):
    at = row + 18 * block
    return fma(load_nibbles_f32(at + 2, 8), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _add_q4_1(row, block, weight, acc):
    at = row + 20 * block
    acc = add(acc, splat_f32x32(weight * load_f16(at + 2)))
    return fma(load_nibbles_f32(at + 4, 0), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _add_q8_0(row, block, weight, acc):
    at = row + 34 * block
    return fma(bytes_to_f32(load_i8x32(at + 2)), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _add_q6_k(row, block, weight, acc):
    at, group = row + block // 8 * 210, block % 8
    low, high = _q6_k_scales(at, group)
    return fma(bytes_to_f32(_q6_k_codes(at, group)), splat_sixteens(weight * low, weight * high), acc)


class Format(NamedTuple):
    """What a type is to kernels. None stands for what it does not have."""

    bits: int  # of codes in a panel: 4 or 8; 0 for float types, whose products are taken in float32
    add_block: object  # (row, block, weight, acc)
    bytes_256: int  # bytes of 256 weights
    unpack: object = None  # (rows, first, count, codes, scales, minima)
    minimum: bool = False  # whether blocks have a minimum beside their scale
    load_one: object = None  # of float types: a number at an address
    load_eight: object = None
    store_one: object = None

    @property
    def size(self):
        """Bytes of a number of a float type."""
        return self.bytes_256 // 256


FORMATS = {
    F32: Format(0, _add_f32, 1024, load_one=load_f32, load_eight=load_f32x8, store_one=store_f32),
    F16: Format(0, _add_f16, 512, load_one=load_f16, load_eight=load_f16x8, store_one=store_f16),
    BF16: Format(0, _add_bf16, 512, load_one=load_bf16, load_eight=load_bf16x8, store_one=store_bf16),
    Q4_0: Format(4, _add_q4_0, 144, _unpack_q4_0),
    Q4_1: Format(4, _add_q4_1, 160, _unpack_q4_1, minimum=True),
    Q8_0: Format(8, _add_q8_0, 272, _unpack_q8_0),
    Q6_K: Format(8, _add_q6_k, 210, _unpack_q6_k),
}


@functools.cache
def dequantise_row_for(qtype):
    """A function ``(row, out, columns)``: a row of weights or of the cache as float32; addresses, and a number."""
    add_block, load_one, load_eight, size = (getattr(FORMATS[qtype], name) for name in _READING)
    if load_one is None:

        @helper
        def dequantise_row(row, out, columns):
            for block in range(columns // 32):
                store_f32x32(out + 128 * block, add_block(row, block, np.float32(1), splat_f32x32(np.float32(0))))

    else:

        @helper
        def dequantise_row(row, out, columns):
            whole = columns // 8 * 8
            for i in range(0, whole, 8):
                store_f32x8(out + 4 * i, load_eight(row + size * i))
            for i in range(whole, columns):
                store_f32(out + 4 * i, load_one(row + size * i))

    return dequantise_row


_READING = "add_block", "load_one", "load_eight", "size"


@functools.cache
def write_row_for(qtype):
    """A function ``(x, row, columns)``: float32 values at the address `x` as a row of a cache type, F32, F16, BF16 or
    Q8_0. The bytes of ``reference.quant.quantise``."""
    store_one, size = FORMATS[qtype].store_one, FORMATS[qtype].size
    if store_one is None:

        @helper
        def write_row(x, row, columns):
            for block in range(columns // 32):
                write_q8(x + 128 * block, row + 34 * block, row + 34 * block + 2, 0)

    else:

        @helper
        def write_row(x, row, columns):
            for i in range(columns):
                store_one(row + size * i, load_f32(x + 4 * i))

    return write_row


@helper
def write_q8(x, scale, codes, zero):
    """Thirty-two float32 as a scale, an IEEE half, and codes of 8 bits that are `zero` more than ggml's Q8_0 has. All
    but `zero` are addresses."""
    d = magnitude(x) / np.float32(127)
    inverse = np.float32(0)
    if d > 0:
        inverse = np.float32(1) / d
    store_f16(scale, d)
    factor, zero = splat_f32(inverse), splat_f32(np.float32(zero))
    for i in range(4):
        store_as_i8(codes + 8 * i, add(round_away(mul(load_f32x8(x + 32 * i), factor)), zero))


@helper
def magnitude(x):
    """The largest absolute value of thirty-two float32 at an address. A scale from it keeps an infinite value or NaN in
    sight, where codes would turn it into a number."""
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    return farthest(farther(farther(absolute(a), absolute(b)), farther(absolute(c), absolute(d))))


@helper
def quantise_block(x, codes, step, apart, scale, sums, starts, sum16):
    """Thirty-two activations, float32 at `x`, to the parts of `quant.Input`; the largest becomes code 127 or -127.

    Codes are stored eight at a time: at the address `codes`, `step` bytes behind it, and the others likewise, `apart`
    bytes behind these. All others are addresses.
    """
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    most, inverse = magnitude(x), np.float32(0)
    if most > 0:
        inverse = np.float32(127) / most
    factor = splat_f32(inverse)
    others = codes + apart
    store_as_i8(codes, round_even(mul(a, factor)))
    store_as_i8(codes + step, round_even(mul(b, factor)))
    store_as_i8(others, round_even(mul(c, factor)))
    store_as_i8(others + step, round_even(mul(d, factor)))
    stored = load_eights(codes, codes + step, others, others + step)
    one = most / np.float32(127)
    store_f32(scale, one)
    store_start4(starts, stored)
    store_sum16(sum16, stored)
    store_f32(sums, one * np.float32(sum_i8x32(stored)))
