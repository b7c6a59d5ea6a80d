"""Softmax of scores in memory."""

import numpy as np


def softmax(scores: np.ndarray) -> np.ndarray:
    """``exp(x) / Σ exp(x)`` along the last axis, which may not be empty.

    The largest score is subtracted first, so that no exponential overflows: the result depends on differences of scores
    only. A row in which a score is NaN or +inf, or all are -inf, becomes NaN.

    Parameters
    ----------
    scores : float array (..., n), n ≥ 1
    """
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
