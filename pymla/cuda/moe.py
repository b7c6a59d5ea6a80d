"""The mixture of experts. Twin of `pymla.reference.moe`.

The host never learns which experts were chosen: grids depend on the number of tokens alone, and kernels read the ids.
Where few tokens meet many experts, a warp takes a row of gate beside its row of up for each pair of a token and an
expert, applies SiLU, and a second launch sums the chosen experts' down rows with their weights. Where pairs are many,
they are sorted by expert on the device and multiplied in tiles on the tensor cores (`_grouped`), so that an expert's
rows are read once for up to `TILE` of its tokens. Sums run in one order always: no atomic addition of floats. Shared
experts are experts that every token chose, and take part in the same launches.
"""

import functools
import math

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda import norm
from pymla.cuda.contract import check
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.machine.ptx import (
    WARP,
    ballot,
    div,
    exp2,
    fma,
    global_address,
    lane,
    load_f32,
    shfl_idx,
    store_f32,
    syncwarp,
    warp_max,
    warp_sum,
)
from pymla.cuda.matmul.gemm import NARROW as TILE
from pymla.cuda.matmul.gemm import ROWS, THREADS, tile_of
from pymla.cuda.matmul.gemv import row_products, row_sums
from pymla.cuda.memory import empty
from pymla.cuda.quant import FEW, INPUT, MATRICES, WARPS, Activation, Matrices, matmul, row_address
from pymla.cuda.runtime.jit import device, kernel, unrolled
from pymla.errors import PymlaError
from pymla.tensor import QTensor

__all__ = ["experts", "ffn", "router"]

F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "C")
F3 = types.Array(types.float32, 3, "C")
I1 = types.Array(types.int32, 1, "C")
I2 = types.Array(types.int32, 2, "C")
#: The routed experts' matrices, and the shared ones'.
BOTH = types.UniTuple(MATRICES, 2)

#: Pairs for each expert on average, from which tiles are faster than rows.
FEW_PAIRS = 2
#: Threads that sort pairs.
_SORTING = 512

_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
_LOG2E = np.float32(math.log2(math.e))


def router(logits, bias, config, ids, weights):
    """Choose `num_experts_per_tok` experts for every token (`pymla.reference.moe.router`)."""
    check.router(logits, bias, config, ids, weights)
    tokens, count = logits.shape
    groups = config.n_group
    grouping = groups, count // groups, config.topk_group, 1 if config.group_score == "max" else 2
    _router[tokens, WARP, 4 * (2 * count + groups)](
        logits,
        empty(0, np.float32) if bias is None else bias,
        config.scoring_func == "sigmoid",
        grouping,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        ids,
        weights,
    )


def experts(activation, ids, weights, gate, up, down, out, shared=None, add=False):
    """Routed and shared experts (`pymla.reference.moe.experts`): `activation` of (T, K), `ids` int32 and `weights`
    float32 (T, k), `gate` and `up` of E matrices of F rows and K columns and one type, `down` of E matrices of K rows
    and F columns, `out` float32 (T, K), overwritten or with `add` added to.

    `shared`: gate, up and down of S shared experts together, S * F rows of K columns and K rows of S * F columns. They
    are launches of their own (`ffn`) where their types are others, or where more tokens than `FEW` read rows one by
    one: as products the shared experts are read once for all of these.
    """
    check.experts(activation, ids, weights, gate, up, down, out, shared)
    _need_one_type(gate, up)
    (tokens, used), (count, inner) = ids.shape, gate.data.shape[:2]
    in_tiles = tokens * used > FEW_PAIRS * count and gate.qtype in FORMATS and down.qtype in FORMATS
    if shared is not None:
        same = all(w.qtype == other.qtype for w, other in zip(shared, (gate, up, down), strict=True))
        if not same or (tokens > FEW and not in_tiles):
            ffn(activation, *shared, out, add)
            return experts(activation, ids, weights, gate, up, down, out, add=True)
        shared = shared[0].by_rows(inner), shared[1].by_rows(inner), shared[2].by_columns(inner)
    run = _experts_in_tiles if in_tiles else _experts_by_rows
    run(activation, ids, weights, (gate, up, down), shared, inner, out, add)
    return out


