"""Products with quantised matrices. Twin of `pymla.reference.quant`.

Quantised types multiply on integers: activations become int8 with a scale per 32 values, once for all matrices that
read them (`Activation`). Float types multiply in float32. Few tokens read every row straight from the file
(`pymla.cpu.matmul.gemv`); many go through panels (`pymla.cpu.matmul.gemm`).

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

import numpy as np

from pymla import ggml
from pymla.cpu.contract import check
from pymla.cpu.matmul import kernels
from pymla.cpu.matmul.activations import Activation, activation_kernels, counting
from pymla.cpu.matmul.gemm_f32 import F32_ROWS
from pymla.cpu.matmul.matrices import Matrices
from pymla.cpu.matmul.unpacked import PAIR_ROWS
from pymla.cpu.runtime.jit import Kernel
from pymla.tensor import QTensor

__all__ = [
    "Activation",
    "activation_kernels",
    "embedding_rows",
    "embedding_rows_kernels",
    "matmul",
    "matmul_heads",
    "matmul_heads_kernels",
    "matmul_heads_transposed",
    "matmul_heads_transposed_kernels",
    "matmul_kernels",
]

#: Up to this many tokens every row is read once per token, straight from the file (gemv); more go through panels.
GEMV_TOKENS = 4
#: Most items of `matmul_heads_transposed` per head, each with a share of the tokens.
_SHARES = 4


def matmul(w: QTensor, activation: Activation, out: np.ndarray) -> np.ndarray:
    """``out = x @ W.T``: `w` of N rows and K columns, `activation` of (T, K), `out` float32 (T, N).

    Where `w` has several matrices, `out` has (T, matrices * N): the same input for all of them.
    """
    check.matmul(w, activation, out)
    matrices = Matrices.of(w)
    if len(out) <= GEMV_TOKENS:
        items, x = matrices.number * matrices.rows, activation.rows(w.qtype)
        kernels.matmul_rows(w.qtype)[items](matrices, x, counting(len(out)), out)
    elif w.qtype in ggml.QUANTISED:
        items, x = matrices.number * -(-matrices.rows // PAIR_ROWS), activation.panels(w.qtype)
        kernels.matmul_panels(w.qtype)[items](matrices, x, counting(len(out)), out)
    else:
        items, x = matrices.number * -(-matrices.rows // F32_ROWS), activation.panels(w.qtype)
        kernels.matmul_float(w.qtype)[items](matrices, x, out)
    return out


def matmul_heads(w: QTensor, x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """A matrix for each head: ``out[t, h] = W[h] @ x[t, h]``, `x` float32 (T, H, K), `out` float32 (T, H, N)."""
    check.matmul_heads(w, x, out)
    tokens, heads, columns = x.shape
    activation = Activation(x.reshape(tokens * heads, columns))
    matrices = Matrices.of(w)
    kernels.matmul_heads(w.qtype)[matrices.number * matrices.rows](matrices, activation.rows(w.qtype), out)
    return out


def matmul_heads_transposed(w: QTensor, x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``out[t, h] = W[h].T @ x[t, h]`` with H matrices of N rows and K columns.

    `x` float32 (T, H, N) and `out` (T, H, K) may be part of a wider last axis.
    """
    check.matmul_heads_transposed(w, x, out)
    shares = min(_SHARES, len(x))
    kernels.matmul_heads_transposed(w.qtype)[len(w.data) * shares](Matrices.of(w), x, shares, out)
    return out


def embedding_rows(w: QTensor, tokens: np.ndarray, scale: float, out: np.ndarray) -> np.ndarray:
    """Rows `tokens` (int32 (T,)) of the embedding matrix, times `scale`, as float32 (T, K)."""
    check.embedding_rows(w, tokens, scale, out)
    kernels.embedding_rows(w.qtype)[len(tokens)](w.data, tokens, scale, out)
    return out


def matmul_kernels(qtype: int) -> list[Kernel]:
    """The kernels that `matmul` launches for matrices of a type."""
    many = kernels.matmul_panels if qtype in ggml.QUANTISED else kernels.matmul_float
    return [kernels.matmul_rows(qtype), many(qtype)]


def matmul_heads_kernels(qtype: int) -> list[Kernel]:
    """The kernels that `matmul_heads` launches for matrices of a type."""
    return [kernels.matmul_heads(qtype)]


def matmul_heads_transposed_kernels(qtype: int) -> list[Kernel]:
    """The kernels that `matmul_heads_transposed` launches for matrices of a type."""
    return [kernels.matmul_heads_transposed(qtype)]


def embedding_rows_kernels(qtype: int) -> list[Kernel]:
    """The kernels that `embedding_rows` launches for a matrix of a type."""
    return [kernels.embedding_rows(qtype)]
