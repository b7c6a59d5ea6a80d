"""The indexer's keys as int8: in panels, as the products of `pymla.cpu.attention.index_tiles` take them.

A page has panels of the codes of `LANES` keys each, four codes of every key side by side; then the scales of its 64
keys, float32. Keys and queries are multiplied by a Hadamard matrix before they become codes (`hadamard.mix`), which
changes no product but for a factor: so a single scale is precise enough for a key, as in DeepSeek's own indexer, whose
keys are rotated and have 8 bits with a scale each.
"""

import numpy as np

from pymla.cpu.attention.codes import quantise_i8
from pymla.cpu.attention.hadamard import mix
from pymla.cpu.machine.simd import address, load_f32, load_i32, store_f32, store_i32
from pymla.cpu.machine.simd_words import BIAS
from pymla.cpu.matmul.matrices import copy
from pymla.cpu.runtime.compiling import helper
from pymla.cpu.runtime.isa import LANES
from pymla.pages import PAGE

#: What bytes of a panel differ in from codes: in the highest bit, where they have a bias.
_BIAS_BIT = np.int8(-BIAS)


@helper
def mixed_together(columns):
    """How many numbers of a key are mixed with each other: the largest power of two that divides `columns`."""
    return columns & -columns


@helper
def mix_key(x, columns):
    """Mix a key or a query, `columns` float32 at the address `x`, in place. `columns` is a multiple of 32. The product
    of a mixed key and a mixed query is `mixed_together` times as large as before."""
    count = mixed_together(columns)
    for at in range(x, x + 4 * columns, 4 * count):
        mix(at, count)


@helper
def write_key(page, row, x, columns):
    """Float32 at the address `x` become the key in a row of the page at an address."""
    mixed, codes = np.empty(columns, np.float32), np.empty(columns, np.int8)
    copy(x, address(mixed), columns)
    mix_key(address(mixed), columns)
    scale, _ = quantise_i8(address(mixed), columns, address(codes), BIAS)
    store_f32(page + PAGE * columns + 4 * row, scale)
    lane = _first_word(page, row, columns)
    for i in range(0, columns, 4):
        store_i32(lane + LANES * i, load_i32(address(codes) + i))


@helper
def read_key(page, row, out, columns):
    """The key in a row of the page at an address, as float32 at the address `out`."""
    codes = np.empty(columns, np.int8)
    lane = _first_word(page, row, columns)
    for i in range(0, columns, 4):
        store_i32(address(codes) + i, load_i32(lane + LANES * i))
    scale = load_f32(page + PAGE * columns + 4 * row) / np.float32(mixed_together(columns))
    for i in range(columns):
        store_f32(out + 4 * i, scale * np.float32(codes[i] ^ _BIAS_BIT))
    mix_key(out, columns)


@helper
def _first_word(page, row, columns):
    """The address of the first four codes of a key; the next four are `LANES` words behind."""
    return page + row // LANES * LANES * columns + 4 * (row % LANES)