def _experts_by_rows(activation, ids, weights, routed, shared, inner, out, add):
    """Experts of few tokens. `routed` and `shared`, either of them or None: gate, up and down of several matrices, each
    gate with `inner` rows."""
    (gate, _, down), (tokens, used) = routed or shared, ids.shape
    gates, ups, downs = _both(routed, shared)
    choices = used + downs[1].count
    hidden = empty((tokens * choices, inner), np.float32)
    x = activation.input(gate.qtype)
    _GATE_UP[gate.qtype][(-(-inner // WARPS), choices, tokens), THREADS](gates, ups, ids, x, hidden)
    y = Activation(hidden)
    x = y.input(down.qtype)
    _DOWN[down.qtype][(-(-out.shape[1] // WARPS), tokens), THREADS](downs, ids, weights, x, add, out)


def _experts_in_tiles(activation, ids, weights, routed, shared, inner, out, add):
    """Experts of quantised types, for many pairs of a token and an expert."""
    (gate, _, down), (tokens, used) = routed, ids.shape
    gates, ups, downs = _both(routed, shared)
    count, others = downs[0].count, downs[1].count
    chosen, rows = tokens * used, out.shape[1]
    number = chosen + tokens * others
    # Every expert may have a tile that is not full.
    tiles = empty((-(-chosen // TILE) + min(count, chosen) + others * -(-tokens // TILE), 3), np.int32)
    pairs, tokens_of = empty(number, np.int32), empty(number, np.int32)
    _sort_pairs[1, _SORTING, 8 * (count + others)](ids, count, others, pairs, tokens_of, tiles)
    hidden, results = empty((2, number, inner), np.float32), empty((1, number, rows), np.float32)
    x, grid = activation.input(gate.qtype), (len(tiles), -(-inner // ROWS), 2)
    shared_bytes = tile_of(gate.qtype, TILE).shared_bytes
    _GROUPED[gate.qtype][grid, THREADS, shared_bytes](gates, ups, x, tokens_of, pairs, tiles, hidden)
    _multiply(hidden[0], hidden[1])
    y = Activation(hidden[0])
    x, grid = y.input(down.qtype), (len(tiles), -(-rows // ROWS), 1)
    shared_bytes = tile_of(down.qtype, TILE).shared_bytes
    _GROUPED[down.qtype][grid, THREADS, shared_bytes](downs, downs, x, pairs, pairs, tiles, results)
    results = results.reshape(tokens, used + others, rows)
    _combine[(-(-rows // THREADS), tokens), THREADS](weights, results, add, out)


def ffn(activation, gate, up, down, out, add=False):
    """The dense network, also the shared experts (`pymla.reference.moe.ffn`): `activation` of (T, K), `out` float32
    (T, K), overwritten or with `add` added to."""
    check.ffn(activation, gate, up, down, out)
    tokens, inner = len(out), len(gate.data)
    if tokens == 1 and gate.qtype == up.qtype:
        whole = [QTensor(w.qtype, w.data[None]) for w in (gate, up, down)]
        none = empty((1, 0), np.int32), empty((1, 0), np.float32)
        _experts_by_rows(activation, *none, None, whole, inner, out, add)
        return out
    hidden, other = empty((tokens, inner), np.float32), empty((tokens, inner), np.float32)
    matmul(gate, activation, hidden)
    matmul(up, activation, other)
    _multiply(hidden, other)
    if not add:
        return matmul(down, Activation(hidden), out)
    return norm.add(out, matmul(down, Activation(hidden), empty(out.shape, np.float32)))


def _both(routed, shared):
    """Gates, ups and downs: of each the routed experts' matrices and the shared ones', none where there are none."""

    def of(w, other):
        return Matrices.of(w) if w else Matrices.of(other)._replace(count=0)

    routed, shared = routed or (None,) * 3, shared or (None,) * 3
    return [(of(w, other), of(other, w)) for w, other in zip(routed, shared, strict=True)]


def _need_one_type(gate, up):
    if gate.qtype != up.qtype:
        names = f"{ggml.NAME[gate.qtype]} and {ggml.NAME[up.qtype]}"
        raise PymlaError(f"experts whose gate and up matrices differ in type, {names}, do not run on the GPU")


def _multiply(x, y):
    """``x = silu(x) * y`` of contiguous arrays."""
    _silu_mul[-(-x.size // THREADS), THREADS](x.reshape(-1), y.reshape(-1))


@device
def silu(x):
    """``x / (1 + exp(−x))``"""
    return div(x, _ONE + exp2(-x * _LOG2E))


@kernel(F1, F1, max_threads=THREADS)
def _silu_mul(x, y):
    """``x = silu(x) * y``"""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < len(x):
        x[i] = silu(x[i]) * y[i]


@device
def _first_best(choice, first, end):
    """The largest of ``choice[first:end]`` and where it is first; an empty range gives −inf."""
    top, at = -_INFINITY, 0
    for e in range(first, end):
        if choice[e] > top:
            top, at = choice[e], e
    return top, at


@device
def _best_of_warp(top, at):
    """The first of the lanes' largest: its place."""
    return shfl_idx(at, cuda.ffs(ballot(top == warp_max(top))) - 1)


@kernel(
    F2,
    F1,
    types.boolean,
    types.UniTuple(types.int64, 4),
    types.boolean,
    types.float32,
    I2,
    F2,
    max_threads=WARP,
)
def _router(logits, bias, sigmoid, grouping, normalise, factor, ids, weights):
    """A warp for each token. `grouping`: groups, experts of a group, groups that are kept, and how many of its best
    experts a group counts as. Lanes own neighbouring experts, so that the first lane has the first of equal ones."""
    t, me, count = cuda.blockIdx.x, lane(), logits.shape[1]
    groups, size, kept, best = grouping
    shared = cuda.shared.array(0, np.float32)
    scores, choice, of_groups = shared[:count], shared[count : 2 * count], shared[2 * count : 2 * count + groups]
    # An odd number of experts for each lane: no two lanes meet at a bank of shared memory.
    own = (count + WARP - 1 >> 5) | 1
    first, end = min(me * own, count), min(me * own + own, count)

    most = -_INFINITY
    for e in range(me, count, WARP):
        most = max(most, logits[t, e])
    most = warp_max(most)
    total = _ZERO
    for e in range(me, count, WARP):
        x = exp2((-logits[t, e] if sigmoid else logits[t, e] - most) * _LOG2E)
        scores[e] = x
        total += x
    total = warp_sum(total)
    for e in range(me, count, WARP):
        score = div(_ONE, _ONE + scores[e]) if sigmoid else div(scores[e], total)
        scores[e] = score
        choice[e] = score + bias[e] if len(bias) else score
    syncwarp()

    if groups > 1:
        for g in range(me, groups, WARP):
            top = second = -_INFINITY
            # Each lane begins elsewhere in its group, for the banks' sake.
            at = g if g < size else 0
            for _ in range(size):
                x = choice[g * size + at]
                second = max(second, min(x, top))
                top = max(top, x)
                at = at + 1 if at + 1 < size else 0
            of_groups[g] = top if best == 1 else top + second
        syncwarp()
        for g in range(me, groups, WARP):
            score, better = of_groups[g], 0
            for other in range(groups):
                if of_groups[other] > score or (of_groups[other] == score and other < g):
                    better += 1
            if better >= kept:
                for e in range(g * size, g * size + size):
                    choice[e] = -_INFINITY
        syncwarp()

    top, at = _first_best(choice, first, end)
    chosen = _ZERO
    for j in range(ids.shape[1]):
        winner = _best_of_warp(top, at)
        score = scores[winner]
        chosen += score
        if me == j & 31:
            ids[t, j] = winner
            weights[t, j] = score
        if first <= winner and winner < end:
            choice[winner] = -_INFINITY
            top, at = _first_best(choice, first, end)
    for j in range(me, ids.shape[1], WARP):
        share = div(weights[t, j], chosen + np.float32(1e-20)) if normalise else weights[t, j]
        weights[t, j] = share * factor


def _row_parts(qtype, rows):
    """A lane's parts of `rows` rows times activations, as a device function of the rows' addresses, the `Input` and the
    row of the activations; the lanes' parts add up to the products."""
    if qtype in FLOATS:
        every = unrolled(_float_part(qtype), rows)

        @device
        def parts(addresses, x, t):
            return every(0, addresses, (x, t))

    else:
        products, first = row_products(qtype, rows, 1), unrolled(_first, rows)

        @device
        def parts(addresses, x, t):
            return first(0, products(addresses, (t,), x), 0)

    return parts


@functools.cache
def _float_part(qtype):
    """A lane's part of a row of a float type times activations, for `unrolled`."""
    one, _, nbytes = FLOATS[qtype]

    @device
    def part(row, _, fixed):
        x, t = fixed
        sum, at = _ZERO, x.x + 4 * x.columns * t
        for k in range(lane(), x.columns, WARP):
            sum = fma(one(row + nbytes * k), load_f32(at + 4 * k), sum)
        return sum

    return part


@device
def _first(sums, _, fixed):
    return sums[0]


def _gate_up(qtype):
    """Gate and up, for each pair of a token and an expert."""
    parts = _row_parts(qtype, 2)

    @kernel(BOTH, BOTH, I2, INPUT, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _gate_up(gate, up, ids, x, hidden):
        """``hidden = silu(gate @ x) * (up @ x)``: a warp takes a row (x) for choice y of token z. Behind a token's
        choices come the shared experts."""
        row, j, t = WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, cuda.blockIdx.y, cuda.blockIdx.z
        used = ids.shape[1]
        if j < used:
            e = ids[t, j]
            at, other = row_address(gate[0], e, row), row_address(up[0], e, row)
        else:
            at, other = row_address(gate[1], j - used, row), row_address(up[1], j - used, row)
        g, u = parts((at, other), x, t)
        g, u = warp_sum(g), warp_sum(u)
        if lane() == 0 and row < hidden.shape[1]:
            hidden[t * cuda.gridDim.y + j, row] = silu(g) * u

    return _gate_up


@device
def _chosen_down(j, fixed):
    """The row of down, the row of activations and the weight of a token's choice j; shared experts, whose weight is 1,
    come behind the chosen ones."""
    down, ids, weights, t, row = fixed
    used = ids.shape[1]
    number = t * (used + down[1].count) + j
    if j < used:
        return row_address(down[0], ids[t, j], row), number, weights[t, j]
    return row_address(down[1], j - used, row), number, _ONE


def _weighted_rows(qtype):
    """A lane's part of a token's down rows times activations, weighted and summed: a device function (count, input,
    fixed), `fixed` for `_chosen_down`."""
    if qtype not in FLOATS:
        return row_sums(qtype, _chosen_down)
    part = _float_part(qtype)

    @device
    def total(count, x, fixed):
        sum = _ZERO
        for j in range(count):
            address, number, weight = _chosen_down(j, fixed)
            sum = fma(weight, part(address, 0, (x, number)), sum)
        return sum

    return total


def _down(qtype):
    """Down, summed over a token's experts."""
    total = _weighted_rows(qtype)

    @kernel(BOTH, I2, F2, INPUT, types.boolean, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _down(down, ids, weights, x, add, out):
        """``out[t] += Σ weights[t, j] * down[e] @ hidden[t, j]``: a warp takes a row (x) of token y."""
        row, t = WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, cuda.blockIdx.y
        sum = warp_sum(total(ids.shape[1] + down[1].count, x, (down, ids, weights, t, row)))
        if lane() == 0 and row < out.shape[1]:
            out[t, row] = out[t, row] + sum if add else sum

    return _down


@kernel(I2, types.int64, types.int64, I1, I1, I2, max_threads=_SORTING)
def _sort_pairs(ids, routed, others, pairs, tokens, tiles):
    """Numbers of the pairs (token * choices + choice) by expert, in any order within one, their tokens, and tiles of at
    most `TILE` pairs of an expert: the expert, the first and the last position; −1 where there is no tile. Behind
    `routed` experts come `others`, which every token chose. One block; the shared memory holds two numbers for each
    expert."""
    shared = cuda.shared.array(0, np.int32)
    me, used, count = cuda.threadIdx.x, ids.shape[1], routed + others
    choices = used + others
    counts, places = shared[:count], shared[count : 2 * count]
    for e in range(me, count, _SORTING):
        counts[e] = 0 if e < routed else len(ids)
    for i in range(me, len(tiles), _SORTING):
        tiles[i, 0] = -1
    cuda.syncthreads()
    for t in range(me, len(ids), _SORTING):
        for j in range(used):
            cuda.atomic.add(counts, ids[t, j], 1)
    cuda.syncthreads()
    for e in range(me, count, _SORTING):
        begin = tile = 0
        for other in range(e):
            begin += counts[other]
            tile += (counts[other] + TILE - 1) // TILE
        places[e] = begin
        end = begin + counts[e]
        while begin < end:
            tiles[tile, 0], tiles[tile, 1], tiles[tile, 2] = e, begin, min(begin + TILE, end) - 1
            begin += TILE
            tile += 1
    cuda.syncthreads()
    for t in range(me, len(ids), _SORTING):
        for j in range(used):
            at = cuda.atomic.add(places, ids[t, j], 1)
            pairs[at] = t * choices + j
            tokens[at] = t
        for e in range(others):
            at = places[routed + e] + t
            pairs[at] = t * choices + used + e
            tokens[at] = t


@kernel(F2, F3, types.boolean, F2, max_threads=THREADS)
def _combine(weights, results, add, out):
    """``out[t] += Σ weights[t, j] * results[t, j]``, where shared experts have the weight 1: a thread takes a column
    (x) of token y."""
    column, t, used = THREADS * cuda.blockIdx.x + cuda.threadIdx.x, cuda.blockIdx.y, weights.shape[1]
    if column < out.shape[1]:
        sum = _ZERO
        for j in range(results.shape[1]):
            sum = fma(weights[t, j] if j < used else _ONE, results[t, j, column], sum)
        out[t, column] = out[t, column] + sum if add else sum


def _grouped(qtype):
    """Products of pairs that are sorted by expert, on int8 tensor cores: `quant.matmul` for many tokens, with rows of
    activations that lie anywhere."""
    tile = tile_of(qtype, TILE)
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
        min_blocks=2 if FORMATS[qtype].halves else 3,
    )
    def _grouped(first_w, second_w, x, sources, targets, tiles, out):
        """``out[z, targets[i]] = W[e] @ x[sources[i]]`` for the pairs i of tile x and `ROWS` rows (y) of their expert's
        matrix, the first or the second one (z)."""
        thread, first = cuda.threadIdx.x, ROWS * cuda.blockIdx.y
        matrix, begin, last = tiles[cuda.blockIdx.x, 0], tiles[cuda.blockIdx.x, 1], tiles[cuda.blockIdx.x, 2]
        if matrix < 0:
            return
        routed, others = first_w if cuda.blockIdx.z == 0 else second_w
        w, matrix = (routed, matrix) if matrix < routed.count else (others, matrix - routed.count)
        sums = product(row_address(w, matrix, first + thread), sources[min(begin + thread, last)], x)
        store_all(sums, (out[cuda.blockIdx.z], targets, first, begin, last))

    return _grouped


_GATE_UP = {qtype: _gate_up(qtype) for qtype in ggml.SUPPORTED}
_DOWN = {qtype: _down(qtype) for qtype in ggml.SUPPORTED}
_GROUPED = {qtype: _grouped(qtype) for qtype in FORMATS}
