"""Normalisation and the residual sum."""

import numpy as np

from pymla.reference.contract import check
from pymla.reference.quant import Activation


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
    check.rms_norm(x, weight, eps, out)
    scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + x.dtype.type(eps))
    out[...] = x * scale * weight.astype(x.dtype)
    return out


def layer_norm(x, weight, bias, eps, out):
    """``out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` along the last axis.

    Parameters
    ----------
    x : float array (T, K)
    weight, bias : float32 array (K,)
    eps : float
    out : float array (T, K)
        May be `x` itself.

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization" (2016), equation 4.
    """
    check.layer_norm(x, weight, bias, eps, out)
    centred = x - np.mean(x, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + x.dtype.type(eps))
    out[...] = centred * scale * weight.astype(x.dtype) + bias.astype(x.dtype)
    return out


def normed(x, weight, eps, out, y=None):
    """What matrices read of normalised rows: ``x += y``, then ``out = rms_norm(x)``.

    Parameters
    ----------
    x : float array (T, K), contiguous
    weight, eps : as for `rms_norm`
    out : float array (T, K)
    y : float array (T, K), optional
        Added to `x` first: the residual connection.

    Returns
    -------
    Activation of `out`
    """
    check.normed(x, weight, eps, out, y)
    if y is not None:
        add(x, y)
    return Activation(rms_norm(x, weight, eps, out))


def add(x, y):
    """``x += y``, both float arrays (T, K): the residual connection."""
    check.add(x, y)
    x += y
    return x
