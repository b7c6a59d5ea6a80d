"""Products of rows of weights with one activation vector, for every ggml type.

Four rows at a time, so that activations are loaded once for them, and far apart, so that each of the four is a stream
that the processor recognises and fetches from memory in advance. `gemv_512` or `gemv_256`, whatever registers the
processor has, takes whole fours of blocks of 32 weights, of which the codes of the activations are mixed so that they
meet the weights as the file has them (`place`); the rest, in the order of the columns, is taken here.
"""

import functools

import numpy as np

from pymla.cpu.formats import FORMATS, Q4_0, Q4_1, Q6_K, Q8_0
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import (
    fma,
    load_f16,
    load_f32,
    load_f32x8,
    load_i8x32,
    load_nibbles,
    splat_f32,
    store_f32,
    total,
)
from pymla.cpu.machine.simd_bytes import dot_i8, dot_u7, to_f32, zero_i32x8
from pymla.cpu.matmul import gemv_256, gemv_512
from pymla.cpu.memory import fetch_ahead
from pymla.cpu.runtime.compiling import helper, inlined

# Kernels see module globals as constants.
_fours = gemv_512 if LANES == 16 else gemv_256
_place_in_fours, _dot_4_bits_of_fours = _fours.place, _fours.dot_4_bits
_place_in_eights = gemv_512.place_eights
_dot_q8_0_of_fours, _dot_q6_k_of_fours = _fours.dot_q8_0, _fours.dot_q6_k


#: Orders of activations: that of the columns, for panels; that of tiles (`panels_amx.empty_columns`), for panels too;
#: for rows of most types; for those of eight blocks of Q4_0 in a register.
COLUMNS, TILES, MIXED, EIGHTHS = range(4)


def order(qtype):
    """The order of activations that meet rows of a quantised type."""
    return EIGHTHS if LANES == 16 and qtype == Q4_0 else MIXED


@helper
def place(order, block, blocks):
    """Where the activations of a block of a row stand: its first eight codes, and bytes from there to the next eight
    and to the last sixteen."""
    if order <= TILES or block >= blocks // 4 * 4:
        return 32 * block, 8, 16
    if order == EIGHTHS and block < blocks // 8 * 8:
        return _place_in_eights(block)
    low, apart = _place_in_fours(block, blocks // 4 * 4)
    return low, 8, apart


@functools.cache
def dot_rows_for(qtype):
    """A function ``(row, stride, count, activations, columns, out)``: rows of weights times one activation vector.

    - row, stride, count : the address of the first row, the bytes from row to row, and their number.
    - activations : addresses of x, codes, scale, sums, starts and sum16 of a `quant.Input` in the type's `order`. Float
      types read the first, quantised types the others.
    - columns : their number.
    - out : address for float32 (count,).
    """
    if not FORMATS[qtype].bits:
        dot_row = dot_float_for(qtype)

        @helper
        def dot_rows(row, stride, count, activations, columns, out):
            for i in range(count):
                store_f32(out + 4 * i, dot_row(row + i * stride, activations[0], columns))

        return dot_rows
    dot_four = _DOT_FOUR[qtype]

    @helper
    def dot_rows(row, stride, count, activations, columns, out):
        apart = (count + 3) // 4
        for i in range(apart):
            rows = _four(row, stride, i, apart, count)
            _store(out, i, apart, count, dot_four(rows, activations, columns))

    return dot_rows


@helper
def _four(row, stride, i, apart, count):
    """Addresses of four rows from the i-th on; the last row stands for those that are not there."""
    last = count - 1
    second, third, fourth = min(i + apart, last), min(i + 2 * apart, last), min(i + 3 * apart, last)
    return row + i * stride, row + second * stride, row + third * stride, row + fourth * stride


@helper
def _store(out, i, apart, count, results):
    """The results of four such rows."""
    last = count - 1
    first, second, third, fourth = results
    store_f32(out + 4 * i, first)
    store_f32(out + 4 * min(i + apart, last), second)
    store_f32(out + 4 * min(i + 2 * apart, last), third)
    store_f32(out + 4 * min(i + 3 * apart, last), fourth)


@inlined
def _dot_q4_0(rows, activations, columns):
    """Four rows times one activation vector, as for each quantised type."""
    _, codes, scale, sums, starts, _ = activations
    return _dot_4_bits(18, 2, rows, codes, scale, sums, starts, columns)


@inlined
def _dot_q4_1(rows, activations, columns):
    _, codes, scale, sums, starts, _ = activations
    return _dot_4_bits(20, 4, rows, codes, scale, sums, starts, columns)


@inlined
def _dot_q6_k(rows, activations, columns):
    _, codes, scale, _, _, sum16 = activations
    return _dot_q6_k_of_fours(rows, codes, scale, sum16, columns)


@inlined
def _dot_4_bits(size, header, rows, codes, scale, sums, starts, columns):
    """Q4_0, whose blocks have 18 bytes and a header of 2, or Q4_1, with 20 and 4."""
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
    result = np.float32(0)
    for _ in range(blocks):
        d = load_f16(row)
        products = dot_u7(zero_i32x8(), load_nibbles(row + header), load_i8x32(codes))
        result += total(to_f32(products)) * (d * load_f32(scale))
        result += (np.float32(-8) * d if size == 18 else load_f16(row + 2)) * load_f32(sums)
        row, codes, scale, sums = row + size, codes + 32, scale + 4, sums + 4
    return result


@inlined
def _dot_q8_0(rows, activations, columns):
    _, codes, scale, _, _, _ = activations
    a, b, c, d = _dot_q8_0_of_fours(rows, codes, scale, columns)
    if columns % 128:
        done = columns // 128 * 4
        at, codes, scale = 34 * done, codes + 32 * done, scale + 4 * done
        a += _rest_q8_0(rows[0] + at, codes, scale, columns % 128 // 32)
        b += _rest_q8_0(rows[1] + at, codes, scale, columns % 128 // 32)
        c += _rest_q8_0(rows[2] + at, codes, scale, columns % 128 // 32)
        d += _rest_q8_0(rows[3] + at, codes, scale, columns % 128 // 32)
    return a, b, c, d


@helper
def _rest_q8_0(row, codes, scale, blocks):
    result = np.float32(0)
    for _ in range(blocks):
        products = dot_i8(zero_i32x8(), load_i8x32(row + 2), load_i8x32(codes))
        result += total(to_f32(products)) * (load_f16(row) * load_f32(scale))
        row, codes, scale = row + 34, codes + 32, scale + 4
    return result


_DOT_FOUR = {Q4_0: _dot_q4_0, Q4_1: _dot_q4_1, Q8_0: _dot_q8_0, Q6_K: _dot_q6_k}


@functools.cache
def dot_float_for(qtype):
    """A function ``(row, x, columns)``: a row of a float type, F32, F16 or BF16, times activations; addresses."""
    load_one, load_eight, size = FORMATS[qtype].load_one, FORMATS[qtype].load_eight, FORMATS[qtype].size

    @helper
    def dot_float(row, x, columns):
        a = splat_f32(np.float32(0))
        b = splat_f32(np.float32(0))
        for _ in range(columns // 16):
            fetch_ahead(row, 16 * size)
            a = fma(load_eight(row), load_f32x8(x), a)
            b = fma(load_eight(row + 8 * size), load_f32x8(x + 32), b)
            row, x = row + 16 * size, x + 64
        rest = np.float32(0)
        for _ in range(columns % 16):
            rest += load_one(row) * load_f32(x)
            row += size
            x += 4
        return total(a) + total(b) + rest

    return dot_float
