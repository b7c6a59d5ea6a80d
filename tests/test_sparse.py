"""Sparse attention of every backend against its definition: the choice of positions, and attention over them.

Rows that a token may not see, or that were not chosen, are poisoned with NaN.
"""

import numpy as np
import pytest
from cases import poisoned_cache, ragged_step
from compare import assert_close
from definitions import index_scores, sparse
from test_attention import FLOAT, INTEGERS, PAGES, in_blocks, latent_layout, on_tensor_cores
from tested import SIMULATED, each_backend

from pymla import ggml
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.tensor import QTensor

pytestmark = [each_backend, pytest.mark.filterwarnings("error")]

#: Types of the indexer's keys.
INDEX_TYPES = (ggml.F32, ggml.F16, ggml.BF16, ggml.Q8_0)

#: Lengths of the sequences and their new tokens.
RAGGED = ((3, 65, 130), (1, 2, 2)) if SIMULATED else ((3, 63, 64, 65, 300), (3, 1, 3, 2, 20))

#: The indexer's heads, numbers of a key, and how many positions are chosen.
CHOICES = [(4, 32, 40), (2, 64, 64), (1, 32, 200)]
if not SIMULATED:
    CHOICES += [(64, 128, 64), (32, 128, 1), (5, 96, 128), (16, 128, 299), (16, 128, 512)]


def index_of(backend, qtype, step, lengths, width):
    """The indexer's keys as ggml blocks, NaN where no token sees them, and in the backend's memory."""
    (blocks,) = poisoned_cache([(qtype, width)], step, lengths, PAGES)
    return blocks, backend.index(blocks)


def chosen_positions(backend, q, weights, keys, step, most):
    out = backend.put(np.full((len(q), most), 10**6, np.int32))
    backend.attention.choose(backend.put(q), backend.put(weights), keys, backend.put(step), out)
    return np.array(backend.memory.to_host(out))


@pytest.mark.parametrize("qtype", INDEX_TYPES, ids=lambda qtype: ggml.NAME[qtype])
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_choose(backend, case, qtype):
    heads, width, most = case
    lengths, new = RAGGED
    step = ragged_step(lengths, new, PAGES)
    blocks, keys = index_of(backend, qtype, step, lengths, width)
    q, weights = backend.normal(len(step.positions), heads, width), backend.normal(len(step.positions), heads, seed=1)
    chosen = chosen_positions(backend, q, weights, keys, step, most)
    rounded = backend.rounds and qtype != ggml.F32
    for t, scores in enumerate(index_scores(q, weights, blocks, step)):
        count = min(most, len(scores))
        positions = chosen[t, :count]
        assert (chosen[t, count:] == -1).all()
        assert (np.diff(positions) > 0).all()
        assert 0 <= positions[0] <= positions[-1] < len(scores)
        worst = np.sort(scores)[-count]  # a score that backends round may take another one's place
        assert scores[positions].min() >= worst - (0.02 if rounded else 1e-5) * np.abs(scores).max()


def test_choose_takes_the_lower_of_equal_scores(backend):
    """With numbers that no backend rounds: most scores are equal, and many are zero."""
    lengths, new = RAGGED
    step = ragged_step(lengths, new, PAGES)
    blocks = QTensor(ggml.F32, np.full((PAGES * PAGE, 32 * 4), 0xFF, np.uint8))
    rng = np.random.default_rng(3)
    for sequence, length in enumerate(lengths):
        for p in range(length):
            row = np.zeros(32, np.float32)
            row[0] = rng.integers(-1, 2)
            blocks.data[step.block_tables[sequence, p // PAGE] * PAGE + p % PAGE] = row.view(np.uint8)
    q = np.zeros((len(step.positions), 2, 32), backend.dtype)
    q[:, 0, 0], q[:, 1, 0] = 1, -1
    weights = np.tile(np.array([1, -1], backend.dtype), (len(q), 1))
    chosen = chosen_positions(backend, q, weights, backend.index(blocks), step, 40)
    for t, scores in enumerate(index_scores(q, weights, blocks, step)):
        if len(scores) > 40:
            expected = sorted(sorted(range(len(scores)), key=lambda p, scores=scores: (-scores[p], p))[:40])
            assert chosen[t].tolist() == expected


#: Heads, rank, rotated numbers, and how many positions are chosen.
SPARSE = [(3, 64, 32, 40)]
SPARSE += [(16, 32, 16, 64), (17, 64, 16, 100)] if SIMULATED else [(16, 512, 64, 64), (33, 96, 64, 130), (1, 64, 12, 1)]


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse(backend, case, cache_type):
    heads, rank, rope, most = case
    lengths, new = RAGGED
    step, layout = ragged_step(lengths, new, PAGES), latent_layout(cache_type, rank, rope)
    rng, seen = np.random.default_rng(4), step.positions + 1
    chosen = np.full((len(seen), most), -1, np.int32)
    for t, count in enumerate(np.minimum(seen, most)):
        chosen[t, :count] = np.sort(rng.choice(seen[t], count, replace=False))
    blocks = poisoned_cache(layout, step, lengths, PAGES)
    slots = [
        step.block_tables[step.seq_of[t], p // PAGE] * PAGE + p % PAGE
        for t, row in enumerate(chosen)
        for p in row
        if p >= 0
    ]
    for rows in blocks:  # not a single row that no token chose may be read
        kept = rows.data[slots]
        rows.data[:] = 0xFF
        rows.data[slots] = kept
    q = backend.normal(len(seen), heads, rank + rope, seed=2)
    expected = sparse(q, *blocks, step, chosen, 0.1)
    assert np.isfinite(expected).all()
    cache = backend.latent(layout, blocks)
    actual = backend.result_in_part(backend.attention.sparse, q, *cache, step, chosen, 0.1, shape=expected.shape)
    tolerance = {"cpu": INTEGERS if in_blocks(cache_type) else FLOAT, "cuda": on_tensor_cores(cache_type)}
    assert_close(actual, expected, **backend.tolerance(**tolerance))


def test_all_positions_chosen_is_the_absorbed_form(backend):
    lengths, new = RAGGED
    step, layout = ragged_step(lengths, new, PAGES), latent_layout("f32", 64, 16)
    blocks = poisoned_cache(layout, step, lengths, PAGES)
    q, cache = backend.normal(len(step.positions), 4, 80, seed=2), backend.latent(layout, blocks)
    chosen = np.full((len(q), max(lengths)), -1, np.int32)
    for t, position in enumerate(step.positions):
        chosen[t, : position + 1] = np.arange(position + 1)
    shape = len(q), 4, 64
    actual = backend.result(backend.attention.sparse, q, *cache, step, chosen, 0.1, shape=shape)
    expected = backend.result(backend.attention.absorbed, q, *cache, step, 0.1, shape=shape)
    tolerance = {"cpu": FLOAT, "cuda": on_tensor_cores("f32")}
    assert_close(actual, expected.astype(np.float64), **backend.tolerance(**tolerance))


def test_no_token(backend):
    step = Step(*(np.zeros(0, np.int32) for _ in range(4)), np.zeros((1, 1), np.int32))
    keys = backend.attention.index_cache(ggml.F32, 32, PAGE)
    out = backend.put(np.zeros((0, 4), np.int32))
    backend.attention.choose(backend.unset(0, 2, 32), backend.unset(0, 2), keys, backend.put(step), out)
    cache = backend.attention.latent_cache(latent_layout("f32", 32, 16), PAGE)
    backend.attention.sparse(backend.unset(0, 2, 48), *cache, backend.put(step), out, 0.1, backend.unset(0, 2, 32))
