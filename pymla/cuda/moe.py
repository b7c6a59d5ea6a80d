"""The mixture of experts. Twin of `pymla.reference.moe`.

The host never learns which experts were chosen: grids depend on the number of tokens alone, and kernels read the ids.
Where few tokens meet many experts, a warp takes a row of gate beside its row of up for each pair of a token and an
expert, applies SiLU, and a second launch sums the chosen experts' down rows with their weights. Where pairs are many,
they are sorted by expert on the device and multiplied in tiles on the tensor cores (`_grouped`), so that an expert's
rows are read once for up to `TILE` of its tokens. Sums run in one order always: no atomic addition of floats.
"""

import math

import numpy as np
from numba import cuda, types

from pymla import ggml
from pymla.cuda.formats import FLOATS, FORMATS
from pymla.cuda.jit import device, kernel
from pymla.cuda.memory import empty
from pymla.cuda.ptx import (
    WARP,
    ballot,
    div,
    exp2,
    fma,
    lane,
    load_f32,
    load_f32x2,
    load_u32,
    shfl_idx,
    syncwarp,
    warp_max,
    warp_sum,
)
from pymla.cuda.quant import INPUT, MATRICES, WARPS, Activation, Matrices, matmul, row_address
from pymla.cuda.tiles import THREADS, TILE, TILE_PRODUCT, store_two
from pymla.errors import PymlaError

__all__ = ["experts", "ffn", "router"]

F1 = types.Array(types.float32, 1, "C")
F2 = types.Array(types.float32, 2, "C")
F3 = types.Array(types.float32, 3, "C")
I1 = types.Array(types.int32, 1, "C")
I2 = types.Array(types.int32, 2, "C")

#: Pairs for each expert on average, from which tiles are faster than rows.
FEW_PAIRS = 2
#: Threads that sort pairs.
_SORTING = 512

_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
_LOG2E = np.float32(math.log2(math.e))


def router(logits, bias, config, ids, weights):
    """Choose `num_experts_per_tok` experts for every token (`pymla.reference.moe.router`)."""
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


