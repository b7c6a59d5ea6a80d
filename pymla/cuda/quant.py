"""Products with quantised matrices. Twin of `pymla.reference.quant`.

Quantised types multiply on integers: activations become int8 with a scale per 32 values, once for all matrices that
read them (`Activation`). Float types multiply in float32. For few tokens a warp takes four rows straight from the
file's blocks (`rows`); for many, blocks of threads multiply tiles on the tensor cores (`tiles`). No matrix is ever
copied.
"""

from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda import memory
from pymla.cuda.contract import check
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.machine.ptx import (
    WARP,
    as_f32,
    as_word,
    div,
    dp4a,
    fma,
    global_address,
    group_max,
    group_sum,
    lane,
    load_f32,
    load_f32x4,
    load_shared_f32x4,
    nearest_int,
    shared_address,
    shfl_xor,
    store_f32,
    store_f32x2,
    store_u32,
    to_f32,
    warp_sum,
)
from pymla.cuda.matmul.gemm import NARROW, THREADS, WIDE, tile_of
from pymla.cuda.matmul.gemm import ROWS as TILE_ROWS
from pymla.cuda.matmul.gemv import row_products
from pymla.cuda.runtime.jit import device, kernel

F2 = types.Array(types.float32, 2, "C")
A3 = types.Array(types.float32, 3, "A")
I1 = types.Array(types.int32, 1, "C")

WARPS = THREADS // WARP

#: Tiles that keep a large chip busy.
ENOUGH_TILES = 256
#: Rows, and tokens, of a block's product in float32.
TILE = 64

#: Up to this many tokens every row is read straight from the file; beyond, it goes through shared memory.
FEW = 8


class Matrices(NamedTuple):
    """One or several matrices of a QTensor for a kernel: rows of a matrix are contiguous, matrices may lie apart."""

    address: int
    matrix_stride: int  # bytes
    row_stride: int
    count: int
    rows: int

    @classmethod
    def of(cls, w):
        """The view of a QTensor with two- or three-dimensional data on the device."""
        data = w.data if w.data.ndim == 3 else w.data[None]
        return cls(data.address, *data.strides[:2], *data.shape[:2])


MATRICES = types.NamedUniTuple(types.int64, 5, Matrices)


class Input(NamedTuple):
    """Activations as kernels read them: addresses, and sizes. The quantised parts are 0 where only float types do."""

    x: int  # float32 (T, K)
    codes: int  # int8 (T, K)
    scales: int  # float32 (T, K // 32, 2): the scale, x ≈ codes * scale, and the sum of codes * scale
    tokens: int
    columns: int


INPUT = types.NamedUniTuple(types.int64, 5, Input)


