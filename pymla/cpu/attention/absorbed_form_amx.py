"""Products of the absorbed form by tiles of AMX: sixteen tokens of a page at a time, and sixteen heads.

Twins of functions of `pymla.cpu.attention.absorbed_form`, with the same operands: codes of the cache as they lie are
rows, queries are a panel; the softmax weights are rows, values a panel.
"""

from pymla.cpu.attention.tiles import PANEL_BYTES, WEIGHTS
from pymla.cpu.machine.isa import LANES
from pymla.cpu.machine.simd import address, load_f32xL, load_i32, prefetch_l2, store_i32
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
from pymla.pages import PAGE

#: Cache lines that memory is asked for, a few at a time: a core has no more than some sixteen under way. Together they
#: are what 64 tokens have of a block: four times the first ones, and once the others.
SCORE_LINES, VALUE_LINES = 4, 18
#: Bytes of a row of results, 16 heads.
_ROW = 64
#: Blocks whose sums are in tiles at the same time.
_FOUR = 4


@helper
def page_scores(codes, seen, queries, scales, scratch, scores, ahead):
    """Scores (PAGE, 16), but for the rotated dimensions, of a page whose codes are at an address.

    Parameters
    ----------
    codes : int
        Address of the first token's codes, from 0 to 255.
    seen : int
        Tokens.
    queries, scales : `absorbed_form.Queries`, `absorbed_form.Scales`
    scratch : uint8 array of `simd_amx.SCRATCH` bytes
    scores : float32 array (PAGE, 16)
    ahead : int
        Memory is asked for `SCORE_LINES` cache lines a block and sixteen tokens from this address on.
    """
    blocks, row_bytes = queries.scales.shape[0], queries.codes.shape[1]
    p, d, z = address(queries.codes), address(queries.scales), address(queries.starts)
    scale_bytes = 4 * scales.scales.shape[1]
    for s in range(0, seen, 16):
        x, sx, at = codes + row_bytes * s, address(scales.scales[s:]), address(scores[s:])
        _sixteen_scores(x, row_bytes, sx, scale_bytes, blocks, p, d, z, address(scratch), at, ahead)
        ahead += 64 * SCORE_LINES * blocks


@helper
def _sixteen_scores(codes, row_bytes, scales, scale_bytes, blocks, panel, panel_scales, starts, scratch, out, ahead):
    """The same for sixteen tokens; all but the counts are addresses. Scales and starts are (blocks, 16) of the queries,
    and `scale_bytes` apart those of the tokens."""
    rows, fours = zero_rows(), blocks // _FOUR
    if fours:
        _dot_four(codes, row_bytes, panel, starts)
        store_four(scratch)
        # The processor multiplies the next four blocks while the sums of the last four are scaled.
        for _ in range(fours - 1):
            codes, panel, starts = codes + _FOUR * BLOCK, panel + _FOUR * PANEL_BYTES, starts + _FOUR * _ROW
            _dot_four(codes, row_bytes, panel, starts)
            rows = _scale_four(rows, scratch, scales, scale_bytes, panel_scales, ahead)
            store_four(scratch)
            scales, panel_scales = scales + 4 * _FOUR, panel_scales + _FOUR * _ROW
            ahead += 64 * _FOUR * SCORE_LINES
        rows = _scale_four(rows, scratch, scales, scale_bytes, panel_scales, ahead)
        codes, panel, starts = codes + _FOUR * BLOCK, panel + _FOUR * PANEL_BYTES, starts + _FOUR * _ROW
        scales, panel_scales = scales + 4 * _FOUR, panel_scales + _FOUR * _ROW
    for _ in range(blocks % _FOUR):
        load_tile(0, starts, 0)
        load_tile(4, codes, row_bytes)
        load_tile(6, panel, 64)
        dot_tiles_u8(0, 4, 6)
        store_tile(0, scratch, 64)
        rows = add_scaled_sums(rows, scratch, load_f32xL(panel_scales), scales, scale_bytes)
        codes, panel, starts = codes + BLOCK, panel + PANEL_BYTES, starts + _ROW
        scales, panel_scales = scales + 4, panel_scales + _ROW
    store_rows(out, _ROW, rows)


@inlined
def _scale_four(rows, sums, scales, scale_bytes, panel_scales, ahead):
    """Add the sums of four tiles, scaled."""
    rows = _scale_one(rows, sums, scales, scale_bytes, panel_scales, ahead)
    rows = _scale_one(rows, sums + SUMS, scales + 4, scale_bytes, panel_scales + _ROW, ahead + 64 * SCORE_LINES)
    sums, scales, panel_scales = sums + 2 * SUMS, scales + 8, panel_scales + 2 * _ROW
    ahead += 2 * 64 * SCORE_LINES
    rows = _scale_one(rows, sums, scales, scale_bytes, panel_scales, ahead)
    return _scale_one(rows, sums + SUMS, scales + 4, scale_bytes, panel_scales + _ROW, ahead + 64 * SCORE_LINES)


