"""Quantised matrices: ggml blocks to numbers and back, and the products taken with them."""

import numpy as np

from pymla import ggml
from pymla.errors import PymlaError
from pymla.reference.contract import check
from pymla.reference.formats import FORMATS, dequantise_rows

#: Names of the types that `quantise` writes.
QUANTISERS = tuple(ggml.NAME[qtype] for qtype, each in FORMATS.items() if each.quantise is not None)


class Activation:
    """The input of one or several matrices.

    Parameters
    ----------
    x : float array (T, K)
    """

    def __init__(self, x):
        check.activation(x)
        self.x = x


def quantise_activations(x):
    """Activations as int8 codes with a float32 scale for every 32 values: ``x ≈ codes * scale``.

    Parameters
    ----------
    x : float32 array (T, K)
        K is a multiple of 32.

    Returns
    -------
    codes : int8 array (T, K), from -127 to 127
    scale : float32 array (T, K // 32)
        0 where all values are 0.
    """
    blocks = np.asarray(x, np.float32).reshape(len(x), np.shape(x)[1] // 32, 32)
    largest = np.abs(blocks).max(-1)
    scale = largest / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(127) / largest).astype(np.float32)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return codes.reshape(np.shape(x)), scale


def matmul(w, activation, out):
    """``out = x @ W.T`` for a quantised W.

    Parameters
    ----------
    w : QTensor of N rows and K columns, or of several such matrices
    activation : Activation of float array (T, K)
    out : float array (T, N), or (T, matrices * N)
    """
    check.matmul(w, activation, out)
    x = activation.x
    rows = w.data.reshape(-1, w.data.shape[-1])
    out[...] = x @ dequantise(rows, w.qtype).astype(x.dtype).T
    return out


def matmul_heads(w, x, out):
    """A matrix for each head: ``out[t, h] = W[h] @ x[t, h]``.

    Parameters
    ----------
    w : QTensor of H matrices of N rows and K columns
    x : float array (T, H, K)
    out : float array (T, H, N)
    """
    check.matmul_heads(w, x, out)
    matrices = dequantise(w.data, w.qtype).astype(x.dtype)
    out[...] = np.einsum("thk,hnk->thn", x, matrices)
    return out


def matmul_heads_transposed(w, x, out):
    """``out[t, h] = W[h].T @ x[t, h]``.

    Parameters
    ----------
    w : QTensor of H matrices of N rows and K columns
    x : float array (T, H, N)
        May be part of a wider last axis, as `out` may.
    out : float array (T, H, K)
    """
    check.matmul_heads_transposed(w, x, out)
    out[...] = np.einsum("thn,hnk->thk", x, dequantise(w.data, w.qtype).astype(x.dtype))
    return out


def embedding_rows(w, tokens, scale, out):
    """Rows of the embedding matrix, times `scale`.

    Parameters
    ----------
    w : QTensor of V rows and K columns
    tokens : int32 array (T,)
    scale : float
    out : float array (T, K)
    """
    check.embedding_rows(w, tokens, scale, out)
    out[...] = dequantise(np.ascontiguousarray(w.data[tokens]), w.qtype).astype(out.dtype) * out.dtype.type(scale)
    return out


def dequantise(data: np.ndarray, qtype: int) -> np.ndarray:
    """Weights of rows of ggml blocks as float32.

    Parameters
    ----------
    data : uint8 array (..., row_bytes)
        Rows, or several matrices of them. Of an interleaved type a multiple of the rows that lie together.
    qtype : int
        A type of docs/types.md.

    Returns
    -------
    float32 array (..., K)
    """
    columns = ggml.columns(qtype, data.shape[-1])
    rows = np.ascontiguousarray(data).reshape(-1, data.shape[-1])
    return dequantise_rows(rows, qtype, columns).reshape(*data.shape[:-1], columns)


def quantise(x: np.ndarray, qtype: int) -> np.ndarray:
    """Float weights as ggml blocks.

    Parameters
    ----------
    x : float array (..., K)
        K is a multiple of the type's block.
    qtype : int
        A type whose name is one of `QUANTISERS`.

    Returns
    -------
    uint8 array (..., row_bytes)

    Raises
    ------
    PymlaError
        The type has no quantiser here, or K is no multiple of its block.
    """
    x = np.ascontiguousarray(x, np.float32)
    width = ggml.row_bytes(qtype, x.shape[-1])
    convert = FORMATS[qtype].quantise if qtype in FORMATS else None
    if convert is None:
        raise PymlaError(f"weights cannot be quantised to {ggml.NAME[qtype]}; choose {', '.join(QUANTISERS)}")
    return convert(x.reshape(-1, ggml.BLOCK_SIZE[qtype])).reshape(*x.shape[:-1], width)
