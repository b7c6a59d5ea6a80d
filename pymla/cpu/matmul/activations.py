"""Activations as products read them: for quantised types int8 with a scale per 32 values, in the order that the weights
of a type are met in (`pymla.cpu.machine.orders`)."""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.contract import check
from pymla.cpu.formats import FORMATS
from pymla.cpu.formats.legacy import abs_max
from pymla.cpu.machine.orders import COLUMNS, TILES, place
from pymla.cpu.machine.simd import (
    address,
    load_eights,
    load_f32x8,
    load_i16,
    mul,
    round_even,
    splat_f32,
    store_as_i8,
    store_f32,
    store_f32x8,
)
from pymla.cpu.machine.simd_bytes import store_sum16, sum_i8x32
from pymla.cpu.machine.simd_panels import store_start4
from pymla.cpu.matmul.gemm_amx import SPARE_COLUMNS, empty_columns
from pymla.cpu.matmul.matrices import copy
from pymla.cpu.memory import empty
from pymla.cpu.runtime.array_types import F2, I1, I2, INT8_2, INT16_2
from pymla.cpu.runtime.jit import Kernel, helper, kernel


class Input(NamedTuple):
    """Activations as kernels read them; the quantised parts are empty where only float types do."""

    x: np.ndarray  # float32 (T, K)
    codes: np.ndarray  # int8 (T, K), in the order `orders.TILES` (K // 32, bytes)
    scale: np.ndarray  # float32 (T, K // 32): x ≈ codes * scale
    sums: np.ndarray  # float32 (T, K // 32): sums of codes * scale
    starts: np.ndarray  # int32 (T, K // 32): for `simd_panels.start4`
    sum16: np.ndarray  # int16 (T, K // 16): sums of codes
    half_sums: np.ndarray  # float32 (T, K // 16): sums of codes * scale


INPUT = types.NamedTuple((F2, INT8_2, F2, F2, I2, INT16_2, F2), Input)


class Activation:
    """The input of one or several matrices, quantised at most once for each order.

    Parameters
    ----------
    x : float32 array (T, K), contiguous
    """

    def __init__(self, x: np.ndarray):
        check.activation(x)
        self.x = x
        self._inputs: dict[int | None, Input] = {}

    def rows(self, qtype: int) -> Input:
        """The `Input` for products with rows of a type (gemv)."""
        return self._input(FORMATS[qtype].order if qtype in ggml.QUANTISED else None)

    def panels(self, qtype: int) -> Input:
        """The `Input` for products with panels of a type (gemm)."""
        if qtype not in ggml.QUANTISED:
            return self._input(None)
        return self._input(TILES if FORMATS[qtype].takes_tiles else COLUMNS)

    def _input(self, order: int | None) -> Input:
        """Codes in an order; for None nothing but `x`."""
        if order not in self._inputs:
            tokens, columns = self.x.shape if order is not None else (0, 0)
            self._inputs[order] = made = Input(
                self.x,
                empty_columns(tokens, columns) if order == TILES else empty((tokens, columns), np.int8),
                _empty_scale(tokens, columns // 32),
                empty((tokens, columns // 32), np.float32),
                empty((tokens, columns // 32), np.int32),
                empty((tokens, columns // 16), np.int16),
                empty((tokens, columns // 16), np.float32),
            )
            if order is not None:
                blocks = tokens * columns // 32
                quantise_activations[blocks, max(64, -(-blocks // 64))](made, order)
        return self._inputs[order]


def activation_kernels(qtypes) -> list[Kernel]:
    """The kernels that an `Activation` launches for matrices of some types."""
    if not any(qtype in ggml.QUANTISED for qtype in qtypes):
        return []
    return [quantise_activations, *([copy_columns] if any(FORMATS[each].takes_tiles for each in qtypes) else [])]


def consecutive(qtype: int, x: Input, index: np.ndarray) -> tuple[Input, np.ndarray]:
    """An `Input` for products with panels of a type, and the index of its columns: those of `x` by `index` (int32).

    Tiles of AMX want columns that follow each other, so they are copied; elsewhere products find them by `index`.
    """
    if not FORMATS[qtype].takes_tiles:
        return x, index
    columns, blocks = len(index), x.scale.shape[1]
    made = x._replace(
        codes=empty_columns(columns, 32 * blocks),
        scale=_empty_scale(columns, blocks),
        sums=empty((columns, blocks), np.float32),
    )
    copy_columns[columns](x, index, made)
    return made, counting(columns)


_longest_index = np.arange(512, dtype=np.int32)


def counting(count: int) -> np.ndarray:
    """The numbers from 0 to ``count - 1``, int32."""
    global _longest_index
    if count > len(_longest_index):
        _longest_index = np.arange(count, dtype=np.int32)
    return _longest_index[:count]


def _empty_scale(tokens, blocks):
    """Memory for scales (T, blocks). The columns behind the last one, which tiles read, have zeros: other numbers may
    be subnormal, and take a hundred times as long."""
    scale = empty((tokens + SPARE_COLUMNS, blocks), np.float32)
    scale[tokens:] = 0
    return scale[:tokens]


@helper
def parts(x, t):
    """Addresses of a token's parts of an `Input`, as `Format.dot_four` takes them."""
    at = t * x.x.shape[1]
    scale, sums, starts, sum16 = address(x.scale), address(x.sums), address(x.starts), address(x.sum16)
    at_blocks = at // 8
    codes = address(x.codes) + at
    return address(x.x) + 4 * at, codes, scale + at_blocks, sums + at_blocks, starts + at_blocks, sum16 + at_blocks


@kernel(INPUT, types.int64)
def quantise_activations(first, last, x, order):
    """Quantise blocks of 32 activations, which are counted over all tokens."""
    blocks = x.x.shape[1] // 32
    for i in range(first, last):
        t, block = i // blocks, i % blocks
        codes, step, apart = place(order, block, blocks)
        codes += address(x.codes) + 32 * blocks * t
        if order == TILES:
            codes = address(x.codes[block]) + 32 * t
        quantise_block(
            address(x.x) + 128 * i,
            (codes, step, apart),
            address(x.scale) + 4 * i,
            address(x.sums) + 4 * i,
            address(x.starts) + 4 * i,
            address(x.sum16) + 4 * i,
            address(x.half_sums) + 8 * i,
        )


@helper
def quantise_block(x, where, scale, sums, starts, sum16, half_sums):
    """Quantise thirty-two activations, float32 at `x`, to the parts of an `Input`; the largest becomes code 127 or
    -127.

    `where` is what `orders.place` gives: the address of the first eight codes, the bytes from there to the next eight,
    and those to the last sixteen. The others are addresses.
    """
    codes, step, apart = where
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    most, inverse = abs_max(x), np.float32(0)
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
    store_f32(half_sums, one * np.float32(load_i16(sum16)))
    store_f32(half_sums + 4, one * np.float32(load_i16(sum16 + 2)))
    store_f32(sums, one * np.float32(sum_i8x32(stored)))


@kernel(INPUT, I1, INPUT)
def copy_columns(first, last, x, index, out):
    """Copy what products by tiles read of activations, the i-th of `out` from ``index[i]``."""
    blocks = x.scale.shape[1]
    for i in range(first, last):
        t = index[i]
        for block in range(blocks):
            store_f32x8(address(out.codes[block]) + 32 * i, load_f32x8(address(x.codes[block]) + 32 * t))
        copy(address(x.scale[t]), address(out.scale[i]), blocks)
        copy(address(x.sums[t]), address(out.sums[i]), blocks)
