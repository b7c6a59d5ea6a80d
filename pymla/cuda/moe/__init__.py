"""The mixture of experts. Twin of `pymla.reference.moe`.

The host never learns which experts were chosen: grids depend on the number of tokens alone, and kernels read the ids.
Experts of few tokens are computed row by row (`pymla.cuda.moe.by_rows`); pairs of a token and an expert, where there
are many, are sorted by expert and multiplied in tiles on the tensor cores (`pymla.cuda.moe.grouped`). Sums run in one
order always: no atomic addition of floats. Shared experts are experts that every token chose, and take part in the same
launches. An id that is no expert's counts as that of the last expert.
"""

import numpy as np

from pymla import ggml
from pymla.cuda import norm
from pymla.cuda.contract import check, need_any
from pymla.cuda.formats import FORMATS
from pymla.cuda.machine.ptx import WARP
from pymla.cuda.matmul.operands import THREADS
from pymla.cuda.memory import empty
from pymla.cuda.moe import relu, routing
from pymla.cuda.moe.by_rows import down_kernel, experts_by_rows, gate_up_kernel
from pymla.cuda.moe.grouped import combine_experts, experts_in_tiles, grouped_kernel, sort_pairs
from pymla.cuda.moe.swiglu import multiply_gated, silu_mul
from pymla.cuda.quant import FEW, Activation, matmul, matmul_kernels
from pymla.tensor import QTensor

__all__ = ["experts", "ffn", "relu_squared", "router"]

#: Pairs for each expert on average, from which tiles are faster than rows.
FEW_PAIRS = 2


def router(logits, bias, config, ids, weights):
    """Choose `num_experts_per_tok` experts for every token (`pymla.reference.moe.router`)."""
    check.router(logits, bias, config, ids, weights)
    tokens, count = logits.shape
    groups = config.n_group
    grouping = groups, count // groups, config.topk_group, 1 if config.group_score == "max" else 2
    routing.router[tokens, WARP, 4 * (2 * count + groups)](
        logits,
        empty(0, np.float32) if bias is None else bias,
        config.scoring_func == "sigmoid",
        grouping,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        ids,
        weights,
    )


def experts(activation, ids, weights, gate, up, down, out, shared=None, add=False):
    """Routed and shared experts (`pymla.reference.moe.experts`): `activation` of (T, K), `ids` int32 and `weights`
    float32 (T, k), `gate` and `up` of E matrices of F rows and K columns, `down` of E matrices of K rows and F columns,
    `out` float32 (T, K), overwritten or with `add` added to.

    `shared`: gate, up and down of S shared experts together, S * F rows of K columns and K rows of S * F columns. They
    are launches of their own (`ffn`) where their types are others, or where more tokens than `FEW` read rows one by
    one: as products the shared experts are read once for all of these.
    """
    check.experts(activation, ids, weights, gate, up, down, out, shared)
    need_any("experts", "ids", ids, len(gate.data), "experts")
    (tokens, used), (count, inner) = ids.shape, gate.data.shape[:2]
    quantised = all(w.qtype in FORMATS for w in (gate, up, down))
    in_tiles = quantised and tokens * used > FEW_PAIRS * count
    if shared is not None:
        same = all(w.qtype == other.qtype for w, other in zip(shared, (gate, up, down), strict=True))
        # Columns of a matrix whose rows have headers are no matrix.
        if not same or ggml.ROW_HEADER[down.qtype] or (tokens > FEW and not in_tiles):
            ffn(activation, *shared, out, add)
            return experts(activation, ids, weights, gate, up, down, out, add=True)
        shared = shared[0].by_rows(inner), shared[1].by_rows(inner), shared[2].by_columns(inner)
    run = experts_in_tiles if in_tiles else experts_by_rows
    run(activation, ids, weights, (gate, up, down), shared, inner, out, add)
    return out


def ffn(activation, gate, up, down, out, add=False):
    """The dense network, also the shared experts (`pymla.reference.moe.ffn`): `activation` of (T, K), `out` float32
    (T, K), overwritten or with `add` added to."""
    check.ffn(activation, gate, up, down, out)
    tokens, inner = len(out), len(gate.data)
    if tokens == 1:
        whole = [QTensor(w.qtype, w.data[None]) for w in (gate, up, down)]
        none = empty((1, 0), np.int32), empty((1, 0), np.float32)
        experts_by_rows(activation, *none, None, whole, inner, out, add)
        return out
    hidden, other = empty((tokens, inner), np.float32), empty((tokens, inner), np.float32)
    matmul(gate, activation, hidden)
    matmul(up, activation, other)
    multiply_gated(hidden, other)
    if not add:
        return matmul(down, Activation(hidden), out)
    return norm.add(out, matmul(down, Activation(hidden), empty(out.shape, np.float32)))


def relu_squared(x):
    """``x = max(x, 0)²``, float32 (T, K), contiguous."""
    check.relu_squared(x)
    relu.relu_squared[-(-x.size // THREADS), THREADS](x.reshape(-1))
    return x


def relu_squared_kernels():
    """The kernels of `relu_squared`."""
    return [relu.relu_squared]


def router_kernels():
    """The kernels of `router`."""
    return [routing.router]


def experts_kernels(gate, up, down):
    """The kernels of `experts` for the types of its matrices."""
    found = [gate_up_kernel(gate, up), down_kernel(down), combine_experts, sort_pairs, silu_mul]
    if all(qtype in FORMATS for qtype in (gate, up, down)):
        found += [grouped_kernel(qtype) for qtype in dict.fromkeys((gate, up, down))]
    return found


def ffn_kernels(gate, up, down):
    """The kernels of `ffn` for the types of its matrices."""
    found = [gate_up_kernel(gate, up), down_kernel(down), silu_mul, *norm.kernels()]
    for qtype in dict.fromkeys((gate, up, down)):
        found += matmul_kernels(qtype)
    return found
