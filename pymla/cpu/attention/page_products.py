"""Products of the absorbed form with a page of 8-bit codes, by vector registers: scores, and weighted values.

Queries of 16 heads are panels, and meet the codes of one row of the cache after the other. For the values, four rows at
a time become panels whose lanes are dimensions: the scales of a row's blocks go into its codes, relative to the row's
largest one, and that goes into the softmax weights. The next page is prefetched meanwhile.

`pymla.cpu.attention.page_products_amx` has the same by tiles of AMX.
"""

from typing import NamedTuple

import numpy as np

from pymla.cpu.attention.codes import BLOCK_BYTES
from pymla.cpu.attention.next_page import prefetch_lines
from pymla.cpu.attention.row_addresses import Rows, four_from, moved, rows_apart, rows_of
from pymla.cpu.attention.score_tiles import SCORE_ROWS, Panel, tile_rope_scores, tile_scores
from pymla.cpu.attention.splits import HEAD_GROUP
from pymla.cpu.attention.value_tiles import VALUE_COLUMNS, VALUE_ROWS, tile_values
from pymla.cpu.machine.isa import AMX, LANES
from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_words import WORD, store_rescaled
from pymla.cpu.runtime.jit import helper
from pymla.pages import PAGE

#: Heads from the first panel of queries to the second; 0 where one panel has all of them.
_SECOND_PANEL = HEAD_GROUP - LANES
#: Rows of the cache that a tile of scores takes: `SCORE_ROWS` meet both panels, or twice as many the one.
_TILE_ROWS = SCORE_ROWS if _SECOND_PANEL else 2 * SCORE_ROWS
#: Bytes of a row of scores.
_SCORE_BYTES = 4 * HEAD_GROUP


class Weights(NamedTuple):
    """Softmax weights of a page as codes, heads side by side."""

    words: np.ndarray  # int32 (PAGE // WORD, HEAD_GROUP)
    scales: np.ndarray  # float32 (HEAD_GROUP,)


@helper
def empty_weights():
    """Room for the weights of a page."""
    return Weights(np.empty((PAGE // WORD, HEAD_GROUP), np.int32), np.empty(HEAD_GROUP, np.float32))


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
    scores : float32 array (PAGE, HEAD_GROUP)
    ahead : next_page.NextPage
    """
    blocks, row_bytes = queries.scales.shape[0], queries.codes.shape[1]
    panel = Panel(address(queries.codes), address(queries.scales), address(queries.starts))
    other = Panel(
        panel.codes + _SECOND_PANEL * row_bytes, panel.scales + 4 * _SECOND_PANEL, panel.starts + 4 * _SECOND_PANEL
    )
    scale, scale_bytes = address(scales.scales), 4 * scales.scales.shape[1]
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
    row_bytes = queries.rope.shape[1]
    panel = Panel(address(queries.rope), address(queries.rope_scales), 0)
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
    base = address(scores)
    return rows_apart(base, _SCORE_BYTES, first), rows_apart(base + 4 * _SECOND_PANEL, _SCORE_BYTES, second)


@helper
def add_page_values(rows, rank, seen, scales, weights, panels, values, ahead):
    """Add the weighted values of a page. The other two thirds of the next page are prefetched.

    Parameters
    ----------
    rows, rank : int
        Address of the rows' codes, and codes of a row.
    seen : int
        Rows that the token sees.
    scales : page_scales.PageScales
    weights : Weights
    panels : uint8 array (PAGE // 32, bytes of 32 rows)
        Scratch for the codes of 32 rows at a time.
    values : float32 array (HEAD_GROUP, rank), padded to a multiple of `VALUE_COLUMNS`
    ahead : next_page.NextPage
    """
    depth, padded = (seen + 31) // 32, values.shape[1]
    words, word_scales = address(weights.words), address(weights.scales)
    lines = ahead.latent_lines + ahead.rope_lines
    begin, rest, tiles, tile = lines // 3, lines - lines // 3, padded // VALUE_COLUMNS * (HEAD_GROUP // VALUE_ROWS), 0
    for s in range(depth):
        _store_value_panels(rows + 32 * s * rank, rank, scales.factors[32 * s :], address(panels[s]))
    for j in range(0, padded, VALUE_COLUMNS):
        panel = address(panels) + BLOCK_BYTES * j
        for h in range(0, HEAD_GROUP, VALUE_ROWS):
            i = h + VALUE_ROWS - 4
            x = Rows(_heads(words, h), _heads(word_scales, h))
            y = Rows(moved(x.codes, 4 * (i - h)), moved(x.scales, 4 * (i - h)))
            at, bt = rows_of(values[:, j:], (h, h + 1, h + 2, h + 3)), rows_of(values[:, j:], (i, i + 1, i + 2, i + 3))
            tile_values(x, y, 4 * HEAD_GROUP, depth, panel, BLOCK_BYTES * padded, at, bt)
            prefetch_lines(ahead, begin + rest * tile // tiles, begin + rest * (tile + 1) // tiles)
            tile += 1


@helper
def _heads(base, h):
    """Addresses of the words, or scales, of four heads from head `h` on."""
    return rows_apart(base, 4, (h, h + 1, h + 2, h + 3))


@helper
def _store_value_panels(rows, rank, factors, panel):
    """Thirty-two rows of codes, `rank` bytes each, times their factors, as panels of `LANES` dimensions; `rows` and
    `panel` are addresses."""
    stride = 2 * factors.shape[1]
    for i in range(rank // 32):
        for t in range(0, 32, 4):
            at = rows + 32 * i + t * rank
            target = panel + BLOCK_BYTES * 32 * i + 4 * LANES * (t // WORD)
            store_rescaled(target, at, at + rank, at + 2 * rank, at + 3 * rank, address(factors[t, i:]), stride)
