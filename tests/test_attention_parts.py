"""Parts of the CPU's attention by themselves: codes, tiles of scores and of values, scales of a page, split-kv."""

import numba
import numpy as np
import pytest

from pymla.cpu.attention import codes, hadamard, page_scales, score_tiles, splits, value_tiles
from pymla.cpu.attention.row_addresses import Rows, four_from, rows_apart
from pymla.cpu.attention.score_tiles import KeyPanel, Panel
from pymla.cpu.machine.simd import address
from pymla.cpu.machine.simd_words import BIAS, WORD
from pymla.cpu.runtime.isa import LANES
from pymla.pages import PAGE, Step

#: Type of a code in a word, without a sign where it has a bias.
CODE = np.uint8 if WORD == 4 else np.int16


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def words_of(values):
    """Codes with a sign as they lie in words."""
    return np.ascontiguousarray(values.astype(np.int8 if WORD == 4 else np.int16)).view(np.uint8)


def panel_of(rows):
    """Rows of bytes as a panel: a word of each of `LANES` rows, then the next one."""
    return np.ascontiguousarray(rows).view(np.int32).reshape(LANES, -1).T.copy()


# Codes ----------------------------------------------------------------------------------------------------------------


@numba.njit
def quantise_codes(x, out, scale, bias):
    return codes.quantise_codes(address(x), len(x), address(out), address(scale), bias)


@pytest.mark.parametrize("bias", [0, BIAS])
@pytest.mark.parametrize("count", [32, 96])
def test_codes(rng, count, bias):
    x = rng.standard_normal(count, dtype=np.float32)
    out, scale = np.zeros(count + 8, CODE), np.full(2, np.nan, np.float32)
    total = quantise_codes(x, out, scale, bias)
    expected = np.rint(x * (np.float32(127) / np.abs(x).max()))
    np.testing.assert_array_equal(out[:count], (expected.astype(np.int64) + bias).astype(CODE))
    assert not out[count:].any()
    assert scale[0] == np.abs(x).max() / np.float32(127)
    assert np.isnan(scale[1])
    assert total == expected.sum()
    assert quantise_codes(np.zeros(count, np.float32), out, scale, bias) == 0
    assert scale[0] == 0
    assert (out[:count] == bias).all()


@pytest.mark.parametrize("fault", [np.inf, -np.inf, np.nan])
def test_a_fault_shows_in_the_scale(rng, fault):
    x, scale = rng.standard_normal(64, dtype=np.float32), np.zeros(1, np.float32)
    x[37] = fault
    quantise_codes(x, np.zeros(64, CODE), scale, 0)
    assert not np.isfinite(scale[0])
    assert not np.isfinite(quantise_i16(x, np.zeros(64, np.int16)))


@numba.njit
def quantise_i16(x, out):
    return codes.quantise_i16(address(x), len(x), address(out))


@numba.njit
def largest_i16(count):
    return codes.largest_i16(count)


@pytest.mark.parametrize("count", [1, 7, 8, 64, 65])
def test_i16_codes(rng, count):
    x, out = rng.standard_normal(count, dtype=np.float32), np.full(count + 2, 9, np.int16)
    scale = quantise_i16(x, out)
    largest = largest_i16(count)
    np.testing.assert_array_equal(out[:count], np.rint(x * (np.float32(largest) / np.abs(x).max())))
    np.testing.assert_allclose(out[:count] * scale, x, atol=0.51 * scale)
    assert out[count:].tolist() == ([0, 9] if count % 2 else [9, 9])


def test_sums_of_i16_products_stay_within_int32():
    for count in (1, 2, 63, 64, 127, 128, 200, 512, 4096):
        assert largest_i16(count) ** 2 * (count + count % 2) < 1 << 31


@numba.njit
def quantise_weights(weights, out, scale):
    codes.quantise_weights(address(weights), address(out), address(scale))


@numba.njit
def quantise_weights_of_heads(weights, row_scales, words, scales):
    heads = weights.shape[1]
    codes.quantise_weights_of_heads(address(weights), address(row_scales), address(words), address(scales), heads)


