"""Products with quantised matrices. Twin of `pymla.reference.quant`.

Quantised types multiply on integers: activations become int8 with a scale per 32 values, once for all matrices that
read them (`Activation`). Float types multiply in float32. Few tokens read every row straight from the file; many go
through panels (`pymla.cpu.matmul.gemm`).

>>> import numpy as np
>>> from pymla import ggml
>>> from pymla.cpu import quant
>>> from pymla.reference.quant import quantise
>>> from pymla.tensor import QTensor
>>> w = QTensor(ggml.Q8_0, quantise(np.eye(64, dtype=np.float32), ggml.Q8_0))
>>> x = np.arange(64, dtype=np.float32)[None]
>>> out = np.empty((1, 64), np.float32)
>>> bool(np.abs(quant.matmul(w, quant.Activation(x), out) - x).max() < 0.5)
True
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu.contract import check
from pymla.cpu.formats import FORMATS, dequantise_row_for, quantise_block
from pymla.cpu.machine.isa import AMX, LANES
from pymla.cpu.machine.simd import (
    address,
    fma,
    load_f32,
    load_f32x8,
    load_f32x32,
    load_f32xL,
    splat_f32,
    store_f32,
    store_f32x8,
    store_f32x32,
    store_f32xL,
)
from pymla.cpu.matmul.gemm import FLOAT_ROWS, FLOAT_SCRATCH, ROWS, SCRATCH, product_float_for, product_for, two_groups
from pymla.cpu.matmul.gemm_amx import MARGIN, empty_columns
from pymla.cpu.matmul.gemv import COLUMNS, TILES, dot_rows_for, order, place
from pymla.cpu.memory import allocate, allocate_f32, empty, fetch_ahead
from pymla.cpu.runtime.compiling import inlined
from pymla.cpu.runtime.jit import helper, kernel, variants
from pymla.pages import Step
from pymla.tensor import QTensor

#: Numba types of the kernels' arguments.
F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "C")
F3 = types.Array(types.float32, 3, "C")
I1 = types.Array(types.int32, 1, "C")
I2 = types.Array(types.int32, 2, "C")
I8 = types.Array(types.int8, 2, "C")
I16 = types.Array(types.int16, 2, "C")
BYTES = types.Array(types.uint8, 2, "C", readonly=True)

CACHE = types.NamedTuple((types.int64, types.Array(types.uint8, 2, "C")), QTensor)
STEP = types.NamedTuple((I1, I1, I1, I1, I2), Step)

#: Up to this many tokens every row is read once per token, straight from the file; beyond, it goes through panels.
FEW = 4


class Matrices(NamedTuple):
    """One or several matrices of a QTensor for a kernel: rows of a matrix are contiguous, matrices may lie apart."""

    address: int
    matrix_stride: int  # bytes
    row_stride: int
    count: int
    rows: int

    @classmethod
    def of(cls, w):
        """The view of a QTensor with two- or three-dimensional data."""
        data = w.data if w.data.ndim == 3 else w.data[None]
        return cls(data.__array_interface__["data"][0], *data.strides[:2], *data.shape[:2])


MATRICES = types.NamedUniTuple(types.int64, 5, Matrices)


class Input(NamedTuple):
    """Activations as kernels read them; the quantised parts are empty where only float types do.

    Codes lie in one of several orders: for panels in that of the columns or of tiles, for rows mixed (`rows.place`).
    """

    x: np.ndarray  # float32 (T, K)
    codes: np.ndarray  # int8 (T, K), for tiles (K // 32, bytes)
    scale: np.ndarray  # float32 (T, K // 32): x ≈ codes * scale
    sums: np.ndarray  # float32 (T, K // 32): sums of codes * scale
    starts: np.ndarray  # int32 (T, K // 32): for `simd_panels.start4`
    sum16: np.ndarray  # int16 (T, K // 16): sums of codes
    zeros: np.ndarray  # int32 (1, 1): 0


INPUT = types.NamedTuple((F2, I8, F2, F2, I2, I16, I2), Input)

_ZERO = np.zeros((1, 1), np.int32)


class Activation:
    """The input of one or several matrices, quantised at most once.

    Parameters
    ----------
    x : float32 array (T, K), contiguous
    """

    def __init__(self, x):
        check.activation(x)
        self.x = x
        self._inputs = {}

    def rows(self, qtype):
        """The `Input` for products with rows of a type."""
        return self._input(order(qtype)) if qtype in ggml.QUANTISED else self._input()

    def panels(self, qtype):
        """The `Input` for products with panels of a type."""
        if qtype not in ggml.QUANTISED:
            return self._input()
        return self._input(TILES if takes_tiles(qtype) else COLUMNS)

    def _input(self, order=None):
        """Codes in an order, or nothing but `x`."""
        if order not in self._inputs:
            tokens, columns = self.x.shape if order is not None else (0, 0)
            self._inputs[order] = made = Input(
                self.x,
                empty_columns(tokens, columns) if order == TILES else empty((tokens, columns), np.int8),
                _empty_scale(tokens, columns // 32),
                empty((tokens, columns // 32), np.float32),
                empty((tokens, columns // 32), np.int32),
                empty((tokens, columns // 16), np.int16),
                _ZERO,
            )
            if order is not None:
                blocks = tokens * columns // 32
                _quantise_activations[blocks, max(64, -(-blocks // 64))](made, order)
        return self._inputs[order]


def takes_tiles(qtype):
    """Whether panels of a type are multiplied by tiles of AMX."""
    return AMX and FORMATS[qtype].bits == 4


def _empty_scale(tokens, blocks):
    """Memory for scales (T, blocks). The columns behind the last one, which tiles read, have zeros: what happens to be
    there may be subnormal, and take a hundred times as long."""
    scale = empty((tokens + MARGIN, blocks), np.float32)
    scale[tokens:] = 0
    return scale[:tokens]


def consecutive(qtype, x, index):
    """An `Input` for products with panels of a type, and the index of its columns: those of `x` by `index` (int32).

    Tiles of AMX want columns that follow each other, so they are copied; elsewhere products find them by `index`.
    """
    if not takes_tiles(qtype):
        return x, index
    columns, blocks = len(index), x.scale.shape[1]
    made = x._replace(
        codes=empty_columns(columns, 32 * blocks),
        scale=_empty_scale(columns, blocks),
        sums=empty((columns, blocks), np.float32),
    )
    _copy_columns[columns](x, index, made)
    return made, counting(columns)


def matmul(w, activation, out):
    """``out = x @ W.T``: `w` of N rows and K columns, `activation` of (T, K), `out` float32 (T, N).

    Where `w` has several matrices, `out` has (T, matrices * N): the same input for all of them.
    """
    check.matmul(w, activation, out)
    matrices = Matrices.of(w)
    if len(out) <= FEW:
        _matmul_rows(w.qtype)[matrices.count * matrices.rows](matrices, activation.rows(w.qtype), out)
    elif w.qtype in ggml.QUANTISED:
        items, x = matrices.count * -(-matrices.rows // ROWS), activation.panels(w.qtype)
        _matmul_panels(w.qtype)[items](matrices, x, counting(len(out)), out)
    else:
        items, x = matrices.count * -(-matrices.rows // FLOAT_ROWS), activation.panels(w.qtype)
        _matmul_float(w.qtype)[items](matrices, x, out)
    return out


def matmul_heads(w, x, out):
    """A matrix for each head: ``out[t, h] = W[h] @ x[t, h]``, `x` float32 (T, H, K), `out` float32 (T, H, N)."""
    check.matmul_heads(w, x, out)
    tokens, heads, columns = x.shape
    activation = Activation(x.reshape(tokens * heads, columns))
    matrices = Matrices.of(w)
    _matmul_heads(w.qtype)[matrices.count * matrices.rows](matrices, activation.rows(w.qtype), out)
    return out


def matmul_heads_transposed(w, x, out):
    """``out[t, h] = W[h].T @ x[t, h]`` with H matrices of N rows and K columns.

    `x` float32 (T, H, N) and `out` (T, H, K) may be part of a wider last axis.
    """
    check.matmul_heads_transposed(w, x, out)
    shares = min(_SHARES, len(x))
    _matmul_heads_transposed(w.qtype)[len(w.data) * shares](Matrices.of(w), x, shares, out)
    return out


def embedding_rows(w, tokens, out):
    """Rows `tokens` (int32 (T,)) of the embedding matrix as float32 (T, K)."""
    check.embedding_rows(w, tokens, out)
    _embedding_rows(w.qtype)[len(tokens)](w.data, tokens, out)
    return out


def matmul_kernels(qtype):
    """What `matmul` launches for matrices of a type."""
    many = _matmul_panels if qtype in ggml.QUANTISED else _matmul_float
    return [_matmul_rows(qtype), many(qtype)]


def matmul_heads_kernels(qtype):
    """What `matmul_heads` launches."""
    return [_matmul_heads(qtype)]


def matmul_heads_transposed_kernels(qtype):
    """What `matmul_heads_transposed` launches."""
    return [_matmul_heads_transposed(qtype)]


def embedding_rows_kernels(qtype):
    """What `embedding_rows` launches."""
    return [_embedding_rows(qtype)]


def activation_kernels(qtypes):
    """What an `Activation` launches for matrices of some types."""
    if not any(qtype in ggml.QUANTISED for qtype in qtypes):
        return []
    return [_quantise_activations, *([_copy_columns] if any(map(takes_tiles, qtypes)) else [])]


_longest_index = np.arange(512, dtype=np.int32)


def counting(count):
    """0, 1, 2, …"""
    global _longest_index
    if count > len(_longest_index):
        _longest_index = np.arange(count, dtype=np.int32)
    return _longest_index[:count]


@kernel(INPUT, types.int64)
def _quantise_activations(first, last, x, order):
    """Blocks of 32 activations, counted over all tokens."""
    blocks = x.x.shape[1] // 32
    for i in range(first, last):
        t, block = i // blocks, i % blocks
        codes, step, apart = place(order, block, blocks)
        codes += address(x.codes) + 32 * blocks * t
        if order == TILES:
            codes = address(x.codes[block]) + 32 * t
        quantise_block(
            address(x.x) + 128 * i,
            codes,
            step,
            apart,
            address(x.scale) + 4 * i,
            address(x.sums) + 4 * i,
            address(x.starts) + 4 * i,
            address(x.sum16) + 4 * i,
        )


@kernel(INPUT, I1, INPUT)
def _copy_columns(first, last, x, index, out):
    """What `panels.product` reads of columns, over columns."""
    blocks = x.scale.shape[1]
    for i in range(first, last):
        t = index[i]
        for block in range(blocks):
            store_f32x8(address(out.codes[block]) + 32 * i, load_f32x8(address(x.codes[block]) + 32 * t))
        copy(address(x.scale[t]), address(out.scale[i]), blocks)
        copy(address(x.sums[t]), address(out.sums[i]), blocks)


#: Bytes of rows that several tokens read one after the other, while they are in a cache.
AT_ONCE = 128 << 10


@helper
def rows_at_once(tokens, stride, rows):
    """Rows that tokens read one after the other; all where there is one token."""
    return max(16, AT_ONCE // stride) if tokens > 1 else rows


@helper
def parts(x, t):
    """Addresses of a token's parts of an `Input`, for `rows.dot_rows`."""
    at = t * x.x.shape[1]
    scale, sums, starts, sum16 = address(x.scale), address(x.sums), address(x.starts), address(x.sum16)
    at_blocks = at // 8
    codes = address(x.codes) + at
    return address(x.x) + 4 * at, codes, scale + at_blocks, sums + at_blocks, starts + at_blocks, sum16 + at_blocks


