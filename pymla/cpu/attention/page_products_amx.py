"""Products of the absorbed form with a page of 8-bit codes, by tiles of AMX: sixteen rows of the page at a time, and
sixteen heads.

The twin of `pymla.cpu.attention.page_products`, with the same operands. For scores, the codes of the cache are a tile's
rows where they lie, and the queries a panel; for values, the softmax weights are rows and the values a panel.
"""

from pymla.cpu.attention.codes import PANEL_BLOCK_BYTES, WEIGHT_GROUP
from pymla.cpu.attention.next_page import LINE
from pymla.cpu.attention.score_tiles import Panel
from pymla.cpu.machine.simd import load_f32xL, load_i32, prefetch_l2, store_i32
from pymla.cpu.machine.simd_amx import (
    BLOCK,
    SUMS,
    add_scaled_sums,
    add_sums_to,
    dot_tiles_u8,
    load_tile,
    store_four,
    store_rows,
    store_tile,
    zero_rows,
    zero_tile,
)
from pymla.cpu.machine.simd_words import store_rescaled
from pymla.cpu.runtime.compiling import helper, inlined
from pymla.cpu.runtime.isa import LANES
from pymla.pages import PAGE

#: Lines of the next page that `page_scores` prefetches for a block and sixteen rows, and `add_page_values` for a block.
#: Four times the first number and once the second are the lines of a block of a page.
SCORE_LINES, VALUE_LINES = 4, 18
_SCORE_LINE_BYTES = LINE * SCORE_LINES
#: Bytes of a row of results: float32 or int32 of 16 heads.
_RESULT_BYTES = 64
#: Blocks whose sums are in tiles at the same time.
_BLOCKS_AT_ONCE = 4


@helper
def page_scores(codes, seen, queries, scales, scratch, scores, ahead):
    """Scores but for the rotated dimensions. A part of the next page is prefetched.

    Parameters
    ----------
    codes : int
        Address of the rows' codes, from 0 to 255.
    seen : int
        Rows that the token sees.
    queries : query_panels.Queries
    scales : page_scales.PageScales
    scratch : int
        Address of `simd_amx.SCRATCH` bytes.
    scores : int
        Address of float32 (PAGE, 16).
    ahead : int
        Address of the next page: `SCORE_LINES` lines for a block and sixteen rows are prefetched from here on.
    """
    blocks, row_bytes, scale_bytes = queries.blocks, queries.row_bytes, 4 * scales.padded
    panel = Panel(queries.codes, queries.scales, queries.starts)
    for s in range(0, seen, 16):
        x, sx, at = codes + row_bytes * s, scales.scales + scale_bytes * s, scores + _RESULT_BYTES * s
        _sixteen_scores(x, row_bytes, sx, scale_bytes, blocks, panel, scratch, at, ahead)
        ahead += _SCORE_LINE_BYTES * blocks


@helper
def _sixteen_scores(codes, row_bytes, scales, scale_bytes, blocks, queries, scratch, out, ahead):
    """`page_scores` for sixteen rows. `codes`, `scales`, `scratch` and `out` are addresses; rows of the page's scales
    are `scale_bytes` apart, and `queries` is a `Panel`."""
    rows, fours = zero_rows(), blocks // _BLOCKS_AT_ONCE
    panel, panel_scales, starts = queries
    if fours:
        _dot_four(codes, row_bytes, panel, starts)
        store_four(scratch)
        # The processor multiplies the next four blocks while the sums of the last four are scaled.
        for _ in range(fours - 1):
            codes, panel = codes + _BLOCKS_AT_ONCE * BLOCK, panel + _BLOCKS_AT_ONCE * PANEL_BLOCK_BYTES
            starts += _BLOCKS_AT_ONCE * _RESULT_BYTES
            _dot_four(codes, row_bytes, panel, starts)
            rows = _scale_four(rows, scratch, scales, scale_bytes, panel_scales, ahead)
            store_four(scratch)
            scales, panel_scales = scales + 4 * _BLOCKS_AT_ONCE, panel_scales + _BLOCKS_AT_ONCE * _RESULT_BYTES
            ahead += _BLOCKS_AT_ONCE * _SCORE_LINE_BYTES
        rows = _scale_four(rows, scratch, scales, scale_bytes, panel_scales, ahead)
        codes, panel = codes + _BLOCKS_AT_ONCE * BLOCK, panel + _BLOCKS_AT_ONCE * PANEL_BLOCK_BYTES
        starts += _BLOCKS_AT_ONCE * _RESULT_BYTES
        scales, panel_scales = scales + 4 * _BLOCKS_AT_ONCE, panel_scales + _BLOCKS_AT_ONCE * _RESULT_BYTES
    for _ in range(blocks % _BLOCKS_AT_ONCE):
        _dot_one(codes, row_bytes, panel, starts)
        store_tile(0, scratch, 64)
        rows = add_scaled_sums(rows, scratch, load_f32xL(panel_scales), scales, scale_bytes)
        codes, panel, starts = codes + BLOCK, panel + PANEL_BLOCK_BYTES, starts + _RESULT_BYTES
        scales, panel_scales = scales + 4, panel_scales + _RESULT_BYTES
    store_rows(out, _RESULT_BYTES, rows)


@inlined
def _scale_four(rows, sums, scales, scale_bytes, panel_scales, ahead):
    """Add the sums of four tiles, scaled, to the scores."""
    step, lines = _RESULT_BYTES, _SCORE_LINE_BYTES
    rows = _scale_one(rows, sums, scales, scale_bytes, panel_scales, ahead)
    rows = _scale_one(rows, sums + SUMS, scales + 4, scale_bytes, panel_scales + step, ahead + lines)
    sums, scales, panel_scales, ahead = sums + 2 * SUMS, scales + 8, panel_scales + 2 * step, ahead + 2 * lines
    rows = _scale_one(rows, sums, scales, scale_bytes, panel_scales, ahead)
    return _scale_one(rows, sums + SUMS, scales + 4, scale_bytes, panel_scales + step, ahead + lines)


