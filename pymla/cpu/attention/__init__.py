"""Multi-head latent attention over a paged cache. Twin of `pymla.reference.attention`.

All forms run over the cache a page of 64 positions at a time, with an online softmax (Milakov and Gimelshein, 2018): a
running maximum m, a running sum l, and accumulated values, which shrink where the maximum grows
(`pymla.cpu.attention.softmax`). Positions behind a query are never read.

- *Absorbed*: a page is dequantised once and meets 16 heads, which are the lanes of two registers, in two small matrix
  products. The pages of a token are split over threads, and the shares merged.
- *Expanded*, *full*: blocks of queries of one head, against keys and values of that head.

A latent cache of 8 bits is multiplied on integers instead, in the first two forms (`pymla.cpu.attention.absorbed_form`,
`pymla.cpu.attention.expanded_form`).

>>> import numpy as np
>>> from pymla.cpu import attention
>>> q, keys, values = (np.ones((5, 2, size), np.float32) for size in (48, 48, 32))
>>> positions = np.arange(5, dtype=np.int32)
>>> out = np.empty((5, 2, 32), np.float32)
>>> attention.expanded(q, attention.KeysValues(keys, values), positions, 48**-0.5, out)[4, 1, :3].tolist()
[1.0, 1.0, 1.0]
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.array_types import A2, A3, CACHE, F2, F3, I1, STEP
from pymla.cpu.attention import absorbed_form, expanded_form
from pymla.cpu.attention.absorbed_form import HEADS, take_item
from pymla.cpu.attention.cache_rows import latent_cache, read_cache_row_for, write_cache_row_for
from pymla.cpu.attention.expanded_form import Panels
from pymla.cpu.attention.softmax import LOG2E, heads_softmax, query_softmax, shrink
from pymla.cpu.cache_types import Q8_PAGES
from pymla.cpu.contract import check
from pymla.cpu.formats import FORMATS
from pymla.cpu.formats.rows import dequantise_row_for
from pymla.cpu.machine.simd import address, load_f32, load_f32x8, store_f32, store_f32x8
from pymla.cpu.matmul.gemm_f32 import tile_f32, transpose_panel
from pymla.cpu.matmul.matrices import add_scaled
from pymla.cpu.matmul.unpacked import PAIR_ROWS as ROWS
from pymla.cpu.memory import empty
from pymla.cpu.quant import (
    Activation,
    matmul,
    matmul_heads_kernels,
    matmul_heads_transposed,
    matmul_heads_transposed_kernels,
    matmul_kernels,
)
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.jit import helper, kernel, variants
from pymla.ggml import F32
from pymla.pages import PAGE
from pymla.scratch import heads_at_once

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

_dot_f32 = FORMATS[F32].dot_row

#: Queries of a head that share the reading of a page in the expanded and full forms.
BLOCK = 64


def store(rows, slots, cache):
    """Write rows, float32 (T, W), into the slots, int32 (T,), of the cache in its type; a row is contiguous."""
    check.store(rows, slots, cache)
    _store(cache.qtype)[len(rows)](rows, slots, cache)


def load(cache, block_table, out):
    """The first ``len(out)`` rows of a sequence as float32 (S, W)."""
    check.load(cache, block_table, out)
    _load(cache.qtype)[len(out)](cache, block_table, out)
    return out


def absorb(q, k_b, out):
    """Queries of the absorbed form: ``out[t, h] = [k_b[h].T @ q[t, h, :nope]; q[t, h, nope:]]``.

    `q` float32 (T, H, nope + R), `k_b` of H matrices of nope rows and rank columns, `out` float32 (T, H, rank + R).
    """
    check.absorb(q, k_b, out)
    nope = k_b.data.shape[1]
    matmul_heads_transposed(k_b, q[..., :nope], out[..., : out.shape[2] - (q.shape[2] - nope)])
    _copy_rope[len(q)](q, out, q.shape[2] - nope)
    return out


def absorbed(q, latent, rope, step, scale, out):
    """Attention in the latent space: `q` float32 (T, H, rank + R), `out` float32 (T, H, rank)."""
    check.absorbed(q, latent, rope, step, scale, out)
    tokens, heads, rank = out.shape
    # Few tokens leave threads idle, so the pages of a token are split over several.
    groups = -(-heads // HEADS)
    splits = max(1, 2 * threads.thread_count() // (tokens * groups))
    partial = empty((tokens * splits, groups * HEADS, -(-rank // ROWS) * ROWS), np.float32)
    sums = np.empty((tokens * splits, heads, 2), np.float32)
    on_integers = latent.qtype == Q8_PAGES
    kernel = absorbed_form.absorbed_pages if on_integers else _absorbed(latent.qtype, rope.qtype)
    kernel[tokens * splits * groups, 1](q, latent, rope, step, scale * LOG2E, rank, splits, partial, sums)
    _merge[tokens * heads](partial, sums, splits, out)
    return out


def absorbed_materialised(q, latent, rope, step, scale, out):
    """`absorbed` with all scores of a token in memory before the first value is read (``--mla 2``)."""
    check.absorbed(q, latent, rope, step, scale, out, "absorbed_materialised")
    tokens, heads, rank = out.shape
    pages = step.block_tables.shape[1]
    for t in range(tokens):
        scores = np.empty((heads, pages * PAGE), np.float32)
        _scores(latent.qtype, rope.qtype)[pages](q, latent, rope, step, rank, scale, t, scores)
        _values(latent.qtype)[heads, 1](scores, latent, step, t, out)
    return out


class KeysValues(NamedTuple):
    """Expanded keys, float32 (S, H, nope + R), and values, float32 (S, H, v)."""

    keys: np.ndarray
    values: np.ndarray


def keys_values(tokens, heads, size, v, exact, dtype=np.float32):
    """Memory for the expanded keys, of `size` numbers, and values of some heads.

    `exact` ones are `KeysValues` of `dtype`; the others have 8 bits (`pymla.cpu.attention.expanded_form`), which is
    several times faster and suits a cache of 8 bits.
    """
    if not exact:
        return Panels.empty(tokens, heads, size, v)
    return KeysValues(np.empty((tokens, heads, size), dtype), np.empty((tokens, heads, v), dtype))


def expand(c_kv, k_pe, k_b, v_b, out):
    """Keys and values of some heads from latent rows.

    `c_kv` float32 (S, rank), `k_pe` float32 (S, R), `k_b` of H matrices of nope rows and `v_b` of H matrices of v rows,
    both of rank columns; `out` from `keys_values`.
    """
    if isinstance(out, Panels):
        expanded_form.expand(c_kv, k_pe, k_b, v_b, out)
        return out
    check.expand(c_kv, k_pe, k_b, v_b, check.sizes("expand", out))
    length, heads, v = out.values.shape
    x = Activation(c_kv)
    nope = np.empty((length, heads * k_b.data.shape[1]), np.float32)
    matmul(k_b, x, nope)
    matmul(v_b, x, out.values.reshape(length, heads * v))
    _join_keys[length](nope.reshape(length, heads, -1), k_pe, out.keys)
    return out


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence over expanded keys and values; `q` float32 (T, H, nope + R), `out` (T, H, v),
    which may be part of a larger array."""
    if isinstance(keys_values, Panels):
        return expanded_form.expanded(q, keys_values, positions, scale, out)
    check.expanded(q, check.sizes("expanded", keys_values), positions, out)
    tokens, heads, _ = q.shape
    _expanded[heads * -(-tokens // BLOCK), 1](q, *keys_values, positions, scale * LOG2E, out)
    return out


def full(q, keys, values, step, scale, out):
    """Attention over a cache of whole keys and values (``--mla 0``); `q` float32 (T, H, nope + R), `out` (T, H, v)."""
    check.full(q, keys, values, step, scale, out)
    tokens, heads, _ = q.shape
    _full(keys.qtype, values.qtype)[heads * -(-tokens // BLOCK), 1](q, keys, values, step, scale * LOG2E, out)
    return out


def full_kernels(keys, values, k_b, v_b):
    """What ``--mla 0`` launches over a cache of these types, with ``W_k_b`` and ``W_v_b`` of these."""
    stores = [_store(keys), _store(values), _full(keys, values), _join_keys]
    return [*stores, *matmul_kernels(k_b), *matmul_kernels(v_b)]


def absorbed_kernels(latent, rope, k_b, v_b, materialised=False):
    """What the absorbed form launches, with its cache and queries."""
    kernels = [_store(latent), _store(rope), _copy_rope]
    kernels += matmul_heads_transposed_kernels(k_b) + matmul_heads_kernels(v_b)
    if materialised:
        return [*kernels, _scores(latent, rope), _values(latent)]
    on_integers = latent == Q8_PAGES
    return [*kernels, absorbed_form.absorbed_pages if on_integers else _absorbed(latent, rope), _merge]


def expanded_kernels(latent, rope, k_b, v_b, exact):
    """What the expanded form launches, with its cache."""
    kernels = [_store(latent), _store(rope), _load(latent), _load(rope)]
    if not exact:
        return kernels + expanded_form.kernels(k_b, v_b)
    return [*kernels, *matmul_kernels(k_b), *matmul_kernels(v_b), _join_keys, _expanded]


@variants
def _store(qtype):
    """`store` into a cache of a type."""
    write_cache_row = write_cache_row_for(qtype)

    @kernel(A2, I1, CACHE)
    def _store(first, last, rows, slots, cache):
        for t in range(first, last):
            write_cache_row(cache, slots[t], address(rows[t]), rows.shape[1])

    return _store


@variants
def _load(qtype):
    """`load` from a cache of a type."""
    read_cache_row = read_cache_row_for(qtype)

    @kernel(CACHE, I1, F2)
    def _load(first, last, cache, block_table, out):
        for p in range(first, last):
            read_cache_row(cache, block_table[p // PAGE] * PAGE + p % PAGE, address(out[p]), out.shape[1])

    return _load


@kernel(F3, F3, types.int64)
def _copy_rope(first, last, q, out, size):
    for t in range(first, last):
        for h in range(q.shape[1]):
            for i in range(size):
                out[t, h, out.shape[2] - size + i] = q[t, h, q.shape[2] - size + i]


@kernel(F3, A2, F3)
def _join_keys(first, last, nope, k_pe, keys):
    """``keys[s, h] = [nope[s, h]; k_pe[s]]``."""
    size = nope.shape[2]
    for s in range(first, last):
        for h in range(keys.shape[1]):
            for i in range(size):
                keys[s, h, i] = nope[s, h, i]
            for i in range(k_pe.shape[1]):
                keys[s, h, size + i] = k_pe[s, i]


@variants
def _absorbed(latent_type, rope_type):
    """`absorbed` over a cache of float types."""
    read_latent, read_rope = read_cache_row_for(latent_type), read_cache_row_for(rope_type)

    @kernel(
        F3,
        CACHE,
        CACHE,
        STEP,
        types.float64,
        types.int64,
        types.int64,
        F3,
        F3,
    )
    def _absorbed(first, last, q, latent, rope, step, scale, rank, splits, partial, sums):
        """Unnormalised values (T * splits, H, rank), both padded, and maximum and sum (T * splits, H, 2), of each share
        of the pages.

        An item is a token, a group of heads and a share.
        """
        heads, size, padded = q.shape[1], q.shape[2], partial.shape[2]
        queries = np.empty((HEADS, size), np.float32)
        panel = np.empty((size, HEADS), np.float32)
        rows = np.zeros((PAGE, size + 16), np.float32)
        scores = np.empty((PAGE, HEADS), np.float32)
        state = np.empty((2, HEADS), np.float32)
        stride = 4 * (size + 16)
        for item in range(first, last):
            task, t, begin, count, length, from_page, to_page = take_item(item, heads, splits, step, sums)
            if from_page == to_page:
                continue
            for h in range(count):
                for i in range(size):
                    queries[h, i] = q[t, begin + h, i] * np.float32(scale)
            transpose_panel(address(queries), 4 * size, count, size, address(panel))
            values = partial[task, begin:]
            values[:HEADS] = 0
            state[0], state[1] = -np.inf, 0
            table = step.block_tables[step.seq_of[t]]
            for page in range(from_page, to_page):
                seen = min(PAGE, length - page * PAGE)
                for s in range(seen):
                    slot = table[page] * PAGE + s
                    row = address(rows[s])
                    read_latent(latent, slot, row, rank)
                    read_rope(rope, slot, row + 4 * rank, size - rank)
                for s in range(0, seen, 4):
                    a, b, c = min(1, seen - 1 - s), min(2, seen - 1 - s), min(3, seen - 1 - s)
                    tile_f32(
                        address(rows[s]), a * stride, b * stride, c * stride, 4,
                        address(panel), 64, size, address(scores[s]), 64, False,
                    )  # fmt: skip
                heads_softmax(address(scores), seen, address(state), address(values), padded)
                for h in range(0, HEADS, 4):
                    for i in range(0, rank, 16):
                        tile_f32(
                            address(scores) + 4 * h, 4, 8, 12, 64,
                            address(rows) + 4 * i, stride, seen, address(values[h, i:]), 4 * padded, True,
                        )  # fmt: skip
            for h in range(count):
                sums[task, begin + h, 0], sums[task, begin + h, 1] = state[0, h], state[1, h]

    return _absorbed


@kernel(F3, F3, types.int64, A3)
def _merge(first, last, partial, sums, splits, out):
    """Bring the shares of each token and head together: values weighted by 2 ** (their maximum - the largest)."""
    _, heads, rank = out.shape
    for item in range(first, last):
        t, h = item // heads, item % heads
        largest = np.float32(-np.inf)
        for split in range(splits):
            largest = max(largest, sums[t * splits + split, h, 0])
        total = np.float32(0)
        out[t, h, :] = 0
        for split in range(splits):
            each = t * splits + split
            if sums[each, h, 1] == 0:
                continue
            weight = np.float32(np.exp2(sums[each, h, 0] - largest))
            total += weight * sums[each, h, 1]
            add_scaled(weight, address(partial[each, h]), address(out[t, h]), rank)
        shrink(np.float32(1) / total, address(out[t, h]), rank)


@variants
def _scores(latent_type, rope_type):
    """Scores of `absorbed_materialised`."""
    read_latent, read_rope = read_cache_row_for(latent_type), read_cache_row_for(rope_type)

    @kernel(
        F3,
        CACHE,
        CACHE,
        STEP,
        types.int64,
        types.float64,
        types.int64,
        F2,
    )
    def _scores(first, last, q, latent, rope, step, rank, scale, t, scores):
        """One token's scores (H, S), over pages; those behind its position have none."""
        heads, size = q.shape[1], q.shape[2]
        table = step.block_tables[step.seq_of[t]]
        row = np.empty(size, np.float32)
        for page in range(first, last):
            for p in range(page * PAGE, min(page * PAGE + PAGE, step.positions[t] + 1)):
                slot = table[page] * PAGE + p % PAGE
                read_latent(latent, slot, address(row), rank)
                read_rope(rope, slot, address(row[rank:]), size - rank)
                for h in range(heads):
                    score = _dot_f32(address(row), address(q[t, h]), size)
                    scores[h, p] = score * np.float32(scale)

    return _scores


@variants
def _values(latent_type):
    """Values of `absorbed_materialised`."""
    read_latent = read_cache_row_for(latent_type)

    @kernel(F2, CACHE, STEP, types.int64, A3)
    def _values(first, last, scores, latent, step, t, out):
        """The softmax of one token's scores, then the values, over heads."""
        rank = out.shape[2]
        length = step.positions[t] + 1
        table = step.block_tables[step.seq_of[t]]
        row = np.empty(rank, np.float32)
        for h in range(first, last):
            largest = scores[h, 0]
            for p in range(length):
                largest = max(largest, scores[h, p])
            total = np.float32(0)
            for p in range(length):
                scores[h, p] = np.exp(scores[h, p] - largest)
                total += scores[h, p]
            out[t, h, :] = 0
            for p in range(length):
                slot = table[p // PAGE] * PAGE + p % PAGE
                read_latent(latent, slot, address(row), rank)
                add_scaled(scores[h, p] / total, address(row), address(out[t, h]), rank)

    return _values


@helper
def attend_page(queries, count, positions, keys, values, key_stride, value_stride, first, seen, size, v, scratch):
    """Take the rows at positions first to first + seen - 1 into the online softmax of a block of queries.

    Parameters
    ----------
    queries : float32 array (BLOCK, D)
        `count` of them, scaled.
    positions : int32 array (count,)
    keys, values : int
        Addresses of the first row of each, float32.
    key_stride, value_stride : int
        Bytes from row to row.
    size, v : int
        Values in a key and in a value.
    scratch : tuple of float32 arrays
        Panel (D, 16), scores (BLOCK, PAGE), values (PAGE, padded v), state (BLOCK, 2), accumulated (BLOCK, padded v).
    """
    panel, scores, padded, state, result = scratch
    width = padded.shape[1]
    rows = (count + 3) // 4 * 4
    for s in range(0, seen, 16):
        transpose_panel(keys + s * key_stride, key_stride, min(16, seen - s), size, address(panel))
        for i in range(0, rows, 4):
            tile_f32(
                address(queries[i]), 4 * size, 8 * size, 12 * size, 4,
                address(panel), 64, size, address(scores[i, s:]), 4 * PAGE, False,
            )  # fmt: skip
    for s in range(seen):
        source, target = values + s * value_stride, address(padded[s])
        for i in range(0, 4 * (v // 8 * 8), 32):
            store_f32x8(target + i, load_f32x8(source + i))
        for i in range(4 * (v // 8 * 8), 4 * v, 4):
            store_f32(target + i, load_f32(source + i))
    for i in range(count):
        query_softmax(scores[i], min(seen, positions[i] + 1 - first), state[i], address(result[i]), width)
    for i in range(0, rows, 4):
        for j in range(0, v, 16):
            tile_f32(
                address(scores[i]), 4 * PAGE, 8 * PAGE, 12 * PAGE, 4,
                address(padded) + 4 * j, 4 * width, seen, address(result[i, j:]), 4 * width, True,
            )  # fmt: skip


@kernel(F3, F3, F3, I1, types.float64, A3)
def _expanded(first, last, q, keys, values, positions, scale, out):
    """Over blocks of queries of each head. Late blocks have more to read: they are dealt out first."""
    tokens, heads, v = out.shape
    size = q.shape[2]
    blocks = (tokens + BLOCK - 1) // BLOCK
    queries, scratch = block_scratch(size, v)
    for item in range(first, last):
        begin, h = (blocks - 1 - item // heads) * BLOCK, item % heads
        count = min(BLOCK, tokens - begin)
        start_block(q, begin, count, h, scale, queries, scratch)
        length = positions[begin + count - 1] + 1
        for page in range(0, length, PAGE):
            attend_page(
                queries, count, positions[begin : begin + count],
                address(keys[page, h]), address(values[page, h]), 4 * heads * size, 4 * heads * v,
                page, min(PAGE, length - page), size, v, scratch,
            )  # fmt: skip
        finish_block(scratch, out, begin, count, h)


@variants
def _full(key_type, value_type):
    """`full` over a cache of two types."""
    read_key, read_value = dequantise_row_for(key_type), dequantise_row_for(value_type)

    @kernel(F3, CACHE, CACHE, STEP, types.float64, A3)
    def _full(first, last, q, keys, values, step, scale, out):
        """Over blocks of queries of each head. A block may reach over sequences: each of them is a run of its own."""
        tokens, heads, v = out.shape
        size = q.shape[2]
        key_bytes, value_bytes = keys.data.shape[1] // heads, values.data.shape[1] // heads
        blocks = (tokens + BLOCK - 1) // BLOCK
        queries, scratch = block_scratch(size, v)
        k = np.empty((PAGE, size), np.float32)
        value = np.empty((PAGE, v), np.float32)
        for item in range(first, last):
            begin, h = (blocks - 1 - item // heads) * BLOCK, item % heads
            end = min(begin + BLOCK, tokens)
            while begin < end:
                stop = begin + 1
                while stop < end and step.seq_of[stop] == step.seq_of[begin]:
                    stop += 1
                start_block(q, begin, stop - begin, h, scale, queries, scratch)
                table = step.block_tables[step.seq_of[begin]]
                length = step.positions[stop - 1] + 1
                for page in range(0, length, PAGE):
                    seen = min(PAGE, length - page)
                    for s in range(seen):
                        slot = table[page // PAGE] * PAGE + s
                        read_key(address(keys.data[slot]) + h * key_bytes, address(k[s]), size)
                        read_value(address(values.data[slot]) + h * value_bytes, address(value[s]), v)
                    attend_page(
                        queries, stop - begin, step.positions[begin:stop],
                        address(k), address(value), 4 * size, 4 * v, page, seen, size, v, scratch,
                    )  # fmt: skip
                finish_block(scratch, out, begin, stop - begin, h)
                begin = stop

    return _full


@helper
def block_scratch(size, v):
    """Queries (BLOCK, D), and the scratch of `attend_page`."""
    width = (v + 15) // 16 * 16
    return np.zeros((BLOCK, size), np.float32), (
        np.empty((size, 16), np.float32),
        np.empty((BLOCK, PAGE), np.float32),
        np.zeros((PAGE, width), np.float32),
        np.empty((BLOCK, 2), np.float32),
        np.empty((BLOCK, width), np.float32),
    )


@helper
def start_block(q, begin, count, h, scale, queries, scratch):
    """Scaled queries of a head, and an empty online softmax."""
    _, scores, _, state, result = scratch
    for i in range(count):
        for j in range(q.shape[2]):
            queries[i, j] = q[begin + i, h, j] * np.float32(scale)
    state[:, 0] = -np.inf
    state[:, 1] = 0
    scores[:] = 0
    result[:] = 0


@helper
def finish_block(scratch, out, begin, count, h):
    """The values, divided by the softmax's sums."""
    _, _, _, state, result = scratch
    for i in range(count):
        for j in range(out.shape[2]):
            out[begin + i, h, j] = result[i, j] / state[i, 1]
