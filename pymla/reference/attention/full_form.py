"""Attention over a cache of whole keys and values of all heads (``--mla 0``)."""

from __future__ import annotations

import numpy as np

from pymla.pages import Step
from pymla.reference.attention.cache_rows import read_rows
from pymla.reference.attention.expanded_form import KeysValues, attend
from pymla.reference.contract import check
from pymla.tensor import QTensor


def full(q: np.ndarray, keys: QTensor, values: QTensor, step: Step, scale: float, out: np.ndarray) -> np.ndarray:
    """Attention over a cache that has keys and values of every head in each row.

    ``out[t, h] = Σ softmax(scale * q[t, h] · keys[:, h])[p] * values[p, h]`` over the positions
    p ≤ ``step.positions[t]`` of the token's sequence.

    Parameters
    ----------
    q : float array (T, H, nope + R)
        T may be 0.
    keys : QTensor of slots × H * (nope + R)
        Of a type of `pymla.pages.CACHE_TYPES` whose blocks divide nope + R.
    values : QTensor of slots × H * v
        Likewise, with blocks that divide v. Its type may be another one.
    step : Step
        As for `absorbed`.
    scale : float
        Factor of the scores before the softmax.
    out : float array (T, H, v)
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
    Tested number by number in float64, to 64 units in the last place. Vaswani et al., "Attention is all you need"
    (2017), section 3.2.
    """
    check.full(q, keys, values, step, scale, out)
    heads, size, v = q.shape[1], q.shape[2], out.shape[2]
    for sequence in np.unique(step.seq_of):
        tokens = np.flatnonzero(step.seq_of == sequence)
        table, length = step.block_tables[sequence], int(step.positions[tokens].max()) + 1
        k = read_rows(keys, table, np.empty((length, heads * size), q.dtype)).reshape(length, heads, size)
        v_rows = read_rows(values, table, np.empty((length, heads * v), q.dtype)).reshape(length, heads, v)
        result = np.empty((len(tokens), heads, v), out.dtype)
        out[tokens] = attend(q[tokens], KeysValues(k, v_rows), step.positions[tokens], scale, result)
    return out
