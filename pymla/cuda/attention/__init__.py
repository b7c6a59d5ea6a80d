"""Multi-head latent attention over a paged cache. Twin of `pymla.reference.attention`.

Each form is a module: `absorbed` in `pymla.cuda.attention.absorbed_form`, with its scores in memory in
`pymla.cuda.attention.materialised_form`, `expanded` in `pymla.cuda.attention.expanded_form`, `full` in
`pymla.cuda.attention.full_form`, `sparse` in `pymla.cuda.attention.sparse_form`, and `choose`, which says what `sparse`
attends to, in `pymla.cuda.attention.indexer`. Rows move in and out of the cache in `pymla.cuda.attention.store_load`.

Tensor cores multiply 16-bit factors: a float32 cache is rounded to float16 by `absorbed` and `sparse`, and by `full`
where sequences have several tokens, and so are bfloat16 rows beside rows of another type; expanded keys and values are
float16 always. `absorbed_materialised`, `full` for single tokens, and `choose` over float32 keys compute in float32.
"""

from typing import NamedTuple

import numpy as np

from pymla.contract import FLOAT16, FLOAT32
from pymla.cuda import memory, quant
from pymla.cuda.attention import sparse_form
from pymla.cuda.attention.absorbed_form import absorbed, absorbed_kernel
from pymla.cuda.attention.expanded_form import expanded, expanded_kernel
from pymla.cuda.attention.expansion import copy_rope, join
from pymla.cuda.attention.full_form import full, full_kernel
from pymla.cuda.attention.full_token import full_token_kernel
from pymla.cuda.attention.indexer import choose, choosing_kernels, index_cache
from pymla.cuda.attention.materialised_form import absorbed_materialised, exponential_kernels, materialised_kernels
from pymla.cuda.attention.mixed_rows import mix_heads
from pymla.cuda.attention.sparse_form import sparse
from pymla.cuda.attention.splits import combining_kernels
from pymla.cuda.attention.store_load import load_kernel, store_kernel
from pymla.cuda.attention.tiles import THREADS
from pymla.cuda.contract import check, need_any
from pymla.errors import PymlaError
from pymla.pages import HADAMARD_TYPES, PAGE, LatentCache, block_rows
from pymla.scratch import DEVICE
from pymla.tensor import QTensor

__all__ = [
    "absorb",
    "absorbed",
    "absorbed_kernels",
    "absorbed_materialised",
    "choose",
    "expand",
    "expanded",
    "expanded_kernels",
    "full",
    "full_kernels",
    "heads_at_once",
    "index_cache",
    "indexer_kernels",
    "keys_values",
    "latent_cache",
    "load",
    "sparse",
    "sparse_kernels",
    "store",
]

#: Heads that `expand` takes at a time.
heads_at_once = DEVICE.heads_at_once


def latent_cache(layout, slots):
    """Memory for ``c_kv`` and ``k_pe`` of so many slots; `layout` from `pymla.engine.cache_layout.row_layout`."""
    return LatentCache(*block_rows(memory, layout, slots))


