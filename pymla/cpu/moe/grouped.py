"""Experts of many tokens: panels of weights times all tokens of an expert (gemm)."""

import numpy as np
from numba import types

from pymla.cpu.machine.simd import address
from pymla.cpu.matmul.activations import INPUT
from pymla.cpu.matmul.gemm import Buffers, product_for, take_rows
from pymla.cpu.matmul.gemm_amx import SPARE_COLUMNS
from pymla.cpu.matmul.matrices import MATRICES, add_scaled, row_at
from pymla.cpu.matmul.unpacked import PAIR_ROWS, RESULT_BYTES, SCRATCH, PairOfRows, two_groups
from pymla.cpu.memory import allocate, allocate_f32
from pymla.cpu.moe.routing import most_tokens
from pymla.cpu.moe.swiglu import silu_mul
from pymla.cpu.runtime.array_types import F2, I1
from pymla.cpu.runtime.isa import LANES
from pymla.cpu.runtime.jit import helper, kernel, variants


@helper
def _any_row_at(w, shared, e, r):
    """The address and the stride of a row of an expert's matrix; shared experts come behind the routed ones."""
    if e < w.number:
        return row_at(w, e, r), w.row_stride
    return row_at(shared, e - w.number, r), shared.row_stride


@helper
def _take_gate_up(results, first, last, where):
    """`gemm.take_rows` for gate rows beside up rows."""
    for at in range(results, results + RESULT_BYTES * (last - first), RESULT_BYTES):
        silu_mul(at, at + 4 * LANES, at, LANES)
    take_rows(results, first, last, where)


@variants
def gate_up_panels(qtype):
    """Gate and up of many tokens, both of one quantised type."""
    product = product_for(_take_gate_up, qtype)

    @kernel(MATRICES, MATRICES, MATRICES, MATRICES, I1, I1, INPUT, F2)
    def gate_up_panels(first, last, gate, up, shared_gate, shared_up, index, starts, x, hidden):
        """`rows.gate_up_rows` over groups of `LANES` rows of each expert: a panel of gate rows beside one of up rows.
        `index` has the columns of `x` of each pair."""
        groups = (gate.rows + LANES - 1) // LANES
        most = most_tokens(starts, first // groups, (last - 1) // groups + 1)
        scratch, results = allocate(SCRATCH), allocate_f32(most + SPARE_COLUMNS + 1, PAIR_ROWS)
        for item in range(first, last):
            buffers = Buffers(address(scratch), address(results))  # in the loop, so that it keeps the arrays alive
            e, row = item // groups, item % groups * LANES
            begin, end = starts[e], starts[e + 1]
            if begin == end:
                continue
            count = min(LANES, gate.rows - row)
            gate_row, stride = _any_row_at(gate, shared_gate, e, row)
            up_row, _ = _any_row_at(up, shared_up, e, row)
            rows = PairOfRows(gate_row, up_row, count, count, stride, LANES * stride)
            where = address(hidden[0, row:]), 4 * hidden.shape[1], count
            product(rows, x.x.shape[1], x, index, (begin, end), buffers, where)

    return gate_up_panels


@variants
def expert_panels(qtype):
    """Rows of the experts' matrices for many tokens, for gate and up that are of two types."""
    product = product_for(take_rows, qtype)

    @kernel(MATRICES, MATRICES, I1, I1, INPUT, F2)
    def expert_panels(first, last, w, shared, index, starts, x, out):
        """``out[i] = w[e] @ x[t]`` for the i-th pair, over groups of `PAIR_ROWS` rows of each expert. `index` has the
        columns of `x` of each pair."""
        groups = (w.rows + PAIR_ROWS - 1) // PAIR_ROWS
        most = most_tokens(starts, first // groups, (last - 1) // groups + 1)
        scratch, results = allocate(SCRATCH), allocate_f32(most + SPARE_COLUMNS + 1, PAIR_ROWS)
        for item in range(first, last):
            buffers = Buffers(address(scratch), address(results))  # in the loop, so that it keeps the arrays alive
            e, begin = item // groups, item % groups * PAIR_ROWS
            if starts[e] == starts[e + 1]:
                continue
            count = min(PAIR_ROWS, w.rows - begin)
            row, stride = _any_row_at(w, shared, e, begin)
            where, columns = (address(out[0, begin:]), 4 * out.shape[1], count), (starts[e], starts[e + 1])
            product(two_groups(row, stride, count), x.x.shape[1], x, index, columns, buffers, where)

    return expert_panels


@helper
def _weight_of(weights, t, j):
    """The weight of a token's j-th expert; shared experts, which come behind the routed ones, have 1."""
    return weights[t, j] if j < weights.shape[1] else np.float32(1)


@helper
def _take_down(results, first, last, where):
    """Add results, times the weights of their experts, to `count` numbers from `begin` on of the tokens' sums."""
    pairs, weights, out, begin, count = where
    choices = len(pairs) // len(out)
    for i in range(first, last):
        t, j = pairs[i] // choices, pairs[i] % choices
        weight = _weight_of(weights, t, j)
        add_scaled(weight, results + RESULT_BYTES * (i - first), address(out[t, begin:]), count)


@variants
def down_panels(qtype):
    """Down of many tokens and a quantised type."""
    product = product_for(_take_down, qtype)

    @kernel(MATRICES, MATRICES, I1, I1, I1, F2, INPUT, types.int64, F2)
    def down_panels(first, last, down, shared, pairs, index, starts, weights, x, add, out):
        """`rows.down_rows` over groups of `PAIR_ROWS` rows; all groups of an item meet an expert's activations while a
        cache has them."""
        experts = len(starts) - 1
        scratch = allocate(SCRATCH)
        results = allocate_f32(most_tokens(starts, 0, experts) + SPARE_COLUMNS, PAIR_ROWS)
        if not add:
            for t in range(len(out)):
                for r in range(first * PAIR_ROWS, min(last * PAIR_ROWS, down.rows)):
                    out[t, r] = 0
        for e in range(experts):
            if starts[e] == starts[e + 1]:
                continue
            for group in range(first, last):
                buffers = Buffers(address(scratch), address(results))  # in the loop, so that it keeps the arrays alive
                begin = group * PAIR_ROWS
                count = min(PAIR_ROWS, down.rows - begin)
                row, stride = _any_row_at(down, shared, e, begin)
                where = pairs, weights, out, begin, count
                columns = starts[e], starts[e + 1]
                product(two_groups(row, stride, count), x.x.shape[1], x, index, columns, buffers, where)

    return down_panels
