"""Multi-head latent attention over a paged cache, in its absorbed and its expanded form.

A cache row belongs to a slot: slot ``block_table[p // 64] * 64 + p % 64`` holds position p of a sequence. Lengths say
what is attended: the token at position p sees positions 0 to p of its sequence, and nothing else is ever read.

DeepSeek-V2 (2024), section 2.1 and appendix C.
"""

from typing import NamedTuple

import numpy as np

from pymla.contract import FLOAT16, FLOATS
from pymla.pages import PAGE, LatentCache, block_rows
from pymla.reference import memory
from pymla.reference.contract import check
from pymla.reference.quant import dequantise, matmul_heads_transposed, quantise
from pymla.scratch import HOST

#: Heads that `expand` takes at a time.
heads_at_once = HOST.heads_at_once


def latent_cache(layout, slots):
    """Memory for ``c_kv`` and ``k_pe`` of so many slots; `layout` from `pymla.engine.cache_layout.row_layout`."""
    return LatentCache(*block_rows(memory, layout, slots))


def store(rows, slots, cache):
    """Write rows into the cache in its type.

    Parameters
    ----------
    rows : float array (T, W)
    slots : int32 array (T,)
    cache : QTensor of (number of slots) rows and W columns
    """
    check.store(rows, slots, cache, (*FLOATS, *FLOAT16))
    cache.data[slots] = quantise(rows.astype(np.float32), cache.qtype)


def load(cache, block_table, out):
    """The first rows of a sequence as numbers.

    Parameters
    ----------
    cache : QTensor of slots × W
    block_table : int32 array (pages,)
    out : float array (S, W)
    """
    check.load(cache, block_table, out)
    positions = np.arange(len(out))
    out[...] = dequantise(cache.data[block_table[positions // PAGE] * PAGE + positions % PAGE], cache.qtype)
    return out


def absorb(q, k_b, out):
    """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

    Parameters
    ----------
    q : float array (T, H, nope + R)
    k_b : QTensor of H matrices of nope rows and rank columns
    out : float array (T, H, rank + R)
    """
    check.absorb(q, k_b, out)
    nope = k_b.data.shape[1]
    rank = out.shape[2] - (q.shape[2] - nope)
    matmul_heads_transposed(k_b, q[..., :nope], out[..., :rank])
    out[..., rank:] = q[..., nope:]
    return out


def absorbed(q, latent, rope, step, scale, out):
    """Attention in the latent space: multi-query, with keys of size rank + R and values of size rank.

    ``out[t, h] = Σ softmax(scale * q[t, h] · [c_kv; k_pe])[p] * c_kv[p]`` over the positions p ≤ ``step.positions[t]``.

    Parameters
    ----------
    q : float array (T, H, rank + R)
        Queries with ``W_k_b`` folded in; the last R values are rotated.
    latent : QTensor of slots × rank
        ``c_kv`` of the layer.
    rope : QTensor of slots × R
        ``k_pe`` of the layer.
    step : Step
        ``seq_of`` (T,), ``positions`` (T,) and ``block_tables`` (B, pages).
    scale : float
    out : float array (T, H, rank)
    """
    check.absorbed(q, latent, rope, step, scale, out)
    for b in np.unique(step.seq_of):
        tokens = np.flatnonzero(step.seq_of == b)
        length = int(step.positions[tokens].max()) + 1
        c_kv = load(latent, step.block_tables[b], np.empty((length, out.shape[2]), q.dtype))
        k_pe = load(rope, step.block_tables[b], np.empty((length, q.shape[2] - out.shape[2]), q.dtype))
        keys = np.concatenate([c_kv, k_pe], axis=1)
        for t in tokens:
            seen = int(step.positions[t]) + 1
            out[t] = _softmax(scale * (q[t] @ keys[:seen].T)) @ c_kv[:seen]
    return out


#: The same mathematics with all scores in memory at once. The reference has no other way, so the two are one function.
absorbed_materialised = absorbed


class KeysValues(NamedTuple):
    """Expanded keys, float (S, H, nope + R), and values, float (S, H, v)."""

    keys: np.ndarray
    values: np.ndarray


def keys_values(tokens, heads, size, v, exact, dtype=np.float32):
    """Memory for the expanded keys, of `size` numbers, and values of some heads, of `dtype`: always exact here."""
    return KeysValues(np.empty((tokens, heads, size), dtype), np.empty((tokens, heads, v), dtype))


def expand(c_kv, k_pe, k_b, v_b, out):
    """Keys and values of some heads from latent rows: ``k = [W_k_b c_kv; k_pe]``, ``v = W_v_b c_kv``.

    Parameters
    ----------
    c_kv : float array (S, rank)
    k_pe : float array (S, R)
        Rotated; all heads share it. May be columns of a wider array.
    k_b : QTensor of H matrices of nope rows and rank columns
    v_b : QTensor of H matrices of v rows and rank columns
    out : KeysValues
    """
    check.expand(c_kv, k_pe, k_b, v_b, check.sizes("expand", out))
    keys, values = out
    nope = keys.shape[2] - k_pe.shape[1]
    keys[..., :nope] = np.einsum("sr,hnr->shn", c_kv, dequantise(k_b.data, k_b.qtype).astype(keys.dtype))
    keys[..., nope:] = k_pe[:, None]
    values[...] = np.einsum("sr,hvr->shv", c_kv, dequantise(v_b.data, v_b.qtype).astype(keys.dtype))
    return out


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence over expanded keys and values.

    Parameters
    ----------
    q : float array (T, H, nope + R)
    keys_values : KeysValues
    positions : int32 array (T,)
        Position p attends to the first p + 1 rows.
    scale : float
    out : float array (T, H, v)
        May be some heads of a larger array.
    """
    check.expanded(q, check.sizes("expanded", keys_values), positions, out)
    keys, values = keys_values
    for t, position in enumerate(positions):
        seen = int(position) + 1
        weights = _softmax(scale * np.einsum("hd,shd->hs", q[t], keys[:seen]))
        out[t] = np.einsum("hs,shv->hv", weights, values[:seen])
    return out


def full(q, keys, values, step, scale, out):
    """Attention over a cache of whole keys and values (``--mla 0``).

    Parameters
    ----------
    q : float array (T, H, nope + R)
    keys : QTensor of slots × H * (nope + R)
    values : QTensor of slots × H * v
    step : Step
    scale : float
    out : float array (T, H, v)
    """
    check.full(q, keys, values, step, scale, out)
    heads = q.shape[1]
    for b in np.unique(step.seq_of):
        tokens = np.flatnonzero(step.seq_of == b)
        length = int(step.positions[tokens].max()) + 1
        k = load(keys, step.block_tables[b], np.empty((length, heads * q.shape[2]), q.dtype)).reshape(length, heads, -1)
        v = load(values, step.block_tables[b], np.empty((length, heads * out.shape[2]), q.dtype))
        v = v.reshape(length, heads, -1)
        result = np.empty((len(tokens), *out.shape[1:]), out.dtype)
        out[tokens] = expanded(q[tokens], KeysValues(k, v), step.positions[tokens], scale, result)
    return out


def _softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)
