"""Experts of few tokens, row by row.

For each pair of a token and an expert, a warp takes a row of gate beside its row of up and applies SiLU; another launch
sums the chosen experts' down rows with their weights.
"""

import functools

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.formats import FLOATS
from pymla.cuda.machine.ptx import WARP, fma, lane, load_f32, valid_index, warp_sum
from pymla.cuda.matmul.operands import INPUT, MATRICES, THREADS, WARPS, Matrices, row_address
from pymla.cuda.matmul.rows import row_products, row_sums
from pymla.cuda.memory import empty
from pymla.cuda.moe.swiglu import silu
from pymla.cuda.quant import Activation
from pymla.cuda.runtime.array_types import F2, I2
from pymla.cuda.runtime.jit import device, kernel, unrolled

_ZERO, _ONE = np.float32(0), np.float32(1)

#: The routed experts' matrices, and the shared ones'.
BOTH = types.UniTuple(MATRICES, 2)


def routed_and_shared(routed, shared):
    """Gates, ups and downs: of each the routed experts' matrices and the shared ones', none where there are none."""

    def of(w, other):
        return Matrices.of(w) if w else Matrices.of(other)._replace(count=0)

    routed, shared = routed or (None,) * 3, shared or (None,) * 3
    return [(of(w, other), of(other, w)) for w, other in zip(routed, shared, strict=True)]


def experts_by_rows(activation, ids, weights, routed, shared, inner, out, add):
    """Experts of few tokens. `routed` and `shared`, either of them or None: gate, up and down of several matrices, each
    gate with `inner` rows."""
    (gate, up, down), (tokens, used) = routed or shared, ids.shape
    gates, ups, downs = routed_and_shared(routed, shared)
    choices = used + downs[1].count
    hidden = empty((tokens * choices, inner), np.float32)
    x = activation.input(up.qtype if gate.qtype in FLOATS else gate.qtype)
    grid = -(-inner // WARPS), choices, tokens
    gate_up_kernel(gate.qtype, up.qtype)[grid, THREADS](gates, ups, ids, x, hidden)
    y = Activation(hidden)
    x = y.input(down.qtype)
    down_kernel(down.qtype)[(-(-out.shape[1] // WARPS), tokens), THREADS](downs, ids, weights, x, add, out)


def _row_parts(qtype, rows):
    """A lane's parts of `rows` rows times activations, as a device function of the rows' addresses, the `Input` and the
    row of the activations; the lanes' parts add up to the products."""
    if qtype in FLOATS:
        every = unrolled(_float_part(qtype), rows)

        @device
        def parts(addresses, x, t):
            return every(0, addresses, (x, t))

    else:
        products, first = row_products(qtype, rows, 1), unrolled(_first, rows)

        @device
        def parts(addresses, x, t):
            return first(0, products(addresses, (t,), x), 0)

    return parts


def _gate_up_parts(gate_type, up_type):
    """`_row_parts` of a row of gate and one of up. Of one type, they are read together."""
    if gate_type == up_type:
        return _row_parts(gate_type, 2)
    of_gate, of_up = _row_parts(gate_type, 1), _row_parts(up_type, 1)

    @device
    def parts(addresses, x, t):
        return of_gate(addresses[:1], x, t) + of_up(addresses[1:], x, t)

    return parts


@functools.cache
def _float_part(qtype):
    """A lane's part of a row of a float type times activations, for `unrolled`."""
    one, _, nbytes = FLOATS[qtype]

    @device
    def part(row, _, fixed):
        x, t = fixed
        sum, at = _ZERO, x.x + 4 * x.columns * t
        for k in range(lane(), x.columns, WARP):
            sum = fma(one(row + nbytes * k), load_f32(at + 4 * k), sum)
        return sum

    return part


@device
def _first(sums, _, fixed):
    return sums[0]


@functools.cache
def gate_up_kernel(gate_type, up_type):
    """The kernel of gate and up, for each pair of a token and an expert."""
    parts = _gate_up_parts(gate_type, up_type)
    names = dict.fromkeys(ggml.NAME[qtype].lower() for qtype in (gate_type, up_type))

    @kernel(BOTH, BOTH, I2, INPUT, F2, variant=",".join(names), max_threads=THREADS)
    def gate_up(gate, up, ids, x, hidden):
        """``hidden = silu(gate @ x) * (up @ x)``: a warp takes a row (x) for choice y of token z. Behind a token's
        choices come the shared experts."""
        row, j, t = WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, cuda.blockIdx.y, cuda.blockIdx.z
        used = ids.shape[1]
        if j < used:
            e = valid_index(ids[t, j], gate[0].count)
            at, other = row_address(gate[0], e, row), row_address(up[0], e, row)
        else:
            at, other = row_address(gate[1], j - used, row), row_address(up[1], j - used, row)
        g, u = parts((at, other), x, t)
        g, u = warp_sum(g), warp_sum(u)
        if lane() == 0 and row < hidden.shape[1]:
            hidden[t * cuda.gridDim.y + j, row] = silu(g) * u

    return gate_up


@device
def _chosen_down(j, fixed):
    """The row of down, the row of activations and the weight of a token's choice j; shared experts, whose weight is 1,
    come behind the chosen ones."""
    down, ids, weights, t, row = fixed
    used = ids.shape[1]
    number = t * (used + down[1].count) + j
    if j < used:
        return row_address(down[0], valid_index(ids[t, j], down[0].count), row), number, weights[t, j]
    return row_address(down[1], j - used, row), number, _ONE


def _weighted_rows(qtype):
    """A lane's part of a token's down rows times activations, weighted and summed: a device function (count, input,
    fixed), `fixed` for `_chosen_down`."""
    if qtype not in FLOATS:
        return row_sums(qtype, _chosen_down)
    part = _float_part(qtype)

    @device
    def total(count, x, fixed):
        sum = _ZERO
        for j in range(count):
            address, number, weight = _chosen_down(j, fixed)
            sum = fma(weight, part(address, 0, (x, number)), sum)
        return sum

    return total


@functools.cache
def down_kernel(qtype):
    """The kernel of down, summed over a token's experts."""
    total = _weighted_rows(qtype)

    @kernel(BOTH, I2, F2, INPUT, types.boolean, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def down(down, ids, weights, x, add, out):
        """``out[t] += Σ weights[t, j] * down[e] @ hidden[t, j]``: a warp takes a row (x) of token y."""
        row, t = WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, cuda.blockIdx.y
        sum = warp_sum(total(ids.shape[1] + down[1].count, x, (down, ids, weights, t, row)))
        if lane() == 0 and row < out.shape[1]:
            out[t, row] = out[t, row] + sum if add else sum

    return down
