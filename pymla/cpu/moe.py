"""The mixture of experts. Twin of `pymla.reference.moe`."""

import numpy as np
from numba import prange

from pymla.cpu.formats import dot_row
from pymla.cpu.jit import inline, kernel
from pymla.cpu.quant import CHUNKS, F2, I1, I8, MATRICES, Activation, Matrices, matmul
from pymla.ggml import QUANTISED

#: The router's choice is a matter of a few hundred numbers per token, which NumPy handles.
from pymla.reference.moe import router

__all__ = ["experts", "ffn", "router"]


def experts(activation, ids, weights, gate, up, down, out):
    """Routed experts, fused: gate and up of all pairs of token and expert in one pass, then down with the weights.

    `activation` of (T, K); `ids` int32 and `weights` float32 (T, k); `gate` and `up` of E matrices of F rows and K columns,
    `down` of E matrices of K rows and F columns; `out` float32 (T, K), overwritten. No expert's rows are read twice.
    """
    pairs = np.argsort(ids.reshape(-1), kind="stable").astype(np.int32)
    starts = np.searchsorted(ids.reshape(-1)[pairs], np.arange(len(gate.data) + 1)).astype(np.int32)
    hidden = np.empty((len(pairs), gate.data.shape[1]), np.float32)
    codes, scale, sums = activation.quantised(gate.qtype if gate.qtype in QUANTISED else up.qtype)
    _gate_up(Matrices.of(gate), Matrices.of(up), pairs, starts, activation.x, codes, scale, sums, hidden)
    inner = Activation(hidden)
    _down(Matrices.of(down), pairs, starts, weights, inner.x, *inner.quantised(down.qtype), out)
    return out


def ffn(activation, gate, up, down, out):
    """``out = down @ (silu(gate @ x) * (up @ x))``: the dense network, also the shared experts."""
    inner = np.empty((len(out), len(gate.data)), np.float32)
    other = np.empty_like(inner)
    matmul(gate, activation, inner)
    matmul(up, activation, other)
    _silu_mul(inner, other)
    return matmul(down, Activation(inner), out)


@inline
def silu(x):
    """``x / (1 + exp(-x))``."""
    return x / (np.float32(1) + np.exp(-x))


@kernel(F2, F2)
def _silu_mul(x, y):
    for t in prange(len(x)):
        for i in range(x.shape[1]):
            x[t, i] = silu(x[t, i]) * y[t, i]


@kernel(MATRICES, MATRICES, I1, I1, F2, I8, F2, F2, F2)
def _gate_up(gate, up, pairs, starts, x, codes, scale, sums, hidden):
    """``hidden[i] = silu(gate[e] @ x[t]) * (up[e] @ x[t])`` for the i-th pair in order of experts."""
    rows = gate.rows
    columns = x.shape[1]
    choices = len(pairs) // len(x)
    chunks = min(rows, CHUNKS)
    for chunk in prange(chunks):
        for e in range(len(starts) - 1):
            for r in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
                if starts[e] == starts[e + 1]:
                    break
                gate_row = gate.address + e * gate.matrix_stride + r * gate.row_stride
                up_row = up.address + e * up.matrix_stride + r * up.row_stride
                for i in range(starts[e], starts[e + 1]):
                    t = pairs[i] // choices
                    a, c, s, m = x[t].ctypes.data, codes[t:].ctypes.data, scale[t:].ctypes.data, sums[t:].ctypes.data
                    g = dot_row(gate.qtype, gate_row, a, c, s, m, columns)
                    hidden[i, r] = silu(g) * dot_row(up.qtype, up_row, a, c, s, m, columns)


@kernel(MATRICES, I1, I1, F2, F2, I8, F2, F2, F2)
def _down(down, pairs, starts, weights, x, codes, scale, sums, out):
    """``out[t] = Σ weights[t, j] * (down[e] @ hidden)``; a thread owns rows of `out`, so none waits for another."""
    rows = down.rows
    columns = x.shape[1]
    choices = weights.shape[1]
    chunks = min(rows, CHUNKS)
    for chunk in prange(chunks):
        first, last = rows * chunk // chunks, rows * (chunk + 1) // chunks
        for t in range(len(out)):
            for r in range(first, last):
                out[t, r] = 0
        for e in range(len(starts) - 1):
            for r in range(first, last):
                if starts[e] == starts[e + 1]:
                    break
                row = down.address + e * down.matrix_stride + r * down.row_stride
                for i in range(starts[e], starts[e + 1]):
                    t, j = pairs[i] // choices, pairs[i] % choices
                    product = dot_row(
                        down.qtype,
                        row,
                        x[i].ctypes.data,
                        codes[i:].ctypes.data,
                        scale[i:].ctypes.data,
                        sums[i:].ctypes.data,
                        columns,
                    )
                    out[t, r] += weights[t, j] * product
