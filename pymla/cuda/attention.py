"""Multi-head latent attention over a paged cache. Twin of `pymla.reference.attention`.

The two forms are in `pymla.cuda.attention_decode` and `pymla.cuda.attention_prompt`; here is what moves rows in and out
of the cache. A cache of whole keys and values (``full``, ``--mla 0``) is for the other backends only.
"""

from typing import NamedTuple

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cache import PAGE
from pymla.cuda import ptx, quant
from pymla.cuda.attention_decode import absorbed
from pymla.cuda.attention_prompt import expanded
from pymla.cuda.jit import device, kernel
from pymla.cuda.memory import DeviceArray, empty
from pymla.weights import QTensor

__all__ = ["absorb", "absorbed", "absorbed_materialised", "expand", "expanded", "keys_values", "load", "store"]

I32, I64 = types.int32, types.int64
I1 = types.Array(types.int32, 1, "C")
#: Rows may be parts of wider ones.
F2 = types.Array(types.float32, 2, "A")
F3 = types.Array(types.float32, 3, "A")

#: Threads of a block; each takes a value.
THREADS = 128

#: A GPU keeps no scores in memory: the form of ``--mla 2`` is that of ``--mla 3``.
absorbed_materialised = absorbed


def store(rows, slots, cache):
    """Write rows, float32 (T, W), into the slots, int32 (T,), of the cache in its type."""
    tokens, width = rows.shape
    blocks = tokens, -(-width // THREADS)
    _STORE[cache.qtype][blocks, THREADS](rows, slots, cache.data.address, cache.data.shape[1])


def load(cache, block_table, out):
    """The first ``len(out)`` rows of a sequence as float32 (S, W)."""
    length, width = out.shape
    blocks = length, -(-width // THREADS)
    _LOAD[cache.qtype][blocks, THREADS](cache.data.address, cache.data.shape[1], block_table, out)
    return out


def absorb(q, k_b, out):
    """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

    `q` float32 (T, H, nope + R), `k_b` of H matrices of nope rows and rank columns, `out` float32 (T, H, rank + R).
    """
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
    length, heads, v = out.values.shape
    nope = k_b.data.shape[1]
    x = quant.Activation(c_kv)
    keys, values = empty((length, heads * nope), np.float32), empty((length, heads * v), np.float32)
    quant.matmul(_one_matrix(k_b), x, keys)
    quant.matmul(_one_matrix(v_b), x, values)
    addresses = out.keys.address, out.values.address
    blocks = length, heads, -(-(out.keys.shape[2] + v) // THREADS)
    _join[blocks, THREADS](keys.reshape(length, heads, nope), k_pe, values.reshape(length, heads, v), addresses)
    return out


def _one_matrix(w):
    """The rows of several matrices as those of one."""
    return QTensor(w.qtype, w.data.reshape(-1, w.data.shape[-1]))


# Values of the cache types: a value of a row, at an address.


@device
def _write_f32(row, i, x):
    ptx.store_f32(row + 4 * i, x)


@device
def _write_f16(row, i, x):
    ptx.store_f16(row + 2 * i, x)


@device
def _write_bf16(row, i, x):
    ptx.store_bf16(row + 2 * i, x)


@device
def _write_q8_0(row, i, x):
    """A block is a warp's."""
    block = row + 34 * (i >> 5)
    d = ptx.div(ptx.warp_max(abs(x)), np.float32(127))
    inverse = ptx.div(np.float32(1), d) if d > np.float32(0) else np.float32(0)
    scaled = x * inverse
    # ggml rounds halves away from zero.
    code = int(abs(scaled) + np.float32(0.5))
    ptx.store_u8(block + 2 + (i & 31), code if scaled > np.float32(0) else -code)
    if i & 31 == 0:
        ptx.store_f16(block, d)


@device
def _read_f32(row, i):
    return ptx.load_f32(row + 4 * i)


@device
def _read_f16(row, i):
    return ptx.load_f16(row + 2 * i)


@device
def _read_bf16(row, i):
    return ptx.load_bf16(row + 2 * i)


@device
def _read_q8_0(row, i):
    block = row + 34 * (i >> 5)
    return ptx.load_f16(block) * ptx.to_f32(ptx.load_i8(block + 2 + (i & 31)))


def _store_kernel(qtype, write):
    @kernel(F2, I1, I64, I64, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def store(rows, slots, cache, row_bytes):
        """Grid: tokens, columns."""
        t, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        # Whole warps are inside, wherever a row has blocks of 32.
        if i < rows.shape[1]:
            write(cache + slots[t] * row_bytes, i, rows[t, i])

    return store


def _load_kernel(qtype, read):
    @kernel(I64, I64, I1, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def load(cache, row_bytes, block_table, out):
        """Grid: positions, columns."""
        p, i = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if i < out.shape[1]:
            slot = block_table[p // PAGE] * PAGE + p % PAGE
            out[p, i] = read(cache + slot * row_bytes, i)

    return load


_WRITE = {ggml.F32: _write_f32, ggml.F16: _write_f16, ggml.BF16: _write_bf16, ggml.Q8_0: _write_q8_0}
_READ = {ggml.F32: _read_f32, ggml.F16: _read_f16, ggml.BF16: _read_bf16, ggml.Q8_0: _read_q8_0}
_STORE = {qtype: _store_kernel(qtype, write) for qtype, write in _WRITE.items()}
_LOAD = {qtype: _load_kernel(qtype, read) for qtype, read in _READ.items()}


@kernel(F3, F3, max_threads=THREADS)
def _copy_rope(q, out):
    """Grid: tokens, heads, columns."""
    t, h, i = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z * THREADS + cuda.threadIdx.x
    if i < q.shape[2]:
        out[t, h, i] = q[t, h, i]


@kernel(F3, F2, F3, types.UniTuple(I64, 2), max_threads=THREADS)
def _join(nope, k_pe, values, out):
    """``keys[s, h] = [nope[s, h]; k_pe[s]]``, and the values, to their addresses and in their type.

    Grid: positions, heads, columns of a key and a value.
    """
    s, h, i = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z * THREADS + cuda.threadIdx.x
    size, v, row = nope.shape[2] + k_pe.shape[1], values.shape[2], s * nope.shape[1] + h
    if i < nope.shape[2]:
        ptx.store_f16(out[0] + 2 * (row * size + i), nope[s, h, i])
    elif i < size:
        ptx.store_f16(out[0] + 2 * (row * size + i), k_pe[s, i - nope.shape[2]])
    elif i < size + v:
        ptx.store_f16(out[1] + 2 * (row * v + i - size), values[s, h, i - size])
