"""The mixture of experts. Twin of `pymla.reference.moe`.

Pairs of a token and an expert are sorted by expert, so that an expert's rows are read once for all of its tokens. Gate
and up rows of the same number are multiplied together, and SiLU is applied before anything is stored. Where many
tokens go through panels, shared experts count as experts that every token chose, and take part in the same pass.

>>> import numpy as np
>>> from pymla import ggml
>>> from pymla.cpu import moe, quant
>>> from pymla.reference.quant import quantise
>>> from pymla.tensor import QTensor
>>> def matrices(count, rows, columns):
...     values = np.random.default_rng(rows).standard_normal((count * rows, columns), np.float32)
...     return QTensor(ggml.Q4_0, quantise(values, ggml.Q4_0).reshape(count, rows, -1))
>>> gate, up, down = matrices(8, 64, 96), matrices(8, 64, 96), matrices(8, 96, 64)
>>> x = quant.Activation(np.ones((2, 96), np.float32))
>>> ids, weights = np.array([[3, 5], [5, 0]], np.int32), np.full((2, 2), 0.5, np.float32)
>>> moe.experts(x, ids, weights, gate, up, down, np.empty((2, 96), np.float32)).shape
(2, 96)
"""

import numpy as np

from pymla.cpu import norm
from pymla.cpu.contract import check
from pymla.cpu.matmul.activations import Activation, consecutive, counting
from pymla.cpu.matmul.matrices import Matrices
from pymla.cpu.matmul.unpacked import PAIR_ROWS
from pymla.cpu.memory import empty
from pymla.cpu.moe import by_rows, grouped, routing
from pymla.cpu.moe.relu import relu_squared_tokens
from pymla.cpu.moe.swiglu import silu_mul_tokens
from pymla.cpu.quant import GEMV_TOKENS, matmul, matmul_kernels
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import Kernel
from pymla.ggml import QUANTISED, ROW_HEADER
from pymla.tensor import QTensor

__all__ = ["experts", "experts_kernels", "ffn", "ffn_kernels", "relu_squared", "relu_squared_kernels", "router"]

_NO_BIAS = np.empty(0, np.float32)

#: Pairs for each expert on average, from which panels are faster than rows.
GEMV_PAIRS = 3
#: Groups of rows that a thread takes at a time in a product by panels: it prefetches the next group's rows, which only
#: then come to its own cache.
GROUPS_AT_ONCE = 8


def router(logits: np.ndarray, bias: np.ndarray | None, config, ids: np.ndarray, weights: np.ndarray) -> None:
    """Choose `num_experts_per_tok` experts for every token (`pymla.reference.moe.router`)."""
    check.router(logits, bias, config, ids, weights)
    rules = routing.Rules(
        sigmoid=int(config.scoring_func == "sigmoid"),
        groups=config.n_group,
        kept=config.topk_group,
        best=1 if config.group_score == "max" else 2,
        normalise=int(config.norm_topk_prob),
    )
    bias = _NO_BIAS if bias is None else bias
    routing.router[len(logits), 16](logits, bias, rules, config.routed_scaling_factor, ids, weights)