@inlined
def _scale_one(rows, sums, scales, scale_bytes, panel_scales, ahead):
    for line in range(SCORE_LINES):
        prefetch_l2(ahead + LINE * line)
    return add_scaled_sums(rows, sums, load_f32xL(panel_scales), scales, scale_bytes)


@inlined
def _dot_one(codes, row_bytes, panel, starts):
    """Products of one block, in tile 0."""
    load_tile(0, starts, 0)
    load_tile(4, codes, row_bytes)
    load_tile(6, panel, 64)
    dot_tiles_u8(0, 4, 6)


@inlined
def _dot_four(codes, row_bytes, panel, starts):
    """Products of four blocks, in tiles 0 to 3. Every row of a tile begins with the same sums."""
    _dot_one(codes, row_bytes, panel, starts)
    load_tile(1, starts + _RESULT_BYTES, 0)
    load_tile(5, codes + BLOCK, row_bytes)
    load_tile(7, panel + PANEL_BLOCK_BYTES, 64)
    dot_tiles_u8(1, 5, 7)
    load_tile(2, starts + 2 * _RESULT_BYTES, 0)
    load_tile(4, codes + 2 * BLOCK, row_bytes)
    load_tile(6, panel + 2 * PANEL_BLOCK_BYTES, 64)
    dot_tiles_u8(2, 4, 6)
    load_tile(3, starts + 3 * _RESULT_BYTES, 0)
    load_tile(5, codes + 3 * BLOCK, row_bytes)
    load_tile(7, panel + 3 * PANEL_BLOCK_BYTES, 64)
    dot_tiles_u8(3, 5, 7)


@helper
def add_page_values(rows, rank, scales, weights, scratch, values, padded, ahead):
    """Add the weighted values of a page. The rest of the next page is prefetched.

    Parameters
    ----------
    rows, rank : int
        Address of the rows' codes, with a bias of 128, and codes of a row.
    scales : page_scales.PageScales
    weights : page_products.Weights
    scratch : int
        Address of `simd_amx.SCRATCH` bytes.
    values, padded : int
        Address of float32 (16, padded).
    ahead : int
        Address of the next page: `VALUE_LINES` lines for a block are prefetched, behind those of `page_scores`.
    """
    blocks, sums = rank // 32, scratch
    panel, other = sums + 2 * SUMS, sums + 2 * SUMS + 4 * PANEL_BLOCK_BYTES
    factors, factor_bytes = scales.factors, 2 * scales.padded
    scale, out, out_bytes = weights.scales, values, 4 * padded
    ahead += _SCORE_LINE_BYTES * blocks * (PAGE // 16)
    _load_weights(weights.words, sums)
    _store_value_panels(rows, rank, factors, factor_bytes, panel, ahead)
    for i in range(blocks):
        _dot_values(panel)
        store_tile(0, sums, 64)
        store_tile(1, sums + SUMS, 64)
        # The processor multiplies while the panels of the next block are made.
        panel, other = other, panel
        if i + 1 < blocks:
            rows, factors, ahead = rows + 32, factors + 2, ahead + LINE * VALUE_LINES
            _store_value_panels(rows, rank, factors, factor_bytes, panel, ahead)
        add_sums_to(out, out_bytes, sums, scale, 4)
        add_sums_to(out + 64, out_bytes, sums + SUMS, scale, 4)
        out += 128


@helper
def _load_weights(words, scratch):
    """Load softmax weights of `WEIGHT_GROUP` positions and sixteen heads, words (WEIGHT_GROUP / 4, 16) at an address,
    into tiles 4 and 5, with a row for each head."""
    for i in range(WEIGHT_GROUP // 4):
        for h in range(16):
            store_i32(scratch + WEIGHT_GROUP * h + 4 * i, load_i32(words + _RESULT_BYTES * i + 4 * h))
    load_tile(4, scratch, WEIGHT_GROUP)
    load_tile(5, scratch + BLOCK, WEIGHT_GROUP)


@helper
def _store_value_panels(codes, row_bytes, factors, factor_bytes, panel, ahead):
    """Sixty-four rows of 32 codes, `row_bytes` apart, times their factors, as panels of `LANES` dimensions. All but the
    distances are addresses."""
    for t in range(0, WEIGHT_GROUP, 4):
        at = codes + t * row_bytes
        target = panel + 2 * PANEL_BLOCK_BYTES * (t // 32) + 4 * LANES * (t % 32 // 4)
        second, third, fourth = at + row_bytes, at + 2 * row_bytes, at + 3 * row_bytes
        store_rescaled(target, at, second, third, fourth, factors + factor_bytes * t, factor_bytes)
        prefetch_l2(ahead + 16 * t)
    for line in range(WEIGHT_GROUP // 4, VALUE_LINES):
        prefetch_l2(ahead + LINE * line)


@inlined
def _dot_values(panel):
    """Products of sixteen heads and 32 dimensions, in tiles 0 and 1."""
    zero_tile(0)
    zero_tile(1)
    load_tile(6, panel, 64)
    dot_tiles_u8(0, 4, 6)
    load_tile(7, panel + PANEL_BLOCK_BYTES, 64)
    dot_tiles_u8(1, 4, 7)
    load_tile(6, panel + 2 * PANEL_BLOCK_BYTES, 64)
    dot_tiles_u8(0, 5, 6)
    load_tile(7, panel + 3 * PANEL_BLOCK_BYTES, 64)
    dot_tiles_u8(1, 5, 7)