def experts(activation, ids, weights, gate, up, down, out):
    """Routed experts (`pymla.reference.moe.experts`): `activation` of (T, K), `ids` int32 and `weights` float32 (T, k),
    `gate` and `up` of E matrices of F rows and K columns and one type, `down` of E matrices of K rows and F columns,
    `out` float32 (T, K), overwritten."""
    _need_one_type(gate, up)
    (tokens, used), (count, inner), rows = ids.shape, gate.data.shape[:2], down.data.shape[1]
    if tokens * used > FEW_PAIRS * count and gate.qtype in FORMATS and down.qtype in FORMATS:
        return _experts_in_tiles(activation, ids, weights, gate, up, down, out)
    hidden = empty((tokens * used, inner), np.float32)
    grid = -(-inner // WARPS), used, tokens
    _GATE_UP[gate.qtype][grid, THREADS](Matrices.of(gate), Matrices.of(up), ids, activation.input(gate.qtype), hidden)
    y = Activation(hidden)
    _DOWN[down.qtype][(-(-rows // WARPS), tokens), THREADS](Matrices.of(down), ids, weights, y.input(down.qtype), out)
    return out


def _experts_in_tiles(activation, ids, weights, gate, up, down, out):
    """`experts` of quantised types, for many pairs."""
    (tokens, used), (count, inner), rows = ids.shape, gate.data.shape[:2], down.data.shape[1]
    number = tokens * used
    # Every expert may have a tile that is not full.
    tiles = empty((-(-number // TILE) + min(count, number), 3), np.int32)
    pairs, tokens_of = empty(number, np.int32), empty(number, np.int32)
    _sort_pairs[1, _SORTING, 8 * count](ids, count, pairs, tokens_of, tiles)
    hidden, results = empty((2, number, inner), np.float32), empty((1, number, rows), np.float32)
    x, gates, ups, downs = activation.input(gate.qtype), Matrices.of(gate), Matrices.of(up), Matrices.of(down)
    _GROUPED[gate.qtype][(len(tiles), -(-inner // TILE), 2), THREADS](gates, ups, x, tokens_of, pairs, tiles, hidden)
    _multiply(hidden[0], hidden[1])
    y = Activation(hidden[0])
    x = y.input(down.qtype)
    _GROUPED[down.qtype][(len(tiles), -(-rows // TILE), 1), THREADS](downs, downs, x, pairs, pairs, tiles, results)
    _combine[(-(-rows // THREADS), tokens), THREADS](weights, results[0], out)
    return out


def ffn(activation, gate, up, down, out):
    """The dense network, also the shared experts (`pymla.reference.moe.ffn`): `activation` of (T, K), `out` float32
    (T, K)."""
    tokens, inner = len(out), len(gate.data)
    hidden = empty((tokens, inner), np.float32)
    if tokens == 1 and gate.qtype == up.qtype:
        _GATE_UP[gate.qtype][-(-inner // WARPS), THREADS](
            Matrices.of(gate), Matrices.of(up), empty((0, 1), np.int32), activation.input(gate.qtype), hidden
        )
    else:
        other = empty((tokens, inner), np.float32)
        matmul(gate, activation, hidden)
        matmul(up, activation, other)
        _multiply(hidden, other)
    return matmul(down, Activation(hidden), out)


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


def _row_part(qtype):
    """A lane's part of a row times activations, as a device function of the row's address, the `Input` and the row of
    the activations; the lanes' parts add up to the product."""
    if qtype in FLOATS:
        one, _, nbytes = FLOATS[qtype]

        @device
        def part(row, x, t):
            sum, at = _ZERO, x.x + 4 * x.columns * t
            for k in range(lane(), x.columns, WARP):
                sum = fma(one(row + nbytes * k), load_f32(at + 4 * k), sum)
            return sum

    else:
        piece, dot = FORMATS[qtype].piece, FORMATS[qtype].dot

        @device
        def part(row, x, t):
            sum, blocks, w = _ZERO, x.columns >> 5, lane() & 3
            codes, scales = x.codes + x.columns * t + 4 * w, x.scales + 8 * blocks * t
            for block in range(lane() >> 2, blocks, WARP // 4):
                scale, total = load_f32x2(scales + 8 * block)
                c0, c1 = load_u32(codes + 32 * block), load_u32(codes + 32 * block + 16)
                sum = dot(piece(row, block, w), c0, c1, scale, total, sum)
            return sum

    return part


def _gate_up(qtype):
    """Gate and up, for each pair of a token and an expert."""
    part = _row_part(qtype)

    @kernel(MATRICES, MATRICES, I2, INPUT, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _gate_up(gate, up, ids, x, hidden):
        """``hidden = silu(gate @ x) * (up @ x)``: a warp takes a row (x) for choice y of token z. Without ids there is
        one matrix."""
        row, j, t = WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, cuda.blockIdx.y, cuda.blockIdx.z
        e = ids[t, j] if len(ids) else 0
        g = warp_sum(part(row_address(gate, e, row), x, t))
        u = warp_sum(part(row_address(up, e, row), x, t))
        if lane() == 0 and row < gate.rows:
            hidden[t * ids.shape[1] + j, row] = silu(g) * u

    return _gate_up


def _down(qtype):
    """Down, summed over a token's experts."""
    part = _row_part(qtype)

    @kernel(MATRICES, I2, F2, INPUT, F2, variant=ggml.NAME[qtype].lower(), max_threads=THREADS)
    def _down(down, ids, weights, x, out):
        """``out[t] = Σ weights[t, j] * down[e] @ hidden[t, j]``: a warp takes a row (x) of token y."""
        row, t = WARPS * cuda.blockIdx.x + cuda.threadIdx.x // WARP, cuda.blockIdx.y
        sum, used = _ZERO, ids.shape[1]
        for j in range(used):
            sum = fma(weights[t, j], part(row_address(down, ids[t, j], row), x, t * used + j), sum)
        sum = warp_sum(sum)
        if lane() == 0 and row < down.rows:
            out[t, row] = sum

    return _down


@kernel(I2, types.int64, I1, I1, I2, max_threads=_SORTING)
def _sort_pairs(ids, count, pairs, tokens, tiles):
    """Numbers of the pairs (token * k + choice) by expert, in any order within one, their tokens, and tiles of at most
    `TILE` pairs of an expert: the expert, the first and the last position; −1 where there is no tile. One block; the
    shared memory holds two numbers for each of `count` experts."""
    shared = cuda.shared.array(0, np.int32)
    me, used = cuda.threadIdx.x, ids.shape[1]
    counts, places = shared[:count], shared[count : 2 * count]
    for e in range(me, count, _SORTING):
        counts[e] = 0
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
            pairs[at] = t * used + j
            tokens[at] = t


@kernel(F2, F2, F2, max_threads=THREADS)
def _combine(weights, results, out):
    """``out[t] = Σ weights[t, j] * results[t * k + j]``: a thread takes a column (x) of token y."""
    column, t, used = THREADS * cuda.blockIdx.x + cuda.threadIdx.x, cuda.blockIdx.y, weights.shape[1]
    if column < out.shape[1]:
        sum = _ZERO
        for j in range(used):
            sum = fma(weights[t, j], results[t * used + j, column], sum)
        out[t, column] = sum


def _grouped(qtype):
    """Products of pairs that are sorted by expert, on int8 tensor cores: `quant.matmul` for many tokens, with rows of
    activations that lie anywhere."""
    tile_product = TILE_PRODUCT[qtype]

    @kernel(
        MATRICES, MATRICES, INPUT, I1, I1, I2, F3, variant=ggml.NAME[qtype].lower(), max_threads=THREADS, min_blocks=4
    )
    def _grouped(first_w, second_w, x, sources, targets, tiles, out):
        """``out[z, targets[i]] = W[e] @ x[sources[i]]`` for the pairs i of tile x and `TILE` rows (y) of their expert's
        matrix, the first or the second one (z)."""
        thread, first = cuda.threadIdx.x, TILE * cuda.blockIdx.y
        matrix, begin, last = tiles[cuda.blockIdx.x, 0], tiles[cuda.blockIdx.x, 1], tiles[cuda.blockIdx.x, 2]
        if matrix < 0:
            return
        w = first_w if cuda.blockIdx.z == 0 else second_w
        row, i, blocks = first + (thread >> 3), begin + (thread >> 2), x.columns >> 5
        sums = tile_product(
            row_address(w, matrix, row),
            row_address(w, matrix, row + 16),
            row_address(w, matrix, row + 32),
            row_address(w, matrix, row + 48),
            x.codes + 32 * blocks * sources[min(i, last)],
            x.codes + 32 * blocks * sources[min(i + 32, last)],
            x.scales + 8 * blocks * sources[min(begin + (thread >> 1), last)],
            blocks,
        )
        s0, s1, s2, s3, s4, s5, s6, s7 = sums
        results, row, i = out[cuda.blockIdx.z], first + 16 * (thread // WARP) + (lane() >> 2), begin + 2 * (lane() & 3)
        store_pairs(results, targets, i, last, row, s0)
        store_pairs(results, targets, i + 8, last, row, s1)
        store_pairs(results, targets, i + 16, last, row, s2)
        store_pairs(results, targets, i + 24, last, row, s3)
        store_pairs(results, targets, i + 32, last, row, s4)
        store_pairs(results, targets, i + 40, last, row, s5)
        store_pairs(results, targets, i + 48, last, row, s6)
        store_pairs(results, targets, i + 56, last, row, s7)

    return _grouped


@device
def store_pairs(results, targets, i, last, row, sums):
    """A lane's part of 16 rows times 8 pairs of a token and an expert: pair i of sorted ones goes to ``targets[i]``."""
    s0, s1, s2, s3 = sums
    left = results.shape[1] - row
    if i <= last:
        store_two(results, targets[i], row, left, s0, s2)
    if i < last:
        store_two(results, targets[i + 1], row, left, s1, s3)


_GATE_UP = {qtype: _gate_up(qtype) for qtype in ggml.SUPPORTED}
_DOWN = {qtype: _down(qtype) for qtype in ggml.SUPPORTED}
_GROUPED = {qtype: _grouped(qtype) for qtype in FORMATS}
