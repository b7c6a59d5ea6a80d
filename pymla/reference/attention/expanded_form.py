"""The expanded form: keys and values of every head from the rows of the cache, then ordinary causal attention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pymla.reference.attention.softmax import softmax
from pymla.reference.contract import check
from pymla.reference.quant import dequantise
from pymla.tensor import QTensor


class KeysValues(NamedTuple):
    """Expanded keys and values of some heads of a sequence."""

    keys: np.ndarray  # float (S, H, nope + R)
    values: np.ndarray  # float (S, H, v)


def keys_values(
    tokens: int, heads: int, nope: int, rotated: int, v: int, exact: bool, dtype: type[np.floating] = np.float32
) -> KeysValues:
    """Memory for expanded keys and values, which `expand` fills. What it holds is not set.

    Parameters
    ----------
    tokens, heads : int
        S and H; tokens may be 0.
    nope, rotated, v : int
        Numbers of a key that are not rotated, and that are, R, and of a value.
    exact : bool
        Whether they are wanted in `dtype`. They always are here; the other backends may have a faster form.
    dtype : float32 or float64
    """
    return KeysValues(np.empty((tokens, heads, nope + rotated), dtype), np.empty((tokens, heads, v), dtype))


def expand(c_kv: np.ndarray, k_pe: np.ndarray, k_b: QTensor, v_b: QTensor, out: KeysValues) -> KeysValues:
    """Keys and values of some heads: ``keys[s, h] = [k_b[h] @ c_kv[s]; k_pe[s]]``, ``values[s, h] = v_b[h] @ c_kv[s]``.

    Parameters
    ----------
    c_kv : float array (S, rank)
        S may be 0.
    k_pe : float array (S, R)
        Rotated; all heads share it. May be columns of a wider array.
    k_b : QTensor of H matrices of nope rows and rank columns
        ``W_k_b`` of these heads, in any type of ``ggml.SUPPORTED``.
    v_b : QTensor of H matrices of v rows and rank columns
        ``W_v_b``; its type may be another one.
    out : KeysValues
        From `keys_values`.

    Returns
    -------
    `out`

    Raises
    ------
    PymlaError
        Shapes, dtypes or types do not fit each other.

    Notes
    -----
    Tested number by number in float64, to 64 units in the last place. DeepSeek-V2, equations 10, 11 and 17.
    """
    check.expand(c_kv, k_pe, k_b, v_b, check.sizes("expand", out))
    keys, values = out
    nope = keys.shape[2] - k_pe.shape[1]
    keys[..., :nope] = np.einsum("sr,hnr->shn", c_kv, dequantise(k_b.data, k_b.qtype).astype(keys.dtype))
    keys[..., nope:] = k_pe[:, None]
    values[...] = np.einsum("sr,hvr->shv", c_kv, dequantise(v_b.data, v_b.qtype).astype(keys.dtype))
    return out


def expanded(
    q: np.ndarray, keys_values: KeysValues, positions: np.ndarray, scale: float, out: np.ndarray
) -> np.ndarray:
    """Causal attention of one sequence over expanded keys and values.

    ``out[t, h] = Σ softmax(scale * q[t, h] · keys[:, h])[p] * values[p, h]`` over the rows p ≤ ``positions[t]``.

    Parameters
    ----------
    q : float array (T, H, nope + R)
        T may be 0.
    keys_values : KeysValues of S rows and H heads
        Filled by `expand`. Rows behind the largest position are not read.
    positions : int32 array (T,), from 0 to S - 1
        In any order.
    scale : float
        Factor of the scores before the softmax.
    out : float array (T, H, v)
        May be some heads of a larger array.

    Returns
    -------
    `out`

    Raises
    ------
    PymlaError
        Shapes or dtypes do not fit each other, or a position is none of the keys'.

    Notes
    -----
    Scores may have any height: only their differences matter. Tested number by number in float64, to 64 units in the
    last place. DeepSeek-V2, equation 18.
    """
    check.expanded(q, check.sizes("expanded", keys_values), positions, out)
    return attend(q, keys_values, positions, scale, out)


def attend(q: np.ndarray, keys_values: KeysValues, positions: np.ndarray, scale: float, out: np.ndarray) -> np.ndarray:
    """`expanded` for arguments that were checked before."""
    keys, values = keys_values
    for t, position in enumerate(positions):
        seen = int(position) + 1
        weights = softmax(scale * np.einsum("hd,shd->hs", q[t], keys[:seen]))
        out[t] = np.einsum("hs,shv->hv", weights, values[:seen])
    return out
