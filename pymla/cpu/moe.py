"""The mixture of experts. Twin of `pymla.reference.moe`.

Pairs of a token and an expert are sorted by expert, so that an expert's rows are read once for all of its tokens. Gate
and up rows of the same number are multiplied together, and SiLU is applied before anything is stored. Where many
tokens go through panels, shared experts are experts that every token chose, and take part in the same pass.

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
from numba import types

from pymla.cpu import norm
from pymla.cpu.contract import check
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import add, address, div, exp, load_f32x8, mul, splat_f32, store_f32x8, sub
from pymla.cpu.matmul.gemm import ROWS, SCRATCH, product_for, two_groups
from pymla.cpu.matmul.gemm_amx import MARGIN
from pymla.cpu.matmul.gemv import dot_rows_for
from pymla.cpu.memory import allocate, allocate_f32, empty
from pymla.cpu.quant import (
    F2,
    FEW,
    I1,
    I2,
    INPUT,
    MATRICES,
    Activation,
    Matrices,
    add_scaled,
    consecutive,
    copy,
    counting,
    matmul,
    matmul_kernels,
    parts,
    rows_at_once,
    take_rows,
)
from pymla.cpu.runtime.jit import helper, kernel, variants
from pymla.ggml import QUANTISED

__all__ = ["experts", "ffn", "router"]

VECTOR = types.Array(types.float32, 1, "C", readonly=True)
_NO_BIAS = np.empty(0, np.float32)

#: Pairs for each expert on average, from which panels are faster than rows.
FEW_PAIRS = 2
#: Groups of rows that a thread takes at a time in a product by panels: it asks memory for the next one's rows, which
#: only then come to its own cache.
NEIGHBOURS = 8


def router(logits, bias, config, ids, weights):
    """Choose `num_experts_per_tok` experts for every token (`pymla.reference.moe.router`)."""
    check.router(logits, bias, config, ids, weights)
    _router[len(logits), 16](
        logits,
        _NO_BIAS if bias is None else bias,
        config.scoring_func == "sigmoid",
        config.n_group,
        config.topk_group,
        1 if config.group_score == "max" else 2,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        ids,
        weights,
    )


def experts(activation, ids, weights, gate, up, down, out, shared=None, add=False):
    """Routed and shared experts, fused: gate and up of all pairs of token and expert in one pass, then down with the
    weights.

    `activation` of (T, K); `ids` int32 and `weights` float32 (T, k); `gate` and `up` of E matrices of F rows and K
    columns, `down` of E matrices of K rows and F columns; `out` float32 (T, K), overwritten or with `add` added to.
    `shared`: gate, up and down of S shared experts together, S * F rows of K columns and K rows of S * F columns. They
    are a pass of their own (`ffn`) where their types are others, and where few tokens read rows: there a row of their
    down matrix is read as a whole, which is faster than an expert's columns after the other's.
    """
    check.experts(activation, ids, weights, gate, up, down, out, shared)
    count, inner = gate.data.shape[:2]
    many = ids.size > FEW_PAIRS * count
    gate_up_by_panels = many and gate.qtype == up.qtype and gate.qtype in QUANTISED
    down_by_panels = many and down.qtype in QUANTISED
    if shared is not None:
        same = all(w.qtype == other.qtype for w, other in zip(shared, (gate, up, down), strict=True))
        if not (same and gate_up_by_panels and down_by_panels):
            ffn(activation, *shared, out, add)
            return experts(activation, ids, weights, gate, up, down, out, add=True)
    gates, ups, downs = (Matrices.of(w) for w in (gate, up, down))
    if shared is None:
        others = [each._replace(count=0) for each in (gates, ups, downs)]
    else:
        by_expert = shared[0].by_rows(inner), shared[1].by_rows(inner), shared[2].by_columns(inner)
        others = [Matrices.of(w) for w in by_expert]
    all_experts = count + others[0].count
    pairs = np.empty(ids.size + len(ids) * others[0].count, np.int32)
    tokens = np.empty(len(pairs), np.int32)
    starts = np.empty(all_experts + 1, np.int32)
    _sort_pairs[1](ids, others[0].count, pairs, tokens, starts)
    hidden = empty((len(pairs), inner), np.float32)
    if gate_up_by_panels:
        x, index = consecutive(gate.qtype, activation.panels(gate.qtype), tokens)
        items = all_experts * -(-inner // LANES)
        _gate_up_panels(gate.qtype)[items, NEIGHBOURS](gates, ups, *others[:2], index, starts, x, hidden)
    else:
        inputs = activation.rows(gate.qtype), activation.rows(up.qtype)
        _gate_up_rows(gate.qtype, up.qtype)[min(count, ids.size) * inner](gates, ups, tokens, starts, *inputs, hidden)
    y = Activation(hidden)
    if down_by_panels:
        index, x = counting(len(pairs)), y.panels(down.qtype)
        _down_panels(down.qtype)[-(-len(down.data[0]) // ROWS)](
            downs, others[2], pairs, index, starts, weights, x, add, out
        )
    else:
        _down_rows(down.qtype)[len(down.data[0])](downs, pairs, starts, weights, y.rows(down.qtype), add, out)
    return out


def ffn(activation, gate, up, down, out, add=False):
    """``out = down @ (silu(gate @ x) * (up @ x))``: the dense network, also the shared experts; with `add` added to
    `out`."""
    check.ffn(activation, gate, up, down, out)
    hidden = empty((len(out), len(gate.data)), np.float32)
    if len(out) <= FEW:
        # An expert that every token chose: two launches, where there would be five.
        tokens, starts, ones = counting(len(out)), np.array([0, len(out)], np.int32), np.ones((len(out), 1), np.float32)
        inputs = activation.rows(gate.qtype), activation.rows(up.qtype)
        _gate_up_rows(gate.qtype, up.qtype)[len(gate.data)](
            Matrices.of(gate), Matrices.of(up), tokens, starts, *inputs, hidden
        )
        y = Activation(hidden).rows(down.qtype)
        _down_rows(down.qtype)[len(down.data)](Matrices.of(down), tokens, starts, ones, y, add, out)
        return out
    other = np.empty_like(hidden)
    matmul(gate, activation, hidden)
    matmul(up, activation, other)
    _silu_mul[len(hidden)](hidden, other)
    if not add:
        return matmul(down, Activation(hidden), out)
    return norm.add(out, matmul(down, Activation(hidden), np.empty_like(out)))


def experts_kernels(gate, up, down):
    """What `router` and `experts` launch for matrices of these types."""
    many = [_gate_up_panels(gate)] if gate == up and gate in QUANTISED else []
    many += [_down_panels(down)] if down in QUANTISED else []
    return [_router, _sort_pairs, _gate_up_rows(gate, up), _down_rows(down), *many]


def ffn_kernels(gate, up, down):
    """What `ffn` launches for matrices of these types."""
    return [
        _gate_up_rows(gate, up),
        _down_rows(down),
        _silu_mul,
        *(k for t in (gate, up, down) for k in matmul_kernels(t)),
    ]


@helper
def silu_mul(x, y, out, count):
    """``out = x / (1 + exp(-x)) * y`` of `count` float32; addresses. Up to 7 more are written where `count` is no
    multiple of 8."""
    one, zero = splat_f32(np.float32(1)), splat_f32(np.float32(0))
    for i in range(0, 4 * count, 32):
        value = load_f32x8(x + i)
        value = div(value, add(one, exp(sub(zero, value))))
        store_f32x8(out + i, mul(value, load_f32x8(y + i)))


@helper
def silu(x):
    """``x / (1 + exp(-x))`` of one number."""
    return x / (np.float32(1) + np.exp(-x))


@kernel(F2, F2)
def _silu_mul(first, last, x, y):
    """``x = silu(x) * y`` over tokens."""
    count = x.shape[1]
    for t in range(first, last):
        silu_mul(address(x[t]), address(y[t]), address(x[t]), count // 8 * 8)
        for i in range(count // 8 * 8, count):
            x[t, i] = silu(x[t, i]) * y[t, i]


@kernel(
    F2,
    VECTOR,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    types.float64,
    I2,
    F2,
)
def _router(first, last, logits, bias, sigmoid, groups, kept, best, normalise, factor, ids, weights):
    """`router` over tokens."""
    count, used = logits.shape[1], ids.shape[1]
    size = count // groups
    scores = np.empty(count, np.float32)
    choice = np.empty(count, np.float32)
    group_scores = np.empty(groups, np.float32)
    for t in range(first, last):
        most = logits[t, 0]
        for e in range(count):
            most = max(most, logits[t, e])
        total = np.float32(0)
        for e in range(count):
            if sigmoid:
                scores[e] = np.float32(1) / (np.float32(1) + np.exp(-logits[t, e]))
            else:
                scores[e] = np.exp(logits[t, e] - most)
                total += scores[e]
        for e in range(count):
            if not sigmoid:
                scores[e] /= total
            choice[e] = scores[e] + (bias[e] if len(bias) else np.float32(0))
        if groups > 1:
            for g in range(groups):
                top, second = np.float32(-np.inf), np.float32(-np.inf)
                for e in range(g * size, (g + 1) * size):
                    if choice[e] > top:
                        top, second = choice[e], top
                    elif choice[e] > second:
                        second = choice[e]
                group_scores[g] = top if best == 1 else top + second
            for _ in range(groups - kept):
                # The last of the worst goes: among equals the first is chosen.
                worst = 0
                for g in range(groups):
                    if group_scores[g] <= group_scores[worst]:
                        worst = g
                group_scores[worst] = np.inf
                for e in range(worst * size, (worst + 1) * size):
                    choice[e] = -np.inf
        chosen = np.float32(0)
        for j in range(used):
            top = 0
            for e in range(count):
                if choice[e] > choice[top]:
                    top = e
            ids[t, j] = top
            weights[t, j] = scores[top]
            chosen += scores[top]
            choice[top] = -np.inf
        for j in range(used):
            share = weights[t, j] / (chosen + np.float32(1e-20)) if normalise else weights[t, j]
            weights[t, j] = share * np.float32(factor)


@helper
def expert(ids, t, j, count):
    """A token's choice of `count` experts; behind its own choices stand the shared experts, whose numbers follow."""
    return ids[t, j] if j < ids.shape[1] else count + j - ids.shape[1]


