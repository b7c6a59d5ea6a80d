"""Products of the absorbed form with a page of 8-bit codes, by vector registers: scores, and weighted values.

Queries of 16 heads are panels, and meet the codes of one row of the cache after the other. For the values, four rows at
a time become panels whose lanes are dimensions: the scales of a row's blocks go into its codes, relative to the row's
largest one, and that goes into the softmax weights. The next page is prefetched meanwhile.

`pymla.cpu.attention.page_products_amx` has the same by tiles of AMX.
"""

from typing import NamedTuple

from pymla.cpu.attention.codes import BLOCK_BYTES
from pymla.cpu.attention.next_page import prefetch_lines
from pymla.cpu.attention.row_addresses import Rows, four_from, rows_apart
from pymla.cpu.attention.score_tiles import SCORE_ROWS, Panel, tile_rope_scores, tile_scores
from pymla.cpu.attention.splits import HEAD_GROUP
from pymla.cpu.attention.value_tiles import VALUE_COLUMNS, VALUE_ROWS, tile_values
from pymla.cpu.machine.simd_words import WORD, store_rescaled
from pymla.cpu.runtime.isa import AMX, LANES
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE

#: Heads from the first panel of queries to the second; 0 where one panel has all of them.
_SECOND_PANEL = HEAD_GROUP - LANES
#: Rows of the cache that a tile of scores takes: `SCORE_ROWS` meet both panels, or twice as many the one.
_TILE_ROWS = SCORE_ROWS if _SECOND_PANEL else 2 * SCORE_ROWS
#: Bytes of a row of scores.
_SCORE_BYTES = 4 * HEAD_GROUP


class Weights(NamedTuple):
    """Addresses of the softmax weights of a page as codes, heads side by side."""

    words: int  # int32 (PAGE // WORD, HEAD_GROUP)
    scales: int  # float32 (HEAD_GROUP,)


