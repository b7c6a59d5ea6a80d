"""A product with a Q4_0 matrix, from registers: y = W x, one row of W at a time. Copy it and change a line.

python examples/dot_q4_0.py [rows] [columns]
"""

import sys
import timeit

import numpy as np
from numba import types

from pymla import ggml
from pymla.cpu import limits
from pymla.cpu.machine import simd, simd_bytes
from pymla.cpu.runtime.jit import helper, kernel
from pymla.reference.quant import dequantise, quantise, quantise_activations

BLOCK = 18  # bytes of 32 weights: a scale, an IEEE half, and 16 bytes of two codes each


@helper
def dot_row(row, codes, scales, blocks):
    """A row of Q4_0 times activations, int8 codes with a float32 scale for 32 of them; all are addresses."""
    acc, zero = simd.splat_f32(np.float32(0)), simd_bytes.zero_i32x8()
    for _ in range(blocks):
        weights = simd.subtract_i8(simd.load_nibbles(row + 2), 8)  # 32 codes, from -8 to 7
        products = simd_bytes.dot_i8(zero, weights, simd.load_i8x32(codes))  # 8 sums of 4 products
        scale = simd.splat_f32(simd.load_f16(row) * simd.load_f32(scales))
        acc = simd.fma(simd_bytes.to_f32(products), scale, acc)
        row, codes, scales = row + BLOCK, codes + 32, scales + 4
    return simd.total(acc)


@kernel(types.uint8[:, ::1], types.int8[::1], types.float32[::1], types.float32[::1])
def multiply(first, last, w, codes, scales, out):
    """Rows `first` to `last` of W, as the bytes of a file, times the activations."""
    for r in range(first, last):
        out[r] = dot_row(simd.address(w[r]), simd.address(codes), simd.address(scales), len(scales))


def main(rows=1 << 17, columns=4096):
    rng = np.random.default_rng(0)
    some = quantise(rng.standard_normal((min(rows, 512), columns), np.float32), ggml.Q4_0)
    w, out = np.tile(some, (-(-rows // len(some)), 1))[:rows], np.empty(rows, np.float32)
    codes, scales = (each[0] for each in quantise_activations(rng.standard_normal((1, columns), np.float32)))
    multiply[rows](w, codes, scales, out)
    x = codes.reshape(-1, 32) * scales[:, None].astype(np.float64)
    expected = dequantise(some, ggml.Q4_0) @ x.reshape(-1)
    error = np.abs(out[: len(some)] - expected).max() / np.abs(expected).max()
    seconds = min(timeit.repeat(lambda: multiply[rows](w, codes, scales, out), number=1, repeat=10))
    rate, limit = w.nbytes / seconds / 1e9, limits.read_rate(w.nbytes) / 1e9
    print(f"largest error {error:.1e}; {rate:.1f} GB/s, {rate / limit:.0%} of the {limit:.1f} that a plain read has")
    return error


if __name__ == "__main__":
    assert main(*map(int, sys.argv[1:])) < 1e-5
