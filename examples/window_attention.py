"""Attention of a new token in the latent space, changed: a head sees no more than a window of positions.

Eight heads are the lanes of a register. The online softmax is that of `pymla.cpu.attention.softmax`, to base 2.

    python examples/window_attention.py [positions] [window] [heads] [rank] [rotated]
"""

import sys
import timeit

import numpy as np
from numba import types

from pymla.cpu import limits
from pymla.cpu.machine import simd
from pymla.cpu.runtime.jit import kernel

F2, F3 = types.float32[:, ::1], types.float32[:, :, ::1]


@kernel(F3, F2, types.int64, F3)
def attend(first, last, q, rows, window, out):
    """Groups of eight heads: q (H / 8, rank + R, 8), times log2 e / sqrt(size); rows (S, rank + R), whose first rank
    numbers are the values; out (H / 8, rank, 8)."""
    for group in range(first, last):
        queries, values = simd.address(q[group]), simd.address(out[group])
        out[group, :, :] = 0
        most, sums = simd.splat_f32(np.float32(-1e30)), simd.splat_f32(np.float32(0))
        for s in range(max(0, len(rows) - window), len(rows)):  # changed: it began with 0
            row, score = simd.address(rows[s]), simd.splat_f32(np.float32(0))
            for i in range(rows.shape[1]):
                score = simd.fma(simd.broadcast_f32x8(row + 4 * i), simd.load_f32x8(queries + 32 * i), score)
            before, most = most, simd.larger(score, most)
            shrink, weight = simd.exp2(simd.sub(before, most)), simd.exp2(simd.sub(score, most))
            sums = simd.fma(sums, shrink, weight)
            for i in range(out.shape[1]):
                value = simd.mul(simd.load_f32x8(values + 32 * i), shrink)
                simd.store_f32x8(values + 32 * i, simd.fma(simd.broadcast_f32x8(row + 4 * i), weight, value))
        for i in range(out.shape[1]):
            simd.store_f32x8(values + 32 * i, simd.div(simd.load_f32x8(values + 32 * i), sums))


def main(positions=8192, window=4096, heads=16, rank=512, rotated=64):
    rng, size = np.random.default_rng(0), rank + rotated
    rows, q = (rng.standard_normal((n, size), np.float32) for n in (positions, heads))
    scaled = q * np.float32(np.log2(np.e) / np.sqrt(size))
    lanes = np.ascontiguousarray(scaled.reshape(-1, 8, size).transpose(0, 2, 1))
    out, seen = np.empty((heads // 8, rank, 8), np.float32), rows[-window:].astype(np.float64)
    weights = np.exp(q @ seen.T / np.sqrt(size))
    expected = weights @ seen[:, :rank] / weights.sum(1, keepdims=True)
    seconds = min(timeit.repeat(lambda: attend[heads // 8, 1](lanes, rows, window, out), number=1, repeat=5))
    error = np.abs(out.transpose(0, 2, 1).reshape(heads, rank) - expected).max() / np.abs(expected).max()
    rate, limit = 4 * seen.size / seconds / 1e9, limits.read_rate(1 << 26) / 1e9
    print(f"largest error {error:.1e}; {rate:.2f} GB/s of cache, {rate / limit:.1%} of the {limit:.1f} of a plain read")
    return error


if __name__ == "__main__":
    assert main(*map(int, sys.argv[1:])) < 1e-5
