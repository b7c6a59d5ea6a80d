"""Sparse attention: the absorbed form over chosen positions."""

from __future__ import annotations

import numpy as np

from pymla.pages import PAGE, Step
from pymla.reference.attention.cache_rows import row_numbers
from pymla.reference.attention.softmax import softmax
from pymla.reference.contract import check
from pymla.tensor import QTensor


def sparse(
    q: np.ndarray,
    latent: QTensor,
    rope: QTensor,
    step: Step,
    chosen: np.ndarray,
    scale: float,
    out: np.ndarray,
) -> np.ndarray:
    """`absorbed` over the chosen positions of each token alone.

    ``out[t, h] = Σ softmax(scale * q[t, h] · [c_kv; k_pe])[p] * c_kv[p]`` over the positions p in ``chosen[t]``.

    Parameters
    ----------
    q, latent, rope, step, scale, out
        As for `absorbed`.
    chosen : int32 array (T, k)
        From `choose`: ascending positions, one at least, then -1.

    Returns
    -------
    `out`

    Raises
    ------
    PymlaError
        As for `absorbed`; or the positions of a token are none that it sees, or not in order.

    Notes
    -----
    DeepSeek-AI, "DeepSeek-V3.2-Exp" (2025), section 2.1, equation 2.
    """
    check.sparse(q, latent, rope, step, chosen, scale, out)
    rank = out.shape[2]
    for t, positions in enumerate(chosen):
        positions = positions[positions >= 0]
        slots = step.block_tables[step.seq_of[t]][positions // PAGE] * PAGE + positions % PAGE
        c_kv = row_numbers(latent, slots, rank, q.dtype)
        keys = np.concatenate([c_kv, row_numbers(rope, slots, q.shape[2] - rank, q.dtype)], axis=1)
        out[t] = softmax(scale * (q[t] @ keys.T)) @ c_kv
    return out
