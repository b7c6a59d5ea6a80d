"""Attention on integers, for a cache of 8 bits.

In the expanded form, keys and values become panels (`pymla.cpu.attention_tiles`) as they are expanded. The lanes of
keys are tokens, and their head dimensions run along K; the lanes of values are head dimensions, and tokens run along
K. Keys have a scale for `KEY_BLOCK` dimensions, values a scale for each token, which goes into the softmax weights.
Those are quantised per 64 tokens. So no number depends on a token that its query does not see.

In the absorbed form the codes of the cache are multiplied where they lie (`pymla.cpu.cache_rows`). Queries are panels,
whose lanes are heads, and meet the codes of one row of the cache after the other. For the values, four rows at a time
become panels whose lanes are dimensions; the scales of a row's blocks go into its codes, relative to the largest, and
that into the softmax weights. The rotated dimensions are multiplied as int16.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cache import PAGE
from pymla.cpu import threads
from pymla.cpu.attention_amx import SCORE_LINES, VALUE_LINES, add_values, load_weights, sixteen_scores
from pymla.cpu.attention_tiles import (
    BLOCK_BYTES,
    PANEL_BYTES,
    WEIGHTS,
    four,
    quantise_codes,
    quantise_heads,
    quantise_weights,
    three,
    tile_rope,
    tile_scores,
    tile_values,
)
from pymla.cpu.cache_rows import even, quantise_i16
from pymla.cpu.formats import F16, F32, is_float, load_f8, store_columns
from pymla.cpu.isa import AMX, LANES
from pymla.cpu.jit import inline, kernel
from pymla.cpu.memory import allocate, allocate_f32, empty
from pymla.cpu.panels import FLOAT_SCRATCH, ROWS, SCRATCH, product_float
from pymla.cpu.panels_amx import MARGIN
from pymla.cpu.quant import A3, CACHE, F2, F3, I1, INPUT, MATRICES, STEP, Activation, Matrices, counting, product_rows
from pymla.cpu.simd import (
    absolute,
    address,
    farther,
    farthest,
    larger,
    largest,
    load_columns,
    load_f16,
    load_f32,
    load_f32x8,
    load_f32xL,
    mul,
    panel_rows,
    prefetch_l2,
    round_even,
    splat_f32,
    splat_f32xL,
    store_as_i16,
    store_f32,
    store_f32x8,
    store_i32,
)
from pymla.cpu.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.simd_amx import configure, release
from pymla.cpu.simd_words import BIAS, WORD, store_rescaled, store_words, widen
from pymla.cpu.softmax import LOG2E, heads_softmax, token_softmax

#: Keys that a block of queries meets at a time.
TOKENS = 128
#: Dimensions of an expanded key with a common scale: with 32, a fifth of the scores' instructions were for scales.
KEY_BLOCK = 64
#: Most tokens that are expanded at a time, a multiple of `TOKENS`: the more, the less often weights are unpacked.
EXPANDED = 512
#: Heads that share the reading of a page in the absorbed form.
HEADS = 16
#: Most queries of a head that share the reading of keys and values.
QUERIES = 192

#: Bytes of a block of a key's codes.
_KEY_BYTES = KEY_BLOCK // 32 * BLOCK_BYTES


class Panels(NamedTuple):
    """Expanded keys and values of some heads; tokens are padded to a multiple of `TOKENS`."""

    keys: np.ndarray  # uint8 (H, tokens // LANES, D // 32 * PANEL_BYTES): D is a multiple of `KEY_BLOCK`
    key_scales: np.ndarray  # float32 (H, tokens // LANES, D // KEY_BLOCK * LANES)
    key_starts: np.ndarray  # int32, likewise: minus `BIAS` times the sums of the codes of a block
    values: np.ndarray  # uint8 (H, tokens // 32, v * BLOCK_BYTES): v is a multiple of ROWS
    value_scales: np.ndarray  # float32 (H, tokens)

    @classmethod
    def empty(cls, tokens, heads, size, v):
        """For so many tokens and heads, keys of `size` and values of `v` numbers."""
        tokens, v, blocks = -(-tokens // TOKENS) * TOKENS, -(-v // ROWS) * ROWS, -(-size // KEY_BLOCK)
        return cls(
            empty((heads, tokens // LANES, blocks * KEY_BLOCK // 32 * PANEL_BYTES), np.uint8),
            empty((heads, tokens // LANES, blocks * LANES), np.float32),
            empty((heads, tokens // LANES, blocks * LANES), np.int32),
            empty((heads, tokens // 32, v * BLOCK_BYTES), np.uint8),
            empty((heads, tokens), np.float32),
        )


BYTES3 = types.Array(types.uint8, 3, "C")
I3 = types.Array(types.int32, 3, "C")
PANELS = types.NamedTuple((BYTES3, F3, I3, BYTES3, F2), Panels)


def expand(c_kv, k_pe, k_b, v_b, out):
    """Keys and values of some heads from latent rows, as `Panels`; otherwise as `attention.expand`."""
    x, tokens, heads = Activation(c_kv), len(c_kv), len(k_b.data)
    # Two items for each thread, where there are so many.
    share = tokens * heads // (2 * threads.thread_count())
    size = min(max(share // TOKENS, 1) * TOKENS, EXPANDED)
    # The two matrices may have different types: k_b is derived where the file has it transposed.
    inputs = x.panels(k_b.qtype), x.panels(v_b.qtype)
    matrices = Matrices.of(k_b), Matrices.of(v_b)
    _expand[heads * -(-tokens // size), 1](*matrices, *inputs, counting(tokens), k_pe, size, out)


def expanded(q, keys_values, positions, scale, out):
    """Causal attention of one sequence over `Panels`; `q` float32 (T, H, D), `out` (T, H, v) with any strides."""
    tokens, heads, _ = q.shape
    size = QUERIES
    # Four items for each thread, where there are so many.
    if heads * -(-tokens // size) < 4 * threads.thread_count():
        size = QUERIES // 2
    _expanded[heads * -(-tokens // size), 1](q, keys_values, positions, scale * LOG2E, size, out)
    return out


@kernel(MATRICES, MATRICES, INPUT, INPUT, I1, F2, types.int64, PANELS)
def _expand(first, last, k_b, v_b, x, y, index, k_pe, size, out):
    """Over blocks of `size` tokens of each head."""
    tokens = len(k_pe)
    groups = (tokens + size - 1) // size
    blocks, v = out.key_scales.shape[2] // LANES, out.values.shape[2] // BLOCK_BYTES
    scratch = allocate(max(SCRATCH, FLOAT_SCRATCH))
    result = allocate_f32(size + MARGIN, ROWS)
    keys = np.zeros((size, KEY_BLOCK * blocks), np.float32)
    values = np.zeros((size, v), np.float32)
    codes = np.empty((size, blocks * _KEY_BYTES), np.uint8)
    for item in range(first, last):
        h, begin = item // groups, item % groups * size
        count = min(size, tokens - begin)
        padded = (count + TOKENS - 1) // TOKENS * TOKENS
        multiply_head(k_b, h, x, index, begin, count, scratch, result, keys)
        multiply_head(v_b, h, y, index, begin, count, scratch, result, values)
        for t in range(count):
            for i in range(k_pe.shape[1]):
                keys[t, k_b.rows + i] = k_pe[begin + t, i]
        # Tokens that are missing are zeros.
        keys[count:padded], values[count:padded] = 0, 0
        for t in range(padded):
            scales = address(out.key_scales[h, (begin + t) // LANES, t % LANES :])
            starts = address(out.key_starts[h, (begin + t) // LANES, t % LANES :])
            for i in range(blocks):
                x_at, at = address(keys[t]) + 4 * KEY_BLOCK * i, address(codes[t]) + _KEY_BYTES * i
                sums = quantise_codes(x_at, KEY_BLOCK, at, scales + 4 * LANES * i, 0)
                store_i32(starts + 4 * LANES * i, np.int32(-BIAS * sums))
        for t in range(0, padded, LANES):
            store_keys(address(codes[t]), codes.shape[1], address(out.keys[h, (begin + t) // LANES]))
        for t in range(0, padded, 32):
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
        product_rows(
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
            (address(out[0, r:]) - 4 * out.shape[1] * begin, 4 * out.shape[1], rows),
        )


@inline
def store_keys(rows, row_bytes, out):
    """Rows of codes to the lanes of a panel; addresses."""
    for i in range(0, row_bytes, 16):
        store_columns(out + i * LANES, load_columns(panel_rows(rows, row_bytes, LANES), i))


@inline
def store_values(rows, panels, scales):
    """Thirty-two tokens' values, float32 (32, v), as panels of `LANES` dimensions, and a scale for each token."""
    v = rows.shape[1]
    inverse = np.empty(32, np.float32)
    for t in range(32):
        most = splat_f32xL(np.float32(0))
        for i in range(0, v, LANES):
            most = farther(absolute(load_f32xL(address(rows[t]) + 4 * i)), most)
        most_of_all = farthest(most)
        inverse[t] = 0
        if most_of_all > 0:
            inverse[t] = np.float32(127) / most_of_all
        scales[t] = most_of_all / np.float32(127)
    out = address(panels)
    for i in range(0, v, LANES):
        for t in range(0, 32, 4):
            a, b = scaled_row(rows, inverse, t, i), scaled_row(rows, inverse, t + 1, i)
            c, d = scaled_row(rows, inverse, t + 2, i), scaled_row(rows, inverse, t + 3, i)
            store_words(out + 4 * LANES * (t // WORD), 4 * LANES, a, b, c, d)
        out += PANEL_BYTES


@inline
def scaled_row(rows, factors, t, i):
    """Codes of `LANES` values of a row."""
    return round_even(mul(load_f32xL(address(rows[t]) + 4 * i), splat_f32xL(factors[t])))


@kernel(F3, PANELS, I1, types.float64, types.int64, A3)
def _expanded(first, last, q, panels, positions, scale, size, out):
    """Over blocks of `size` queries of each head. Late blocks have more to read: they are dealt out first."""
    tokens, heads, v = out.shape
    blocks, padded_v = panels.key_scales.shape[2] // LANES, panels.values.shape[2] // BLOCK_BYTES
    groups = (tokens + size - 1) // size
    query = np.zeros(KEY_BLOCK * blocks, np.float32)
    codes = np.empty((size, blocks * _KEY_BYTES), np.uint8)
    scales = np.empty((size, blocks), np.float32)
    scores = allocate_f32(size, TOKENS)
    weights = np.empty((size, TOKENS // 32 * BLOCK_BYTES), np.uint8)
    weight_scales = np.empty((size, TOKENS // WEIGHTS), np.float32)
    state = np.empty((size, 2), np.float32)
    result = allocate_f32(size, padded_v)
    for item in range(first, last):
        begin, h = (groups - 1 - item // heads) * size, item % heads
        count = min(size, tokens - begin)
        for i in range(count):
            for j in range(q.shape[2]):
                query[j] = q[begin + i, h, j] * np.float32(scale)
            for j in range(blocks):
                at = address(codes[i]) + _KEY_BYTES * j
                quantise_codes(address(query) + 4 * KEY_BLOCK * j, KEY_BLOCK, at, address(scales[i, j:]), BIAS)
        state[:, 0] = -np.inf
        state[:, 1] = 0
        result[:] = 0
        length = positions[begin + count - 1] + 1
        for block in range(0, length, TOKENS):
            seen = min(TOKENS, length - block)
            for s in range(0, seen, ROWS):
                panel = (block + s) // LANES
                p, p_next = address(panels.keys[h, panel]), address(panels.keys[h, panel + 1])
                d, d_next = address(panels.key_scales[h, panel]), address(panels.key_scales[h, panel + 1])
                z, z_next = address(panels.key_starts[h, panel]), address(panels.key_starts[h, panel + 1])
                for i in range(0, count, 3):
                    # A tile at the edge repeats the last query.
                    a, b, c = i, min(i + 1, count - 1), min(i + 2, count - 1)
                    x, sx = three(codes, a, b, c), three(scales, a, b, c)
                    at, bt = three(scores[:, s:], a, b, c), three(scores[:, s + LANES :], a, b, c)
                    tile_scores(x, x, sx, sx, blocks, KEY_BLOCK, p, p_next, d, d_next, z, z_next, 4 * LANES, at, bt)
            for i in range(count):
                visible, token_scales = positions[begin + i] + 1 - block, address(panels.value_scales[h, block:])
                at, target = address(scores[i]), address(result[i])
                token_softmax(at, TOKENS, visible, token_scales, state[i], target, padded_v)
                for s in range(TOKENS // WEIGHTS):
                    target = address(weights[i]) + WEIGHTS // 32 * BLOCK_BYTES * s
                    quantise_weights(at + 4 * WEIGHTS * s, target, address(weight_scales[i, s:]))
            for s in range(0, seen, WEIGHTS):
                depth = min(WEIGHTS, seen - s + 31) // 32
                for j in range(0, padded_v, ROWS):
                    p = address(panels.values[h, (block + s) // 32]) + BLOCK_BYTES * j
                    for i in range(0, count, 4):
                        a, b, c, d = i, min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
                        x = four(weights[:, s // 32 * BLOCK_BYTES :], a, b, c, d)
                        sx, at = four(weight_scales[:, s // WEIGHTS :], a, b, c, d), four(result[:, j:], a, b, c, d)
                        tile_values(x, 4, sx, depth, p, BLOCK_BYTES * padded_v, at)
        for i in range(count):
            for j in range(v):
                out[begin + i, h, j] = result[i, j] / state[i, 1]


@kernel(F3, CACHE, CACHE, STEP, types.float64, types.int64, types.int64, F3, F3)
def absorbed_pages(first, last, q, latent, rope, step, scale, rank, splits, partial, sums):
    """Unnormalised values (T * splits, H, rank), both padded, and maximum and sum (T * splits, H, 2), of each share of
    the pages.

    An item is a token, a group of heads and a share. All its memory is small, or written and read just once: between
    two layers weights drive it from the caches.
    """
    heads, size, padded = q.shape[1], q.shape[2], partial.shape[2]
    blocks = rank // 32
    rotated = size - rank
    words = even(rotated) // 2
    groups = (heads + HEADS - 1) // HEADS
    row_bytes, rope_bytes = blocks * BLOCK_BYTES, 4 * words
    query = np.empty(size, np.float32)
    query_codes = np.empty((HEADS, row_bytes), np.uint8)
    panel = allocate(HEADS * row_bytes)
    panel_scales = allocate_f32(blocks, HEADS)
    panel_starts = allocate(4 * blocks * HEADS).view(np.int32).reshape(blocks, HEADS)
    rope_codes = np.empty(2 * words, np.int16)
    rope_panel, rope_panel_scales = allocate(rope_bytes * HEADS), allocate_f32(1, HEADS)
    wide_codes = allocate(PAGE * row_bytes)
    scales = np.zeros((PAGE, (blocks + 7) // 8 * 8), np.float32)
    factors = np.empty(scales.shape, np.int16)
    largest_scale = np.empty(PAGE, np.float32)
    values_panel = allocate(PAGE // 32 * padded * BLOCK_BYTES).reshape(PAGE // 32, -1)
    if padded > rank:
        values_panel[:] = 0
    scores = allocate_f32(PAGE, HEADS)
    weights = np.empty((PAGE // WORD, HEADS), np.int32)
    weight_scales = np.empty(HEADS, np.float32)
    state = np.empty((2, HEADS), np.float32)
    # Cache lines of a page: as many as bytes of its rows.
    lines = latent.data.shape[1] + rope.data.shape[1]
    in_scores, tiles = lines // 3, padded // ROWS * (HEADS // 4)
    before_rope, in_rope = (latent.data.shape[1], rope.data.shape[1]) if AMX else (0, in_scores)
    if AMX:
        configure()
    tiles_memory, scale_bytes = allocate(TILE_SCRATCH), 4 * scales.shape[1]
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
        table = step.block_tables[step.seq_of[t]]
        ask(latent, rope, table[from_page], 0, lines)
        query[:] = 0
        for h in range(HEADS):
            if h < count:
                for i in range(size):
                    query[i] = q[t, begin + h, i] * np.float32(scale)
            for i in range(blocks):
                at = address(query_codes[h]) + BLOCK_BYTES * i
                total_codes = quantise_codes(address(query) + 128 * i, 32, at, address(panel_scales[i, h:]), 0)
                panel_starts[i, h] = np.int32(-BIAS * total_codes)
            rope_panel_scales[0, h] = quantise_i16(F32, address(query[rank:]), rotated, address(rope_codes))
            for i in range(words):
                at = address(rope_panel) + 4 * (h // LANES * words * LANES + i * LANES + h % LANES)
                store_f32(at, load_f32(address(rope_codes) + 4 * i))
        for h in range(0, HEADS, LANES):
            store_keys(address(query_codes[h]), row_bytes, address(panel) + h * row_bytes)
        values = partial[task, begin:]
        values[:HEADS] = 0
        state[0], state[1] = -np.inf, 0
        for page in range(from_page, to_page):
            seen = min(PAGE, length - page * PAGE)
            rows = address(latent.data[table[page] * PAGE])
            rope_rows = address(rope.data[table[page] * PAGE])
            rope_scales = rope_rows + PAGE * rope_bytes
            for s in range(seen):
                at = rows + PAGE * rank + 2 * blocks * s
                largest_scale[s] = prepare_scales(at, blocks, address(scales[s]), address(factors[s]))
            largest_scale[seen:], factors[seen:] = 0, 0
            # Codes are words as they lie, or become so.
            codes = rows
            if row_bytes != rank:
                codes = address(wide_codes)
                for i in range(seen * blocks):
                    widen(codes + BLOCK_BYTES * i, rows + 32 * i)
            # Memory works on the next page meanwhile, and is asked a little at a time: it takes no more.
            following = table[min(page + 1, to_page - 1)]
            # The panel's halves are heads 0 to 7 and 8 to 15, and meet the same rows; or they are one, and meet others.
            half = 0 if LANES == HEADS else 1
            p, d, z = address(panel), address(panel_scales), address(panel_starts)
            p_next, d_next, z_next = p + half * LANES * row_bytes, d + half * 4 * LANES, z + half * 4 * LANES
            r, f = address(rope_panel), address(rope_panel_scales)
            r_next, f_next = r + half * LANES * rope_bytes, f + half * 4 * LANES
            if AMX:
                ahead, scratch = address(latent.data[following * PAGE]), address(tiles_memory)
                for s in range(0, seen, 16):
                    at, sx = address(scores[s:]), address(scales[s:])
                    x = codes + row_bytes * s
                    sixteen_scores(x, row_bytes, sx, scale_bytes, blocks, p, d, z, scratch, at, ahead)
                    ahead += 64 * SCORE_LINES * blocks
            for s in range(0, seen, 3 * LANES // 8):
                end, other = seen - 1, s + 3 * (1 - half)
                abc = min(s, end), min(s + 1, end), min(s + 2, end)
                egh = min(other, end), min(other + 1, end), min(other + 2, end)
                x, y = multiples(codes, row_bytes, abc), multiples(codes, row_bytes, egh)
                sx, sy = multiples(address(scales), scale_bytes, abc), multiples(address(scales), scale_bytes, egh)
                at, bt = multiples(address(scores), 4 * HEADS, abc), multiples(address(scores), 4 * HEADS, egh)
                bt = bt[0] + half * 4 * LANES, bt[1] + half * 4 * LANES, bt[2] + half * 4 * LANES
                if not AMX:
                    tile_scores(x, y, sx, sy, blocks, 32, p, p_next, d, d_next, z, z_next, 4 * HEADS, at, bt)
                x, y = multiples(rope_rows, rope_bytes, abc), multiples(rope_rows, rope_bytes, egh)
                sx, sy = multiples(rope_scales, 4, abc), multiples(rope_scales, 4, egh)
                tile_rope(x, y, sx, sy, words, r, r_next, f, f_next, at, bt)
                since = before_rope + in_rope * s // PAGE
                ask(latent, rope, following, since, before_rope + in_rope * min(s + 3 * LANES // 8, PAGE) // PAGE)
            heads_softmax(address(scores), seen, address(state), address(values), padded)
            scores[seen:] = 0
            quantise_heads(address(scores), address(largest_scale), address(weights), address(weight_scales), HEADS)
            w, ws, at = address(weights), address(weight_scales), address(values)
            if AMX:
                scratch, factor_bytes = address(tiles_memory), 2 * factors.shape[1]
                load_weights(w, scratch)
                for i in range(blocks):
                    f = address(factors) + 2 * i
                    add_values(rows + 32 * i, rank, f, factor_bytes, ws, scratch, at + 128 * i, 4 * padded, ahead)
                    ahead += 64 * VALUE_LINES
                continue
            depth, tile = (seen + 31) // 32, 0
            for s in range(depth):
                panel_values(rows + 32 * s * rank, rank, factors[32 * s :], address(values_panel[s]))
            for j in range(0, padded, ROWS):
                p = address(values_panel) + BLOCK_BYTES * j
                for h in range(0, HEADS, 4):
                    x = w + 4 * h, w + 4 * h + 4, w + 4 * h + 8, w + 4 * h + 12
                    sx = ws + 4 * h, ws + 4 * h + 4, ws + 4 * h + 8, ws + 4 * h + 12
                    at = four(values[:, j:], h, h + 1, h + 2, h + 3)
                    tile_values(x, 4 * HEADS, sx, depth, p, BLOCK_BYTES * padded, at)
                    since, tile = in_scores + (lines - in_scores) * tile // tiles, tile + 1
                    ask(latent, rope, following, since, in_scores + (lines - in_scores) * tile // tiles)
        for h in range(count):
            sums[task, begin + h, 0], sums[task, begin + h, 1] = state[0, h], state[1, h]
    if AMX:
        release()


@inline
def ask(latent, rope, page, since, until):
    """Ask memory for some of a page's cache lines: those of the latent rows, then those of the rotated dimensions."""
    count = latent.data.shape[1]
    at, other = address(latent.data[page * PAGE]), address(rope.data[page * PAGE])
    for i in range(since, min(until, count)):
        prefetch_l2(at + 64 * i)
    for i in range(max(since, count), until):
        prefetch_l2(other + 64 * (i - count))


@inline
def multiples(base, step, numbers):
    """Addresses of three rows that lie `step` bytes apart."""
    a, b, c = numbers
    return base + a * step, base + b * step, base + c * step


@inline
def prepare_scales(at, blocks, scales, factors):
    """The scales of a row's blocks, IEEE halves at an address, as float32, and relative to the largest as int16 /
    32768, to two others; returns the largest. There is room for a multiple of eight, and zeros behind the scales."""
    whole = blocks // 8 * 8
    for i in range(0, whole, 8):
        store_f32x8(scales + 4 * i, load_f8(F16, at + 2 * i))
    for i in range(whole, blocks):
        store_f32(scales + 4 * i, load_f16(at + 2 * i))
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
def panel_values(rows, rank, factors, panel):
    """Thirty-two rows of codes, `rank` bytes each, times the `factors` of `prepare_scales` as panels of `LANES`
    dimensions; `rows` and `panel` are addresses. Rows behind the last token have factors of 0, whatever their codes."""
    stride = 2 * factors.shape[1]
    for i in range(rank // 32):
        for t in range(0, 32, 4):
            at = rows + 32 * i + t * rank
            target = panel + BLOCK_BYTES * 32 * i + 4 * LANES * (t // WORD)
            store_rescaled(target, at, at + rank, at + 2 * rank, at + 3 * rank, address(factors[t, i:]), stride)
