"""The mixture of experts: which experts a token goes to, and what they compute."""

import numpy as np

from pymla.reference.contract import check
from pymla.reference.quant import dequantise


def router(logits, bias, config, ids, weights):
    """Choose `num_experts_per_tok` experts for every token.

    Parameters
    ----------
    logits : float array (T, E)
        The router's matrix product. Left untouched.
    bias : float32 array (E,) or None
        ``exp_probs_b``: added to the scores for the choice only, never to the weights.
    config : ModelConfig
        Its fields ``scoring_func``, ``n_group``, ``topk_group``, ``group_score``, ``norm_topk_prob`` and
        ``routed_scaling_factor``.
    ids : int32 array (T, k)
        Out: the chosen experts, best first.
    weights : float array (T, k)
        Out: their weights.

    Notes
    -----
    DeepSeek-V2 (2024), section 2.2, with group-limited routing as the model's own code does it (a group counts as its
    best expert); DeepSeek-V3 (2024), section 2.1.2 (a group counts as the sum of its two best). Experts outside the
    chosen groups are never chosen.
    """
    check.router(logits, bias, config, ids, weights)
    if config.scoring_func == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    choice = scores if bias is None else scores + bias.astype(scores.dtype)
    if config.n_group > 1:
        grouped = choice.reshape(len(choice), config.n_group, -1)
        best = 1 if config.group_score == "max" else 2
        group_score = np.sort(grouped)[..., -best:].sum(-1)
        kept = np.argsort(-group_score, kind="stable")[:, : config.topk_group]
        mask = np.zeros(group_score.shape, bool)
        np.put_along_axis(mask, kept, True, axis=-1)
        choice = np.where(mask[..., None], grouped, -np.inf).reshape(choice.shape)
    ids[...] = np.argsort(-choice, kind="stable")[:, : ids.shape[1]]
    chosen = np.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdims=True) + 1e-20)
    weights[...] = chosen * config.routed_scaling_factor


def experts(activation, ids, weights, gate, up, down, out, shared=None, add=False):
    """``out[t] = Σ weights[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`` over the experts e = ids[t, j],
    and what the shared experts give every token.

    Parameters
    ----------
    activation : Activation of float array (T, K)
    ids : int32 array (T, k)
    weights : float array (T, k)
    gate, up : QTensor of E matrices of F rows and K columns
    down : QTensor of E matrices of K rows and F columns
    out : float array (T, K)
    shared : (gate, up, down), optional
        As for `ffn`: of the shared experts together, each of F rows.
    add : bool
        Whether `out` is added to, or overwritten.
    """
    check.experts(activation, ids, weights, gate, up, down, out, shared)
    x = activation.x
    if not add:
        out[...] = 0
    if shared is not None:
        ffn(activation, *shared, out, add=True)
    routed = np.zeros_like(out)
    for e in np.unique(ids):
        token, slot = np.nonzero(ids == e)
        matrices = (dequantise(w.data[e], w.qtype).astype(x.dtype) for w in (gate, up, down))
        routed[token] += weights[token, slot, None] * _swiglu(x[token], *matrices)
    out += routed
    return out


def ffn(activation, gate, up, down, out, add=False):
    """The dense feed-forward network, also the shared experts: ``out = down @ (silu(gate @ x) * (up @ x))``.

    Parameters
    ----------
    activation : Activation of float array (T, K)
    gate, up : QTensor of F rows and K columns
    down : QTensor of K rows and F columns
    out : float array (T, K)
    add : bool
        Whether `out` is added to, or overwritten.
    """
    check.ffn(activation, gate, up, down, out)
    x = activation.x
    result = _swiglu(x, *(dequantise(w.data, w.qtype).astype(x.dtype) for w in (gate, up, down)))
    out[...] = out + result if add else result
    return out


def relu_squared(x):
    """``x = max(x, 0)²``, float array (T, K): the nonlinearity of a dense network without a gate."""
    check.relu_squared(x)
    x[...] = np.square(np.maximum(x, 0))
    return x


def _swiglu(x, gate, up, down):
    hidden = x @ gate.T
    return (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T