@inlined
def _scale_one(rows, sums, scales, scale_bytes, panel_scales, ahead):
    for line in range(SCORE_LINES):
        prefetch_l2(ahead + 64 * line)
    return add_scaled_sums(rows, sums, load_f32xL(panel_scales), scales, scale_bytes)


@inlined
def _dot_four(codes, row_bytes, panel, starts):
    """Products of four blocks, in tiles 0 to 3. Every row of a tile begins with the same sums."""
    load_tile(0, starts, 0)
    load_tile(4, codes, row_bytes)
    load_tile(6, panel, 64)
    dot_tiles_u8(0, 4, 6)
    load_tile(1, starts + _ROW, 0)
    load_tile(5, codes + BLOCK, row_bytes)
    load_tile(7, panel + PANEL_BYTES, 64)
    dot_tiles_u8(1, 5, 7)
    load_tile(2, starts + 2 * _ROW, 0)
    load_tile(4, codes + 2 * BLOCK, row_bytes)
    load_tile(6, panel + 2 * PANEL_BYTES, 64)
    dot_tiles_u8(2, 4, 6)
    load_tile(3, starts + 3 * _ROW, 0)
    load_tile(5, codes + 3 * BLOCK, row_bytes)
    load_tile(7, panel + 3 * PANEL_BYTES, 64)
    dot_tiles_u8(3, 5, 7)


@helper
def add_page_values(rows, rank, scales, weights, weight_scales, scratch, values, ahead):
    """Add the values of a page, weighted, to the results of sixteen heads.

    Parameters
    ----------
    rows, rank : int
        Address of the codes, 128 more than they are, and codes of a token.
    scales : `absorbed_form.Scales`
    weights, weight_scales : int32 array (PAGE / 4, 16), float32 array (16,)
        Words of the softmax weights of four tokens, and their scales.
    scratch : uint8 array of `simd_amx.SCRATCH` bytes
    values : float32 array (16, rank)
    ahead : int
        Memory is asked for `VALUE_LINES` cache lines a block, of those that `page_scores` left.
    """
    blocks, sums = rank // 32, address(scratch)
    panel, other = sums + 2 * SUMS, sums + 2 * SUMS + 4 * PANEL_BYTES
    factors, factor_bytes = address(scales.factors), 2 * scales.factors.shape[1]
    scale, out, out_bytes = address(weight_scales), address(values), 4 * values.shape[1]
    ahead += 64 * SCORE_LINES * blocks * (PAGE // 16)
    _load_weights(address(weights), sums)
    _take_values(rows, rank, factors, factor_bytes, panel, ahead)
    for i in range(blocks):
        _dot_values(panel)
        store_tile(0, sums, 64)
        store_tile(1, sums + SUMS, 64)
        # The processor multiplies while the next block is made.
        panel, other = other, panel
        if i + 1 < blocks:
            rows, factors, ahead = rows + 32, factors + 2, ahead + 64 * VALUE_LINES
            _take_values(rows, rank, factors, factor_bytes, panel, ahead)
        add_sums_to(out, out_bytes, sums, scale, 4)
        add_sums_to(out + 64, out_bytes, sums + SUMS, scale, 4)
        out += 128


@helper
def _load_weights(words, scratch):
    """Softmax weights of `WEIGHTS` tokens and sixteen heads, words (tokens / 4, 16) at an address, as tiles 4 and 5: a
    row for each head."""
    for i in range(WEIGHTS // 4):
        for h in range(16):
            store_i32(scratch + WEIGHTS * h + 4 * i, load_i32(words + _ROW * i + 4 * h))
    load_tile(4, scratch, WEIGHTS)
    load_tile(5, scratch + BLOCK, WEIGHTS)


@helper
def _take_values(codes, row_bytes, factors, factor_bytes, panel, ahead):
    """Panels of 64 tokens and 32 dimensions."""
    for t in range(0, WEIGHTS, 4):
        at = codes + t * row_bytes
        target = panel + 2 * PANEL_BYTES * (t // 32) + 4 * LANES * (t % 32 // 4)
        second, third, fourth = at + row_bytes, at + 2 * row_bytes, at + 3 * row_bytes
        store_rescaled(target, at, second, third, fourth, factors + factor_bytes * t, factor_bytes)
        prefetch_l2(ahead + 16 * t)
    for line in range(WEIGHTS // 4, VALUE_LINES):
        prefetch_l2(ahead + 64 * line)


@inlined
def _dot_values(panel):
    """Sixteen heads times 32 dimensions, in tiles 0 and 1."""
    zero_tile(0)
    zero_tile(1)
    load_tile(6, panel, 64)
    dot_tiles_u8(0, 4, 6)
    load_tile(7, panel + PANEL_BYTES, 64)
    dot_tiles_u8(1, 4, 7)
    load_tile(6, panel + 2 * PANEL_BYTES, 64)
    dot_tiles_u8(0, 5, 6)
    load_tile(7, panel + 3 * PANEL_BYTES, 64)
    dot_tiles_u8(1, 5, 7)