@kernel(I2, types.int64, I1, I1, I1)
def _sort_pairs(first, last, ids, shared, pairs, tokens, starts):
    """Numbers of the pairs (token * choices + choice) by expert, their tokens, and where each expert's pairs begin."""
    choices = ids.shape[1] + shared
    count = len(starts) - 1
    starts[:] = 0
    for t in range(len(ids)):
        for j in range(choices):
            starts[expert(ids, t, j, count - shared) + 1] += 1
    for e in range(count):
        starts[e + 1] += starts[e]
    next_of = starts.copy()
    for t in range(len(ids)):
        for j in range(choices):
            e = expert(ids, t, j, count - shared)
            at = next_of[e]
            next_of[e] += 1
            pairs[at] = t * choices + j
            tokens[at] = t


@helper
def row_at(w, e, r):
    """The address of a row of an expert's matrix."""
    return w.address + e * w.matrix_stride + r * w.row_stride


@helper
def any_row_at(w, shared, e, r):
    """The address and the stride of a row of an expert's matrix: a routed one's, or behind these a shared one's."""
    if e < w.count:
        return row_at(w, e, r), w.row_stride
    return row_at(shared, e - w.count, r), shared.row_stride


@helper
def next_expert(starts, e):
    """The first expert behind `e` that has tokens, or the number of experts."""
    e += 1
    while e < len(starts) - 1 and starts[e] == starts[e + 1]:
        e += 1
    return e


