"""Putting queries, keys and values together from the results of products."""

from numba import cuda

from pymla.cuda.attention.tiles import THREADS
from pymla.cuda.machine import ptx
from pymla.cuda.runtime.array_types import I64, STRIDED3, addresses
from pymla.cuda.runtime.jit import device, kernel


@kernel(STRIDED3, STRIDED3, max_threads=THREADS)
def copy_rope(q, out):
    """Grid: tokens, heads, columns."""
    t, h, i = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z * THREADS + cuda.threadIdx.x
    if i < q.shape[2]:
        out[t, h, i] = q[t, h, i]


@kernel(addresses(3), I64, addresses(4), addresses(2), max_threads=THREADS)
def join(sources, stride, sizes, targets):
    """``keys[s, h] = [nope[s, h]; k_pe[s]]``, and the values, in their type: a head to a warp, by fours.

    `sources`: nope (S, H, nope), k_pe (S, R), whose rows are `stride` bytes apart, and values (S, H, v), all float32.
    Grid: positions, heads.
    """
    s, thread = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    h, lane = thread >> 5, thread & 31
    heads, nope, rope, v = sizes
    size = nope + rope
    row = s * heads + h
    for k in range(4 * lane, size + v if h < heads else 0, 128):
        if k < nope:
            _four_halves(sources[0] + 4 * (row * nope + k), targets[0] + 2 * (row * size + k))
        elif k < size:
            _four_halves(sources[1] + s * stride + 4 * (k - nope), targets[0] + 2 * (row * size + k))
        else:
            _four_halves(sources[2] + 4 * (row * v + k - size), targets[1] + 2 * (row * v + k - size))


@device
def _four_halves(source, target):
    """Four float32 become float16."""
    x0, x1, x2, x3 = ptx.load_f32x4(source)
    ptx.store_u32x2(target, ptx.pack_f16x2(x0, x1), ptx.pack_f16x2(x2, x3))
