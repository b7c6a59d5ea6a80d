"""What operations compute: the formulas themselves, in float64, token by token and head by head.

Tests compare every backend with these, the reference included.
"""

import numpy as np

from pymla.pages import HADAMARD_TYPES, PAGE
from pymla.reference.quant import dequantise
from pymla.tensor import QTensor


def dense(w: QTensor) -> np.ndarray:
    """The numbers of a matrix. `test_reference_quant.py` compares `dequantise` with gguf-py."""
    return dequantise(w.data, w.qtype).astype(np.float64)


def rms_norm(x, weight, eps):
    return np.array([row / np.sqrt(row @ row / len(row) + eps) * weight for row in x.astype(np.float64)])


def layer_norm(x, weight, bias, eps):
    rows = x.astype(np.float64)
    return np.array([(row - row.mean()) / np.sqrt(row.var() + eps) * weight + bias for row in rows])


def rotated(x, positions, inv_freq, magnitude, layout):
    """Pairs at the end of every head of x (T, H, D), turned as complex numbers: neighbours, or with the layout "neox"
    a number of the first half and one of the second."""
    result, count = x.astype(np.float64), len(inv_freq)
    numbers = result[..., result.shape[-1] - 2 * count :]
    for t, position in enumerate(positions):
        for i, frequency in enumerate(inv_freq):
            a, b = (i, i + count) if layout == "neox" else (2 * i, 2 * i + 1)
            turned = (numbers[t, :, a] + 1j * numbers[t, :, b]) * magnitude * np.exp(1j * position * frequency)
            numbers[t, :, a], numbers[t, :, b] = turned.real, turned.imag
    return result


def tempered(x, positions, scale, length):
    """Queries (T, H, D) times the attention temperature of their positions."""
    factors = [1 + scale * np.log(1 + np.floor(position / length)) for position in positions]
    return np.array([factor * query for factor, query in zip(factors, x.astype(np.float64), strict=True)])


def route(logits, bias, used, config):
    """The chosen experts, best first, and their weights: int (T, used) and float64 (T, used)."""
    ids, weights = [], []
    for row in logits.astype(np.float64):
        experts, size = range(len(row)), len(row) // config.n_group
        if config.scoring_func == "sigmoid":
            scores = [1 / (1 + np.exp(-x)) for x in row]
        else:
            total = sum(np.exp(x - row.max()) for x in row)
            scores = [np.exp(x - row.max()) / total for x in row]
        choice = [score + (0 if bias is None else float(bias[e])) for e, score in enumerate(scores)]
        best = 2 if config.group_score == "top2" else 1
        worth = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(config.n_group)]
        kept = sorted(range(config.n_group), key=lambda g, worth=worth: -worth[g])[: config.topk_group]
        chosen = sorted((e for e in experts if e // size in kept), key=lambda e, choice=choice: -choice[e])[:used]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1
        ids.append(chosen)
        weights.append([config.routed_scaling_factor * scores[e] / total for e in chosen])
    return np.array(ids), np.array(weights)


def swiglu(x, gate, up, down):
    """A token through a gated network."""
    g, u = gate @ x, up @ x
    return down @ np.array([a / (1 + np.exp(-a)) * b for a, b in zip(g, u, strict=True)])


def attend(q, keys, values, scale):
    """A query over the keys (S, D) and values (S, v) that it sees."""
    scores = scale * (keys @ q)
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def hadamard(rows):
    """The matrix of 1 and -1 of so many rows, a power of two: the sign is the parity of bits that two numbers share."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(rows)] for i in range(rows)])


def cached(rows: QTensor) -> np.ndarray:
    """The numbers of rows of a cache."""
    numbers = dense(rows)
    if rows.qtype not in HADAMARD_TYPES:
        return numbers
    return (numbers.reshape(-1, 32) @ hadamard(32) / 8).reshape(numbers.shape)


def rows_of(cache: QTensor, step, sequence, length):
    """The first rows of a sequence, slot by slot."""
    slots = [step.block_tables[sequence, p // PAGE] * PAGE + p % PAGE for p in range(length)]
    return cached(QTensor(cache.qtype, cache.data[slots]))


def absorbed(q, latent: QTensor, rope: QTensor, step, scale):
    """Attention of q (T, H, rank + R) in the latent space: (T, H, rank)."""
    out = []
    for t, (sequence, position) in enumerate(zip(step.seq_of, step.positions, strict=True)):
        c_kv = rows_of(latent, step, sequence, position + 1)
        keys = np.concatenate([c_kv, rows_of(rope, step, sequence, position + 1)], axis=1)
        out.append([attend(head, keys, c_kv, scale) for head in q[t].astype(np.float64)])
    return np.array(out)


def index_scores(q, weights, keys: QTensor, step):
    """The indexer's scores of every token for the positions that it sees: a list of T arrays."""
    scores = []
    for t, (sequence, position) in enumerate(zip(step.seq_of, step.positions, strict=True)):
        rows, heads = rows_of(keys, step, sequence, position + 1), q[t].astype(np.float64)
        scores.append(
            np.array([sum(w * max(0, h @ row) for w, h in zip(weights[t], heads, strict=True)) for row in rows])
        )
    return scores


def sparse(q, latent: QTensor, rope: QTensor, step, chosen, scale):
    """Attention of q (T, H, rank + R) in the latent space over chosen positions (T, k): (T, H, rank)."""
    out = []
    for t, sequence in enumerate(step.seq_of):
        positions = [p for p in chosen[t] if p >= 0]
        slots = [step.block_tables[sequence, p // PAGE] * PAGE + p % PAGE for p in positions]
        c_kv, k_pe = (cached(QTensor(rows.qtype, rows.data[slots])) for rows in (latent, rope))
        keys = np.concatenate([c_kv, k_pe], axis=1)
        out.append([attend(head, keys, c_kv, scale) for head in q[t].astype(np.float64)])
    return np.array(out)


def full(q, keys: QTensor, values: QTensor, step, scale):
    """Attention of q (T, H, D) over cached keys and values of all heads: (T, H, v)."""
    (tokens, heads, size), out = q.shape, []
    for t in range(tokens):
        seen = step.positions[t] + 1
        k = rows_of(keys, step, step.seq_of[t], seen).reshape(seen, heads, size)
        v = rows_of(values, step, step.seq_of[t], seen).reshape(seen, heads, -1)
        out.append([attend(q[t, h].astype(np.float64), k[:, h], v[:, h], scale) for h in range(heads)])
    return np.array(out)


def expanded(q, keys, values, positions, scale):
    """Attention of q (T, H, D) over the keys (S, H, D) and values (S, H, v) of a sequence: (T, H, v)."""
    q, keys, values = (each.astype(np.float64) for each in (q, keys, values))
    return np.array(
        [
            [attend(q[t, h], keys[: p + 1, h], values[: p + 1, h], scale) for h in range(q.shape[1])]
            for t, p in enumerate(positions)
        ]
    )


def expand(c_kv, k_pe, k_b: QTensor, v_b: QTensor):
    """Keys (S, H, nope + R) and values (S, H, v) of latent rows."""
    c_kv = c_kv.astype(np.float64)
    keys = [[[*(matrix @ row), *rope] for matrix in dense(k_b)] for row, rope in zip(c_kv, k_pe, strict=True)]
    return np.array(keys), np.array([[matrix @ row for matrix in dense(v_b)] for row in c_kv])
