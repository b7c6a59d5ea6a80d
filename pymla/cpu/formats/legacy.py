"""ggml's first quantised types for kernels: blocks of 32 weights with a scale, and some with a minimum.

The layouts are those of `pymla.reference.formats.legacy`.
"""

import numpy as np

from pymla import ggml
from pymla.cpu.formats.fifth_bits import add_fifth_bits_32, add_fifth_bits_of_rows, gather_words
from pymla.cpu.formats.format import Format
from pymla.cpu.formats.panels import SCALE_EACH, ZERO_POINT, store_columns, store_columns8, store_twice
from pymla.cpu.machine.orders import EIGHTS, FOURS
from pymla.cpu.machine.simd import (
    absolute,
    add,
    bytes_to_f32,
    farther,
    farthest,
    fma,
    high_nibbles,
    load_f16,
    load_f32,
    load_f32x8,
    load_i8x32,
    load_i32,
    load_nibbles,
    load_nibbles_f32,
    low_nibbles,
    mul,
    round_away,
    splat_f32,
    splat_f32x32,
    store_as_i8,
    store_f16,
    store_f32xL,
    subtract_i8,
    total,
)
from pymla.cpu.machine.simd_bytes import dot_i8, dot_u7, to_f32, zero_i32x8
from pymla.cpu.machine.simd_panels import gather_f16, gather_second_f16, load_columns
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import AMX, LANES

if LANES == 16:
    from pymla.cpu.formats import legacy_512 as wide
else:
    from pymla.cpu.formats import legacy_256 as wide

Q4_0_BYTES, Q4_1_BYTES, Q8_0_BYTES = (ggml.BLOCK_BYTES[qtype] for qtype in (ggml.Q4_0, ggml.Q4_1, ggml.Q8_0))
Q5_0_BYTES, Q5_1_BYTES = ggml.BLOCK_BYTES[ggml.Q5_0], ggml.BLOCK_BYTES[ggml.Q5_1]

# Kernels see globals of a module as constants, but not attributes of another module.
_dot_4_bits_of_fours, _dot_5_bits_of_fours, _dot_q8_0_of_fours = wide.dot_4_bits, wide.dot_5_bits, wide.dot_q8_0