def experts(
    activation: Activation,
    ids: np.ndarray,
    weights: np.ndarray,
    gate: QTensor,
    up: QTensor,
    down: QTensor,
    out: np.ndarray,
    shared: tuple[QTensor, QTensor, QTensor] | None = None,
    add: bool = False,
) -> np.ndarray:
    """Routed and shared experts, fused: gate and up of all pairs of token and expert in one pass, then down with the
    weights.

    `activation` of (T, K); `ids` int32 and `weights` float32 (T, k); `gate` and `up` of E matrices of F rows and K
    columns, `down` of E matrices of K rows and F columns; `out` float32 (T, K), overwritten or with `add` added to.
    `shared`: gate, up and down of S shared experts together, S * F rows of K columns and K rows of S * F columns. They
    are a pass of their own (`ffn`) where their types are others, and where few tokens read rows: there a row of their
    down matrix is read as a whole, which is faster than an expert's columns after the other's.
    """
    check.experts(activation, ids, weights, gate, up, down, out, shared)
    matrices = gate, up, down
    many = ids.size > GEMV_PAIRS * len(gate.data)
    by_panels = many and {gate.qtype, up.qtype} <= set(QUANTISED), many and down.qtype in QUANTISED
    if shared is not None:
        same = all(w.qtype == other.qtype for w, other in zip(shared, matrices, strict=True))
        # Columns of a matrix whose rows have headers are no matrix.
        if not (same and all(by_panels) and not ROW_HEADER[down.qtype]):
            ffn(activation, *shared, out, add)
            return experts(activation, ids, weights, *matrices, out, add=True)
    routed = [Matrices.of(w) for w in matrices]
    others = _shared_experts(routed, shared)
    pairs, tokens, starts = _sorted_pairs(ids, routed[0].number, others[0].number)
    hidden = empty((len(pairs), routed[0].rows), np.float32)
    if by_panels[0]:
        _gate_up_panels(activation, (gate.qtype, up.qtype), tokens, starts, (*routed[:2], *others[:2]), hidden)
    else:
        items = min(routed[0].number, ids.size) * routed[0].rows
        _gate_up_rows(activation, gate.qtype, up.qtype, items, (*routed[:2], tokens, starts), hidden)
    y = Activation(hidden)
    if by_panels[1]:
        launch = grouped.down_panels(down.qtype)[-(-routed[2].rows // PAIR_ROWS)]
        x, index = y.panels(down.qtype), counting(len(pairs))
        launch(routed[2], others[2], pairs, index, starts, weights, x, add, out)
    else:
        launch = by_rows.down_rows(down.qtype)[routed[2].rows]
        launch(routed[2], pairs, counting(len(pairs)), starts, weights, y.rows(down.qtype), add, out)
    return out


def _gate_up_panels(activation, qtypes, tokens, starts, matrices, hidden):
    """Launch `grouped.gate_up_panels`; where gate and up are of two types, a kernel for each of them and one for
    SwiGLU."""
    gate, up, shared_gate, shared_up = matrices
    experts = len(starts) - 1
    x, index = consecutive(qtypes[0], activation.panels(qtypes[0]), tokens)
    if qtypes[0] == qtypes[1]:
        launch = grouped.gate_up_panels(qtypes[0])[experts * -(-gate.rows // LANES), GROUPS_AT_ONCE]
        launch(gate, up, shared_gate, shared_up, index, starts, x, hidden)
        return
    items, other = experts * -(-gate.rows // PAIR_ROWS), np.empty_like(hidden)
    grouped.expert_panels(qtypes[0])[items](gate, shared_gate, index, starts, x, hidden)
    x, index = consecutive(qtypes[1], activation.panels(qtypes[1]), tokens)
    grouped.expert_panels(qtypes[1])[items](up, shared_up, index, starts, x, other)
    silu_mul_tokens[len(hidden)](hidden, other)


def _gate_up_rows(activation, gate, up, items, arguments, hidden):
    """Launch `by_rows.gate_up_rows` for matrices of two types."""
    by_rows.gate_up_rows(gate, up)[items](*arguments, activation.rows(gate), activation.rows(up), hidden)


def _shared_experts(routed, shared):
    """Gate, up and down of the shared experts as `Matrices` with one for each expert, of the size of the `routed`
    ones; where `shared` is None, with none."""
    if shared is None:
        return [each._replace(number=0) for each in routed]
    gate, up, down = shared
    inner = routed[0].rows
    return [Matrices.of(w) for w in (gate.by_rows(inner), up.by_rows(inner), down.by_columns(inner))]


def _sorted_pairs(ids, count, shared):
    """Pairs of a token and one of `count` routed or `shared` shared experts, their tokens, and where each expert's
    pairs begin; int32."""
    pairs = np.empty(ids.size + len(ids) * shared, np.int32)
    tokens, starts = np.empty(len(pairs), np.int32), np.empty(count + shared + 1, np.int32)
    routing.sort_pairs[1](ids, shared, pairs, tokens, starts)
    return pairs, tokens, starts


def ffn(
    activation: Activation, gate: QTensor, up: QTensor, down: QTensor, out: np.ndarray, add: bool = False
) -> np.ndarray:
    """``out = down @ (silu(gate @ x) * (up @ x))``: the dense network, also the shared experts; with `add` added to
    `out`."""
    check.ffn(activation, gate, up, down, out)
    hidden = empty((len(out), len(gate.data)), np.float32)
    if len(out) <= GEMV_TOKENS:
        # An expert that every token chose: two launches, where there would be five.
        tokens, starts, ones = counting(len(out)), np.array([0, len(out)], np.int32), np.ones((len(out), 1), np.float32)
        arguments = Matrices.of(gate), Matrices.of(up), tokens, starts
        _gate_up_rows(activation, gate.qtype, up.qtype, len(gate.data), arguments, hidden)
        y = Activation(hidden).rows(down.qtype)
        by_rows.down_rows(down.qtype)[len(down.data)](Matrices.of(down), tokens, tokens, starts, ones, y, add, out)
        return out
    other = np.empty_like(hidden)
    matmul(gate, activation, hidden)
    matmul(up, activation, other)
    silu_mul_tokens[len(hidden)](hidden, other)
    if not add:
        return matmul(down, Activation(hidden), out)
    return norm.add(out, matmul(down, Activation(hidden), np.empty_like(out)))


def relu_squared(x: np.ndarray) -> np.ndarray:
    """``x = max(x, 0)²``, float32 (T, K)."""
    check.relu_squared(x)
    relu_squared_tokens[len(x)](x)
    return x


def experts_kernels(gate: int, up: int, down: int) -> list[Kernel]:
    """The kernels that `router` and `experts` launch for matrices of these types."""
    many = [grouped.down_panels(down)] if down in QUANTISED else []
    if {gate, up} <= set(QUANTISED):
        two = [grouped.expert_panels(gate), grouped.expert_panels(up), silu_mul_tokens]
        many += [grouped.gate_up_panels(gate)] if gate == up else two
    return [routing.router, routing.sort_pairs, by_rows.gate_up_rows(gate, up), by_rows.down_rows(down), *many]


def ffn_kernels(gate: int, up: int, down: int) -> list[Kernel]:
    """The kernels that `ffn` launches for matrices of these types."""
    return [
        by_rows.gate_up_rows(gate, up),
        by_rows.down_rows(down),
        silu_mul_tokens,
        *(each for qtype in (gate, up, down) for each in matmul_kernels(qtype)),
    ]


def relu_squared_kernels() -> list[Kernel]:
    """The kernels that `relu_squared` launches."""
    return [relu_squared_tokens]
