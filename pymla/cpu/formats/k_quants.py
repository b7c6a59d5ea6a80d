"""K-quants for kernels: super-blocks of 256 weights with a scale, and smaller blocks with integer scales of their own.

The layouts are those of `pymla.reference.formats.k_quants`.
"""

from pymla import ggml
from pymla.cpu.formats.format import Format
from pymla.cpu.formats.panels import store_columns8
from pymla.cpu.machine.simd import (
    bit_or,
    bits_2,
    bytes_to_f32,
    fma,
    high_nibbles,
    load_f16,
    load_i8_as_f32,
    load_i8x32,
    low_nibbles,
    mul,
    splat_sixteens,
    store_f32xL,
    subtract_i8,
)
from pymla.cpu.machine.simd_panels import gather_i8, gather_second_f16, load_columns
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES

if LANES == 16:
    from pymla.cpu.formats import k_quants_512 as wide
else:
    from pymla.cpu.formats import k_quants_256 as wide

Q6_K_BYTES = ggml.BLOCK_BYTES[ggml.Q6_K]

# Kernels see globals of a module as constants, but not attributes of another module.
_dot_q6_k_of_fours = wide.dot_q6_k


@inlined
def _add_q6_k(row, block, weight, acc):
    at, group = row + block // 8 * Q6_K_BYTES, block % 8
    low, high = _q6_k_scales(at, group)
    return fma(bytes_to_f32(_q6_k_codes(at, group)), splat_sixteens(weight * low, weight * high), acc)


@inlined
def _q6_k_codes(block, group):
    """Codes of the `group`-th 32 weights of a block, from -32 to 31.

    A half of 128 weights has 64 bytes of low nibbles and 32 bytes that each hold the two high bits of four weights.
    """
    nibbles = load_i8x32(block + 64 * (group // 4) + 32 * (group % 2))
    nibbles = low_nibbles(nibbles) if group % 4 < 2 else high_nibbles(nibbles)
    return _code_6(nibbles, load_i8x32(block + 128 + 32 * (group // 4)), 2 * (group % 4))


@inlined
def _q6_k_scales(block, group):
    """Scales of the two sixteens of a group of 32 weights."""
    d = load_f16(block + 208)
    scales = block + 192 + 2 * group
    return d * load_i8_as_f32(scales), d * load_i8_as_f32(scales + 1)


@helper
def _code_6(nibbles, high, shift):
    """Codes from -32 to 31 of nibbles and the two bits of `high` at `shift`."""
    return subtract_i8(bit_or(nibbles, bits_2(high, shift)), 32)


@helper
def unpack_q6_k(rows, first, count, codes, scales, minima, scratch):
    """`legacy.unpack_q4_0` for Q6_K."""
    for block in range(first // 8, (first + count) // 8):
        _unpack_q6_k_block(rows, Q6_K_BYTES * block, codes, scales)
        codes, scales = codes + 256 * LANES, scales + 64 * LANES


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
            store_columns8(
                target,
                (
                    _code_6(low_nibbles(a), e, shift),
                    _code_6(low_nibbles(b), f, shift),
                    _code_6(low_nibbles(c), g, shift),
                    _code_6(low_nibbles(d), h, shift),
                ),
            )
            store_columns8(
                target + 64 * LANES,
                (
                    _code_6(high_nibbles(a), e, shift + 4),
                    _code_6(high_nibbles(b), f, shift + 4),
                    _code_6(high_nibbles(c), g, shift + 4),
                    _code_6(high_nibbles(d), h, shift + 4),
                ),
            )


@inlined
def dot_q6_k(rows, activations, columns):
    """`legacy.dot_q4_0` for Q6_K."""
    _, codes, scale, _, _, sum16 = activations
    return _dot_q6_k_of_fours(rows, codes, scale, sum16, columns)


Q6_K = Format(
    _add_q6_k,
    dot_four=dot_q6_k,
    dot_tokens=wide.dot_q6_k_of_tokens,
    unpack=unpack_q6_k,
    code_bits=8,
    scale_each=16,
    bytes_256=Q6_K_BYTES,
)
