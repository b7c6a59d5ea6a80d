"""`window_attention.py` on the GPU: warps are heads, lanes are dimensions, and blocks share the window. Without a card:

NUMBA_ENABLE_CUDASIM=1 python examples/window_attention_gpu.py 40 20 2 2  # positions, window, heads, blocks
"""

import sys

import numpy as np
from numba import cuda, types

from pymla.cuda import limits, memory
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.jit import kernel

RANK, SIZE, PARTS = 512, 576, 512 // 32  # numbers of a row that are values, and all; values of a lane


@kernel(types.float32[:, ::1], types.float32[:, ::1], types.int64, types.float32[:, :, ::1], max_threads=512)
def attend(q, rows, window, out):
    """Of each block and head: unnormalised values, then maximum and sum of the scores; out (blocks, H, RANK + 2)."""
    block, lane, head = cuda.blockIdx.x, ptx.lane(), cuda.threadIdx.x // 32
    values, most, total = cuda.local.array(PARTS, types.float32), np.float32(-1e30), np.float32(0)
    for i in range(PARTS):
        values[i] = 0
    begin = max(0, len(rows) - window)  # changed: it was 0
    share = (len(rows) - begin + cuda.gridDim.x - 1) // cuda.gridDim.x
    for s in range(begin + block * share, min(begin + (block + 1) * share, len(rows))):
        score = np.float32(0)
        for i in range(SIZE // 32):
            score += q[head, 32 * i + lane] * rows[s, 32 * i + lane]
        score = ptx.warp_sum(score)
        before, most = most, max(most, score)
        shrink, weight = ptx.exp2(before - most), ptx.exp2(score - most)
        total = total * shrink + weight
        for i in range(PARTS):
            values[i] = values[i] * shrink + weight * rows[s, 32 * i + lane]
    for i in range(PARTS):
        out[block, head, 32 * i + lane] = values[i]
    out[block, head, RANK], out[block, head, RANK + 1] = most, total


def main(positions=1 << 20, window=1 << 19, heads=16, blocks=1024):
    rng = np.random.default_rng(0)
    rows, q = (rng.standard_normal((n, SIZE), np.float32) for n in (positions, heads))
    inputs = [memory.to_device(x) for x in (q * np.float32(np.log2(np.e) / np.sqrt(SIZE)), rows)]
    out = memory.empty((blocks, heads, RANK + 2), np.float32)
    seconds = min(limits.seconds(lambda: attend[blocks, 32 * heads](*inputs, window, out)))
    found = memory.to_host(out).astype(np.float64)
    found = (found * np.exp2(found[:, :, RANK] - found[:, :, RANK].max(0))[..., None]).sum(0)
    weights = np.exp(q @ rows[-window:].T / np.sqrt(SIZE))
    expected = weights @ rows[-window:, :RANK] / weights.sum(1, keepdims=True)
    error = np.abs(found[:, :RANK] / found[:, RANK + 1 :] - expected).max() / np.abs(expected).max()
    rate, limit = rows[-window:].nbytes / seconds / 1e9, limits.read_rate() / 1e9
    print(f"largest error {error:.1e}; {rate:.1f} GB/s of cache, {rate / limit:.1%} of the {limit:.1f} of a plain copy")
    return error


if __name__ == "__main__":
    assert main(*map(int, sys.argv[1:])) < 1e-4
