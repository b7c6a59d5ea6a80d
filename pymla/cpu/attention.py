"""Multi-head latent attention over a paged cache. Twin of `pymla.reference.attention`.

Rows of the cache are read a page at a time into float32 scratch of the thread, then used for all heads (absorbed) or for a
block of queries (expanded, full). Sums run over pages with an online softmax (Milakov and Gimelshein, 2018): a running
maximum m, a running sum l, and the accumulated values, which shrink by exp(m_old - m_new) where the maximum grows.
Positions behind a query are never read.
"""

import numpy as np
from numba import get_num_threads, prange, types

from pymla import ggml
from pymla.cache import PAGE, Step
from pymla.cpu.formats import dequantise_row, dot_float, write_row
from pymla.cpu.jit import inline, kernel
from pymla.cpu.quant import F2, F3, I1, MATRICES, Matrices, matmul_heads
from pymla.cpu.simd import fma, load_f32, load_f32x8, mul, splat_f32, store_f32, store_f32x8
from pymla.weights import QTensor

__all__ = ["absorb", "absorbed", "absorbed_materialised", "expand", "expanded", "full", "load", "store"]

CACHE = types.NamedTuple((types.int64, types.Array(types.uint8, 2, "C")), QTensor)
I2 = types.Array(types.int32, 2, "C")
STEP = types.NamedTuple((I1, I1, I1, I1, I2), Step)
ROWS = types.Array(types.float32, 2, "A")
F32 = ggml.F32

#: Queries that share the reading of a page in the expanded and full forms.
BLOCK = 16


def store(rows, slots, cache):
    """Write rows, float32 (T, W), into the slots, int32 (T,), of the cache in its type; a row is contiguous."""
    _store(rows, slots, cache)


def load(cache, block_table, out):
    """The first ``len(out)`` rows of a sequence as float32 (S, W)."""
    _load(cache, block_table, out)
    return out


def absorb(q, k_b, out):
    """Queries of the absorbed form: ``out[t, h] = [k_b[h] @ q[t, h, :nope]; q[t, h, nope:]]``, float32 (T, H, rank + R)."""
    rank = k_b.data.shape[1]
    nope = q.shape[2] - (out.shape[2] - rank)
    latent = np.empty((*q.shape[:2], rank), np.float32)
    out[..., :rank] = matmul_heads(k_b, np.ascontiguousarray(q[..., :nope]), latent)
    out[..., rank:] = q[..., nope:]
    return out


