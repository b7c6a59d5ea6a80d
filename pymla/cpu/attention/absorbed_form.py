"""The absorbed form of attention on integers, for a latent cache of 8 bits.

The codes of the cache are multiplied where they lie (`pymla.cpu.attention.cache_rows`). Queries are panels, whose lanes
are heads, and meet the codes of one row of the cache after the other. For the values, four rows at a time become panels
whose lanes are dimensions; the scales of a row's blocks go into its codes, relative to the largest, and that into the
softmax weights. The rotated dimensions are multiplied as int16. With AMX, the other products are those of
`pymla.cpu.attention.absorbed_form_amx`.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from pymla.cpu.array_types import CACHE, F3, STEP
from pymla.cpu.attention import absorbed_form_amx
from pymla.cpu.attention.cache_rows import even, quantise_i16
from pymla.cpu.attention.softmax import heads_softmax
from pymla.cpu.attention.tiles import (
    BLOCK_BYTES,
    SCORE_ROWS,
    VALUE_ROWS,
    four,
    four_from,
    moved,
    quantise_codes,
    quantise_heads,
    store_keys,
    tile_rope,
    tile_scores,
    tile_values,
)
from pymla.cpu.machine.isa import AMX, LANES
from pymla.cpu.machine.simd import (
    address,
    larger,
    largest,
    load_f16,
    load_f16x8,
    load_f32,
    load_f32x8,
    mul,
    prefetch_l2,
    splat_f32,
    store_as_i16,
    store_f32,
    store_f32x8,
)
from pymla.cpu.machine.simd_amx import SCRATCH as TILE_SCRATCH
from pymla.cpu.machine.simd_amx import configure, release
from pymla.cpu.machine.simd_words import BIAS, WORD, store_rescaled, widen
from pymla.cpu.matmul.unpacked import PAIR_ROWS as ROWS
from pymla.cpu.memory import allocate, allocate_f32
from pymla.cpu.runtime.jit import helper, kernel
from pymla.pages import PAGE

#: Heads that share the reading of a page.
HEADS = 16

#: Heads from the first panel of queries to the second; 0 where one has them all.
_SECOND = HEADS - LANES
#: Rows of the cache that a tile takes: those of `tile_scores` meet both panels, or twice as many the same one.
_TAKEN = SCORE_ROWS if _SECOND else 2 * SCORE_ROWS


class Queries(NamedTuple):
    """Queries of `HEADS` heads as panels, whose lanes are heads."""

    codes: np.ndarray  # uint8 (HEADS, bytes of a row): a panel of `LANES` heads, then the next one
    scales: np.ndarray  # float32 (blocks, HEADS)
    starts: np.ndarray  # int32, likewise: minus `BIAS` times the sums of the codes of a block
    rope: np.ndarray  # uint8 (HEADS, bytes of the words of a row), likewise
    rope_scales: np.ndarray  # float32 (1, HEADS)


class Scales(NamedTuple):
    """The scales of the rows of a page; a row has room for a multiple of eight, and zeros behind its own."""

    scales: np.ndarray  # float32 (PAGE, blocks)
    factors: np.ndarray  # int16, likewise: relative to the largest of the row, times 32768
    largest: np.ndarray  # float32 (PAGE,)


class Following(NamedTuple):
    """A page that memory is asked for while another one is worked on: a little at a time, as it takes no more."""

    rows: int  # address
    row_lines: int  # cache lines
    rope_rows: int
    rope_lines: int


@kernel(F3, CACHE, CACHE, STEP, types.float64, types.int64, types.int64, F3, F3)
def absorbed_pages(first, last, q, latent, rope, step, scale, rank, splits, partial, sums):
    """Unnormalised values (T * splits, H, rank), both padded, and maximum and sum (T * splits, H, 2), of each share of
    the pages.

    An item is a token, a group of heads and a share. All its memory is small, or written and read just once: between
    two layers weights drive it from the caches.
    """
    heads, padded = q.shape[1], partial.shape[2]
    blocks, rotated = rank // 32, q.shape[2] - rank
    queries = Queries(
        allocate(HEADS * blocks * BLOCK_BYTES).reshape(HEADS, -1),
        allocate_f32(blocks, HEADS),
        allocate(4 * blocks * HEADS).view(np.int32).reshape(blocks, HEADS),
        allocate(HEADS * 2 * even(rotated)).reshape(HEADS, -1),
        allocate_f32(1, HEADS),
    )
    room = (blocks + 7) // 8 * 8
    scales = Scales(np.zeros((PAGE, room), np.float32), np.empty((PAGE, room), np.int16), np.empty(PAGE, np.float32))
    wide_codes = allocate(PAGE * blocks * BLOCK_BYTES)
    scores = allocate_f32(PAGE, HEADS)
    weights, weight_scales = np.empty((PAGE // WORD, HEADS), np.int32), np.empty(HEADS, np.float32)
    panels = allocate(PAGE // 32 * padded * BLOCK_BYTES).reshape(PAGE // 32, -1)
    if padded > rank:
        panels[:] = 0
    tiles = allocate(TILE_SCRATCH)
    state = np.empty((2, HEADS), np.float32)
    if AMX:
        configure()
    for item in range(first, last):
        task, t, begin, count, length, from_page, to_page = take_item(item, heads, splits, step, sums)
        if from_page == to_page:
            continue
        table = step.block_tables[step.seq_of[t]]
        following = _following(latent, rope, table[from_page])
        ask(following, 0, following.row_lines + following.rope_lines)
        take_queries(q[t, begin : begin + count], scale, rank, queries)
        values = partial[task, begin : begin + HEADS]
        values[:] = 0
        state[0], state[1] = -np.inf, 0
        for page in range(from_page, to_page):
            seen = min(PAGE, length - page * PAGE)
            rows, rope_rows = address(latent.data[table[page] * PAGE]), address(rope.data[table[page] * PAGE])
            following = _following(latent, rope, table[min(page + 1, to_page - 1)])
            take_scales(rows + PAGE * rank, seen, blocks, scales)
            # Codes are words as they lie, or become so.
            codes = rows
            if WORD != 4:
                codes = address(wide_codes)
                for i in range(seen * blocks):
                    widen(codes + BLOCK_BYTES * i, rows + 32 * i)
            if AMX:
                absorbed_form_amx.page_scores(codes, seen, queries, scales, tiles, scores, following.rows)
            else:
                page_scores(codes, seen, queries, scales, scores, following)
            add_rope_scores(rope_rows, seen, queries, scores, following)
            heads_softmax(address(scores), seen, address(state), address(values), padded)
            scores[seen:] = 0
            largest_scales = address(scales.largest)
            quantise_heads(address(scores), largest_scales, address(weights), address(weight_scales), HEADS)
            if AMX:
                ahead = following.rows
                absorbed_form_amx.add_page_values(rows, rank, scales, weights, weight_scales, tiles, values, ahead)
            else:
                add_page_values(rows, rank, seen, scales, weights, weight_scales, panels, values, following)
        for h in range(count):
            sums[task, begin + h, 0], sums[task, begin + h, 1] = state[0, h], state[1, h]
    if AMX:
        release()


@helper
def take_item(item, heads, splits, step, sums):
    """What an item of the absorbed form is: its row of the results, its token, its first head and how many it has, how
    many positions the token sees, and the first page and the one behind the last. Its sums become those of no pages."""
    groups = (heads + HEADS - 1) // HEADS
    task, begin = item // groups, item % groups * HEADS
    t, split = task // splits, task % splits
    count = min(HEADS, heads - begin)
    length = step.positions[t] + 1
    pages = (length + PAGE - 1) // PAGE
    for h in range(begin, begin + count):
        sums[task, h, 0], sums[task, h, 1] = -np.inf, 0
    return task, t, begin, count, length, pages * split // splits, pages * (split + 1) // splits


@helper
def _following(latent, rope, page):
    """The lines of a page are as many as its rows have bytes."""
    rows, rope_rows = address(latent.data[page * PAGE]), address(rope.data[page * PAGE])
    return Following(rows, latent.data.shape[1], rope_rows, rope.data.shape[1])


@helper
def ask(following, since, until):
    """Ask memory for some of a page's cache lines: those of the latent rows, then those of the rotated dimensions."""
    count = following.row_lines
    for i in range(since, min(until, count)):
        prefetch_l2(following.rows + 64 * i)
    for i in range(max(since, count), until):
        prefetch_l2(following.rope_rows + 64 * (i - count))


