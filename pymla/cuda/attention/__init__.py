"""Multi-head latent attention over a paged cache. Twin of `pymla.reference.attention`.

Each form is a module: `absorbed` in `pymla.cuda.attention.absorbed_form`, with its scores in memory in
`pymla.cuda.attention.materialised_form`, `expanded` in `pymla.cuda.attention.expanded_form`, `full` in
`pymla.cuda.attention.full_form`. Here is what moves rows in and out of the cache.

Tensor cores multiply 16-bit factors: a float32 cache is rounded to float16 by `absorbed`, and by `full` where sequences
have several tokens; expanded keys and values are float16 always. `absorbed_materialised`, and `full` for single tokens,
compute in float32.
"""

from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.contract import FLOAT16, FLOAT32
from pymla.cuda import memory, quant
from pymla.cuda.attention.absorbed_form import absorbed
from pymla.cuda.attention.cache_rows import read_one, write_one
from pymla.cuda.attention.expanded_form import expanded
from pymla.cuda.attention.full_form import full
from pymla.cuda.attention.materialised_form import absorbed_materialised
from pymla.cuda.contract import check
from pymla.cuda.machine import ptx
from pymla.cuda.memory import DeviceArray, empty
from pymla.cuda.runtime.jit import device, kernel
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE, LatentCache, block_rows
from pymla.scratch import DEVICE
from pymla.tensor import QTensor

__all__ = [
    "absorb",
    "absorbed",
    "absorbed_materialised",
    "expand",
    "expanded",
    "full",
    "heads_at_once",
    "keys_values",
    "latent_cache",
    "load",
    "store",
]

#: Heads that `expand` takes at a time.
heads_at_once = DEVICE.heads_at_once

I32, I64 = types.int32, types.int64
I1 = types.Array(types.int32, 1, "C")
#: Rows at an address, so many bytes apart.
ROWS = types.UniTuple(I64, 2)
#: Rows may be parts of wider ones.
F2 = types.Array(types.float32, 2, "A")
F3 = types.Array(types.float32, 3, "A")

#: Threads of a block; each takes a value.
THREADS = 128


def latent_cache(layout, slots):
    """Memory for ``c_kv`` and ``k_pe`` of so many slots; `layout` from `pymla.engine.cache.row_layout`."""
    return LatentCache(*block_rows(memory, layout, slots))


def store(rows, slots, cache):
    """Write rows, float32 or float16 (T, W), into the slots, int32 (T,), of the cache in its type.

    `rows` may be columns of a wider array.
    """
    check.store(rows, slots, cache, (*FLOAT32, *FLOAT16))
    tokens, width = rows.shape
    stride = rows.strides[0]
    blocks = tokens, -(-width // THREADS)
    source, target = (rows.address, stride), (cache.data.address, cache.data.shape[1])
    _STORE[cache.qtype, rows.dtype.name][blocks, THREADS](source, width, slots, target)


def load(cache, block_table, out):
    """The first ``len(out)`` rows of a sequence as float32 (S, W)."""
    check.load(cache, block_table, out)
    length, width = out.shape
    blocks = length, -(-width // THREADS)
    _LOAD[cache.qtype][blocks, THREADS](cache.data.address, cache.data.shape[1], block_table, out)
    return out


def absorb(q, k_b, out):
    """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

    `q` float32 (T, H, nope + R), `k_b` of H matrices of nope rows and rank columns, `out` float32 (T, H, rank + R).
    """
    check.absorb(q, k_b, out)
    tokens, heads, size = q.shape
    nope = k_b.data.shape[1]
    rank = out.shape[2] - (size - nope)
    quant.matmul_heads_transposed(k_b, q[..., :nope], out[..., :rank])
    blocks = tokens, heads, -(-(size - nope) // THREADS)
    _copy_rope[blocks, THREADS](q[..., nope:], out[..., rank:])
    return out


class KeysValues(NamedTuple):
    """Expanded keys, float16 (S, H, nope + R), and values, float16 (S, H, v)."""

    keys: DeviceArray
    values: DeviceArray


def keys_values(tokens, heads, size, v, exact, dtype=np.float32):
    """Memory for the expanded keys, of `size` numbers, and values of some heads: always float16 here."""
    return KeysValues(empty((tokens, heads, size), np.float16), empty((tokens, heads, v), np.float16))


def expand(c_kv, k_pe, k_b, v_b, out):
    """Keys and values of some heads from latent rows.

    `c_kv` float32 (S, rank), `k_pe` float32 (S, R), `k_b` of H matrices of nope rows and `v_b` of H matrices of v rows,
    both of rank columns; `out` from `keys_values`.
    """
    check.expand(c_kv, k_pe, k_b, v_b, check.sizes("expand", out))
    length, heads, v = out.values.shape
    nope, rope = k_b.data.shape[1], k_pe.shape[1]
    stride, item = k_pe.strides
    if nope % 4 or rope % 4 or v % 4 or stride % 16 or item != 4:
        raise PymlaError(f"keys of {nope} and {rope} and values of {v} numbers; the CUDA backend takes them by fours")
    x = quant.Activation(c_kv)
    keys, values = empty((length, heads * nope), np.float32), empty((length, heads * v), np.float32)
    quant.matmul(_one_matrix(k_b), x, keys)
    quant.matmul(_one_matrix(v_b), x, values)
    blocks = length, -(-heads // (THREADS // 32))
    sources, targets = (keys.address, k_pe.address, values.address), (out.keys.address, out.values.address)
    _join[blocks, THREADS](sources, stride, (heads, nope, rope, v), targets)
    return out


def _one_matrix(w):
    """The rows of several matrices as those of one."""
    return QTensor(w.qtype, w.data.reshape(-1, w.data.shape[-1]))


def _store_kernel(qtype, source_type):
    read, write = read_one(source_type), write_one(qtype)

    @kernel(ROWS, I32, I1, ROWS, variant=f"{ggml.NAME[source_type]},{ggml.NAME[qtype]}".lower(), max_threads=THREADS)
    def store(source, width, slots, cache):
        """Grid: tokens, columns."""
        t, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        # Whole warps are inside, wherever a row has blocks of 32.
        if i < width:
            write(cache[0] + slots[t] * cache[1], i, read(source[0] + t * source[1], i))

    return store


def _load_kernel(qtype):
    read = read_one(qtype)

    @kernel(I64, I64, I1, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def load(cache, row_bytes, block_table, out):
        """Grid: positions, columns."""
        p, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if i < out.shape[1]:
            slot = block_table[p // PAGE] * PAGE + p % PAGE
            out[p, i] = read(cache + slot * row_bytes, i)

    return load


#: By the types of the cache and of the rows.
_STORE = {
    (qtype, name): _store_kernel(qtype, source_type)
    for qtype in CACHE_TYPES.values()
    for name, source_type in (("float32", ggml.F32), ("float16", ggml.F16))
}
_LOAD = {qtype: _load_kernel(qtype) for qtype in CACHE_TYPES.values()}


@kernel(F3, F3, max_threads=THREADS)
def _copy_rope(q, out):
    """Grid: tokens, heads, columns."""
    t, h, i = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z * THREADS + cuda.threadIdx.x
    if i < q.shape[2]:
        out[t, h, i] = q[t, h, i]


@kernel(types.UniTuple(I64, 3), I64, types.UniTuple(I64, 4), types.UniTuple(I64, 2), max_threads=THREADS)
def _join(sources, stride, sizes, targets):
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