@helper
def page_scores(codes, seen, queries, scales, scores, ahead):
    """Scores but for the rotated dimensions. A third of the next page is prefetched.

    Parameters
    ----------
    codes : int
        Address of the rows' codes, in words, with bias.
    seen : int
        Rows that the token sees.
    queries : query_panels.Queries
    scales : page_scales.PageScales
    scores : int
        Address of float32 (PAGE, HEAD_GROUP).
    ahead : next_page.NextPage
    """
    blocks, row_bytes = queries.blocks, queries.row_bytes
    panel = Panel(queries.codes, queries.scales, queries.starts)
    other = Panel(
        panel.codes + _SECOND_PANEL * row_bytes, panel.scales + 4 * _SECOND_PANEL, panel.starts + 4 * _SECOND_PANEL
    )
    scale, scale_bytes = scales.scales, 4 * scales.padded
    lines = (ahead.latent_lines + ahead.rope_lines) // 3
    for s in range(0, seen, _TILE_ROWS):
        first, second = _rows_of_tile(s, seen)
        x = Rows(rows_apart(codes, row_bytes, first), rows_apart(scale, scale_bytes, first))
        y = Rows(rows_apart(codes, row_bytes, second), rows_apart(scale, scale_bytes, second))
        at, bt = _scores_of_tile(scores, first, second)
        tile_scores(x, y, panel, other, blocks, 32, _SCORE_BYTES, at, bt)
        prefetch_lines(ahead, lines * s // PAGE, lines * min(s + _TILE_ROWS, PAGE) // PAGE)


@helper
def add_rope_scores(rows, seen, queries, scores, ahead):
    """Add the scores of the rotated dimensions, of int16 rows at an address. With AMX, whose tiles leave that to this
    function, the next page's rotated dimensions are prefetched."""
    row_bytes = queries.rope_bytes
    panel = Panel(queries.rope, queries.rope_scales, 0)
    other = Panel(panel.codes + _SECOND_PANEL * row_bytes, panel.scales + 4 * _SECOND_PANEL, 0)
    scale = rows + PAGE * row_bytes
    for s in range(0, seen, _TILE_ROWS):
        first, second = _rows_of_tile(s, seen)
        x = Rows(rows_apart(rows, row_bytes, first), rows_apart(scale, 4, first))
        y = Rows(rows_apart(rows, row_bytes, second), rows_apart(scale, 4, second))
        at, bt = _scores_of_tile(scores, first, second)
        tile_rope_scores(x, y, panel, other, row_bytes // 4, at, bt)
        if AMX:
            lines, begin = ahead.rope_lines, ahead.latent_lines
            stop = begin + lines * min(s + _TILE_ROWS, PAGE) // PAGE
            prefetch_lines(ahead, begin + lines * s // PAGE, stop)


@helper
def _rows_of_tile(s, seen):
    """The numbers of the rows that a tile takes from row `s` on: four for each panel."""
    return four_from(s, seen), four_from(s + _TILE_ROWS - SCORE_ROWS, seen)


@helper
def _scores_of_tile(scores, first, second):
    """Addresses of a tile's scores."""
    other = scores + 4 * _SECOND_PANEL
    return rows_apart(scores, _SCORE_BYTES, first), rows_apart(other, _SCORE_BYTES, second)


@helper
def add_page_values(rows, rank, seen, scales, weights, panels, values, padded, ahead):
    """Add the weighted values of a page. The other two thirds of the next page are prefetched.

    Parameters
    ----------
    rows, rank : int
        Address of the rows' codes, as the cache has them, and codes of a row.
    seen : int
        Rows that the token sees.
    scales : page_scales.PageScales
    weights : Weights
    panels : int
        Address of scratch for the panels of a page's values.
    values, padded : int
        Address of float32 (HEAD_GROUP, padded): `rank` numbers, padded to a multiple of `VALUE_COLUMNS`.
    ahead : next_page.NextPage
    """
    depth, panel_bytes = (seen + 31) // 32, BLOCK_BYTES * padded
    lines = ahead.latent_lines + ahead.rope_lines
    begin, rest, tiles, tile = lines // 3, lines - lines // 3, padded // VALUE_COLUMNS * (HEAD_GROUP // VALUE_ROWS), 0
    for s in range(depth):
        factors = scales.factors + 2 * scales.padded * 32 * s
        _store_value_panels(rows + 32 * s * rank, rank, factors, 2 * scales.padded, panels + panel_bytes * s)
    for j in range(0, padded, VALUE_COLUMNS):
        for h in range(0, HEAD_GROUP, VALUE_ROWS):
            first, second = _four_heads(h), _four_heads(h + VALUE_ROWS - 4)
            x = Rows(rows_apart(weights.words, 4, first), rows_apart(weights.scales, 4, first))
            y = Rows(rows_apart(weights.words, 4, second), rows_apart(weights.scales, 4, second))
            at = rows_apart(values + 4 * j, 4 * padded, first)
            bt = rows_apart(values + 4 * j, 4 * padded, second)
            tile_values(x, y, 4 * HEAD_GROUP, depth, panels + BLOCK_BYTES * j, panel_bytes, at, bt)
            prefetch_lines(ahead, begin + rest * tile // tiles, begin + rest * (tile + 1) // tiles)
            tile += 1


@helper
def _four_heads(h):
    return h, h + 1, h + 2, h + 3


@helper
def _store_value_panels(rows, rank, factors, factor_bytes, panel):
    """Thirty-two rows of codes, `rank` bytes each, times their factors, `factor_bytes` each, as panels of `LANES`
    dimensions; `rows`, `factors` and `panel` are addresses."""
    for i in range(rank // 32):
        for t in range(0, 32, 4):
            at, of_row = rows + 32 * i + t * rank, factors + 2 * i + t * factor_bytes
            target = panel + BLOCK_BYTES * 32 * i + 4 * LANES * (t // WORD)
            store_rescaled(target, at, at + rank, at + 2 * rank, at + 3 * rank, of_row, factor_bytes)