@variants
def _gate_up_rows(gate_type, up_type):
    """Gate and up rows of few tokens."""
    dot_gate, dot_up = dot_rows_for(gate_type), dot_rows_for(up_type)

    @kernel(MATRICES, MATRICES, I1, I1, INPUT, INPUT, F2)
    def _gate_up_rows(first, last, gate, up, tokens, starts, x, y, hidden):
        """``hidden[i] = silu(gate[e] @ x[t]) * (up[e] @ x[t])`` for the i-th pair, over rows of the matrices: all of
        the first expert that has tokens, then all of the second, so that a thread reads long stretches of memory. `x`
        and `y` are the same activations, for each matrix in the order of its type."""
        columns, results = x.x.shape[1], np.empty((2, min(last - first, gate.rows) + 7), np.float32)
        g, u = address(results[0]), address(results[1])
        begin, e = 0, next_expert(starts, -1)
        while begin < last and e < gate.count:
            until = min(last - begin, gate.rows)
            size = rows_at_once(starts[e + 1] - starts[e], gate.row_stride, gate.rows)
            for r in range(max(first - begin, 0), until, size):
                count = min(size, until - r)
                for i in range(starts[e], starts[e + 1]):
                    t = tokens[i]
                    dot_gate(row_at(gate, e, r), gate.row_stride, count, parts(x, t), columns, g)
                    dot_up(row_at(up, e, r), up.row_stride, count, parts(y, t), columns, u)
                    silu_mul(g, u, g, count)
                    copy(g, address(hidden[i, r:]), count)
            begin, e = begin + gate.rows, next_expert(starts, e)

    return _gate_up_rows


@helper
def _take_gate_up(results, first, last, where):
    """`quant.take_rows` for gate rows beside up rows."""
    for at in range(results, results + 4 * ROWS * (last - first), 4 * ROWS):
        silu_mul(at, at + 4 * LANES, at, LANES)
    take_rows(results, first, last, where)