def absorbed(q, latent, rope, step, scale, out):
    """Attention in the latent space: `q` float32 (T, H, rank + R), `out` float32 (T, H, rank)."""
    tokens, heads, rank = out.shape
    # Few tokens leave threads idle, so the pages of a token are split over several.
    pages = int(step.positions.max()) // PAGE + 1
    splits = max(1, min(pages, _tasks() // tokens))
    partial = np.empty((tokens * splits, heads, rank), np.float32)
    sums = np.empty((tokens * splits, heads, 2), np.float32)
    _absorbed(q, latent, rope, step, scale, splits, partial, sums)
    _merge(partial, sums, splits, out)
    return out


def absorbed_materialised(q, latent, rope, step, scale, out):
    """`absorbed` with all scores of a token in memory before the first value is read (``--mla 2``)."""
    scores = np.empty((q.shape[1], int(step.positions.max()) + 1), np.float32)
    for t in range(len(q)):
        _materialised(q[t], latent, rope, step.block_tables[step.seq_of[t]], scale, step.positions[t], scores, out[t])
    return out


def expand(c_kv, k_pe, k_b, v_b, keys, values):
    """Keys, float32 (S, H, nope + R), and values, float32 (S, H, v), of some heads from latent rows."""
    parts = max(1, get_num_threads() // values.shape[1])
    _expand(c_kv, k_pe, Matrices.of(k_b), Matrices.of(v_b), parts, keys, values)


def expanded(q, keys, values, positions, scale, out):
    """Causal attention of one sequence over expanded keys and values; all float32, `out` (T, H, v)."""
    _expanded(q, keys, values, positions, scale, out)
    return out


def full(q, keys, values, step, scale, out):
    """Attention over a cache of whole keys and values (``--mla 0``); `q` float32 (T, H, nope + R), `out` (T, H, v)."""
    _full(q, keys, values, step, scale, out)
    return out


def _tasks():
    return 2 * get_num_threads()


@kernel(ROWS, I1, CACHE)
def _store(rows, slots, cache):
    columns = rows.shape[1]
    for t in prange(len(rows)):
        write_row(cache.qtype, rows[t].ctypes.data, cache.data[slots[t]].ctypes.data, columns)


@kernel(CACHE, I1, F2)
def _load(cache, block_table, out):
    for p in prange(len(out)):
        row = cache.data[block_table[p // PAGE] * PAGE + p % PAGE]
        dequantise_row(cache.qtype, row.ctypes.data, out[p].ctypes.data, out.shape[1])


@inline
def add_scaled(weight, x, out, columns):
    """``out += weight * x`` at addresses of float32."""
    factor = splat_f32(weight)
    whole = columns // 8 * 8
    for i in range(0, 4 * whole, 32):
        store_f32x8(out + i, fma(factor, load_f32x8(x + i), load_f32x8(out + i)))
    for i in range(4 * whole, 4 * columns, 4):
        store_f32(out + i, load_f32(out + i) + weight * load_f32(x + i))


@inline
def shrink(factor, out, columns):
    """``out *= factor`` at an address of float32."""
    splat = splat_f32(factor)
    for i in range(0, columns // 8 * 32, 32):
        store_f32x8(out + i, mul(splat, load_f32x8(out + i)))
    for i in range(columns // 8 * 32, 4 * columns, 4):
        store_f32(out + i, load_f32(out + i) * factor)


@inline
def attend_page(scores, count, state, values, stride, out, columns):
    """Take a page into one head's online softmax.

    Parameters
    ----------
    scores : float32 array
        `count` of them; become the softmax's unnormalised weights.
    state : float32 array (2,)
        Running maximum and sum.
    values, stride : int
        Address of the first value row, float32, and bytes from row to row.
    out : int
        Address of the accumulated values, float32 (columns,).
    """
    largest = state[0]
    for s in range(count):
        largest = max(largest, scores[s])
    if largest > state[0]:
        correction = np.exp(state[0] - largest)
        state[1] *= correction
        shrink(correction, out, columns)
        state[0] = largest
    for s in range(count):
        weight = np.exp(scores[s] - largest)
        state[1] += weight
        add_scaled(weight, values + s * stride, out, columns)


@kernel(F3, CACHE, CACHE, STEP, types.float64, types.int64, F3, F3)
def _absorbed(q, latent, rope, step, scale, splits, partial, sums):
    """Unnormalised values (T * splits, H, rank), and maximum and sum (T * splits, H, 2), of each share of the pages."""
    heads, rank = partial.shape[1], partial.shape[2]
    rope_size = q.shape[2] - rank
    for task in prange(len(partial)):
        t, split = task // splits, task % splits
        length = step.positions[t] + 1
        pages = (length + PAGE - 1) // PAGE
        table = step.block_tables[step.seq_of[t]]
        c_kv = np.empty((PAGE, rank), np.float32)
        k_pe = np.empty((PAGE, rope_size), np.float32)
        scores = np.empty(PAGE, np.float32)
        for h in range(heads):
            sums[task, h, 0] = -np.inf
            sums[task, h, 1] = 0
            for i in range(rank):
                partial[task, h, i] = 0
        for page in range(pages * split // splits, pages * (split + 1) // splits):
            count = min(PAGE, length - page * PAGE)
            for s in range(count):
                slot = table[page] * PAGE + s
                dequantise_row(latent.qtype, latent.data[slot].ctypes.data, c_kv[s].ctypes.data, rank)
                dequantise_row(rope.qtype, rope.data[slot].ctypes.data, k_pe[s].ctypes.data, rope_size)
            for h in range(heads):
                query = q[t, h].ctypes.data
                for s in range(count):
                    score = dot_float(F32, c_kv[s].ctypes.data, query, rank)
                    score += dot_float(F32, k_pe[s].ctypes.data, query + 4 * rank, rope_size)
                    scores[s] = score * np.float32(scale)
                address = partial[task, h].ctypes.data
                attend_page(scores, count, sums[task, h], c_kv.ctypes.data, 4 * rank, address, rank)


@kernel(F3, F3, types.int64, F3)
def _merge(partial, sums, splits, out):
    """Bring the shares of each token together: values weighted by exp(their maximum - the largest)."""
    tokens, heads, rank = out.shape
    for t in prange(tokens):
        for h in range(heads):
            largest = np.float32(-np.inf)
            for split in range(splits):
                largest = max(largest, sums[t * splits + split, h, 0])
            total = np.float32(0)
            for i in range(rank):
                out[t, h, i] = 0
            for split in range(splits):
                each = t * splits + split
                # A share may be empty: its maximum is -inf and its weight 0.
                weight = np.exp(sums[each, h, 0] - largest)
                total += weight * sums[each, h, 1]
                add_scaled(weight, partial[each, h].ctypes.data, out[t, h].ctypes.data, rank)
            shrink(np.float32(1) / total, out[t, h].ctypes.data, rank)


@kernel(F2, CACHE, CACHE, I1, types.float64, types.int64, F2, F2)
def _materialised(q, latent, rope, table, scale, position, scores, out):
    """One token, all heads: scores (H, S), their softmax, then the values by slices of the latent row."""
    heads, rank = out.shape
    rope_size = q.shape[1] - rank
    length = position + 1
    for page in prange((length + PAGE - 1) // PAGE):
        c_kv = np.empty(rank, np.float32)
        k_pe = np.empty(rope_size, np.float32)
        for p in range(page * PAGE, min(page * PAGE + PAGE, length)):
            slot = table[page] * PAGE + p % PAGE
            dequantise_row(latent.qtype, latent.data[slot].ctypes.data, c_kv.ctypes.data, rank)
            dequantise_row(rope.qtype, rope.data[slot].ctypes.data, k_pe.ctypes.data, rope_size)
            for h in range(heads):
                score = dot_float(F32, c_kv.ctypes.data, q[h].ctypes.data, rank)
                score += dot_float(F32, k_pe.ctypes.data, q[h].ctypes.data + 4 * rank, rope_size)
                scores[h, p] = score * np.float32(scale)
    for h in prange(heads):
        largest = scores[h, 0]
        for p in range(length):
            largest = max(largest, scores[h, p])
        total = np.float32(0)
        for p in range(length):
            scores[h, p] = np.exp(scores[h, p] - largest)
            total += scores[h, p]
        for p in range(length):
            scores[h, p] /= total
        row = np.empty(rank, np.float32)
        for i in range(rank):
            out[h, i] = 0
        for p in range(length):
            slot = table[p // PAGE] * PAGE + p % PAGE
            dequantise_row(latent.qtype, latent.data[slot].ctypes.data, row.ctypes.data, rank)
            add_scaled(scores[h, p], row.ctypes.data, out[h].ctypes.data, rank)


@kernel(F2, F2, MATRICES, MATRICES, types.int64, F3, F3)
def _expand(c_kv, k_pe, k_b, v_b, parts, keys, values):
    length, rank = c_kv.shape
    heads, v = values.shape[1], values.shape[2]
    rope_size = k_pe.shape[1]
    nope = keys.shape[2] - rope_size
    for task in prange(heads * parts):
        h, part = task // parts, task % parts
        first, last = length * part // parts, length * (part + 1) // parts
        row = np.empty(max(rank, nope), np.float32)
        transposed = np.empty((nope, rank), np.float32)
        for r in range(rank):
            dequantise_row(k_b.qtype, k_b.address + h * k_b.matrix_stride + r * k_b.row_stride, row.ctypes.data, nope)
            for n in range(nope):
                transposed[n, r] = row[n]
        for n in range(nope):
            for s in range(first, last):
                keys[s, h, n] = dot_float(F32, transposed[n].ctypes.data, c_kv[s].ctypes.data, rank)
        for s in range(first, last):
            for i in range(rope_size):
                keys[s, h, nope + i] = k_pe[s, i]
        for i in range(v):
            dequantise_row(v_b.qtype, v_b.address + h * v_b.matrix_stride + i * v_b.row_stride, row.ctypes.data, rank)
            for s in range(first, last):
                values[s, h, i] = dot_float(F32, row.ctypes.data, c_kv[s].ctypes.data, rank)


@inline
def start(state, out, queries, columns):
    """Empty online softmax of some queries."""
    for i in range(queries):
        state[i, 0] = -np.inf
        state[i, 1] = 0
        for j in range(columns):
            out[i, j] = 0


@inline
def attend_block(q, keys, key_stride, values, value_stride, first, count, positions, scale, scores, state, out):
    """Take the rows at positions first to first + count - 1 into the online softmax of a block of queries.

    `q` (Q, D), `state` (Q, 2) and `out` (Q, v) are float32 arrays, `positions` int32 (Q,); `keys` and `values` are addresses.
    """
    for i in range(len(q)):
        seen = min(count, positions[i] + 1 - first)
        if seen > 0:
            for s in range(seen):
                product = dot_float(F32, keys + s * key_stride, q[i].ctypes.data, q.shape[1])
                scores[s] = product * np.float32(scale)
            attend_page(scores, seen, state[i], values, value_stride, out[i].ctypes.data, out.shape[1])


@kernel(F3, F3, F3, I1, types.float64, F3)
def _expanded(q, keys, values, positions, scale, out):
    tokens, heads, v = out.shape
    blocks = (tokens + BLOCK - 1) // BLOCK
    for task in prange(blocks * heads):
        # Late blocks have more to read: they are dealt out first.
        begin, h = (blocks - 1 - task // heads) * BLOCK, task % heads
        end = min(begin + BLOCK, tokens)
        query = q[begin:end, h].copy()
        result = np.empty((end - begin, v), np.float32)
        state = np.empty((end - begin, 2), np.float32)
        scores = np.empty(PAGE, np.float32)
        start(state, result, end - begin, v)
        for first in range(0, positions[end - 1] + 1, PAGE):
            attend_block(
                query,
                keys[first, h].ctypes.data,
                4 * heads * keys.shape[2],
                values[first, h].ctypes.data,
                4 * heads * v,
                first,
                min(PAGE, len(keys) - first),
                positions[begin:end],
                scale,
                scores,
                state,
                result,
            )
        for i in range(end - begin):
            for j in range(v):
                out[begin + i, h, j] = result[i, j] / state[i, 1]


@kernel(F3, CACHE, CACHE, STEP, types.float64, F3)
def _full(q, keys, values, step, scale, out):
    tokens, heads, v = out.shape
    size = q.shape[2]
    key_bytes, value_bytes = keys.data.shape[1] // heads, values.data.shape[1] // heads
    blocks = (tokens + BLOCK - 1) // BLOCK
    for task in prange(blocks * heads):
        begin, h = (blocks - 1 - task // heads) * BLOCK, task % heads
        end = min(begin + BLOCK, tokens)
        result = np.empty((end - begin, v), np.float32)
        state = np.empty((end - begin, 2), np.float32)
        scores = np.empty(PAGE, np.float32)
        k = np.empty((PAGE, size), np.float32)
        value = np.empty((PAGE, v), np.float32)
        start(state, result, end - begin, v)
        # A block of queries may reach over sequences: each run of one sequence is a block of its own.
        while begin < end:
            run = begin + 1
            while run < end and step.seq_of[run] == step.seq_of[begin]:
                run += 1
            query = q[begin:run, h].copy()
            offset = begin % BLOCK
            table = step.block_tables[step.seq_of[begin]]
            length = step.positions[run - 1] + 1
            for first in range(0, length, PAGE):
                count = min(PAGE, length - first)
                for s in range(count):
                    slot = table[first // PAGE] * PAGE + s
                    dequantise_row(keys.qtype, keys.data[slot].ctypes.data + h * key_bytes, k[s].ctypes.data, size)
                    dequantise_row(values.qtype, values.data[slot].ctypes.data + h * value_bytes, value[s].ctypes.data, v)
                attend_block(
                    query,
                    k.ctypes.data,
                    4 * size,
                    value.ctypes.data,
                    4 * v,
                    first,
                    count,
                    step.positions[begin:run],
                    scale,
                    scores,
                    state[offset : offset + run - begin],
                    result[offset : offset + run - begin],
                )
            for i in range(run - begin):
                for j in range(v):
                    out[begin + i, h, j] = result[offset + i, j] / state[offset + i, 1]
            begin = run