@inlined
def _add_q4_0(row, block, weight, acc):
    at = row + Q4_0_BYTES * block
    return fma(load_nibbles_f32(at + 2, 8), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _add_q4_1(row, block, weight, acc):
    at = row + Q4_1_BYTES * block
    acc = add(acc, splat_f32x32(weight * load_f16(at + 2)))
    return fma(load_nibbles_f32(at + 4, 0), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _add_q5_0(row, block, weight, acc):
    at = row + Q5_0_BYTES * block
    codes = subtract_i8(_codes_5(at + 2), 16)
    return fma(bytes_to_f32(codes), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _add_q5_1(row, block, weight, acc):
    at = row + Q5_1_BYTES * block
    acc = add(acc, splat_f32x32(weight * load_f16(at + 2)))
    return fma(bytes_to_f32(_codes_5(at + 4)), splat_f32x32(weight * load_f16(at)), acc)


@inlined
def _codes_5(word):
    """Codes from 0 to 31 of a block, whose word of fifth bits and then nibbles begin at an address."""
    return add_fifth_bits_32(load_nibbles(word + 4), load_i32(word))


@inlined
def _add_q8_0(row, block, weight, acc):
    at = row + Q8_0_BYTES * block
    return fma(bytes_to_f32(load_i8x32(at + 2)), splat_f32x32(weight * load_f16(at)), acc)


# Panels


@helper
def unpack_q4_0(rows, first, count, codes, scales, minima, scratch):
    """Unpack blocks of 32 weights of each row of a panel, as `unpack` of each quantised type does.

    Parameters
    ----------
    rows : tuple of int
        Addresses of the rows, from `simd_panels.panel_rows`.
    first, count : int
        The first block, a multiple of 8, and the number of blocks.
    codes : int
        Address for 8 registers a block: four columns' codes of each row, from 0 on, or for 8 bits as
        `simd_panels.panel_codes8` makes them.
    scales : int
        Address for float32 of the rows: a scale for each block, or for codes of 8 bits a scale for 16 weights.
    minima : int
        Address for a minimum for each block, or for 16 weights, written where the type has minima.
    scratch : int
        Address of memory that types may use (`panels.DECODED_ROW` bytes a row).
    """
    _unpack_4_bits(Q4_0_BYTES, rows, first, count, codes, scales, minima)


@helper
def unpack_q4_1(rows, first, count, codes, scales, minima, scratch):
    """`unpack_q4_0` for Q4_1."""
    _unpack_4_bits(Q4_1_BYTES, rows, first, count, codes, scales, minima)


@helper
def _unpack_4_bits(size, rows, first, count, codes, scales, minima):
    for block in range(first, first + count):
        at = size * block
        a, b, c, d = load_columns(rows, at + size - 16)
        _store_columns4(size, codes, low_nibbles(a), low_nibbles(b), low_nibbles(c), low_nibbles(d))
        _store_columns4(size, codes + 16 * LANES, high_nibbles(a), high_nibbles(b), high_nibbles(c), high_nibbles(d))
        store_f32xL(scales, gather_f16(rows, at))
        if size == Q4_1_BYTES:
            store_f32xL(minima, gather_second_f16(rows, at))
        codes, scales, minima = codes + 32 * LANES, scales + 4 * LANES, minima + 4 * LANES


@helper
def _store_columns4(size, out, a, b, c, d):
    """Tiles of AMX take Q4_0's codes with their sign; elsewhere the zero point is in the sums that products begin
    with."""
    if AMX and size == Q4_0_BYTES:
        a, b, c, d = subtract_i8(a, 8), subtract_i8(b, 8), subtract_i8(c, 8), subtract_i8(d, 8)
    store_columns(out, (a, b, c, d))


@helper
def unpack_q5_0(rows, first, count, codes, scales, minima, scratch):
    """`unpack_q4_0` for Q5_0."""
    _unpack_5_bits(Q5_0_BYTES, rows, first, count, codes, scales, minima)


@helper
def unpack_q5_1(rows, first, count, codes, scales, minima, scratch):
    """`unpack_q4_0` for Q5_1."""
    _unpack_5_bits(Q5_1_BYTES, rows, first, count, codes, scales, minima)


@helper
def _unpack_5_bits(size, rows, first, count, codes, scales, minima):
    for block in range(first, first + count):
        at = size * block
        a, b, c, d = load_columns(rows, at + size - 16)
        word = gather_words(rows, at + size - 20)
        _store_columns5(size, codes, word, 0, low_nibbles(a), low_nibbles(b), low_nibbles(c), low_nibbles(d))
        out = codes + 16 * LANES
        _store_columns5(size, out, word, 16, high_nibbles(a), high_nibbles(b), high_nibbles(c), high_nibbles(d))
        store_f32xL(scales, gather_f16(rows, at))
        if size == Q5_1_BYTES:
            store_f32xL(minima, gather_second_f16(rows, at))
        codes, scales, minima = codes + 32 * LANES, scales + 4 * LANES, minima + 4 * LANES


@helper
def _store_columns5(size, out, word, first, a, b, c, d):
    """Sixteen columns, the first of which is the `first` of a block, with the fifth bits of their codes; tiles of AMX
    take Q5_0's codes with their sign."""
    a, b = add_fifth_bits_of_rows(a, word, first), add_fifth_bits_of_rows(b, word, first + 4)
    c, d = add_fifth_bits_of_rows(c, word, first + 8), add_fifth_bits_of_rows(d, word, first + 12)
    if AMX and size == Q5_0_BYTES:
        a, b, c, d = subtract_i8(a, 16), subtract_i8(b, 16), subtract_i8(c, 16), subtract_i8(d, 16)
    store_columns(out, (a, b, c, d))


@helper
def unpack_q8_0(rows, first, count, codes, scales, minima, scratch):
    """`unpack_q4_0` for Q8_0."""
    # Tiles of AMX take signed codes.
    store = store_columns if AMX else store_columns8
    for block in range(first, first + count):
        at = Q8_0_BYTES * block
        store(codes, load_columns(rows, at + 2))
        store(codes + 16 * LANES, load_columns(rows, at + 18))
        if SCALE_EACH == 32:
            store_f32xL(scales, gather_f16(rows, at))
        else:
            store_twice(scales, gather_f16(rows, at))
        codes, scales = codes + 32 * LANES, scales + 32 // SCALE_EACH * 4 * LANES


# Rows of weights times the activations of one token. The fours of blocks are in `legacy_512` or `legacy_256`.


@inlined
def dot_q4_0(rows, activations, columns):
    """Four rows times the activations of a token, as `dot_four` of each quantised type."""
    _, codes, scale, sums, starts, _ = activations
    return _dot_4_bits(Q4_0_BYTES, 2, rows, codes, scale, sums, starts, columns)


@inlined
def dot_q4_1(rows, activations, columns):
    """`dot_q4_0` for Q4_1."""
    _, codes, scale, sums, starts, _ = activations
    return _dot_4_bits(Q4_1_BYTES, 4, rows, codes, scale, sums, starts, columns)


@inlined
def _dot_4_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Rows of blocks of `size` bytes, of which `header` come before the codes."""
    a, b, c, d = _dot_4_bits_of_fours(size, header, rows, codes, scale, sums, starts, columns)
    if columns % 128:
        done = columns // 128 * 4
        at, codes, scale, sums = size * done, codes + 32 * done, scale + 4 * done, sums + 4 * done
        a += _rest_4_bits(size, header, rows[0] + at, codes, scale, sums, columns % 128 // 32)
        b += _rest_4_bits(size, header, rows[1] + at, codes, scale, sums, columns % 128 // 32)
        c += _rest_4_bits(size, header, rows[2] + at, codes, scale, sums, columns % 128 // 32)
        d += _rest_4_bits(size, header, rows[3] + at, codes, scale, sums, columns % 128 // 32)
    return a, b, c, d


@helper
def _rest_4_bits(size, header, row, codes, scale, sums, blocks):
    """The blocks behind the last four, in the order of the columns."""
    result = np.float32(0)
    for _ in range(blocks):
        d = load_f16(row)
        products = dot_u7(zero_i32x8(), load_nibbles(row + header), load_i8x32(codes))
        result += total(to_f32(products)) * (d * load_f32(scale))
        result += (np.float32(-8) * d if size == Q4_0_BYTES else load_f16(row + 2)) * load_f32(sums)
        row, codes, scale, sums = row + size, codes + 32, scale + 4, sums + 4
    return result


@inlined
def dot_q5_0(rows, activations, columns):
    """`dot_q4_0` for Q5_0."""
    _, codes, scale, sums, starts, _ = activations
    return _dot_5_bits(Q5_0_BYTES, 6, rows, codes, scale, sums, starts, columns)


@inlined
def dot_q5_1(rows, activations, columns):
    """`dot_q4_0` for Q5_1."""
    _, codes, scale, sums, starts, _ = activations
    return _dot_5_bits(Q5_1_BYTES, 8, rows, codes, scale, sums, starts, columns)


@inlined
def _dot_5_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Rows of blocks of `size` bytes, of which `header` come before the nibbles, with the word of fifth bits last."""
    a, b, c, d = _dot_5_bits_of_fours(size, header, rows, codes, scale, sums, starts, columns)
    if columns % 128:
        done = columns // 128 * 4
        at, codes, scale, sums = size * done, codes + 32 * done, scale + 4 * done, sums + 4 * done
        a += _rest_5_bits(size, header, rows[0] + at, codes, scale, sums, columns % 128 // 32)
        b += _rest_5_bits(size, header, rows[1] + at, codes, scale, sums, columns % 128 // 32)
        c += _rest_5_bits(size, header, rows[2] + at, codes, scale, sums, columns % 128 // 32)
        d += _rest_5_bits(size, header, rows[3] + at, codes, scale, sums, columns % 128 // 32)
    return a, b, c, d


@helper
def _rest_5_bits(size, header, row, codes, scale, sums, blocks):
    """`_rest_4_bits` for codes of 5 bits."""
    result = np.float32(0)
    for _ in range(blocks):
        d = load_f16(row)
        products = dot_u7(zero_i32x8(), _codes_5(row + header - 4), load_i8x32(codes))
        result += total(to_f32(products)) * (d * load_f32(scale))
        result += (np.float32(-16) * d if size == Q5_0_BYTES else load_f16(row + 2)) * load_f32(sums)
        row, codes, scale, sums = row + size, codes + 32, scale + 4, sums + 4
    return result


@inlined
def dot_q8_0(rows, activations, columns):
    """`dot_q4_0` for Q8_0."""
    _, codes, scale, _, _, _ = activations
    a, b, c, d = _dot_q8_0_of_fours(rows, codes, scale, columns)
    if columns % 128:
        done = columns // 128 * 4
        at, codes, scale = Q8_0_BYTES * done, codes + 32 * done, scale + 4 * done
        a += _rest_q8_0(Q8_0_BYTES, 2, rows[0] + at, codes, scale, scale, columns % 128 // 32)
        b += _rest_q8_0(Q8_0_BYTES, 2, rows[1] + at, codes, scale, scale, columns % 128 // 32)
        c += _rest_q8_0(Q8_0_BYTES, 2, rows[2] + at, codes, scale, scale, columns % 128 // 32)
        d += _rest_q8_0(Q8_0_BYTES, 2, rows[3] + at, codes, scale, scale, columns % 128 // 32)
    return a, b, c, d


@helper
def _rest_q8_0(size, header, row, codes, scale, sums, blocks):
    """`_rest_4_bits` for Q8_0, which needs no sums."""
    result = np.float32(0)
    for _ in range(blocks):
        products = dot_i8(zero_i32x8(), load_i8x32(row + header), load_i8x32(codes))
        result += total(to_f32(products)) * (load_f16(row) * load_f32(scale))
        row, codes, scale = row + size, codes + 32, scale + 4
    return result


# Rows of weights times the activations of four tokens, where registers have 64 bytes.

_dot_4_bits_of_tokens, _dot_5_bits_of_tokens = wide.dot_4_bits_of_tokens, wide.dot_5_bits_of_tokens
_dot_q8_0_of_tokens = wide.dot_q8_0_of_tokens


def _dot_tokens_for(whole, rest, size, header):
    """Make `dot_tokens` of a type, whose blocks have `size` bytes and a header: of a function for whole fours of
    blocks, None where there is none, and of one for those behind them."""
    if whole is None:
        return None

    @inlined
    def rest_of_token(row, token, columns):
        _, codes, scale, sums, _, _ = token
        done = columns // 128 * 4
        at, blocks = row + size * done, columns % 128 // 32
        return rest(size, header, at, codes + 32 * done, scale + 4 * done, sums + 4 * done, blocks)

    @inlined
    def dot_tokens(row, tokens, columns):
        a, b, c, d = whole(size, header, row, tokens, columns)
        if columns % 128:
            a += rest_of_token(row, tokens[0], columns)
            b += rest_of_token(row, tokens[1], columns)
            c += rest_of_token(row, tokens[2], columns)
            d += rest_of_token(row, tokens[3], columns)
        return a, b, c, d

    return dot_tokens


# Writing


@helper
def abs_max(x):
    """The largest absolute value of thirty-two float32 at an address. A scale made of it keeps an infinite value or NaN
    in sight, where codes would turn it into a number."""
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    return farthest(farther(farther(absolute(a), absolute(b)), farther(absolute(c), absolute(d))))


@helper
def write_q8(x, scale, codes, zero):
    """Thirty-two float32 as a scale, an IEEE half, and codes of 8 bits that are `zero` more than ggml's Q8_0 has. All
    but `zero` are addresses."""
    d = abs_max(x) / np.float32(127)
    inverse = np.float32(0)
    if d > 0:
        inverse = np.float32(1) / d
    store_f16(scale, d)
    factor, zero = splat_f32(inverse), splat_f32(np.float32(zero))
    for i in range(4):
        store_as_i8(codes + 8 * i, add(round_away(mul(load_f32x8(x + 32 * i), factor)), zero))


@helper
def _write_block_q8_0(x, block):
    write_q8(x, block, block + 2, 0)


Q4_0 = Format(
    _add_q4_0,
    dot_four=dot_q4_0,
    dot_tokens=_dot_tokens_for(_dot_4_bits_of_tokens, _rest_4_bits, Q4_0_BYTES, 2),
    order=EIGHTS if LANES == 16 else FOURS,
    unpack=unpack_q4_0,
    code_bits=4,
    zero_point=8,
    bytes_256=8 * Q4_0_BYTES,
)
Q4_1 = Format(
    _add_q4_1,
    dot_four=dot_q4_1,
    dot_tokens=_dot_tokens_for(_dot_4_bits_of_tokens, _rest_4_bits, Q4_1_BYTES, 4),
    unpack=unpack_q4_1,
    code_bits=4,
    minimum_each=32,
    bytes_256=8 * Q4_1_BYTES,
)
Q5_0 = Format(
    _add_q5_0,
    dot_four=dot_q5_0,
    dot_tokens=_dot_tokens_for(_dot_5_bits_of_tokens, _rest_5_bits, Q5_0_BYTES, 6),
    unpack=unpack_q5_0,
    code_bits=5,
    zero_point=16,
    bytes_256=8 * Q5_0_BYTES,
)
Q5_1 = Format(
    _add_q5_1,
    dot_four=dot_q5_1,
    dot_tokens=_dot_tokens_for(_dot_5_bits_of_tokens, _rest_5_bits, Q5_1_BYTES, 8),
    unpack=unpack_q5_1,
    code_bits=5,
    minimum_each=32,
    bytes_256=8 * Q5_1_BYTES,
)
Q8_0 = Format(
    _add_q8_0,
    dot_four=dot_q8_0,
    dot_tokens=_dot_tokens_for(_dot_q8_0_of_tokens, _rest_q8_0, Q8_0_BYTES, 2),
    unpack=unpack_q8_0,
    code_bits=8,
    scale_each=SCALE_EACH,
    zero_point=ZERO_POINT,
    bytes_256=8 * Q8_0_BYTES,
    write_block=_write_block_q8_0,
)