@helper
def take_queries(q, scale, rank, out):
    """Queries of one token, float32 (H, D) with at most `HEADS` heads, times a scale, as `Queries`; heads that are
    missing are zeros."""
    heads, size = q.shape
    rotated = size - rank
    row_bytes, rope_bytes = out.codes.shape[1], out.rope.shape[1]
    codes, rope_codes = np.empty((HEADS, row_bytes), np.uint8), np.empty((HEADS, rope_bytes), np.uint8)
    query = np.zeros(size, np.float32)
    for h in range(HEADS):
        for i in range(size):
            query[i] = q[h, i] * np.float32(scale) if h < heads else np.float32(0)
        for i in range(rank // 32):
            at = address(codes[h]) + BLOCK_BYTES * i
            total = quantise_codes(address(query) + 128 * i, 32, at, address(out.scales[i, h:]), 0)
            out.starts[i, h] = np.int32(-BIAS * total)
        out.rope_scales[0, h] = quantise_i16(address(query[rank:]), rotated, address(rope_codes[h]))
    for h in range(0, HEADS, LANES):
        store_keys(address(codes[h]), row_bytes, address(out.codes[h]))
        for lane in range(LANES):
            for i in range(0, rope_bytes, 4):
                word = load_f32(address(rope_codes[h + lane]) + i)
                store_f32(address(out.rope[h]) + LANES * i + 4 * lane, word)


@helper
def take_scales(at, seen, blocks, out):
    """The scales of the rows of a page, IEEE halves from an address on, as `Scales`. Rows behind the last token have
    factors of 0."""
    for s in range(seen):
        out.largest[s] = _take_row(at + 2 * blocks * s, blocks, address(out.scales[s]), address(out.factors[s]))
    out.largest[seen:], out.factors[seen:] = 0, 0


@helper
def _take_row(at, blocks, scales, factors):
    """The same for a row; returns the largest. All but `blocks` are addresses."""
    whole = blocks // 8 * 8
    for i in range(0, whole, 8):
        store_f32x8(scales + 4 * i, load_f16x8(at + 2 * i))
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


@helper
def page_scores(codes, seen, queries, scales, scores, following):
    """Scores (PAGE, HEADS), but for the rotated dimensions, of a page whose codes are at an address. Memory is asked
    for a third of the next one meanwhile."""
    blocks, row_bytes = queries.scales.shape[0], queries.codes.shape[1]
    p, d, z = address(queries.codes), address(queries.scales), address(queries.starts)
    q, e, w = p + _SECOND * row_bytes, d + 4 * _SECOND, z + 4 * _SECOND
    scale, scale_bytes = address(scales.scales), 4 * scales.scales.shape[1]
    asked = (following.row_lines + following.rope_lines) // 3
    for s in range(0, seen, _TAKEN):
        first, second = _taken(s, seen)
        x, y = _rows(codes, row_bytes, first), _rows(codes, row_bytes, second)
        sx, sy = _rows(scale, scale_bytes, first), _rows(scale, scale_bytes, second)
        at, bt = _results(scores, first, second)
        tile_scores(x, y, sx, sy, blocks, 32, p, q, d, e, z, w, 4 * HEADS, at, bt)
        ask(following, asked * s // PAGE, asked * min(s + _TAKEN, PAGE) // PAGE)


@helper
def add_rope_scores(rows, seen, queries, scores, following):
    """Add those of the rotated dimensions, of int16 rows at an address. With AMX, memory is asked for the next page's
    meanwhile."""
    row_bytes = queries.rope.shape[1]
    p, d = address(queries.rope), address(queries.rope_scales)
    q, e = p + _SECOND * row_bytes, d + 4 * _SECOND
    scale = rows + PAGE * row_bytes
    for s in range(0, seen, _TAKEN):
        first, second = _taken(s, seen)
        x, y = _rows(rows, row_bytes, first), _rows(rows, row_bytes, second)
        sx, sy = _rows(scale, 4, first), _rows(scale, 4, second)
        at, bt = _results(scores, first, second)
        tile_rope(x, y, sx, sy, row_bytes // 4, p, q, d, e, at, bt)
        if AMX:
            asked, before = following.rope_lines, following.row_lines
            ask(following, before + asked * s // PAGE, before + asked * min(s + _TAKEN, PAGE) // PAGE)


@helper
def _taken(s, seen):
    """The rows that a tile takes from `s` on, four for each panel."""
    return four_from(s, seen), four_from(s + _TAKEN - SCORE_ROWS, seen)


@helper
def _rows(base, step, numbers):
    """Addresses of four rows that lie `step` bytes apart."""
    a, b, c, d = numbers
    return base + a * step, base + b * step, base + c * step, base + d * step


@helper
def _results(scores, first, second):
    """Where the scores of a tile go."""
    base = address(scores)
    return _rows(base, 4 * HEADS, first), _rows(base + 4 * _SECOND, 4 * HEADS, second)


@helper
def add_page_values(rows, rank, seen, scales, weights, weight_scales, panels, values, following):
    """Add the values of a page whose codes are at an address, weighted, to the results (HEADS, rank), padded to a
    multiple of `ROWS`. Memory is asked for the rest of the next one meanwhile."""
    depth, padded = (seen + 31) // 32, values.shape[1]
    w, ws = address(weights), address(weight_scales)
    lines = following.row_lines + following.rope_lines
    asked, rest, tiles, tile = lines // 3, lines - lines // 3, padded // ROWS * (HEADS // VALUE_ROWS), 0
    for s in range(depth):
        _take_values(rows + 32 * s * rank, rank, scales.factors[32 * s :], address(panels[s]))
    for j in range(0, padded, ROWS):
        p = address(panels) + BLOCK_BYTES * j
        for h in range(0, HEADS, VALUE_ROWS):
            x, sx = _rows(w, 4, (h, h + 1, h + 2, h + 3)), _rows(ws, 4, (h, h + 1, h + 2, h + 3))
            i = h + VALUE_ROWS - 4
            at, bt = four(values[:, j:], h, h + 1, h + 2, h + 3), four(values[:, j:], i, i + 1, i + 2, i + 3)
            y, sy = moved(x, 4 * (i - h)), moved(sx, 4 * (i - h))
            tile_values(x, y, 4 * HEADS, sx, sy, depth, p, BLOCK_BYTES * padded, at, bt)
            ask(following, asked + rest * tile // tiles, asked + rest * (tile + 1) // tiles)
            tile += 1


@helper
def _take_values(rows, rank, factors, panel):
    """Thirty-two rows of codes, `rank` bytes each, times their factors, as panels of `LANES` dimensions; `rows` and
    `panel` are addresses."""
    stride = 2 * factors.shape[1]
    for i in range(rank // 32):
        for t in range(0, 32, 4):
            at = rows + 32 * i + t * rank
            target = panel + BLOCK_BYTES * 32 * i + 4 * LANES * (t // WORD)
            store_rescaled(target, at, at + rank, at + 2 * rank, at + 3 * rank, address(factors[t, i:]), stride)
