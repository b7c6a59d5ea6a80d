"""Experts of many tokens, in tiles on the tensor cores.

Pairs of a token and an expert are sorted by expert on the device, so that an expert's rows are read once for up to
`PAIRS` of its tokens.
"""

import functools

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.machine.ptx import fma, global_address, store_f32, valid_index
from pymla.cuda.matmul.gemm_layout import NARROW, TILE_ROWS, has_two_products, layout_of
from pymla.cuda.matmul.gemm_tiles import tile_of
from pymla.cuda.matmul.operands import INPUT, THREADS, row_address
from pymla.cuda.memory import empty
from pymla.cuda.moe.by_rows import BOTH, routed_and_shared
from pymla.cuda.moe.swiglu import multiply_gated
from pymla.cuda.quant import Activation
from pymla.cuda.runtime.array_types import F2, F3, I1, I2
from pymla.cuda.runtime.jit import device, kernel

#: Pairs of a tile, which are its activations.
PAIRS = NARROW
#: Threads that sort pairs.
SORTING_THREADS = 512

_ZERO, _ONE = np.float32(0), np.float32(1)


def experts_in_tiles(activation, ids, weights, routed, shared, inner, out, add):
    """Experts of quantised types, for many pairs of a token and an expert."""
    (gate, up, down), (tokens, used) = routed, ids.shape
    gates, ups, downs = routed_and_shared(routed, shared)
    count, others = downs[0].count, downs[1].count
    chosen, rows = tokens * used, out.shape[1]
    number = chosen + tokens * others
    # Every expert may have a tile that is not full.
    tiles = empty((-(-chosen // PAIRS) + min(count, chosen) + others * -(-tokens // PAIRS), 3), np.int32)
    pairs, tokens_of = empty(number, np.int32), empty(number, np.int32)
    sort_pairs[1, SORTING_THREADS, 8 * (count + others)](ids, count, others, pairs, tokens_of, tiles)

    def multiply(qtype, matrices, x, sources, products):
        """Products of one or two matrices with the rows `sources` of activations, for each pair."""
        grid = len(tiles), -(-products.shape[2] // TILE_ROWS), len(products)
        launched, shared_bytes = grouped_kernel(qtype), layout_of(qtype, PAIRS).nbytes
        launched[grid, THREADS, shared_bytes](*matrices, x.input(qtype), sources, pairs, tiles, products)

    hidden, results = empty((2, number, inner), np.float32), empty((1, number, rows), np.float32)
    if gate.qtype == up.qtype:
        multiply(gate.qtype, (gates, ups), activation, tokens_of, hidden)
    else:
        multiply(gate.qtype, (gates, gates), activation, tokens_of, hidden[:1])
        multiply(up.qtype, (ups, ups), activation, tokens_of, hidden[1:])
    multiply_gated(hidden[0], hidden[1])
    multiply(down.qtype, (downs, downs), Activation(hidden[0]), pairs, results)
    results = results.reshape(tokens, used + others, rows)
    combine_experts[(-(-rows // THREADS), tokens), THREADS](weights, results, add, out)


@kernel(I2, types.int64, types.int64, I1, I1, I2, max_threads=SORTING_THREADS)
def sort_pairs(ids, routed, others, pairs, tokens, tiles):
    """Numbers of the pairs (token * choices + choice) by expert, in any order within one, their tokens, and tiles of at
    most `PAIRS` pairs of an expert: the expert, the first and the last position; −1 where there is no tile. Behind
    `routed` experts come `others`, which every token chose. One block; the shared memory holds two numbers for each
    expert."""
    shared = cuda.shared.array(0, np.int32)
    me, used, count = cuda.threadIdx.x, ids.shape[1], routed + others
    choices = used + others
    counts, places = shared[:count], shared[count : 2 * count]
    for e in range(me, count, SORTING_THREADS):
        counts[e] = 0 if e < routed else len(ids)
    for i in range(me, len(tiles), SORTING_THREADS):
        tiles[i, 0] = -1
    cuda.syncthreads()
    for t in range(me, len(ids), SORTING_THREADS):
        for j in range(used):
            cuda.atomic.add(counts, valid_index(ids[t, j], routed), 1)
    cuda.syncthreads()
    for e in range(me, count, SORTING_THREADS):
        begin = tile = 0
        for other in range(e):
            begin += counts[other]
            tile += (counts[other] + PAIRS - 1) // PAIRS
        places[e] = begin
        end = begin + counts[e]
        while begin < end:
            tiles[tile, 0], tiles[tile, 1], tiles[tile, 2] = e, begin, min(begin + PAIRS, end) - 1
            begin += PAIRS
            tile += 1
    cuda.syncthreads()
    for t in range(me, len(ids), SORTING_THREADS):
        for j in range(used):
            at = cuda.atomic.add(places, valid_index(ids[t, j], routed), 1)
            pairs[at] = t * choices + j
            tokens[at] = t
        for e in range(others):
            at = places[routed + e] + t
            pairs[at] = t * choices + used + e
            tokens[at] = t


@kernel(F2, F3, types.boolean, F2, max_threads=THREADS)
def combine_experts(weights, results, add, out):
    """``out[t] += Σ weights[t, j] * results[t, j]``, where shared experts have the weight 1: a thread takes a column
    (x) of token y."""
    column, t, used = THREADS * cuda.blockIdx.x + cuda.threadIdx.x, cuda.blockIdx.y, weights.shape[1]
    if column < out.shape[1]:
        sum = _ZERO
        for j in range(results.shape[1]):
            sum = fma(weights[t, j] if j < used else _ONE, results[t, j, column], sum)
        out[t, column] = out[t, column] + sum if add else sum


@functools.cache
def grouped_kernel(qtype):
    """The kernel of products of pairs that are sorted by expert, on int8 tensor cores: as `gemm`, with rows of
    activations that lie anywhere."""
    tile = tile_of(qtype, PAIRS)
    product = tile.product

    @device
    def store(upper, lower, row, i, to):
        """Results of two rows and of a pair, if they are there: pair i of sorted ones goes to ``targets[i]``."""
        results, targets, first, begin, last = to
        if begin + i <= last:
            at = global_address(results) + 4 * (results.shape[1] * targets[begin + i] + first + row)
            if first + row < results.shape[1]:
                store_f32(at, upper)
            if first + row + 8 < results.shape[1]:
                store_f32(at + 32, lower)

    store_all = tile.storing(store)

    @kernel(
        BOTH,
        BOTH,
        INPUT,
        I1,
        I1,
        I2,
        F3,
        variant=ggml.NAME[qtype].lower(),
        max_threads=THREADS,
        min_blocks=2 if has_two_products(qtype) else 3,
    )
    def grouped(first_w, second_w, x, sources, targets, tiles, out):
        """``out[z, targets[i]] = W[e] @ x[sources[i]]`` for the pairs i of tile x and `TILE_ROWS` rows (y) of their
        expert's matrix, the first or the second one (z)."""
        thread, first = cuda.threadIdx.x, TILE_ROWS * cuda.blockIdx.y
        matrix, begin, last = tiles[cuda.blockIdx.x, 0], tiles[cuda.blockIdx.x, 1], tiles[cuda.blockIdx.x, 2]
        if matrix < 0:
            return
        routed, others = first_w if cuda.blockIdx.z == 0 else second_w
        w, matrix = (routed, matrix) if matrix < routed.count else (others, matrix - routed.count)
        sums = product(row_address(w, matrix, first + thread), sources[min(begin + thread, last)], x)
        store_all(sums, (out[cuda.blockIdx.z], targets, first, begin, last))

    return grouped
