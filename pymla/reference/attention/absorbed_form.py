"""The absorbed form: all heads of a token meet the rows of the cache as they are."""

from __future__ import annotations

import numpy as np

from pymla.pages import Step
from pymla.reference.attention.cache_rows import read_rows
from pymla.reference.attention.softmax import softmax
from pymla.reference.contract import check
from pymla.reference.quant import matmul_heads_transposed
from pymla.tensor import QTensor


def absorb(q: np.ndarray, k_b: QTensor, out: np.ndarray) -> np.ndarray:
    """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

    Their products with rows ``[c_kv; k_pe]`` of the cache are those of `q` with keys ``[k_b[h] @ c_kv; k_pe]``.

    Parameters
    ----------
    q : float array (T, H, nope + R)
        The last R numbers are rotated. T may be 0.
    k_b : QTensor of H matrices of nope rows and rank columns
        ``W_k_b`` of the layer, in any type of ``ggml.SUPPORTED``.
    out : float array (T, H, rank + R)

    Returns
    -------
    `out`

    Raises
    ------
    PymlaError
        Shapes, dtypes or the type do not fit each other.

    Notes
    -----
    DeepSeek-V2, section 2.1.2: "W^UK can be absorbed into W^Q".
    """
    check.absorb(q, k_b, out)
    nope = k_b.data.shape[1]
    rank = out.shape[2] - (q.shape[2] - nope)
    matmul_heads_transposed(k_b, q[..., :nope], out[..., :rank])
    out[..., rank:] = q[..., nope:]
    return out


def absorbed(q: np.ndarray, latent: QTensor, rope: QTensor, step: Step, scale: float, out: np.ndarray) -> np.ndarray:
    """Attention in the latent space: multi-query, with keys of rank + R numbers and values of rank numbers.

    ``out[t, h] = Σ softmax(scale * q[t, h] · [c_kv; k_pe])[p] * c_kv[p]`` over the positions p ≤ ``step.positions[t]``
    of the token's sequence.

    Parameters
    ----------
    q : float array (T, H, rank + R)
        From `absorb`. T may be 0.
    latent : QTensor of slots × rank
        ``c_kv`` of the layer, of a type of `pymla.pages.CACHE_TYPES`.
    rope : QTensor of slots × R
        ``k_pe`` of the layer.
    step : Step
        Read are ``seq_of`` (T,), rows of ``block_tables``; ``positions`` (T,), from 0 to 64 * pages - 1; and of
        ``block_tables`` (B, pages) the pages up to these positions. Several sequences may be mixed.
    scale : float
        Factor of the scores before the softmax, such as ``(nope + R) ** -0.5``.
    out : float array (T, H, rank)
        May be part of a larger array.

    Returns
    -------
    `out`

    Raises
    ------
    PymlaError
        Shapes, dtypes or types do not fit each other; or a sequence, a position or a page is none of the step's or the
        cache's.

    Notes
    -----
    A NaN in a row that a token sees makes its result NaN, and no other token's. Tested number by number in float64
    against the definition and against `expanded`, to 64 units in the last place.

    DeepSeek-V2, section 2.1.2 and equation 18.
    """
    check.absorbed(q, latent, rope, step, scale, out)
    return attend(q, latent, rope, step, scale, out)


def attend(q: np.ndarray, latent: QTensor, rope: QTensor, step: Step, scale: float, out: np.ndarray) -> np.ndarray:
    """`absorbed` for arguments that were checked before."""
    rank, rotated = out.shape[2], q.shape[2] - out.shape[2]
    for sequence in np.unique(step.seq_of):
        tokens = np.flatnonzero(step.seq_of == sequence)
        table, length = step.block_tables[sequence], int(step.positions[tokens].max()) + 1
        c_kv = read_rows(latent, table, np.empty((length, rank), q.dtype))
        k_pe = read_rows(rope, table, np.empty((length, rotated), q.dtype))
        keys = np.concatenate([c_kv, k_pe], axis=1)
        for t in tokens:
            seen = int(step.positions[t]) + 1
            out[t] = softmax(scale * (q[t] @ keys[:seen].T)) @ c_kv[:seen]
    return out