def store(rows, slots, cache):
    """Write rows, float32 or float16 (T, W), into the slots, int32 (T,), of the cache in its type.

    `rows` may be columns of a wider array. A row whose slot is none of the cache is not written.
    """
    check.store(rows, slots, cache, (*FLOAT32, *FLOAT16))
    need_any("store", "slots", slots, len(cache.data), "slots in the cache")
    tokens, width = rows.shape
    blocks = tokens, -(-width // THREADS)
    source, target = (rows.address, rows.strides[0]), (cache.data.address, cache.data.shape[1], len(cache.data))
    store_kernel(cache.qtype, rows.dtype.name)[blocks, THREADS](source, width, slots, target)


def load(cache, block_table, out):
    """The first ``len(out)`` rows of a sequence as float32 (S, W). A page that is none of the cache counts as its last
    one."""
    check.load(cache, block_table, out)
    need_any("load", "block_table", block_table, len(cache.data) // PAGE, "pages in the cache")
    length, width = out.shape
    blocks, slots = (length, -(-width // THREADS)), len(cache.data)
    load_kernel(cache.qtype)[blocks, THREADS]((cache.data.address, cache.data.shape[1], slots), block_table, out)
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
    copy_rope[blocks, THREADS](q[..., nope:], out[..., rank:])
    return out


class KeysValues(NamedTuple):
    """Expanded keys, float16 (S, H, nope + R), and values, float16 (S, H, v)."""

    keys: memory.DeviceArray
    values: memory.DeviceArray


def keys_values(tokens, heads, nope, rotated, v, exact, dtype=np.float32):
    """Memory for the expanded keys and values of some heads: always float16 here, so that a large number makes no other
    number coarse."""
    keys = memory.empty((tokens, heads, nope + rotated), np.float16)
    return KeysValues(keys, memory.empty((tokens, heads, v), np.float16))


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
    keys, values = memory.empty((length, heads * nope), np.float32), memory.empty((length, heads * v), np.float32)
    quant.matmul(_one_matrix(k_b), x, keys)
    quant.matmul(_one_matrix(v_b), x, values)
    blocks = length, -(-heads // (THREADS // 32))
    sources, targets = (keys.address, k_pe.address, values.address), (out.keys.address, out.values.address)
    join[blocks, THREADS](sources, stride, (heads, nope, rope, v), targets)
    return out


def _one_matrix(w):
    """Several matrices as one with the rows of all."""
    return QTensor(w.qtype, w.data.reshape(-1, w.data.shape[-1]))


def absorbed_kernels(types_of_rows, sizes, k_b, v_b, materialised=False):
    """The kernels of generation in the absorbed form.

    Parameters
    ----------
    types_of_rows : (int, int)
        Cache types of ``c_kv`` and ``k_pe``.
    sizes : (int, int)
        Of ``c_kv`` and ``k_pe``: rank and R.
    k_b, v_b : int
        Types of the matrices.
    materialised : bool
        Whether the scores lie in memory.
    """
    found = [*_stores(types_of_rows, "float32"), copy_rope, *quant.matmul_heads_transposed_kernels(k_b)]
    found += [*quant.matmul_kernels(v_b), *combining_kernels()]
    if types_of_rows[0] in HADAMARD_TYPES:
        found.append(mix_heads)
    if materialised:
        return [*found, *materialised_kernels(types_of_rows, *sizes), *exponential_kernels()]
    return [*found, absorbed_kernel(types_of_rows, *sizes)[0]]


def expanded_kernels(types_of_rows, sizes, k_b, v_b):
    """The kernels of prompts in the expanded form; `sizes` are those of a key, nope + R, and of a value."""
    found = [*_stores(types_of_rows, "float32"), *_expand_kernels(k_b, v_b), expanded_kernel(*sizes)[0]]
    return found + [load_kernel(qtype) for qtype in dict.fromkeys(types_of_rows)]


def full_kernels(types_of_rows, sizes, k_b, v_b):
    """The kernels of a cache of whole keys and values of these cache types; `sizes` as for `expanded_kernels`."""
    found = [*_stores(types_of_rows, "float16"), *_expand_kernels(k_b, v_b), *combining_kernels()]
    return [*found, full_kernel(types_of_rows, *sizes)[0], full_token_kernel(types_of_rows, *sizes)]


def indexer_kernels(qtype, width, heads):
    """The kernels that store an indexer's keys, of a cache type and `width` numbers, and choose by so many heads."""
    return [*_stores((qtype,), "float32"), *choosing_kernels(qtype, width, heads)]


def sparse_kernels(types_of_rows, sizes):
    """The kernels of `sparse` that `absorbed_kernels` does not have, for the cache types and the sizes of ``c_kv`` and
    ``k_pe``."""
    return sparse_form.sparse_kernels(types_of_rows, *sizes)


def _stores(types_of_rows, source):
    return [store_kernel(qtype, source) for qtype in dict.fromkeys(types_of_rows)]


def _expand_kernels(k_b, v_b):
    return [join, *quant.matmul_kernels(k_b), *quant.matmul_kernels(v_b)]
