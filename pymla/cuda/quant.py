"""Products with quantised matrices. Twin of `pymla.reference.quant`.

Quantised types multiply on integers: activations become int8 with a scale per 32 values, once for all matrices that
read them (`Activation`). Float types multiply in float32. With few tokens a warp takes four rows straight from the
file's blocks (gemv); with many, blocks of threads multiply tiles on the tensor cores (gemm). No matrix is ever copied.
"""

import numpy as np

from pymla.cuda import memory
from pymla.cuda.contract import check, need_any
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.matmul.activations import BLOCKS, quantise_activations
from pymla.cuda.matmul.embedding import embedding_rows_kernel
from pymla.cuda.matmul.few_tokens import WARP_ROWS, WARP_TOKENS
from pymla.cuda.matmul.gemm import gemm_kernel
from pymla.cuda.matmul.gemm_float import FLOAT_TILE, gemm_float_kernel, gemm_float_tiles_kernel, gemv_float_kernel
from pymla.cuda.matmul.gemm_layout import NARROW, TILE_ROWS, WIDE, layout_of, tile_widths
from pymla.cuda.matmul.gemv import gemv_few_kernel, gemv_kernel
from pymla.cuda.matmul.operands import THREADS, WARPS, Input, Matrices
from pymla.cuda.matmul.transposed import transposed_kernel

#: Tiles that keep a large chip busy.
ENOUGH_TILES = 256

#: Up to this many tokens every row is read straight from the file; beyond, it goes through shared memory.
FEW = 8


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
        if qtype not in FORMATS:
            return Input(self.x.address, 0, 0, *self.x.shape)
        if self.codes is None:
            self.quantised()
            blocks = self.x.size // 32
            quantise_activations[-(-blocks // BLOCKS), THREADS](
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
    matrices, x = Matrices.of(w), activation.input(w.qtype)
    launch = _float_launch if w.qtype in FLOATS else _quantised_launch
    kernel, grid, shared_bytes = launch(w.qtype, len(out), matrices.rows, matrices.count)
    kernel[grid, THREADS, shared_bytes](matrices, x, heads, out)


def _float_launch(qtype, tokens, rows, count):
    """The kernel, the grid and the bytes of shared memory for products of a float type."""
    if tokens <= FEW:
        return gemv_float_kernel(qtype), (-(-rows // WARPS), count, -(-tokens // WARP_TOKENS)), 0
    # Neighbouring blocks take the same rows, which are then read from memory once.
    grid = -(-tokens // FLOAT_TILE), -(-rows // FLOAT_TILE), count
    if grid[0] * grid[1] * count >= ENOUGH_TILES:
        return gemm_float_tiles_kernel(qtype), grid, 0
    # A router's matrix, say: a block would go along its columns alone, slice after slice.
    return gemm_float_kernel(qtype), (-(-tokens // (WARP_TOKENS * WARPS)), -(-rows // WARP_ROWS), count), 0


def _quantised_launch(qtype, tokens, rows, count):
    """The kernel, the grid and the bytes of shared memory for products of a quantised type."""
    if tokens == 1:
        return gemv_kernel(qtype), (-(-rows // (WARP_ROWS * WARPS)), count), 0
    if tokens <= FEW:
        return gemv_few_kernel(qtype), (-(-tokens // WARP_TOKENS), -(-rows // (WARP_ROWS * WARPS)), count), 0
    # Wide tiles read less, and are for matrices that keep all multiprocessors busy with them.
    row_tiles = -(-rows // TILE_ROWS)
    wide = WIDE in tile_widths(qtype) and -(-tokens // WIDE) * row_tiles * count >= ENOUGH_TILES
    activations = WIDE if wide else NARROW
    grid = -(-tokens // activations), row_tiles, count
    return gemm_kernel(qtype, activations), grid, layout_of(qtype, activations).nbytes


def matmul_heads_transposed(w, x, out):
    """``out[t, h] = W[h].T @ x[t, h]`` with H matrices of N rows and K columns.

    `x` float32 (T, H, N) and `out` (T, H, K) may be part of a wider last axis.
    """
    check.matmul_heads_transposed(w, x, out)
    tokens, heads, columns = out.shape
    grid = -(-columns // 32), heads, tokens
    transposed_kernel(w.qtype)[grid, THREADS](Matrices.of(w), x, out)
    return out


def embedding_rows(w, tokens, scale, out):
    """Rows `tokens` (int32 (T,)) of the embedding matrix, times `scale`, as float32 (T, K). A token that is no row of
    the matrix gets the last row."""
    check.embedding_rows(w, tokens, scale, out)
    need_any("embedding_rows", "tokens", tokens, len(w.data), "rows of w")
    embedding_rows_kernel(w.qtype)[len(tokens), THREADS](Matrices.of(w), tokens, scale, out)
    return out


def matmul_kernels(qtype):
    """The kernels of `matmul` and `matmul_heads` for a type."""
    if qtype in FLOATS:
        return [gemv_float_kernel(qtype), gemm_float_kernel(qtype), gemm_float_tiles_kernel(qtype)]
    tiles = [gemm_kernel(qtype, activations) for activations in tile_widths(qtype)]
    return [gemv_kernel(qtype), gemv_few_kernel(qtype), *tiles]


def matmul_heads_transposed_kernels(qtype):
    """The kernels of `matmul_heads_transposed` for a type."""
    return [transposed_kernel(qtype)]


def embedding_rows_kernels(qtype):
    """The kernels of `embedding_rows` for a type."""
    return [embedding_rows_kernel(qtype)]


def activation_kernels(qtypes):
    """The kernels that quantise the input of matrices of some types."""
    return [quantise_activations] if any(qtype in FORMATS for qtype in qtypes) else []