@variants
def _gate_up_panels(qtype):
    """Gate and up of many tokens, both of one quantised type."""
    product = product_for(_take_gate_up, qtype)

    @kernel(MATRICES, MATRICES, MATRICES, MATRICES, I1, I1, INPUT, F2)
    def _gate_up_panels(first, last, gate, up, shared_gate, shared_up, index, starts, x, hidden):
        """The same over groups of `LANES` rows of each expert: a panel of gate rows beside one of up rows. `index` has
        the columns of `x` of each pair."""
        columns = x.x.shape[1]
        groups = (gate.rows + LANES - 1) // LANES
        scratch = allocate(SCRATCH)
        most = 0
        for e in range(first // groups, (last - 1) // groups + 1):
            most = max(most, starts[e + 1] - starts[e])
        result = allocate_f32(most + MARGIN + 1, ROWS)
        for item in range(first, last):
            e, row = item // groups, item % groups * LANES
            begin, end = starts[e], starts[e + 1]
            if begin == end:
                continue
            count = min(LANES, gate.rows - row)
            gate_row, stride = any_row_at(gate, shared_gate, e, row)
            product(
                gate_row,
                any_row_at(up, shared_up, e, row)[0],
                count,
                count,
                stride,
                columns,
                LANES * stride,
                x,
                index,
                (begin, end),
                address(scratch),
                address(result),
                (address(hidden[0, row:]), 4 * hidden.shape[1], count),
            )

    return _gate_up_panels


@variants
def _down_rows(qtype):
    """Down rows of few tokens."""
    dot_rows = dot_rows_for(qtype)

    @kernel(MATRICES, I1, I1, F2, INPUT, types.int64, F2)
    def _down_rows(first, last, down, pairs, starts, weights, x, add, out):
        """``out[t] += Σ weights[t, j] * (down[e] @ hidden)`` over rows: a thread owns them and waits for no other."""
        columns, result = x.x.shape[1], np.empty(last - first, np.float32)
        choices = weights.shape[1]
        if not add:
            for t in range(len(out)):
                for r in range(first, last):
                    out[t, r] = 0
        e = next_expert(starts, -1)
        while e < down.count:
            size = rows_at_once(starts[e + 1] - starts[e], down.row_stride, last - first)
            for r in range(first, last, size):
                count = min(size, last - r)
                row = row_at(down, e, r)
                for i in range(starts[e], starts[e + 1]):
                    t, j = pairs[i] // choices, pairs[i] % choices
                    dot_rows(row, down.row_stride, count, parts(x, i), columns, address(result))
                    add_scaled(weights[t, j], address(result), address(out[t, r:]), count)
            e = next_expert(starts, e)

    return _down_rows


@helper
def weight_of(weights, t, j):
    """Of a token's choice; shared experts have 1."""
    return weights[t, j] if j < weights.shape[1] else np.float32(1)


@helper
def _take_down(results, first, last, where):
    """What `panels.product` gives to `count` numbers from `begin` on of the tokens' sums."""
    pairs, weights, out, begin, count = where
    choices = len(pairs) // len(out)
    for i in range(first, last):
        t, j = pairs[i] // choices, pairs[i] % choices
        add_scaled(weight_of(weights, t, j), results + 4 * ROWS * (i - first), address(out[t, begin:]), count)


@variants
def _down_panels(qtype):
    """Down of many tokens and a quantised type."""
    product = product_for(_take_down, qtype)

    @kernel(MATRICES, MATRICES, I1, I1, I1, F2, INPUT, types.int64, F2)
    def _down_panels(first, last, down, shared, pairs, index, starts, weights, x, add, out):
        """The same over groups of `ROWS` rows; all groups of an item meet an expert's activations while a cache has
        them."""
        columns = x.x.shape[1]
        scratch = allocate(SCRATCH)
        most = 0
        for e in range(len(starts) - 1):
            most = max(most, starts[e + 1] - starts[e])
        result = allocate_f32(most + MARGIN, ROWS)
        if not add:
            for t in range(len(out)):
                for r in range(first * ROWS, min(last * ROWS, down.rows)):
                    out[t, r] = 0
        for e in range(len(starts) - 1):
            if starts[e] == starts[e + 1]:
                continue
            for group in range(first, last):
                begin = group * ROWS
                count = min(ROWS, down.rows - begin)
                row, stride = any_row_at(down, shared, e, begin)
                second, half, rest = two_groups(row, stride, count)
                product(
                    row,
                    second,
                    half,
                    rest,
                    stride,
                    columns,
                    ROWS * stride,
                    x,
                    index,
                    (starts[e], starts[e + 1]),
                    address(scratch),
                    address(result),
                    (pairs, weights, out, begin, count),
                )

    return _down_panels