class Activation:
    """The input of one or several matrices, quantised at most once.

    An `Input` holds addresses, so that the Activation must live until the launch that takes it. It may die before that
    launch runs: its memory then goes to arrays that later launches of the same stream write.

    Parameters
    ----------
    x : float32 DeviceArray (T, K), contiguous

    Attributes
    ----------
    codes : int8 DeviceArray (T, K), or None before it is quantised
    scales : float32 DeviceArray (T, K // 32, 2)
        Scales, and sums of 32 ``codes * scale``.
    """

    def __init__(self, x):
        check.activation(x)
        self.x, self.codes, self.scales = x, None, None

    def quantised(self):
        """The same, with room for codes and scales, which the caller fills."""
        tokens, columns = self.x.shape
        self.codes = memory.empty((tokens, columns), np.int8)
        self.scales = memory.empty((tokens, columns // 32, 2), np.float32)
        return self

    def input(self, qtype):
        """The `Input` for products with a type."""
        if qtype not in ggml.QUANTISED:
            return Input(self.x.address, 0, 0, *self.x.shape)
        if self.codes is None:
            self.quantised()
            blocks = self.x.size // 32
            _quantise_activations[-(-blocks // _BLOCKS), THREADS](
                self.x.address, self.codes.address, self.scales.address, blocks
            )
        return Input(self.x.address, self.codes.address, self.scales.address, *self.x.shape)


def matmul(w, activation, out):
    """``out = x @ W.T``: `w` of N rows and K columns, `activation` of (T, K), `out` float32 (T, N).

    Where `w` has several matrices, `out` has (T, matrices * N): the same input for all of them.
    """
    check.matmul(w, activation, out)
    _product(w, activation, 1, out)
    return out


def matmul_heads(w, x, out):
    """A matrix for each head: ``out[t, h] = W[h] @ x[t, h]``, `x` float32 (T, H, K), `out` float32 (T, H, N)."""
    check.matmul_heads(w, x, out)
    tokens, heads, columns = x.shape
    _product(w, Activation(x.reshape(tokens * heads, columns)), heads, out.reshape(tokens, -1))
    return out


def _product(w, activation, heads, out):
    """`matmul`, or with more than one head `matmul_heads`: row ``t * heads + h`` of the activations is the input of
    token t and matrix h."""
    matrices, x, tokens = Matrices.of(w), activation.input(w.qtype), len(out)
    rows, count, shared_bytes = matrices.rows, matrices.count, 0
    # Neighbouring blocks take the same rows, which are then read from memory once.
    if tokens > FEW and w.qtype in FLOATS:
        launched, grid = _MATMUL_TILES[w.qtype], (-(-tokens // TILE), -(-rows // TILE), count)
        # A router's matrix, say: a block would go along its columns alone, slice after slice.
        if grid[0] * grid[1] * count < ENOUGH_TILES:
            launched, grid = _MATMUL_FLOAT[w.qtype], (-(-tokens // (AT_ONCE * WARPS)), -(-rows // ROWS), count)
    elif tokens > FEW:
        of_rows = -(-rows // TILE_ROWS)
        # Wide tiles read less, and are for matrices that keep all multiprocessors busy with them.
        wide = (w.qtype, WIDE) in _MATMUL and -(-tokens // WIDE) * of_rows * count >= ENOUGH_TILES
        activations = WIDE if wide else NARROW
        launched, grid = _MATMUL[w.qtype, activations], (-(-tokens // activations), of_rows, count)
        shared_bytes = tile_of(w.qtype, activations).shared_bytes
    elif w.qtype in FLOATS:
        launched, grid = _MATVEC_FLOAT[w.qtype], (-(-rows // WARPS), count, -(-tokens // AT_ONCE))
    elif tokens > 1:
        launched, grid = _MATVEC_FEW[w.qtype], (-(-tokens // AT_ONCE), -(-rows // (ROWS * WARPS)), count)
    else:
        launched, grid = _MATVEC[w.qtype], (-(-rows // (ROWS * WARPS)), count)
    launched[grid, THREADS, shared_bytes](matrices, x, heads, out)


def matmul_heads_transposed(w, x, out):
    """``out[t, h] = W[h].T @ x[t, h]`` with H matrices of N rows and K columns.

    `x` float32 (T, H, N) and `out` (T, H, K) may be part of a wider last axis.
    """
    check.matmul_heads_transposed(w, x, out)
    tokens, heads, columns = out.shape
    grid = -(-columns // 32), heads, tokens
    _TRANSPOSED[w.qtype][grid, THREADS](Matrices.of(w), x, out)
    return out


def embedding_rows(w, tokens, out):
    """Rows `tokens` (int32 (T,)) of the embedding matrix as float32 (T, K)."""
    check.embedding_rows(w, tokens, out)
    _EMBEDDING_ROWS[w.qtype][len(tokens), THREADS](Matrices.of(w), tokens, out)
    return out


#: Blocks of 32 activations that a block of threads quantises: eight lanes take one.
_BLOCKS = THREADS // 8


@kernel(types.int64, types.int64, types.int64, types.int64, max_threads=THREADS)
def _quantise_activations(x, codes, scales, blocks):
    """`blocks` of 32 activations, counted over all tokens, as int8 (`reference.quant.quantise_activations`)."""
    i, part = cuda.blockIdx.x * _BLOCKS + cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
    x0, x1, x2, x3 = load_f32x4(x + 128 * min(i, blocks - 1) + 16 * part)
    quantise_four(x0, x1, x2, x3, codes + 32 * i + 4 * part, scales + 8 * i, part, i < blocks)


@device
def quantise_four(x0, x1, x2, x3, codes, scales, part, inside):
    """Four of the 32 activations of eight neighbouring lanes, of which this is number `part`: the address of its codes,
    that of the block's two numbers, and whether they are written."""
    # Magnitudes compare as their bits do, and NaN is above all of them: it becomes the scale.
    largest = max(max(_magnitude(x0), _magnitude(x1)), max(_magnitude(x2), _magnitude(x3)))
    maximum = as_f32(group_max(largest, 8))
    scale = div(maximum, np.float32(127))
    inverse = div(np.float32(127), maximum) if maximum != np.float32(0) else np.float32(0)
    c0, c1 = nearest_int(x0 * inverse) & 255, nearest_int(x1 * inverse) & 255
    c2, c3 = nearest_int(x2 * inverse) & 255, nearest_int(x3 * inverse) & 255
    word = c0 | c1 << 8 | c2 << 16 | c3 << 24
    total = group_sum(dp4a(word, 0x01010101, 0), 8)
    if inside:
        store_u32(codes, word)
        if part == 0:
            store_f32x2(scales, scale, to_f32(total) * scale)


@device
def _magnitude(x):
    return as_word(x) & 0x7FFFFFFF


@device
def row_address(w, matrix, row):
    """The address of a row; of the last one where there are fewer, so that it can be read."""
    return w.address + matrix * w.matrix_stride + min(row, w.rows - 1) * w.row_stride


@device
def input_row(x, heads, matrix, t):
    """The row of the activations for a token, the last one where there are fewer, and a matrix."""
    return min(t * heads + matrix, x.tokens - heads + matrix) if heads > 1 else min(t, x.tokens - 1)


#: Rows, and tokens, that a warp takes at a time.
ROWS, AT_ONCE = 4, 4


def _matvec(qtype):
    """A product with one token."""
    products = row_products(qtype, ROWS, 1)

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS, min_blocks=4)
    def _matvec(w, x, heads, out):
        """A warp takes `ROWS` rows of matrix y."""
        matrix, me = cuda.blockIdx.y, lane()
        first = ROWS * (WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP)
        s0, s1, s2, s3 = products(four_rows(w, matrix, first), (input_row(x, heads, matrix, 0),), x)
        r0, r1, r2, r3 = warp_sum(s0[0]), warp_sum(s1[0]), warp_sum(s2[0]), warp_sum(s3[0])
        if me < ROWS and first + me < w.rows:
            result = r0 if me == 0 else r1 if me == 1 else r2 if me == 2 else r3
            store_f32(global_address(out) + 4 * (matrix * w.rows + first + me), result)

    return _matvec


def _matvec_few(qtype):
    """A product with up to `AT_ONCE` tokens, which share the rows that are read."""
    products = row_products(qtype, ROWS, AT_ONCE)

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _matvec_few(w, x, heads, out):
        """As `matvec`, for tokens from ``AT_ONCE * x`` on; y are rows and z matrices."""
        matrix, t = cuda.blockIdx.z, AT_ONCE * cuda.blockIdx.x
        first = ROWS * (WARPS * cuda.blockIdx.y + cuda.threadIdx.x // WARP)
        numbers = (
            input_row(x, heads, matrix, t),
            input_row(x, heads, matrix, t + 1),
            input_row(x, heads, matrix, t + 2),
            input_row(x, heads, matrix, t + 3),
        )
        s0, s1, s2, s3 = products(four_rows(w, matrix, first), numbers, x)
        store_few_rows(out, t, matrix * w.rows + first, w.rows - first, (s0, s1, s2, s3))

    return _matvec_few


@device
def four_rows(w, matrix, first):
    """The addresses of a warp's rows; of the last one where there are fewer."""
    r0, left = row_address(w, matrix, first), w.rows - first
    r1 = r0 + (w.row_stride if left > 1 else 0)
    r2 = r1 + (w.row_stride if left > 2 else 0)
    return r0, r1, r2, r2 + (w.row_stride if left > 3 else 0)


@device
def four_inputs(x, heads, matrix, t):
    """The addresses of the float32 activations of tokens from t on, as `input_row` finds them."""
    stride = 4 * x.columns
    return (
        x.x + stride * input_row(x, heads, matrix, t),
        x.x + stride * input_row(x, heads, matrix, t + 1),
        x.x + stride * input_row(x, heads, matrix, t + 2),
        x.x + stride * input_row(x, heads, matrix, t + 3),
    )


@device
def dot_four(w, x, sum):
    """``sum + w · x`` of four numbers each."""
    return fma(w[0], x[0], fma(w[1], x[1], fma(w[2], x[2], fma(w[3], x[3], sum))))


@device
def dots_four(w, x, sums):
    """`dot_four` of four tokens."""
    s0, s1, s2, s3 = sums
    return dot_four(w, x[0], s0), dot_four(w, x[1], s1), dot_four(w, x[2], s2), dot_four(w, x[3], s3)


@device
def times_four(weight, x, sums):
    """``sums + weight * x`` of four tokens."""
    s0, s1, s2, s3 = sums
    return fma(weight, x[0], s0), fma(weight, x[1], s1), fma(weight, x[2], s2), fma(weight, x[3], s3)


@device
def store_few(out, t, column, left, sums):
    """A row's products with four tokens, the lanes' parts of which are `sums`, if the row is there."""
    s0, s1, s2, s3 = sums
    s0, s1, s2, s3 = warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3)
    me = lane()
    if me < AT_ONCE and left > 0 and t + me < len(out):
        out[t + me, column] = s0 if me == 0 else s1 if me == 1 else s2 if me == 2 else s3


@device
def store_few_rows(out, t, column, left, sums):
    """`store_few` of four rows, of which `left` are there."""
    store_few(out, t, column, left, sums[0])
    store_few(out, t, column + 1, left - 1, sums[1])
    store_few(out, t, column + 2, left - 2, sums[2])
    store_few(out, t, column + 3, left - 3, sums[3])


def _matmul(qtype, activations):
    """A product with many tokens, on int8 tensor cores."""
    tile = tile_of(qtype, activations)
    product = tile.product

    @device
    def store(upper, lower, row, t, to):
        """Results of two rows and a token, if they are there. `to`: the address of the first results of the tile, bytes
        from token to token, and how many rows and tokens are left."""
        address, stride, rows, tokens = to
        at = address + stride * t + 4 * row
        if t < tokens and row < rows:
            store_f32(at, upper)
        if t < tokens and row + 8 < rows:
            store_f32(at + 32, lower)

    store_all = tile.storing(store)

    @kernel(
        MATRICES,
        INPUT,
        types.int64,
        F2,
        variant=f"{ggml.NAME[qtype].lower()},{activations}",
        max_threads=THREADS,
        min_blocks=2 if activations == WIDE or FORMATS[qtype].halves else 3,
    )
    def _matmul(w, x, heads, out):
        """A block takes a tile: `TILE_ROWS` rows (y) of matrix z and as many tokens (x) as it has activations."""
        thread, matrix = cuda.threadIdx.x, cuda.blockIdx.z
        first, t = TILE_ROWS * cuda.blockIdx.y, activations * cuda.blockIdx.x
        sums = product(row_address(w, matrix, first + thread), input_row(x, heads, matrix, t + thread), x)
        stride = 4 * out.shape[1]
        address = global_address(out) + stride * t + 4 * (matrix * w.rows + first)
        store_all(sums, (address, stride, w.rows - first, len(out) - t))

    return _matmul


def _matvec_float(qtype):
    """A product in float32 with few tokens."""
    one, four, nbytes = FLOATS[qtype]

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _matvec_float(w, x, heads, out):
        """A warp takes a row of matrix y and tokens from ``AT_ONCE * z`` on."""
        matrix, row, t = cuda.blockIdx.y, WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, AT_ONCE * cuda.blockIdx.z
        at, columns, me = row_address(w, matrix, row), x.columns, lane()
        x0, x1, x2, x3 = four_inputs(x, heads, matrix, t)
        s0 = s1 = s2 = s3 = np.float32(0)
        several = len(out) > 1
        # Rows are aligned for four weights at a time where four divides their length.
        whole = columns if columns & 3 == 0 else 0
        for k in range(4 * me, whole, 4 * WARP):
            weights = four(at + nbytes * k)
            s0 = dot_four(weights, load_f32x4(x0 + 4 * k), s0)
            if several:
                s1 = dot_four(weights, load_f32x4(x1 + 4 * k), s1)
                s2 = dot_four(weights, load_f32x4(x2 + 4 * k), s2)
                s3 = dot_four(weights, load_f32x4(x3 + 4 * k), s3)
        for k in range(whole + me, columns, WARP):
            weight = one(at + nbytes * k)
            s0 = fma(weight, load_f32(x0 + 4 * k), s0)
            s1 = fma(weight, load_f32(x1 + 4 * k), s1)
            s2 = fma(weight, load_f32(x2 + 4 * k), s2)
            s3 = fma(weight, load_f32(x3 + 4 * k), s3)
        store_few(out, t, matrix * w.rows + row, w.rows - row, (s0, s1, s2, s3))

    return _matvec_float


def _matmul_float(qtype):
    """A product in float32 with many tokens, but with fewer tiles than multiprocessors."""
    one, four, nbytes = FLOATS[qtype]

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _matmul_float(w, x, heads, out):
        """A warp takes `ROWS` rows (y) of matrix z and `AT_ONCE` tokens; the block's warps have neighbouring tokens."""
        matrix, t = cuda.blockIdx.z, AT_ONCE * (WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP)
        first, columns, me = ROWS * cuda.blockIdx.y, x.columns, lane()
        r0, r1, r2, r3 = four_rows(w, matrix, first)
        x0, x1, x2, x3 = four_inputs(x, heads, matrix, t)
        zero = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        s0 = s1 = s2 = s3 = zero
        whole = columns if columns & 3 == 0 else 0
        for k in range(4 * me, whole, 4 * WARP):
            v = load_f32x4(x0 + 4 * k), load_f32x4(x1 + 4 * k), load_f32x4(x2 + 4 * k), load_f32x4(x3 + 4 * k)
            s0, s1 = dots_four(four(r0 + nbytes * k), v, s0), dots_four(four(r1 + nbytes * k), v, s1)
            s2, s3 = dots_four(four(r2 + nbytes * k), v, s2), dots_four(four(r3 + nbytes * k), v, s3)
        for k in range(whole + me, columns, WARP):
            y = load_f32(x0 + 4 * k), load_f32(x1 + 4 * k), load_f32(x2 + 4 * k), load_f32(x3 + 4 * k)
            s0, s1 = times_four(one(r0 + nbytes * k), y, s0), times_four(one(r1 + nbytes * k), y, s1)
            s2, s3 = times_four(one(r2 + nbytes * k), y, s2), times_four(one(r3 + nbytes * k), y, s3)
        store_few_rows(out, t, matrix * w.rows + first, w.rows - first, (s0, s1, s2, s3))

    return _matmul_float


#: Columns of a slice in shared memory, and float32 between them.
_SLICE, _APART = 16, TILE + 4
_FLOATS = _SLICE * _APART


def _matmul_tiles(qtype):
    """A product in float32 with many tokens."""
    one, _, nbytes = FLOATS[qtype]

    @kernel(MATRICES, INPUT, types.int64, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _matmul_tiles(w, x, heads, out):
        """A block takes `TILE` rows (y) of matrix z and `TILE` tokens (x), a thread 8 rows and 4 tokens of these."""
        weights = cuda.shared.array(_FLOATS, np.float32, alignment=16)
        inputs = cuda.shared.array(_FLOATS, np.float32, alignment=16)
        thread, matrix, columns = cuda.threadIdx.x, cuda.blockIdx.z, x.columns
        first, t = TILE * cuda.blockIdx.y, TILE * cuda.blockIdx.x
        # What this thread copies: half of a slice of a row and of a token.
        number, begin = thread >> 1, _SLICE // 2 * (thread & 1)
        row = row_address(w, matrix, first + number)
        token = x.x + 4 * columns * input_row(x, heads, matrix, t + number)
        from_weights = shared_address(weights) + 32 * (thread >> 4)
        from_inputs = shared_address(inputs) + 16 * (thread & 15)
        zero = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
        for start in range(0, columns, _SLICE):
            for i in range(begin, begin + _SLICE // 2):
                inside, at = start + i < columns, _APART * i + number
                weights[at] = one(row + nbytes * (start + i)) if inside else np.float32(0)
                inputs[at] = load_f32(token + 4 * (start + i)) if inside else np.float32(0)
            cuda.syncthreads()
            for k in range(_SLICE):
                w0, w1, w2, w3 = load_shared_f32x4(from_weights + 4 * _APART * k)
                w4, w5, w6, w7 = load_shared_f32x4(from_weights + 4 * _APART * k + 16)
                values = load_shared_f32x4(from_inputs + 4 * _APART * k)
                s0, s1 = times_four(w0, values, s0), times_four(w1, values, s1)
                s2, s3 = times_four(w2, values, s2), times_four(w3, values, s3)
                s4, s5 = times_four(w4, values, s4), times_four(w5, values, s5)
                s6, s7 = times_four(w6, values, s6), times_four(w7, values, s7)
            cuda.syncthreads()
        # Rows are neighbours in `out`.
        t += 4 * (thread & 15)
        column = matrix * w.rows + first + 8 * (thread >> 4)
        left = w.rows - first - 8 * (thread >> 4)
        for i in range(4):
            if t + i < len(out):
                store_rows(out, t + i, column, left, s0[i], s1[i], s2[i], s3[i])
                store_rows(out, t + i, column + 4, left - 4, s4[i], s5[i], s6[i], s7[i])

    return _matmul_tiles


@device
def store_rows(out, t, column, left, s0, s1, s2, s3):
    """Results of four rows, of which `left` are there."""
    if left > 0:
        out[t, column] = s0
    if left > 1:
        out[t, column + 1] = s1
    if left > 2:
        out[t, column + 2] = s2
    if left > 3:
        out[t, column + 3] = s3


def _transposed(qtype):
    """The product with a transposed matrix, in float32."""
    piece, weights = FORMATS[qtype].piece, FORMATS[qtype].weights

    @kernel(MATRICES, A3, A3, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _transposed(w, x, out):
        """A block takes 32 columns (x) of head y and token z; every thread a piece of one in 32 rows."""
        partial = cuda.shared.array((WARPS, 32), np.float32)
        thread, block, h, t = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        part = thread & 3
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for row in range(thread >> 2, w.rows, THREADS // 4):
            w0, w1, w2, w3, w4, w5, w6, w7 = weights(piece(row_address(w, h, row), block, part))
            factor = x[t, h, row]
            s0, s1, s2, s3 = fma(w0, factor, s0), fma(w1, factor, s1), fma(w2, factor, s2), fma(w3, factor, s3)
            s4, s5, s6, s7 = fma(w4, factor, s4), fma(w5, factor, s5), fma(w6, factor, s6), fma(w7, factor, s7)
        s0, s1, s2, s3 = every_fourth(s0), every_fourth(s1), every_fourth(s2), every_fourth(s3)
        s4, s5, s6, s7 = every_fourth(s4), every_fourth(s5), every_fourth(s6), every_fourth(s7)
        if lane() < 4:
            warp, k = thread // WARP, 4 * part
            partial[warp, k], partial[warp, k + 1], partial[warp, k + 2], partial[warp, k + 3] = s0, s1, s2, s3
            k += 16
            partial[warp, k], partial[warp, k + 1], partial[warp, k + 2], partial[warp, k + 3] = s4, s5, s6, s7
        cuda.syncthreads()
        if thread < 32:
            result = partial[0, thread] + partial[1, thread] + partial[2, thread] + partial[3, thread]
            out[t, h, 32 * block + thread] = result

    return _transposed


@device
def every_fourth(x):
    """The sum over the lanes that are a multiple of four apart."""
    x += shfl_xor(x, 4)
    x += shfl_xor(x, 8)
    return x + shfl_xor(x, 16)


def _transposed_float(qtype):
    """The product with a transposed matrix of floats."""
    one, _, nbytes = FLOATS[qtype]

    @kernel(MATRICES, A3, A3, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _transposed(w, x, out):
        """A block takes 32 columns (x) of head y and token z, a lane a column, a warp one in four rows."""
        partial = cuda.shared.array((WARPS, 32), np.float32)
        thread, h, t = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        warp, column = thread // WARP, 32 * cuda.blockIdx.x + thread % WARP
        sum = np.float32(0)
        if column < out.shape[2]:
            for row in range(warp, w.rows, WARPS):
                sum = fma(one(row_address(w, h, row) + nbytes * column), x[t, h, row], sum)
        partial[warp, thread % WARP] = sum
        cuda.syncthreads()
        if thread < 32 and column < out.shape[2]:
            out[t, h, column] = partial[0, thread] + partial[1, thread] + partial[2, thread] + partial[3, thread]

    return _transposed


def _embedding_rows(qtype):
    """Rows as float32."""
    piece, weights = FORMATS[qtype].piece, FORMATS[qtype].weights

    @kernel(MATRICES, I1, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _embedding_rows(w, tokens, out):
        """A block takes a token, every thread a piece."""
        t = cuda.blockIdx.x
        row = row_address(w, 0, tokens[t])
        for i in range(cuda.threadIdx.x, out.shape[1] >> 3, THREADS):
            block, part = i >> 2, i & 3
            k = 32 * block + 4 * part
            w0, w1, w2, w3, w4, w5, w6, w7 = weights(piece(row, block, part))
            out[t, k], out[t, k + 1], out[t, k + 2], out[t, k + 3] = w0, w1, w2, w3
            k += 16
            out[t, k], out[t, k + 1], out[t, k + 2], out[t, k + 3] = w4, w5, w6, w7

    return _embedding_rows


def _embedding_rows_float(qtype):
    """Rows of floats as float32."""
    one, _, nbytes = FLOATS[qtype]

    @kernel(MATRICES, I1, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _embedding_rows(w, tokens, out):
        """A block takes a token."""
        t = cuda.blockIdx.x
        row = row_address(w, 0, tokens[t])
        for k in range(cuda.threadIdx.x, out.shape[1], THREADS):
            out[t, k] = one(row + nbytes * k)

    return _embedding_rows


_MATVEC = {qtype: _matvec(qtype) for qtype in FORMATS}
_MATVEC_FEW = {qtype: _matvec_few(qtype) for qtype in FORMATS}
#: Types with two scales in a block would spill registers in wide tiles.
_MATMUL = {(q, n): _matmul(q, n) for q in FORMATS for n in (NARROW, WIDE) if n == NARROW or not FORMATS[q].halves}
_MATVEC_FLOAT = {qtype: _matvec_float(qtype) for qtype in FLOATS}
_MATMUL_FLOAT = {qtype: _matmul_float(qtype) for qtype in FLOATS}
_MATMUL_TILES = {qtype: _matmul_tiles(qtype) for qtype in FLOATS}
_TRANSPOSED = {q: _transposed(q) for q in FORMATS} | {q: _transposed_float(q) for q in FLOATS}
_EMBEDDING_ROWS = {q: _embedding_rows(q) for q in FORMATS} | {q: _embedding_rows_float(q) for q in FLOATS}