@pytest.mark.parametrize("empty", [False, True])
def test_weights(rng, empty):
    weights = np.zeros(64, np.float32) if empty else rng.random(64, dtype=np.float32)
    out, scale = np.zeros(64, CODE), np.full(1, np.nan, np.float32)
    quantise_weights(weights, out, scale)
    assert scale[0] == weights.max() / np.float32(255)
    factor = np.float32(0 if empty else 255) / (weights.max() or np.float32(1))
    np.testing.assert_array_equal(out, np.rint(weights * factor))


def test_weights_of_heads(rng):
    weights, row_scales = rng.random((64, 16), dtype=np.float32), rng.random(64, dtype=np.float32)
    weights[:, 5] = 0
    words, scales = np.zeros((64 // WORD, 16), np.int32), np.full(16, np.nan, np.float32)
    scaled = weights * row_scales[:, None]
    quantise_weights_of_heads(weights, row_scales, words, scales)
    np.testing.assert_array_equal(weights, scaled)
    np.testing.assert_allclose(scales, scaled.max(0) / 255, rtol=1e-6)
    found = words.view(CODE).reshape(64 // WORD, 16, WORD).transpose(0, 2, 1).reshape(64, 16)
    np.testing.assert_allclose(found * scales, scaled, atol=0.51 * scales.max())


@numba.njit
def mix(x):
    hadamard.mix(address(x), len(x))


@pytest.mark.parametrize("count", [32, 64, 128])
def test_mixed_numbers(rng, count):
    """Products of two vectors stay the same but for a factor, and a single large number is spread over all."""
    x, y = rng.integers(-99, 100, (2, count)).astype(np.float32)
    product, one = x @ y, np.zeros(count, np.float32)
    one[rng.integers(count)] = 3
    for each in (x, y, one):
        mix(each)
    assert x @ y == count * product
    assert (np.abs(one) == 3).all()


@numba.njit
def store_panel(rows, panel):
    codes.store_panel(address(rows), rows.shape[1], address(panel))


def test_panels(rng):
    rows = rng.integers(0, 256, (LANES, 48)).astype(np.uint8)
    panel = np.zeros((12, LANES), np.int32)
    store_panel(rows, panel)
    np.testing.assert_array_equal(panel, panel_of(rows))


@numba.njit
def store_i16_panel(rows, panel):
    codes.store_i16_panel(address(rows), 2 * rows.shape[1], address(panel))


def test_panels_of_i16(rng):
    rows = rng.integers(-4095, 4096, (LANES, 6)).astype(np.int16)
    panel = np.zeros((3, LANES), np.int32)
    store_i16_panel(rows, panel)
    np.testing.assert_array_equal(panel, panel_of(rows))


# Tiles ----------------------------------------------------------------------------------------------------------------


@numba.njit
def tile_scores(rows, row_scales, count, first, second, blocks, block_codes, out):
    """A tile of the rows that there are, with two neighbouring panels."""
    numbers = four_from(0, count)
    x = Rows(rows_apart(address(rows), rows.shape[1], numbers), rows_apart(address(row_scales), 4 * blocks, numbers))
    at = rows_apart(address(out), 4 * out.shape[1], numbers)
    bt = rows_apart(address(out) + 4 * LANES, 4 * out.shape[1], numbers)
    p = Panel(address(first[0]), address(first[1]), address(first[2]))
    q = Panel(address(second[0]), address(second[1]), address(second[2]))
    score_tiles.tile_scores(x, x, p, q, blocks, block_codes, 4 * LANES, at, bt)


def random_panel(rng, blocks, block_codes):
    """Codes of `LANES` rows with their scales: the panel, its scales and starts, and the numbers."""
    values = rng.integers(-127, 128, (LANES, blocks, block_codes))
    scales = rng.random((blocks, LANES), dtype=np.float32)
    starts = (-BIAS * values.sum(-1)).T.astype(np.int32).copy()
    panel = panel_of(words_of(values.reshape(LANES, -1)))
    return (panel, scales, starts), (values * scales.T[:, :, None].astype(np.float64)).reshape(LANES, -1)


@pytest.mark.parametrize("count", range(1, score_tiles.SCORE_ROWS + 1))
@pytest.mark.parametrize(("blocks", "block_codes"), [(1, 32), (3, 64)])
def test_tile_of_scores(rng, count, blocks, block_codes):
    """Rows past the end repeat the last one; no other result is written."""
    values = rng.integers(-127, 128, (count, blocks, block_codes))
    scales = rng.random((count, blocks), dtype=np.float32)
    rows = (values + BIAS).reshape(count, -1).astype(CODE).view(np.uint8)
    (first, x), (second, y) = (random_panel(rng, blocks, block_codes) for _ in range(2))
    out = np.full((5, 2 * LANES + 3), np.nan, np.float32)
    tile_scores(rows, scales, count, first, second, blocks, block_codes, out)
    expected = (values * scales[:, :, None].astype(np.float64)).reshape(count, -1) @ np.concatenate([x, y]).T
    np.testing.assert_allclose(out[:count, : 2 * LANES], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    out[:count, : 2 * LANES] = np.nan
    assert np.isnan(out).all()


@numba.njit
def tile_rope_scores(rows, row_scales, count, first, second, out):
    numbers = four_from(0, count)
    x = Rows(rows_apart(address(rows), 2 * rows.shape[1], numbers), rows_apart(address(row_scales), 4, numbers))
    at = rows_apart(address(out), 4 * out.shape[1], numbers)
    bt = rows_apart(address(out) + 4 * LANES, 4 * out.shape[1], numbers)
    p, q = Panel(address(first[0]), address(first[1]), 0), Panel(address(second[0]), address(second[1]), 0)
    score_tiles.tile_rope_scores(x, x, p, q, rows.shape[1] // 2, at, bt)


@pytest.mark.parametrize("count", range(1, score_tiles.SCORE_ROWS + 1))
def test_tile_of_rope_scores(rng, count):
    """Added once where rows past the end repeat the last row."""
    numbers = 12
    rows = rng.integers(-4095, 4096, (count, numbers)).astype(np.int16)
    scales, before = rng.random(count, dtype=np.float32), rng.random((count, 2 * LANES), dtype=np.float32)
    panels, expected = [], []
    for _ in range(2):
        values = rng.integers(-4095, 4096, (LANES, numbers)).astype(np.int16)
        lane_scales = rng.random(LANES, dtype=np.float32)
        panels.append((panel_of(values.view(np.uint8)), lane_scales))
        expected.append((rows.astype(np.int64) @ values.T.astype(np.int64)) * scales[:, None] * lane_scales)
    out = before.copy()
    tile_rope_scores(rows, scales, count, *panels, out)
    expected = np.concatenate(expected, axis=1) + before
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@numba.njit
def tile_key_scores(rows, rope_rows, count, first, second, sizes, out):
    numbers = four_from(0, count)
    x = Rows(rows_apart(address(rows[0]), rows[0].shape[1], numbers), rows_apart(address(rows[1]), 4, numbers))
    y = Rows(
        rows_apart(address(rope_rows[0]), 2 * rope_rows[0].shape[1], numbers),
        rows_apart(address(rope_rows[1]), 4, numbers),
    )
    at = rows_apart(address(out), 4 * out.shape[1], numbers)
    bt = rows_apart(address(out) + 4 * LANES, 4 * out.shape[1], numbers)
    p = KeyPanel(_panel(first[0]), Panel(address(first[1][0]), address(first[1][1]), 0))
    q = KeyPanel(_panel(second[0]), Panel(address(second[1][0]), address(second[1][1]), 0))
    score_tiles.tile_key_scores(x, y, p, q, sizes, 4 * LANES, at, bt)


@numba.njit
def _panel(arrays):
    return Panel(address(arrays[0]), address(arrays[1]), address(arrays[2]))


@pytest.mark.parametrize("count", range(1, score_tiles.SCORE_ROWS + 1))
def test_tile_of_key_scores(rng, count):
    """Codes of 8 bits and rotated ones of 16 in one tile, which overwrites what was there."""
    block_codes, rotated = 96, 12
    values, rope = rng.integers(-127, 128, (count, block_codes)), rng.integers(-4095, 4096, (count, rotated))
    scales, rope_scales = rng.random((2, count), dtype=np.float32)
    rows = (values + BIAS).astype(CODE).view(np.uint8), scales
    panels, expected = [], []
    for _ in range(2):
        plain, numbers = random_panel(rng, 1, block_codes)
        codes_of_lanes = rng.integers(-4095, 4096, (LANES, rotated)).astype(np.int16)
        lane_scales = rng.random(LANES, dtype=np.float32)
        panels.append((plain, (panel_of(codes_of_lanes.view(np.uint8)), lane_scales)))
        expected.append((values * scales[:, None].astype(np.float64)) @ numbers.T)
        expected[-1] += (rope * rope_scales[:, None].astype(np.float64)) @ (codes_of_lanes.T * lane_scales)
    out = np.full((5, 2 * LANES + 3), np.nan, np.float32)
    rope_rows = rope.astype(np.int16), rope_scales
    tile_key_scores(rows, rope_rows, count, *panels, (1, block_codes, rotated // 2), out)
    expected = np.concatenate(expected, axis=1)
    np.testing.assert_allclose(out[:count, : 2 * LANES], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    out[:count, : 2 * LANES] = np.nan
    assert np.isnan(out).all()


@numba.njit
def tile_values(weights, weight_scales, count, blocks, panels, out):
    first, second = four_from(0, count), four_from(value_tiles.VALUE_ROWS - 4, count)
    of_weights, of_scales, of_out = address(weights), address(weight_scales), address(out)
    x = Rows(rows_apart(of_weights, weights.shape[1], first), rows_apart(of_scales, 4, first))
    y = Rows(rows_apart(of_weights, weights.shape[1], second), rows_apart(of_scales, 4, second))
    at, bt = rows_apart(of_out, 4 * out.shape[1], first), rows_apart(of_out, 4 * out.shape[1], second)
    value_tiles.tile_values(x, y, 4, blocks, address(panels), panels[0].nbytes, at, bt)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("count", range(1, value_tiles.VALUE_ROWS + 1))
def test_tile_of_values(rng, count, blocks):
    """Added once where rows past the end repeat the last row."""
    columns = value_tiles.VALUE_COLUMNS
    values, weights = rng.integers(-127, 128, (32 * blocks, columns)), rng.integers(0, 256, (count, 32 * blocks))
    scales, before = rng.random(count, dtype=np.float32), rng.random((count, columns), dtype=np.float32)
    of_blocks = [values[32 * i : 32 * i + 32].T for i in range(blocks)]
    panels = np.array([[panel_of(words_of(x[j : j + LANES])) for j in (0, LANES)] for x in of_blocks])
    out = before.copy()
    tile_values(weights.astype(CODE).view(np.uint8), scales, count, blocks, panels, out)
    expected = weights @ values * scales[:, None].astype(np.float64) + before
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


# Scales of a page -----------------------------------------------------------------------------------------------------


@numba.njit
def take_scales(halves, seen, bits, memory):
    blocks = halves.shape[1]
    page_scales.take_scales(address(halves), seen, blocks, bits, page_scales.page_scales_at(address(memory), blocks))


@pytest.mark.parametrize("seen", [1, 63, 64])
@pytest.mark.parametrize("blocks", [1, 8, 16, 19])
def test_scales_of_a_page(rng, blocks, seen):
    """Rows behind the last one seen are NaN, and get factors of 0; so do all blocks of a row of zeros."""
    padded = -(-blocks // 8) * 8
    halves = rng.random((PAGE, blocks)).astype(np.float16)
    halves[0], halves[seen:] = 0, np.nan
    memory = np.zeros(PAGE * (6 * padded + 4), np.uint8)
    take_scales(halves.view(np.uint16), seen, 8, memory)
    scales = memory[: 4 * PAGE * padded].view(np.float32).reshape(PAGE, padded)
    factors = memory[4 * PAGE * padded : 6 * PAGE * padded].view(np.int16).reshape(PAGE, padded)
    largest = memory[6 * PAGE * padded :].view(np.float32)
    np.testing.assert_array_equal(scales[:seen, :blocks], halves[:seen])
    assert not scales[:, blocks:].any()
    expected = halves[:seen].max(1)
    np.testing.assert_array_equal(largest, np.append(expected, np.zeros(PAGE - seen)))
    relative = halves[:seen].astype(np.float64) / np.where(expected > 0, expected, 1)[:, None]
    np.testing.assert_allclose(factors[:seen, :blocks], 32767 * relative, atol=1)
    assert not factors[seen:].any()
    assert not factors[:, blocks:].any()


def test_scales_of_codes_that_are_unpacked(rng):
    """Codes of 4 bits become multiples of 16. Scales have either sign, and a code of -128 times a factor fits int8."""
    halves, memory = rng.standard_normal((PAGE, 8)).astype(np.float16), np.zeros(PAGE * (6 * 8 + 4), np.uint8)
    take_scales(halves.view(np.uint16), PAGE, 4, memory)
    scales, factors = memory[: 32 * PAGE].view(np.float32), memory[32 * PAGE : 48 * PAGE].view(np.int16)
    np.testing.assert_array_equal(scales.reshape(PAGE, 8), halves.astype(np.float32) / 16)
    largest = np.abs(halves.astype(np.float64)).max(1)
    np.testing.assert_allclose(memory[48 * PAGE :].view(np.float32), largest / 16 * 128 / 127, rtol=1e-6)
    np.testing.assert_allclose(factors.reshape(PAGE, 8), 32767 * 127 / 128 * (halves / largest[:, None]), atol=1.5)
    assert np.abs(128 * factors.astype(np.int64) + (1 << 14) >> 15).max() == 127


# Split-kv and combine -------------------------------------------------------------------------------------------------


@numba.njit
def take_item(number, heads, partial, step):
    return splits.take_item(number, heads, partial, step)


@pytest.mark.parametrize("heads", [1, 16, 17, 40])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_items_cover_every_page_once(heads, count):
    lengths, groups = (1, 64, 65, 500), -(-heads // 16)
    positions, zeros = np.array(lengths, np.int32) - 1, np.zeros(4, np.int32)
    step = Step(zeros, positions, zeros, zeros, np.zeros((1, 8), np.int32))
    sums = np.full((4 * count, heads, 2), np.nan, np.float32)
    partial = splits.Splits(count, 32, np.zeros((4 * count, 16 * groups, 32), np.float32), sums)
    seen = {}
    for number in range(partial.items):
        item = take_item(number, heads, partial, step)
        assert item.length == lengths[item.token]
        assert item.row // count == item.token
        for head in range(item.begin, item.begin + item.heads):
            seen.setdefault((item.token, head), []).extend(range(item.first_page, item.stop_page))
    assert len(seen) == 4 * heads
    assert all(pages == list(range(-(-lengths[token] // 64))) for (token, _), pages in seen.items())
    np.testing.assert_array_equal(sums, np.broadcast_to(np.array([-np.inf, 0], np.float32), sums.shape))


@pytest.mark.parametrize("rank", [3, 32, 50])
def test_splits_are_combined(rng, rank):
    """Values of splits that had no pages are NaN; scores have any height."""
    tokens, heads, count = 2, 3, 4
    scores = rng.standard_normal((tokens, count, heads, 10)) * 5
    scores[0] += 900
    rows = rng.standard_normal((tokens, count, 10, rank))
    maxima = scores.max(-1)
    weights = 2 ** (scores - maxima[..., None])
    values = np.full((tokens * count, 16, 64), np.nan, np.float32)
    values[:, :heads, :rank] = np.einsum("tchp,tcpr->tchr", weights, rows).reshape(-1, heads, rank)
    sums = np.stack([maxima, weights.sum(-1)], -1).astype(np.float32).reshape(-1, heads, 2)
    values[1], sums[1] = np.nan, [-np.inf, 0]
    used = np.ones((tokens, count), bool)
    used[0, 1] = False
    out = np.full((tokens, heads, rank), np.nan, np.float32)
    splits.Splits(count, rank, values, sums).combine(out)
    for t in range(tokens):
        all_scores = np.concatenate(scores[t, used[t]], axis=-1)
        share = 2 ** (all_scores - all_scores.max(-1, keepdims=True))
        expected = share @ np.concatenate(rows[t, used[t]]) / share.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[t], expected, rtol=1e-4, atol=1e-4)
