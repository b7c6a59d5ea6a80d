"""The lightning indexer of sparse attention: which positions a token attends to."""

from __future__ import annotations

import numpy as np

from pymla.pages import Step, block_rows
from pymla.reference import memory
from pymla.reference.attention.cache_rows import read_rows
from pymla.reference.contract import check
from pymla.tensor import QTensor


def index_cache(qtype: int, width: int, slots: int) -> QTensor:
    """Memory for the indexer's keys of one layer. What it holds is not set; `store` writes rows into it.

    Parameters
    ----------
    qtype : int
        F32, F16, BF16 or Q8_0.
    width : int
        Numbers of a key, a multiple of 32.
    slots : int
        A multiple of 64.
    """
    (keys,) = block_rows(memory, [(qtype, width)], slots)
    return keys


def choose(q: np.ndarray, weights: np.ndarray, keys: QTensor, step: Step, out: np.ndarray) -> np.ndarray:
    """The positions of the k largest scores ``I[t, s] = Σ_h weights[t, h] * max(0, q[t, h] · keys[s])``, s ≤ p.

    Parameters
    ----------
    q : float array (T, H, D)
        The indexer's queries, rotated. T may be 0.
    weights : float array (T, H)
        Of any sign.
    keys : QTensor of slots × D
        Of a type of `index_cache`.
    step : Step
        As for `absorbed`.
    out : int32 array (T, k)
        Ascending positions; of equal scores the lower position is chosen. A token whose position p is below k gets 0
        to p, and behind them -1.

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
    A score that is not a number counts as the smallest of all.

    DeepSeek-AI, "DeepSeek-V3.2-Exp" (2025), section 2.1, equation 1.
    """
    check.choose(q, weights, keys, step, out)
    most = out.shape[1]
    for t, position in enumerate(step.positions):
        seen = int(position) + 1
        out[t] = -1
        if seen <= most:
            out[t, :seen] = np.arange(seen)
            continue
        rows = read_rows(keys, step.block_tables[step.seq_of[t]], np.empty((seen, q.shape[2]), q.dtype))
        scores = weights[t] @ np.maximum(q[t] @ rows.T, 0)
        scores[np.isnan(scores)] = -np.inf
        # A stable sort keeps the lower of two positions with equal scores in front.
        out[t] = np.sort(np.argsort(-scores, kind="stable")[:most])
    return out
