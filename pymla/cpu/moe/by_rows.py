"""Experts of few tokens: rows of weights straight from the file times the activations of one token (gemv)."""

import numpy as np
from numba import types

from pymla.cpu.machine.simd import address
from pymla.cpu.matmul.activations import INPUT
from pymla.cpu.matmul.gemv import dot_rows_of_tokens_for, four_tokens
from pymla.cpu.matmul.kernels import rows_at_once
from pymla.cpu.matmul.matrices import MATRICES, add_scaled, copy, row_at
from pymla.cpu.moe.routing import next_expert
from pymla.cpu.moe.swiglu import silu_mul
from pymla.cpu.runtime.array_types import F2, I1
from pymla.cpu.runtime.jit import kernel, variants


@variants
def gate_up_rows(gate_type, up_type):
    """Gate and up rows of few tokens."""
    dot_gate, dot_up = dot_rows_of_tokens_for(gate_type), dot_rows_of_tokens_for(up_type)

    @kernel(MATRICES, MATRICES, I1, I1, INPUT, INPUT, F2)
    def gate_up_rows(first, last, gate, up, tokens, starts, x, y, hidden):
        """``hidden[i] = silu(gate[e] @ x[t]) * (up[e] @ x[t])`` for the i-th pair, over rows of the matrices: all of
        the first expert that has tokens, then all of the second, so that a thread reads long stretches of memory. `x`
        and `y` are the same activations, for each matrix in the order of its type."""
        columns, results = x.x.shape[1], np.empty((2, 4, min(last - first, gate.rows) + 7), np.float32)
        apart = 4 * results.shape[2]
        begin, e = 0, next_expert(starts, -1)
        while begin < last and e < gate.number:
            until = min(last - begin, gate.rows)
            size = rows_at_once(starts[e + 1] - starts[e], gate.row_stride, gate.rows)
            for r in range(max(first - begin, 0), until, size):
                count = min(size, until - r)
                g, u = address(results[0]), address(results[1])  # in the loop, so that it keeps the array alive
                for i in range(starts[e], starts[e + 1], 4):
                    number, end = min(4, starts[e + 1] - i), starts[e + 1]
                    four = four_tokens(x, tokens, i, end)
                    dot_gate(row_at(gate, e, r), gate.row_stride, count, four, number, columns, g, apart)
                    four = four_tokens(y, tokens, i, end)
                    dot_up(row_at(up, e, r), up.row_stride, count, four, number, columns, u, apart)
                    for j in range(number):
                        silu_mul(g + j * apart, u + j * apart, g + j * apart, count)
                        copy(g + j * apart, address(hidden[i + j, r:]), count)
            begin, e = begin + gate.rows, next_expert(starts, e)

    return gate_up_rows


@variants
def down_rows(qtype):
    """Down rows of few tokens."""
    dot_rows = dot_rows_of_tokens_for(qtype)

    @kernel(MATRICES, I1, I1, I1, F2, INPUT, types.int64, F2)
    def down_rows(first, last, down, pairs, index, starts, weights, x, add, out):
        """``out[t] += Σ weights[t, j] * (down[e] @ hidden)`` over rows: a thread owns them and waits for no other.
        `index` counts the pairs."""
        columns, results = x.x.shape[1], np.empty((4, last - first), np.float32)
        choices, apart = weights.shape[1], 4 * (last - first)
        if not add:
            for t in range(len(out)):
                for r in range(first, last):
                    out[t, r] = 0
        e = next_expert(starts, -1)
        while e < down.number:
            size = rows_at_once(starts[e + 1] - starts[e], down.row_stride, last - first)
            for r in range(first, last, size):
                count = min(size, last - r)
                row = row_at(down, e, r)
                for i in range(starts[e], starts[e + 1], 4):
                    result, number = address(results), min(4, starts[e + 1] - i)
                    four = four_tokens(x, index, i, starts[e + 1])
                    dot_rows(row, down.row_stride, count, four, number, columns, result, apart)
                    for pair in pairs[i : i + number]:
                        t, j = pair // choices, pair % choices
                        add_scaled(weights[t, j], result, address(out[t, r:]), count)
                        result += apart
            e = next_expert(starts, e)

    return down_rows