@variants
def _matmul_rows(qtype):
    """`matmul` for few tokens: blocks are read straight from the file."""
    dot_rows = dot_rows_for(qtype)

    @kernel(MATRICES, INPUT, F2)
    def _matmul_rows(first, last, w, x, out):
        """`matmul` for few tokens, over the rows of all matrices: blocks are read straight from the file."""
        columns, size = x.x.shape[1], rows_at_once(len(out), w.row_stride, last - first)
        r = first
        while r < last:
            matrix, i = r // w.rows, r % w.rows
            count = min(size, last - r, w.rows - i)
            row = w.address + matrix * w.matrix_stride + i * w.row_stride
            for t in range(len(out)):
                dot_rows(row, w.row_stride, count, parts(x, t), columns, address(out[t, r:]))
            r += count

    return _matmul_rows


@helper
def copy(source, target, count):
    """`count` float32 from one address to another."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_f32xL(target + 4 * i, load_f32xL(source + 4 * i))
    for i in range(whole, count):
        store_f32(target + 4 * i, load_f32(source + 4 * i))


@helper
def take_rows(results, first, last, where):
    """What `panels.product` gives to rows of float32; `where` has the address of row 0, bytes from row to row, and the
    count of numbers."""
    at, stride, count = where
    for t in range(first, last):
        copy(results + 4 * ROWS * (t - first), at + stride * t, count)


@variants
def _matmul_panels(qtype):
    """`matmul` for many tokens and a quantised type."""
    product = product_for(take_rows, qtype)

    @kernel(MATRICES, INPUT, I1, F2)
    def _matmul_panels(first, last, w, x, index, out):
        """Over groups of `ROWS` rows of each matrix."""
        tokens, columns = x.x.shape
        groups = (w.rows + ROWS - 1) // ROWS
        scratch, result = allocate(SCRATCH), allocate_f32(tokens + MARGIN, ROWS)
        for item in range(first, last):
            matrix, begin = item // groups, item % groups * ROWS
            row = w.address + matrix * w.matrix_stride + begin * w.row_stride
            count = min(ROWS, w.rows - begin)
            second, half, rest = two_groups(row, w.row_stride, count)
            product(
                row,
                second,
                half,
                rest,
                w.row_stride,
                columns,
                ROWS * w.row_stride,
                x,
                index,
                (0, tokens),
                address(scratch),
                address(result),
                (address(out[0, matrix * w.rows + begin :]), 4 * out.shape[1], count),
            )

    return _matmul_panels


@variants
def _matmul_float(qtype):
    """`matmul` for many tokens and a float type."""
    product = product_float_for(qtype)

    @kernel(MATRICES, INPUT, F2)
    def _matmul_float(first, last, w, x, out):
        """Over groups of `FLOAT_ROWS` rows of each matrix."""
        groups, scratch = (w.rows + FLOAT_ROWS - 1) // FLOAT_ROWS, allocate(FLOAT_SCRATCH)
        for item in range(first, last):
            matrix, begin = item // groups, item % groups * FLOAT_ROWS
            row = w.address + matrix * w.matrix_stride + begin * w.row_stride
            count, target = min(FLOAT_ROWS, w.rows - begin), matrix * w.rows + begin
            product(row, count, w.row_stride, x.x.shape[1], x.x, out[:, target:], address(scratch))

    return _matmul_float


@variants
def _matmul_heads(qtype):
    """`matmul_heads`."""
    dot_rows = dot_rows_for(qtype)

    @kernel(MATRICES, INPUT, F3)
    def _matmul_heads(first, last, w, x, out):
        """`matmul_heads` over the rows of all heads."""
        tokens, heads, _ = out.shape
        columns, size = x.x.shape[1], rows_at_once(tokens, w.row_stride, last - first)
        r = first
        while r < last:
            h, i = r // w.rows, r % w.rows
            count = min(size, last - r, w.rows - i)
            row = w.address + h * w.matrix_stride + i * w.row_stride
            for t in range(tokens):
                dot_rows(row, w.row_stride, count, parts(x, t * heads + h), columns, address(out[t, h, i:]))
            r += count

    return _matmul_heads


#: Most items of `_matmul_heads_transposed` per head, each with a share of the tokens.
_SHARES = 4
A2 = types.Array(types.float32, 2, "A")
A3 = types.Array(types.float32, 3, "A")


@variants
def _matmul_heads_transposed(qtype):
    """`matmul_heads_transposed`: sums of scaled rows."""
    add_block, load_one, size = FORMATS[qtype].add_block, FORMATS[qtype].load_one, FORMATS[qtype].size

    @inlined
    def add_four(rows, weights, block, sums):
        """Add a block of four rows times their weights to float32 at `sums`."""
        acc = add_block(rows[0], block, weights[0], load_f32x32(sums))
        acc = add_block(rows[1], block, weights[1], acc)
        acc = add_block(rows[2], block, weights[2], acc)
        store_f32x32(sums, add_block(rows[3], block, weights[3], acc))

    @kernel(MATRICES, A3, types.int64, A3)
    def _matmul_heads_transposed(first, last, w, x, shares, out):
        """An item is one of the shares of a head's tokens. Four rows, a quarter of the matrix apart, are added at a
        time, each a stream that the processor fetches in advance."""
        tokens, columns, stride = len(x), out.shape[2], w.row_stride
        blocks, apart = columns // 32, w.rows // 4
        for item in range(first, last):
            h, share = item // shares, item % shares
            matrix = w.address + h * w.matrix_stride
            for t in range(tokens * share // shares, tokens * (share + 1) // shares):
                sums = address(out[t, h])
                out[t, h, :] = 0
                for i in range(apart):
                    a, b, c, d = i, i + apart, i + 2 * apart, i + 3 * apart
                    rows = matrix + a * stride, matrix + b * stride, matrix + c * stride, matrix + d * stride
                    weights = x[t, h, a], x[t, h, b], x[t, h, c], x[t, h, d]
                    for each in rows:
                        fetch_ahead(each, stride)
                    for block in range(blocks):
                        add_four(rows, weights, block, sums + 128 * block)
                for i in range(4 * apart, w.rows):
                    row, weight = matrix + i * stride, x[t, h, i]
                    for block in range(blocks):
                        at = sums + 128 * block
                        store_f32x32(at, add_block(row, block, weight, load_f32x32(at)))
                if load_one is not None:  # types with blocks have no columns behind the last block
                    for c in range(32 * blocks, columns):
                        for i in range(w.rows):
                            out[t, h, c] += x[t, h, i] * load_one(matrix + i * stride + c * size)

    return _matmul_heads_transposed


@helper
def add_scaled(weight, x, out, columns):
    """``out += weight * x`` at addresses of float32."""
    factor = splat_f32(weight)
    whole = columns // 8 * 8
    for i in range(0, 4 * whole, 32):
        store_f32x8(out + i, fma(factor, load_f32x8(x + i), load_f32x8(out + i)))
    for i in range(4 * whole, 4 * columns, 4):
        store_f32(out + i, load_f32(out + i) + weight * load_f32(x + i))


@variants
def _embedding_rows(qtype):
    """`embedding_rows`."""
    dequantise_row = dequantise_row_for(qtype)

    @kernel(BYTES, I1, F2)
    def _embedding_rows(first, last, data, tokens, out):
        for t in range(first, last):
            dequantise_row(address(data[tokens[t]]), address(out[t]), out.shape[1])

    return _embedding_rows
