"""Quantised matrices: ggml blocks to numbers and back, and the products taken with them.

Block layouts follow ``ggml-common.h`` and ``ggml-quants.c`` of llama.cpp; gguf-py's ``quants.py`` is the oracle of the
tests: `dequantise` is bit-exact against it for every type, `quantise` byte-exact.
"""

import numpy as np

from pymla import ggml
from pymla.errors import PymlaError
from pymla.reference.contract import check


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
    blocks = np.asarray(x, np.float32).reshape(len(x), -1, 32)
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


def embedding_rows(w, tokens, out):
    """Rows of the embedding matrix.

    Parameters
    ----------
    w : QTensor of V rows and K columns
    tokens : int32 array (T,)
    out : float array (T, K)
    """
    check.embedding_rows(w, tokens, out)
    out[...] = dequantise(np.ascontiguousarray(w.data[tokens]), w.qtype)
    return out


def dequantise(data, qtype):
    """Weights of ggml blocks as float32.

    Parameters
    ----------
    data : uint8 array (..., row_bytes)
        Whole blocks along the last axis.
    qtype : int
        A type of ``ggml.SUPPORTED``.

    Returns
    -------
    float32 array (..., K)
    """
    shape = data.shape[:-1]
    if qtype == ggml.F32:
        return np.ascontiguousarray(data).view(np.float32)
    if qtype == ggml.F16:
        return np.ascontiguousarray(data).view(np.float16).astype(np.float32)
    if qtype == ggml.BF16:
        return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    blocks = np.ascontiguousarray(data).reshape(-1, ggml.BLOCK_BYTES[qtype])
    return _DEQUANTISE[qtype](blocks).reshape(*shape, -1)


def quantise(x, qtype):
    """Float weights as ggml blocks.

    Parameters
    ----------
    x : float32 array (..., K)
        K is a multiple of the type's block.
    qtype : int
        F32, F16, BF16, Q4_0, Q4_1 or Q8_0.

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
    if qtype == ggml.F32:
        return x.view(np.uint8)
    if qtype == ggml.F16:
        return x.astype(np.float16).view(np.uint8)
    if qtype == ggml.BF16:
        return _to_bf16(x).view(np.uint8)
    if qtype not in _QUANTISE:
        raise PymlaError(f"weights cannot be quantised to {ggml.NAME[qtype]}; choose {', '.join(QUANTISERS)}")
    return _QUANTISE[qtype](x.reshape(-1, ggml.BLOCK_SIZE[qtype])).reshape(*x.shape[:-1], width)


def _half(column):
    """A two-byte column (n, 2) as float32 (n, 1)."""
    return np.ascontiguousarray(column).view(np.float16).astype(np.float32)


def _nibbles(qs):
    """Codes of 4 bits: the low halves of the bytes come first, then the high halves."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _dequantise_q4_0(blocks):
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _dequantise_q4_1(blocks):
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks[:, 2:4])


def _dequantise_q8_0(blocks):
    return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _dequantise_q6_k(blocks):
    low, high, scales, d = np.split(blocks, [128, 192, 208], axis=-1)
    low, high = low.reshape(-1, 2, 1, 2, 32), high.reshape(-1, 2, 1, 32)
    # A half of 128 weights has 64 bytes of low nibbles and 32 bytes that hold four times the two high bits.
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = np.concatenate([high >> s & 3 for s in (0, 2, 4, 6)], axis=2)
    codes = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scale = _half(d) * scales.view(np.int8).astype(np.float32)
    return (scale[..., None] * codes).reshape(len(blocks), 256)


_DEQUANTISE = {
    ggml.Q4_0: _dequantise_q4_0,
    ggml.Q4_1: _dequantise_q4_1,
    ggml.Q8_0: _dequantise_q8_0,
    ggml.Q6_K: _dequantise_q6_k,
}


def _to_bf16(x):
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, bits >> 16 | 64, rounded).astype(np.uint16)


def _inverse(d):
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d).astype(np.float32)


def _pack_nibbles(codes):
    return codes[:, :16] | codes[:, 16:] << 4


def _quantise_q4_0(blocks):
    # The value of largest magnitude keeps its sign and becomes code 0, that is -8.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], axis=-1)
    d = extreme / np.float32(-8)
    codes = np.trunc(blocks * _inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([d.astype(np.float16).view(np.uint8), _pack_nibbles(codes)], axis=-1)


def _quantise_q4_1(blocks):
    low = blocks.min(-1, keepdims=True)
    d = (blocks.max(-1, keepdims=True) - low) / np.float32(15)
    codes = np.trunc((blocks - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    halves = [v.astype(np.float16).view(np.uint8) for v in (d, low)]
    return np.concatenate([*halves, _pack_nibbles(codes)], axis=-1)


def _quantise_q8_0(blocks):
    d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d)
    # ggml rounds halves away from zero (roundf), NumPy to even.
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    return np.concatenate([d.astype(np.float16).view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=-1)


_QUANTISE = {ggml.Q4_0: _quantise_q4_0, ggml.Q4_1: _quantise_q4_1, ggml.Q8_0: _quantise_q8_0}

#: Names of the types that `quantise` writes.
QUANTISERS = tuple(ggml.NAME[t] for t in (ggml.F32, ggml.F16, ggml.BF16, *_QUANTISE))
