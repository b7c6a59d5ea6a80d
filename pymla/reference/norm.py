"""RMS normalisation and the residual sum."""

import numpy as np


def rms_norm(x, weight, eps, out):
    """``out = x / sqrt(mean(x²) + eps) * weight`` along the last axis.

    Parameters
    ----------
    x : float array (T, K)
    weight : float32 array (K,)
    eps : float
    out : float array (T, K)
        May be `x` itself.

    Notes
    -----
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=x.dtype) + x.dtype.type(eps))
    out[...] = x * scale * weight.astype(x.dtype)
    return out


def add(x, y):
    """``x += y``, both float arrays (T, K): the residual connection."""
    x += y
    return x
