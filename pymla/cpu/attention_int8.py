"""Attention on integers, for a cache of 8 bits.

In the expanded form, keys and values become panels (`pymla.cpu.panels`) as they are expanded. The lanes of keys are
tokens, and their head dimensions run along K; the lanes of values are head dimensions, and tokens run along K. Keys
have 7 bits with a scale for 32 dimensions, values 8 bits with a scale for each token, which goes into the softmax
weights. Those are quantised like activations, per 32 tokens. So no number depends on a token that its query does not
see.

In the absorbed form the codes of the cache are multiplied as they are. Queries are panels, whose lanes are heads, and
meet the codes of one row of the cache after the other. For the values, four rows at a time become panels whose lanes
are dimensions; the scales of a row's blocks go into its codes, relative to the largest, and that into the softmax
weights.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cache import PAGE
from pymla.cpu.compiling import unrolled
from pymla.cpu.formats import dequantise_row, is_float, not_finite, quantise_block
from pymla.cpu.jit import inline, kernel
from pymla.cpu.panels import FLOAT_SCRATCH, ROWS, SCRATCH, product, product_float, tile_f32, transpose_panel
from pymla.cpu.quant import CACHE, F2, F3, I1, INPUT, MATRICES, STEP, Activation, Matrices, counting
from pymla.cpu.simd import (
    LANES,
    absolute,
    add,
    address,
    broadcast_f32x8,
    broadcast_f32xL,
    broadcast_i8xL,
    broadcast_i32xL,
    div,
    dot_u6,
    dot_u7L,
    finish8,
    fma,
    larger,
    largest,
    load_columns,
    load_f16,
    load_f32x8,
    load_f32xL,
    load_i8x16,
    load_i8xL,
    load_pair,
    load_scales,
    mul,
    ones_i8x32,
    round_even,
    splat_f32,
    splat_f32xL,
    start7,
    store_as_i8,
    store_as_i16,
    store_f32,
    store_f32x8,
    store_f32xL,
    store_i8x32,
    store_i32,
    store_i32x8,
    store_packed_x8,
    store_packed_xL,
    store_rescaled,
    sum_blocks,
    sum_i8x16,
    times_minus_64,
    total,
    where_positive,
    zero8,
    zero_sums,
)
from pymla.cpu.softmax import heads_softmax, query_softmax

#: Tokens that are expanded, and keys that a block of queries meets, at a time.
TOKENS = 128
#: Heads that share the reading of a page in the absorbed form.
HEADS = 16
#: Tokens that a panel of so many heads meets at once in either of its halves.
TOKENS_A_LANE = LANES // 8
#: Queries of a head that share the reading of keys and values.
QUERIES = 96


class Panels(NamedTuple):
    """Expanded keys and values of some heads; tokens are padded to a multiple of `TOKENS`."""

    keys: np.ndarray  # uint8 (H, tokens // LANES, D * LANES): codes from 1 to 127, 64 is zero; D is a multiple of 32
    key_scales: np.ndarray  # float32 (H, tokens // LANES, D // 32 * LANES)
    values: np.ndarray  # uint8 (H, tokens // 32, v * 32): signed codes; v is a multiple of ROWS
    value_scales: np.ndarray  # float32 (H, tokens)

    @classmethod
    def empty(cls, tokens, heads, size, v):
        """For so many tokens and heads, keys of `size` and values of `v` numbers."""
        tokens, size, v = -(-tokens // TOKENS) * TOKENS, -(-size // 32) * 32, -(-v // ROWS) * ROWS
        return cls(
            np.empty((heads, tokens // LANES, size * LANES), np.uint8),
            np.empty((heads, tokens // LANES, size // 32 * LANES), np.float32),
            np.empty((heads, tokens // 32, v * 32), np.uint8),
            np.empty((heads, tokens), np.float32),
        )


BYTES3 = types.Array(types.uint8, 3, "C")
PANELS = types.NamedTuple((BYTES3, F3, BYTES3, F2), Panels)


def expand(c_kv, k_pe, k_b, v_b, out):
    """Keys and values of some heads from latent rows, as `Panels`; otherwise as `attention.expand`."""
    x = Activation(c_kv).panels(k_b.qtype)
    blocks = -(-len(c_kv) // TOKENS)
    _expand[len(k_b.data) * blocks, 1](Matrices.of(k_b), Matrices.of(v_b), x, counting(len(c_kv)), k_pe, out)


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence over `Panels`; `q` float32 (T, H, D), `out` (T, H, v)."""
    tokens, heads, _ = q.shape
    _expanded[heads * -(-tokens // QUERIES), 1](q, keys_values, positions, scale, out)
    return out


@kernel(MATRICES, MATRICES, INPUT, I1, F2, PANELS)
def _expand(first, last, k_b, v_b, x, index, k_pe, out):
    """Over blocks of `TOKENS` tokens of each head."""
    tokens = len(k_pe)
    blocks = (tokens + TOKENS - 1) // TOKENS
    size, v = out.keys.shape[2] // LANES, out.values.shape[2] // 32
    scratch = np.empty(max(SCRATCH, FLOAT_SCRATCH), np.uint8)
    result = np.empty((TOKENS, ROWS), np.float32)
    keys = np.zeros((TOKENS, size), np.float32)
    values = np.zeros((TOKENS, v), np.float32)
    codes = np.empty((TOKENS, size), np.uint8)
    for item in range(first, last):
        h, begin = item // blocks, item % blocks * TOKENS
        count = min(TOKENS, tokens - begin)
        multiply_head(k_b, h, x, index, begin, count, scratch, result, keys)
        multiply_head(v_b, h, x, index, begin, count, scratch, result, values)
        for t in range(count):
            for i in range(k_pe.shape[1]):
                keys[t, k_b.rows + i] = k_pe[begin + t, i]
        # Tokens that are missing are zeros.
        keys[count:], values[count:] = 0, 0
        for t in range(TOKENS):
            scales = address(out.key_scales[h, (begin + t) // LANES, t % LANES :])
            for i in range(size // 32):
                quantise_key(address(keys[t, 32 * i :]), address(codes[t, 32 * i :]), scales + 4 * LANES * i)
        for t in range(0, TOKENS, 8):
            lane = t % LANES
            store_keys(address(codes[t]), size, address(out.keys[h, (begin + t) // LANES]) + 4 * lane)
        for t in range(0, TOKENS, 32):
            store_values(values[t:], out.values[h, (begin + t) // 32], out.value_scales[h, begin + t :])


@inline
def multiply_head(w, h, x, index, begin, count, scratch, result, out):
    """``out[t, :rows] = W[h] @ x[begin + t]`` for `count` tokens."""
    columns = x.x.shape[1]
    matrix = w.address + h * w.matrix_stride
    for r in range(0, w.rows, ROWS):
        row, rows = matrix + r * w.row_stride, min(ROWS, w.rows - r)
        if is_float(w.qtype):
            for s in range(0, rows, 16):
                part = min(16, rows - s)
                source = row + s * w.row_stride
                tokens = x.x[begin : begin + count]
                product_float(w.qtype, source, part, w.row_stride, columns, tokens, out[:, r + s :], address(scratch))
            continue
        half = min(LANES, rows)
        rest, skip = (rows - half, LANES) if rows > half else (1, half - 1)
        product(
            w.qtype,
            row,
            row + skip * w.row_stride,
            half,
            rest,
            w.row_stride,
            columns,
            ROWS * w.row_stride,
            x,
            index,
            (begin, begin + count),
            address(scratch),
            address(result),
        )
        for t in range(count):
            for i in range(rows):
                out[t, r + i] = result[t, i]


@inline
def quantise_key(x, codes, scale):
    """Thirty-two float32 as codes from 1 to 127 around 64, and their scale; all are addresses."""
    a, b, c, d = load_f32x8(x), load_f32x8(x + 32), load_f32x8(x + 64), load_f32x8(x + 96)
    most = largest(larger(larger(absolute(a), absolute(b)), larger(absolute(c), absolute(d))))
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(63) / most
    factor, zero = splat_f32(inverse), splat_f32(np.float32(64))
    store_as_i8(codes, add(round_even(mul(a, factor)), zero))
    store_as_i8(codes + 8, add(round_even(mul(b, factor)), zero))
    store_as_i8(codes + 16, add(round_even(mul(c, factor)), zero))
    store_as_i8(codes + 24, add(round_even(mul(d, factor)), zero))
    store_f32(scale, (most + not_finite(a, b, c, d)) / np.float32(63))


@inline
def store_keys(rows, size, out):
    """Eight rows of codes (8, size) to eight lanes of a panel; addresses."""
    eight = (
        rows,
        rows + size,
        rows + 2 * size,
        rows + 3 * size,
        rows + 4 * size,
        rows + 5 * size,
        rows + 6 * size,
        rows + 7 * size,
    )
    for i in range(0, size, 16):
        a, b, c, d = load_columns(eight, i)
        at = out + i * LANES
        store_i8x32(at, a)
        store_i8x32(at + 4 * LANES, b)
        store_i8x32(at + 8 * LANES, c)
        store_i8x32(at + 12 * LANES, d)


@inline
def store_values(rows, panels, scales):
    """Thirty-two tokens' values, float32 (32, v), as panels of `LANES` dimensions, and a scale for each token."""
    v = rows.shape[1]
    inverse = np.empty(32, np.float32)
    for t in range(32):
        most = splat_f32(np.float32(0))
        fault = splat_f32(np.float32(0))
        for i in range(0, v, 8):
            x = load_f32x8(address(rows[t]) + 4 * i)
            most = larger(absolute(x), most)
            fault = add(fault, mul(x, splat_f32(np.float32(0))))
        most_of_all = largest(most)
        inverse[t] = 0
        if most_of_all > 0:
            inverse[t] = np.float32(127) / most_of_all
        scales[t] = (most_of_all + total(fault)) / np.float32(127)
    out = address(panels)
    for i in range(0, v, LANES):
        for t in range(0, 32, 4):
            store_panel4(rows, inverse, t, i, out)
            out += 4 * LANES


@inline
def store_panel4(rows, inverse, t, i, out):
    """Codes of four tokens of `LANES` dimensions."""
    a = mul(load_f32xL(address(rows[t]) + 4 * i), splat_f32xL(inverse[t]))
    b = mul(load_f32xL(address(rows[t + 1]) + 4 * i), splat_f32xL(inverse[t + 1]))
    c = mul(load_f32xL(address(rows[t + 2]) + 4 * i), splat_f32xL(inverse[t + 2]))
    d = mul(load_f32xL(address(rows[t + 3]) + 4 * i), splat_f32xL(inverse[t + 3]))
    store_packed_xL(out, round_even(a), round_even(b), round_even(c), round_even(d))


@kernel(F3, PANELS, I1, types.float64, F3)
def _expanded(first, last, q, panels, positions, scale, out):
    """Over blocks of queries of each head. Late blocks have more to read: they are dealt out first."""
    tokens, heads, v = out.shape
    size, padded_v = panels.keys.shape[2] // LANES, panels.values.shape[2] // 32
    blocks = (tokens + QUERIES - 1) // QUERIES
    query = np.zeros(size, np.float32)
    codes = np.empty((QUERIES, size), np.uint8)
    scales = np.empty((QUERIES, size // 32), np.float32)
    sum16 = np.empty((QUERIES, size // 16), np.int16)
    unused = np.empty(2, np.float32)
    scores = np.empty((QUERIES, TOKENS), np.float32)
    weights = np.empty((QUERIES, TOKENS), np.uint8)
    weight_scales = np.empty((QUERIES, TOKENS // 32), np.float32)
    state = np.empty((QUERIES, 2), np.float32)
    result = np.empty((QUERIES, padded_v), np.float32)
    for item in range(first, last):
        begin, h = (blocks - 1 - item // heads) * QUERIES, item % heads
        count = min(QUERIES, tokens - begin)
        for i in range(count):
            for j in range(q.shape[2]):
                query[j] = q[begin + i, h, j] * np.float32(scale)
            for j in range(0, size, 32):
                low, sums = address(codes[i, j:]), address(sum16[i, j // 16 :])
                at, free = address(scales[i, j // 32 :]), address(unused)
                quantise_block(address(query[j:]), low, low + 16, at, free, free + 4, sums)
        state[:, 0] = -np.inf
        state[:, 1] = 0
        result[:] = 0
        length = positions[begin + count - 1] + 1
        for block in range(0, length, TOKENS):
            seen = min(TOKENS, length - block)
            panel = block // LANES
            for s in range(0, seen, ROWS):
                p, q_ = address(panels.keys[h, panel]), address(panels.keys[h, panel + 1])
                d, e = address(panels.key_scales[h, panel]), address(panels.key_scales[h, panel + 1])
                panel += 2
                for i in range(0, count, 3):
                    a, b, c = i, min(i + 1, count - 1), min(i + 2, count - 1)
                    _tile_keys(
                        address(codes[a]), address(codes[b]), address(codes[c]),
                        address(scales[a]), address(scales[b]), address(scales[c]),
                        address(sum16[a]), address(sum16[b]), address(sum16[c]),
                        size // 32, p, q_, d, e,
                        address(scores[a, s:]), address(scores[b, s:]), address(scores[c, s:]),
                    )  # fmt: skip
            for i in range(count):
                query_softmax(
                    scores[i], min(seen, positions[begin + i] + 1 - block), state[i], address(result[i]), padded_v
                )
                for s in range(0, TOKENS, 32):
                    token_scales = address(panels.value_scales[h, block + s :])
                    at = address(weight_scales[i, s // 32 :])
                    quantise_weights(address(scores[i, s:]), token_scales, address(weights[i, s:]), at)
            for j in range(0, padded_v, ROWS):
                p = address(panels.values[h, block // 32]) + 32 * j
                for i in range(0, count, 3):
                    a, b, c = i, min(i + 1, count - 1), min(i + 2, count - 1)
                    _tile_values(
                        address(weights[a]), address(weights[b]), address(weights[c]), 4,
                        address(weight_scales[a]), address(weight_scales[b]), address(weight_scales[c]), 4,
                        (seen + 31) // 32, p, 32 * padded_v,
                        address(result[a, j:]), address(result[b, j:]), address(result[c, j:]),
                    )  # fmt: skip
        for i in range(count):
            for j in range(v):
                out[begin + i, h, j] = result[i, j] / state[i, 1]


@kernel(F3, CACHE, CACHE, STEP, types.float64, types.int64, F3, F3)
def absorbed_pages(first, last, q, latent, rope, step, scale, splits, partial, sums):
    """Unnormalised values (T * splits, H, rank), and maximum and sum (T * splits, H, 2), of each share of the pages.

    An item is a token, a group of heads and a share.
    """
    heads, rank = partial.shape[1], partial.shape[2]
    size, blocks = q.shape[2], rank // 32
    groups = (heads + HEADS - 1) // HEADS
    padded = (rank + ROWS - 1) // ROWS * ROWS
    query = np.zeros((HEADS, size), np.float32)
    codes = np.empty((HEADS, rank), np.uint8)
    panel = np.empty(HEADS * rank, np.uint8)
    panel_scales = np.empty((blocks, HEADS), np.float32)
    rope_panel = np.empty((size - rank, HEADS), np.float32)
    rope_rows = np.empty((PAGE, size - rank), np.float32)
    rows = np.empty(PAGE, np.int64)
    whole = (blocks + 7) // 8 * 8
    scales = np.zeros((PAGE, whole), np.float32)
    starts = np.empty((PAGE, whole), np.int32)
    factors = np.empty((PAGE, whole), np.int16)
    largest_scale = np.empty(PAGE, np.float32)
    values_panel = np.zeros((PAGE // 32, padded * 32), np.uint8)
    scores = np.empty((PAGE, HEADS), np.float32)
    weights = np.empty((PAGE // 4, HEADS), np.int32)
    weight_scales = np.empty((PAGE // 32, HEADS), np.float32)
    values = np.empty((HEADS, padded), np.float32)
    state = np.empty((2, HEADS), np.float32)
    for item in range(first, last):
        task, group = item // groups, item % groups
        t, split = task // splits, task % splits
        begin = group * HEADS
        count = min(HEADS, heads - begin)
        length = step.positions[t] + 1
        pages = (length + PAGE - 1) // PAGE
        from_page, to_page = pages * split // splits, pages * (split + 1) // splits
        for h in range(begin, begin + count):
            sums[task, h, 0], sums[task, h, 1] = -np.inf, 0
        if from_page == to_page:
            continue
        for h in range(count):
            for i in range(size):
                query[h, i] = q[t, begin + h, i] * np.float32(scale)
            for i in range(blocks):
                quantise_key(address(query[h, 32 * i :]), address(codes[h, 32 * i :]), address(panel_scales[i, h:]))
        for h in range(0, HEADS, 8):
            store_keys(address(codes[h]), rank, address(panel) + h // LANES * (rank * LANES) + 4 * (h % LANES))
        transpose_panel(address(query) + 4 * rank, 4 * size, count, size - rank, address(rope_panel))
        values[:] = 0
        state[0], state[1] = -np.inf, 0
        table = step.block_tables[step.seq_of[t]]
        for page in range(from_page, to_page):
            seen = min(PAGE, length - page * PAGE)
            for s in range(PAGE):
                slot = table[page] * PAGE + min(s, seen - 1)
                rows[s] = address(latent.data[slot])
                if s < seen:
                    dequantise_row(rope.qtype, address(rope.data[slot]), address(rope_rows[s]), size - rank)
                    at = address(scales[s]), address(starts[s]), address(factors[s])
                    largest_scale[s] = prepare_row(rows[s], blocks, at[0], at[1], at[2])
                else:
                    largest_scale[s], factors[s] = 0, 0
            for s in range(0, seen, 3 * TOKENS_A_LANE):
                last_row = seen - 1
                a, b, c = s, min(s + 1, last_row), min(s + 2, last_row)
                e, f, g = a, b, c
                if TOKENS_A_LANE == 2:
                    e, f, g = min(s + 3, last_row), min(s + 4, last_row), min(s + 5, last_row)
                _tile_rows(
                    rows, scales, starts, (a, b, c), (e, f, g), blocks,
                    address(panel), address(panel_scales), address(scores),
                )  # fmt: skip
            stride = 4 * (size - rank)
            for s in range(0, seen, 4):
                a, b, c = min(1, seen - 1 - s), min(2, seen - 1 - s), min(3, seen - 1 - s)
                tile_f32(
                    address(rope_rows[s]), a * stride, b * stride, c * stride, 4,
                    address(rope_panel), 64, size - rank, address(scores[s]), 64, True,
                )  # fmt: skip
            heads_softmax(address(scores), seen, address(state), address(values), padded)
            depth = (seen + 31) // 32
            for s in range(seen, 32 * depth):
                scores[s] = 0
            for s in range(0, depth):
                at = address(weights[8 * s]), address(weight_scales[s])
                quantise_heads(address(scores[32 * s]), address(largest_scale[32 * s :]), at[0], at[1])
                for i in range(blocks):
                    for four in range(0, 32, 4):
                        r = 32 * s + four
                        at_panel = address(values_panel[s]) + 32 * 32 * i + 4 * LANES * (four // 4)
                        for half in range(2):
                            offset = 34 * i + 2 + 16 * half
                            store_rescaled(
                                at_panel + 16 * 32 * half,
                                rows[r] + offset,
                                rows[r + 1] + offset,
                                rows[r + 2] + offset,
                                rows[r + 3] + offset,
                                address(factors[r, i:]),
                                2 * whole,
                            )
            for j in range(0, padded, ROWS):
                p = address(values_panel) + 32 * j
                for h in range(0, HEADS, 3):
                    a, b, c = h, min(h + 1, HEADS - 1), min(h + 2, HEADS - 1)
                    w, ws = address(weights), address(weight_scales)
                    _tile_values(
                        w + 4 * a, w + 4 * b, w + 4 * c, 4 * HEADS,
                        ws + 4 * a, ws + 4 * b, ws + 4 * c, 4 * HEADS,
                        depth, p, 32 * padded,
                        address(values[a, j:]), address(values[b, j:]), address(values[c, j:]),
                    )  # fmt: skip
        for h in range(count):
            sums[task, begin + h, 0], sums[task, begin + h, 1] = state[0, h], state[1, h]
            for i in range(rank):
                partial[task, begin + h, i] = values[h, i]


@inline
def prepare_row(row, blocks, scales, starts, factors):
    """What attention needs of a Q8_0 row beside its codes; returns the largest scale of a block.

    Parameters
    ----------
    row : int
        Address.
    blocks : int
    scales, starts, factors : int
        Addresses for each block's scale, float32; -64 times its sum of codes, int32; and its scale relative to the
        largest, int16 / 32768. There is room for a multiple of eight, and zeros behind the scales.
    """
    ones, zero = ones_i8x32(), zero_sums()
    for i in range(0, blocks // 8 * 8, 8):
        store_f32x8(scales + 4 * i, load_scales(row + 34 * i, 34))
        at = row + 34 * i + 2
        a = sum_pair(zero, ones, at)
        b = sum_pair(zero, ones, at + 34)
        c = sum_pair(zero, ones, at + 68)
        d = sum_pair(zero, ones, at + 102)
        store_i32x8(starts + 4 * i, times_minus_64(sum_blocks(a, b, c, d)))
    for i in range(blocks // 8 * 8, blocks):
        at = row + 34 * i
        store_f32(scales + 4 * i, load_f16(at))
        low, high = np.int32(sum_i8x16(load_i8x16(at + 2))), np.int32(sum_i8x16(load_i8x16(at + 18)))
        store_i32(starts + 4 * i, np.int32(-64) * (low + high))
    most = load_f32x8(scales)
    for i in range(8, blocks, 8):
        most = larger(load_f32x8(scales + 4 * i), most)
    largest_scale = largest(most)
    inverse = splat_f32(np.float32(0))
    if largest_scale > 0:
        inverse = splat_f32(np.float32(32767) / largest_scale)
    for i in range(0, blocks, 8):
        store_as_i16(factors + 2 * i, mul(load_f32x8(scales + 4 * i), inverse))
    return largest_scale


@inline
def sum_pair(zero, ones, at):
    """Parts of the sums of two blocks of Q8_0, four blocks apart."""
    low = dot_u6(zero, ones, load_pair(at, at + 136))
    return dot_u6(low, ones, load_pair(at + 16, at + 152))


@inline
def _tile_rows(rows, scales, starts, first, second, blocks, panel, panel_scales, scores):
    """Scores of rows of the cache with 16 heads; the panel's second half meets the `second` rows.

    Parameters
    ----------
    rows : int64 array
        Addresses of Q8_0 rows.
    scales, starts : arrays (rows, blocks)
        From `prepare_row`.
    first, second : tuples of 3 int
        Rows; the same ones where the panel's halves are heads 0 to 7 and 8 to 15, others where each has 16 heads.
    blocks : int
    panel, panel_scales, scores : int
        Addresses: codes of the queries, float32 (blocks, HEADS), float32 (rows, HEADS).
    """
    p, d = panel, panel_scales
    # Of two halves with the same heads there is one only.
    half = 0 if TOKENS_A_LANE == 2 else 1
    q, e = panel + half * 32 * LANES * blocks, panel_scales + half * 4 * LANES
    (a, b, c), (f, g, h) = first, second
    xa, xb, xc, ya, yb, yc = rows[a] + 2, rows[b] + 2, rows[c] + 2, rows[f] + 2, rows[g] + 2, rows[h] + 2
    sa, sb, sc = address(scales[a]), address(scales[b]), address(scales[c])
    sf, sg, sh = address(scales[f]), address(scales[g]), address(scales[h])
    to_starts = address(starts) - address(scales)
    fa = splat_f32xL(np.float32(0))
    ga, fb, gb, fc, gc = fa, fa, fa, fa, fa
    for _ in range(blocks):
        ia, ja = broadcast_i32xL(sa + to_starts), broadcast_i32xL(sf + to_starts)
        ib, jb = broadcast_i32xL(sb + to_starts), broadcast_i32xL(sg + to_starts)
        ic, jc = broadcast_i32xL(sc + to_starts), broadcast_i32xL(sh + to_starts)
        sums = _sixteen_rows((ia, ja, ib, jb, ic, jc), p, q, xa, xb, xc, ya, yb, yc)
        p, q = p + 16 * LANES, q + 16 * LANES
        sums = _sixteen_rows(sums, p, q, xa + 16, xb + 16, xc + 16, ya + 16, yb + 16, yc + 16)
        p, q = p + 16 * LANES, q + 16 * LANES
        ia, ja, ib, jb, ic, jc = sums
        du, dv = load_f32xL(d), load_f32xL(e)
        fa, ga = scaled(ia, du, sa, fa), scaled(ja, dv, sf, ga)
        fb, gb = scaled(ib, du, sb, fb), scaled(jb, dv, sg, gb)
        fc, gc = scaled(ic, du, sc, fc), scaled(jc, dv, sh, gc)
        d, e = d + 4 * HEADS, e + 4 * HEADS
        sa, sb, sc, sf, sg, sh = sa + 4, sb + 4, sc + 4, sf + 4, sg + 4, sh + 4
        xa, xb, xc, ya, yb, yc = xa + 34, xb + 34, xc + 34, ya + 34, yb + 34, yc + 34
    right = half * 4 * LANES
    store_f32xL(scores + 64 * a, fa)
    store_f32xL(scores + 64 * f + right, ga)
    store_f32xL(scores + 64 * b, fb)
    store_f32xL(scores + 64 * g + right, gb)
    store_f32xL(scores + 64 * c, fc)
    store_f32xL(scores + 64 * h + right, gc)


@inline
def scaled(products, panel_scale, scale, acc):
    """``acc + products * panel_scale * scale``, the last one at an address."""
    return fma(finish8(products), mul(panel_scale, broadcast_f32xL(scale)), acc)


@unrolled
def _sixteen_rows(sums, p, q, xa, xb, xc, ya, yb, yc):
    sums = _four_rows(sums, p, q, xa, xb, xc, ya, yb, yc)
    p, q = p + 4 * LANES, q + 4 * LANES
    sums = _four_rows(sums, p, q, xa + 4, xb + 4, xc + 4, ya + 4, yb + 4, yc + 4)
    p, q = p + 4 * LANES, q + 4 * LANES
    sums = _four_rows(sums, p, q, xa + 8, xb + 8, xc + 8, ya + 8, yb + 8, yc + 8)
    p, q = p + 4 * LANES, q + 4 * LANES
    return _four_rows(sums, p, q, xa + 12, xb + 12, xc + 12, ya + 12, yb + 12, yc + 12)


@unrolled
def _four_rows(sums, p, q, xa, xb, xc, ya, yb, yc):
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(q)
    # Side by side, so that LLVM loads the codes once where both halves meet the same row.
    x, y = broadcast_i8xL(xa), broadcast_i8xL(ya)
    ia, ja = dot_u7L(ia, u, x), dot_u7L(ja, v, y)
    x, y = broadcast_i8xL(xb), broadcast_i8xL(yb)
    ib, jb = dot_u7L(ib, u, x), dot_u7L(jb, v, y)
    x, y = broadcast_i8xL(xc), broadcast_i8xL(yc)
    return ia, ja, ib, jb, dot_u7L(ic, u, x), dot_u7L(jc, v, y)


@inline
def quantise_heads(weights, token_scales, codes, scales):
    """`quantise_weights` for 16 heads side by side: weights (32, 16), codes 4 tokens a word (8, 16), scales (16,)."""
    for half in range(0, 64, 32):
        zero = splat_f32(np.float32(0))
        most, fault = zero, zero
        for s in range(32):
            x = mul(load_f32x8(weights + 64 * s + half), broadcast_f32x8(token_scales + 4 * s))
            store_f32x8(weights + 64 * s + half, x)
            most, fault = larger(x, most), fma(x, zero, fault)
        store_f32x8(scales + half, mul(add(most, fault), splat_f32(np.float32(1 / 127))))
        factor = where_positive(most, div(splat_f32(np.float32(127)), most))
        for s in range(0, 32, 4):
            at = weights + 64 * s + half
            a, b = mul(load_f32x8(at), factor), mul(load_f32x8(at + 64), factor)
            c, d = mul(load_f32x8(at + 128), factor), mul(load_f32x8(at + 192), factor)
            store_packed_x8(codes + 16 * s + half, round_even(a), round_even(b), round_even(c), round_even(d))


@inline
def quantise_weights(weights, token_scales, codes, scale):
    """Thirty-two softmax weights times their tokens' scales as codes from 0 to 127, and their scale; all are
    addresses."""
    a = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    weights, token_scales = weights + 32, token_scales + 32
    b = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    weights, token_scales = weights + 32, token_scales + 32
    c = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    weights, token_scales = weights + 32, token_scales + 32
    d = where_positive(load_f32x8(weights), mul(load_f32x8(weights), load_f32x8(token_scales)))
    most = largest(larger(larger(a, b), larger(c, d)))
    inverse = np.float32(0)
    if most > 0:
        inverse = np.float32(127) / most
    factor = splat_f32(inverse)
    store_as_i8(codes, round_even(mul(a, factor)))
    store_as_i8(codes + 8, round_even(mul(b, factor)))
    store_as_i8(codes + 16, round_even(mul(c, factor)))
    store_as_i8(codes + 24, round_even(mul(d, factor)))
    store_f32(scale, (most + not_finite(a, b, c, d)) / np.float32(127))


@inline
def _tile_keys(xa, xb, xc, sa, sb, sc, za, zb, zc, blocks, p, q, d, e, at, bt, ct):
    """Scores of `ROWS` tokens with three queries.

    Parameters
    ----------
    xa, xb, xc, sa, sb, sc, za, zb, zc : int
        Addresses of each query's codes, scales and sums of sixteen codes.
    blocks : int
        Of 32 dimensions.
    p, q, d, e : int
        Addresses of the panels of two groups of `LANES` tokens, and of their scales.
    at, bt, ct : int
        Addresses of each query's scores.
    """
    fa = splat_f32xL(np.float32(0))
    ga, fb, gb, fc, gc = fa, fa, fa, fa, fa
    for _ in range(blocks):
        ia, ib, ic = start7(za), start7(zb), start7(zc)
        sums = _sixteen_keys((ia, ia, ib, ib, ic, ic), p, q, xa, xb, xc)
        p, q, xa, xb, xc = p + 16 * LANES, q + 16 * LANES, xa + 16, xb + 16, xc + 16
        ia, ja, ib, jb, ic, jc = _sixteen_keys(sums, p, q, xa, xb, xc)
        p, q, xa, xb, xc = p + 16 * LANES, q + 16 * LANES, xa + 16, xb + 16, xc + 16
        du, dv = load_f32xL(d), load_f32xL(e)
        s = broadcast_f32xL(sa)
        fa, ga = fma(finish8(ia), mul(du, s), fa), fma(finish8(ja), mul(dv, s), ga)
        s = broadcast_f32xL(sb)
        fb, gb = fma(finish8(ib), mul(du, s), fb), fma(finish8(jb), mul(dv, s), gb)
        s = broadcast_f32xL(sc)
        fc, gc = fma(finish8(ic), mul(du, s), fc), fma(finish8(jc), mul(dv, s), gc)
        d, e = d + 4 * LANES, e + 4 * LANES
        sa, sb, sc = sa + 4, sb + 4, sc + 4
        za, zb, zc = za + 4, zb + 4, zc + 4
    store_f32xL(at, fa)
    store_f32xL(at + 4 * LANES, ga)
    store_f32xL(bt, fb)
    store_f32xL(bt + 4 * LANES, gb)
    store_f32xL(ct, fc)
    store_f32xL(ct + 4 * LANES, gc)


@unrolled
def _sixteen_keys(sums, p, q, xa, xb, xc):
    sums = _four_keys(sums, p, q, xa, xb, xc)
    sums = _four_keys(sums, p + 4 * LANES, q + 4 * LANES, xa + 4, xb + 4, xc + 4)
    sums = _four_keys(sums, p + 8 * LANES, q + 8 * LANES, xa + 8, xb + 8, xc + 8)
    return _four_keys(sums, p + 12 * LANES, q + 12 * LANES, xa + 12, xb + 12, xc + 12)


@unrolled
def _four_keys(sums, p, q, xa, xb, xc):
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(q)
    y = broadcast_i8xL(xa)
    ia, ja = dot_u7L(ia, u, y), dot_u7L(ja, v, y)
    y = broadcast_i8xL(xb)
    ib, jb = dot_u7L(ib, u, y), dot_u7L(jb, v, y)
    y = broadcast_i8xL(xc)
    return ia, ja, ib, jb, dot_u7L(ic, u, y), dot_u7L(jc, v, y)


@inline
def _tile_values(xa, xb, xc, x_step, sa, sb, sc, s_step, blocks, p, stride, at, bt, ct):
    """Add `ROWS` dimensions of the values, weighted, to the results of three queries.

    Parameters
    ----------
    xa, xb, xc, sa, sb, sc : int
        Addresses of each query's codes and scales.
    x_step, s_step : int
        Bytes from four codes to the next four, and from a scale to the next.
    blocks : int
        Of 32 tokens.
    p, stride : int
        Address of the panels of two groups of `LANES` dimensions, and bytes from block to block.
    at, bt, ct : int
        Addresses of each query's results.
    """
    fa, ga = load_f32xL(at), load_f32xL(at + 4 * LANES)
    fb, gb = load_f32xL(bt), load_f32xL(bt + 4 * LANES)
    fc, gc = load_f32xL(ct), load_f32xL(ct + 4 * LANES)
    zero = zero8()
    for _ in range(blocks):
        sums = _sixteen_values((zero, zero, zero, zero, zero, zero), p, xa, xb, xc, x_step)
        xa, xb, xc = xa + 4 * x_step, xb + 4 * x_step, xc + 4 * x_step
        ia, ja, ib, jb, ic, jc = _sixteen_values(sums, p + 16 * LANES, xa, xb, xc, x_step)
        xa, xb, xc = xa + 4 * x_step, xb + 4 * x_step, xc + 4 * x_step
        p += stride
        s = broadcast_f32xL(sa)
        fa, ga = fma(finish8(ia), s, fa), fma(finish8(ja), s, ga)
        s = broadcast_f32xL(sb)
        fb, gb = fma(finish8(ib), s, fb), fma(finish8(jb), s, gb)
        s = broadcast_f32xL(sc)
        fc, gc = fma(finish8(ic), s, fc), fma(finish8(jc), s, gc)
        sa, sb, sc = sa + s_step, sb + s_step, sc + s_step
    store_f32xL(at, fa)
    store_f32xL(at + 4 * LANES, ga)
    store_f32xL(bt, fb)
    store_f32xL(bt + 4 * LANES, gb)
    store_f32xL(ct, fc)
    store_f32xL(ct + 4 * LANES, gc)


@unrolled
def _sixteen_values(sums, p, xa, xb, xc, step):
    sums = _four_values(sums, p, xa, xb, xc)
    xa, xb, xc = xa + step, xb + step, xc + step
    sums = _four_values(sums, p + 4 * LANES, xa, xb, xc)
    xa, xb, xc = xa + step, xb + step, xc + step
    sums = _four_values(sums, p + 8 * LANES, xa, xb, xc)
    return _four_values(sums, p + 12 * LANES, xa + step, xb + step, xc + step)


@unrolled
def _four_values(sums, p, xa, xb, xc):
    ia, ja, ib, jb, ic, jc = sums
    u, v = load_i8xL(p), load_i8xL(p + 32 * LANES)
    y = broadcast_i8xL(xa)
    ia, ja = dot_u7L(ia, y, u), dot_u7L(ja, y, v)
    y = broadcast_i8xL(xb)
    ib, jb = dot_u7L(ib, y, u), dot_u7L(jb, y, v)
    y = broadcast_i8xL(xc)
    return ia, ja, ib, jb, dot_u7L(ic, y, u), dot_u7L(jc, y, v)
