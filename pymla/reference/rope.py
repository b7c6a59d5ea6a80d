"""Rotary position embedding, on interleaved pairs as DeepSeek's models use it and on halves as GPT-NeoX does, and the
attention temperature.
"""

import numpy as np

from pymla.reference.contract import check


def angles(positions, inv_freq, magnitude, out):
    """Cosine and sine of every position and frequency, times `magnitude`.

    Parameters
    ----------
    positions : int32 array (T,)
    inv_freq : float64 array (R // 2,)
        Radians per position (`ModelConfig.inv_freq`).
    magnitude : float
        `ModelConfig.rope_magnitude`.
    out : float array (T, R // 2, 2)
        The last axis holds cosine and sine. Angles are taken in float64: in float32 a position of 100,000 has an error
        of 0.004 radians.
    """
    check.angles(positions, inv_freq, magnitude, out)
    theta = positions[:, None].astype(np.float64) * inv_freq
    out[..., 0] = np.cos(theta) * magnitude
    out[..., 1] = np.sin(theta) * magnitude
    return out


def rope_interleaved(x, cos_sin):
    """Rotate pairs (2i, 2i + 1) of the last R values of every head, in place.

    Parameters
    ----------
    x : float array (T, H, D)
        D ≥ R; the first D - R values stay as they are.
    cos_sin : float array (T, R // 2, 2)
        From `angles`.

    Notes
    -----
    Su et al., "RoFormer" (2021), equation 34; the interleaved layout of llama.cpp's ``LLAMA_ROPE_TYPE_NORM``.
    """
    check.rope_interleaved(x, cos_sin)
    size = 2 * cos_sin.shape[1]
    pairs = x[..., x.shape[-1] - size :].reshape(*x.shape[:-1], size // 2, 2)
    cos, sin = cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    even = pairs[..., 0] * cos - pairs[..., 1] * sin
    odd = pairs[..., 0] * sin + pairs[..., 1] * cos
    x[..., x.shape[-1] - size :] = np.stack([even, odd], axis=-1).reshape(*x.shape[:-1], size)
    return x


def rope_neox(x, cos_sin):
    """Rotate pairs (i, i + R / 2) of the last R values of every head, in place.

    Parameters
    ----------
    x, cos_sin : as for `rope_interleaved`

    Notes
    -----
    The layout of GPT-NeoX and llama.cpp's ``LLAMA_ROPE_TYPE_NEOX``, transformers' ``rotate_half``.
    """
    check.rope_neox(x, cos_sin)
    pairs = cos_sin.shape[1]
    first, second = np.split(x[..., x.shape[-1] - 2 * pairs :].copy(), 2, axis=-1)
    cos, sin = cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    x[..., x.shape[-1] - 2 * pairs : x.shape[-1] - pairs] = first * cos - second * sin
    x[..., x.shape[-1] - pairs :] = first * sin + second * cos
    return x


def temper(x, positions, scale, length):
    """Multiply the queries of every token by the attention temperature of its position, in place.

    Parameters
    ----------
    x : float array (T, H, D)
    positions : int32 array (T,)
    scale : float
        `AttentionTemperature.scale`.
    length : int
        `AttentionTemperature.length`, at least 1: queries below this position stay as they are.

    Notes
    -----
    ``llm_graph_input_attn_temp`` of llama.cpp; ``get_llama_4_attn_scale`` of transformers' Mistral4.
    """
    check.temper(x, positions, scale, length)
    x *= (1 + scale * np.log1p(positions // length))[:, None, None].astype(x.dtype)
    return x
