"""What the GPU's sparse attention has for itself (`test_sparse.py` has what all backends share): scores in memory, the
choice among many of them, chosen positions that are split over blocks, and the memory of a block."""

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import latent_layout, poisoned_cache, ragged_step
from compare import assert_close
from definitions import index_scores, sparse
from numba import types
from test_attention import HALF, PAGES
from tested import BACKENDS

from pymla import ggml
from pymla.cuda import attention, memory
from pymla.cuda.attention import indexer, top_positions
from pymla.cuda.attention.index_input import GROUP
from pymla.cuda.attention.index_scores import index_scores as write_scores
from pymla.cuda.attention.index_scores import plan_of
from pymla.cuda.attention.sparse_form import TEAMS, sparse_in_splits, sparse_kernel
from pymla.cuda.attention.steps import StepArrays
from pymla.cuda.runtime.jit import KERNELS, kernel
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.tensor import QTensor

CUDA = BACKENDS[0]
F1, L1 = types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")
#: Numbers that no factor of 16 bits rounds, and products of them that no sum rounds.
SMALL = np.arange(-4, 5)


def on_device(step):
    return Step(*map(memory.to_device, step))


def scored(qtype, heads, width, lengths, new, most):
    """Scores and maxima of a step on the GPU, its step, and its scores as they should be: of small integers, so that
    every backend computes the same."""
    rng, step = np.random.default_rng(heads), ragged_step(lengths, new, PAGES)
    (blocks,) = poisoned_cache([(ggml.F32, width)], step, lengths, PAGES)
    rows = blocks.data.view(np.float32)
    rows[np.isfinite(rows)] = rng.choice(SMALL, np.isfinite(rows).sum())
    if qtype == ggml.Q8_0:  # the scale of a block is 1
        rows[:, ::32][np.isfinite(rows[:, ::32])] = 127
    q = rng.choice(SMALL, (len(step.positions), heads, width)).astype(np.float32)
    weights = rng.choice(SMALL, (len(q), heads)).astype(np.float32)
    there, keys = on_device(step), CUDA.index(QTensor(qtype, blocks.data) if qtype == ggml.F32 else cast(blocks, qtype))
    arrays = StepArrays.of(there)
    scores = memory.empty((len(q), arrays.longest), np.float32)
    maxima = memory.empty((len(q), arrays.longest // GROUP), np.float32)
    write_scores(memory.to_device(q), memory.to_device(weights), keys, arrays, most, scores, maxima)
    return memory.to_host(scores), memory.to_host(maxima), step, index_scores(q, weights, blocks, step)


def cast(blocks, qtype):
    """Rows of float32 in another type; rows that are not numbers stay NaN."""
    from pymla.reference.quant import quantise

    rows = blocks.data.view(np.float32)
    data = np.full((len(rows), ggml.row_bytes(qtype, rows.shape[1])), 0xFF, np.uint8)
    finite = np.isfinite(rows).all(1)
    data[finite] = quantise(rows[finite], qtype)
    return QTensor(qtype, data)


#: Type, heads, numbers of a key, lengths of sequences, and their new tokens: single tokens whose positions warps share,
#: and prompts of which they have a token each; warps that share the heads of a token, two and four of them; more heads
#: than fit at a time.
SCORES = [
    (ggml.F16, 3, 32, (200, 70), (1, 1)),
    (ggml.BF16, 33, 32, (150,), (1,)),
    (ggml.Q8_0, 65, 32, (130,), (1,)),
    (ggml.F16, 140, 32, (131,), (1,)),
    (ggml.F32, 9, 32, (135, 70), (1, 1)),
    (ggml.F16, 17, 64, (140, 60), (5, 2)),
    (ggml.Q8_0, 40, 32, (135,), (3,)),
    (ggml.F32, 3, 32, (70, 133), (3, 2)),
]


@pytest.mark.parametrize("case", SCORES, ids=str)
def test_scores(case):
    """They are exact, those of positions that are not seen are −inf, and a token of few positions has none."""
    qtype, heads, width, lengths, new = case
    scores, maxima, step, expected = scored(qtype, heads, width, lengths, new, most=64)
    for t, wanted in enumerate(expected):
        seen = len(wanted)
        assert seen == step.positions[t] + 1
        if seen <= 64:
            assert np.isnan(scores[t]).all()
            assert np.isnan(maxima[t]).all()
            continue
        groups = -(-seen // GROUP)
        np.testing.assert_array_equal(scores[t, :seen], wanted)
        np.testing.assert_array_equal(scores[t, seen : GROUP * groups], -np.inf)
        np.testing.assert_array_equal(maxima[t, :groups], scores[t, : GROUP * groups].reshape(-1, GROUP).max(1))


def test_scores_that_are_not_numbers_are_the_smallest():
    """Of a key with an infinite number, whose products are NaN and infinite."""
    step = ragged_step((100,), (1,), PAGES)
    (blocks,) = poisoned_cache([(ggml.F16, 32)], step, (100,), PAGES)
    rows = blocks.data.view(np.float16)
    slots = step.block_tables[0, np.arange(100) // PAGE] * PAGE + np.arange(100) % PAGE
    rows[slots] = 1
    rows[slots[[5, 70]], :2] = np.inf, -np.inf
    q, weights = memory.to_device(np.ones((1, 1, 32), np.float32)), memory.to_device(np.ones((1, 1), np.float32))
    out = memory.empty((1, 98), np.int32)
    attention.choose(q, weights, QTensor(ggml.F16, memory.to_device(blocks.data)), on_device(step), out)
    assert memory.to_host(out)[0].tolist() == [p for p in range(100) if p not in (5, 70)]


def choose_among(scores, most, longest=None):
    """The choice among given scores of one token."""
    seen = len(scores)
    longest = longest or -(-seen // PAGE) * PAGE
    values = np.full((1, longest), -np.inf, np.float32)
    values[0, :seen] = scores
    maxima = values.reshape(1, -1, GROUP).max(2)
    there = [memory.to_device(each) for each in (values, maxima)]
    one, table = np.zeros(1, np.int32), np.zeros((1, longest // PAGE), np.int32)
    step = StepArrays.of(on_device(Step(one, np.array([seen - 1], np.int32), one, one, table)))
    groups, out = memory.empty((1, most), np.int32), memory.empty((1, most), np.int32)
    addresses = there[0].address, there[1].address
    top_positions.choose_positions[1, top_positions.THREADS](addresses, longest, step, groups, out)
    return memory.to_host(out)[0].tolist()


def best(scores, most):
    return sorted(sorted(range(len(scores)), key=lambda p: (-scores[p], p))[:most])


RNG = np.random.default_rng(7)
ROWS = {
    "normal": RNG.standard_normal(1000),
    "equal": np.zeros(700),
    "two values": RNG.integers(0, 2, 900),
    "ascending": np.arange(640) / 7,
    "descending": -np.arange(641.0),
    "last bits": 1 + RNG.integers(0, 64, 800) * np.finfo(np.float32).eps,
    "infinite": np.where(RNG.random(700) < 0.9, -np.inf, np.inf),
    "signs of zero": np.where(RNG.random(600) < 0.5, -0.0, 0.0),
    "large and tiny": RNG.standard_normal(777) * 10.0 ** RNG.integers(-44, 38, 777),
}


@pytest.mark.parametrize("most", [1, 40, 100, 511])
@pytest.mark.parametrize("name", ROWS)
def test_the_choice_is_exact(name, most):
    """With groups that are chosen first, where there are more of them than positions are chosen, and without."""
    scores = ROWS[name].astype(np.float32)
    assert choose_among(scores, most) == best(scores, most)


def test_as_many_positions_as_are_chosen():
    assert choose_among(np.zeros(5, np.float32), 5) == [0, 1, 2, 3, 4]
    assert choose_among(np.zeros(3, np.float32), 5) == [0, 1, 2, -1, -1]
    assert choose_among(np.array([1, 0, 2, 0, 0, 0], np.float32), 5) == [0, 1, 2, 3, 4]


def test_keys_are_in_the_order_of_numbers():
    numbers = np.array([-np.inf, -3e38, -1, -1e-45, 0, 1e-45, 1, 3e38, np.inf], np.float32)
    keys = memory.empty(len(numbers), np.int64)

    def body(x, out):
        for i in range(len(x)):
            out[i] = top_positions.key_of(x[i])

    made = kernel(F1, L1, variant="test")(body)
    del KERNELS[made.__name__]
    made[1, 1](memory.to_device(numbers), keys)
    found = memory.to_host(keys)
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < 2**32


def test_tokens_are_scored_by_parts(monkeypatch):
    """As many at a time as their scores have room."""
    lengths, new, heads, width, most = (75, 90), (6, 3), 2, 32, 20
    step = ragged_step(lengths, new, PAGES)
    (blocks,) = poisoned_cache([(ggml.F32, width)], step, lengths, PAGES)
    q, weights = CUDA.normal(9, heads, width), CUDA.normal(9, heads, seed=1)
    launched = []
    original = indexer.index_scores
    monkeypatch.setattr(indexer, "index_scores", lambda *a: launched.append(len(a[0])) or original(*a))

    def chosen():
        out = CUDA.put(np.zeros((9, most), np.int32))
        attention.choose(CUDA.put(q), CUDA.put(weights), CUDA.index(blocks), on_device(step), out)
        return memory.to_host(out)

    together = chosen()
    monkeypatch.setattr(indexer, "CHOICE_SCRATCH", 1)
    np.testing.assert_array_equal(chosen(), together)
    assert launched == [9, 4, 4, 1]


def test_where_all_positions_are_chosen_there_are_no_scores(monkeypatch):
    """As the shape of the tables says."""
    monkeypatch.setattr(indexer, "index_scores", None)
    step = ragged_step((70,), (1,), PAGES)
    keys = QTensor(ggml.F16, memory.empty((PAGES * PAGE, 64), np.uint8))
    out = memory.empty((1, 128), np.int32)
    q, weights = memory.empty((1, 2, 32), np.float32), memory.empty((1, 2), np.float32)
    attention.choose(q, weights, keys, on_device(step), out)
    assert memory.to_host(out)[0].tolist() == [*range(70), *[-1] * 58]


def check_sparse(cache_type, heads, rank, rope, counts, splits, teams=1):
    """Tokens of one sequence each, with so many chosen positions of 300."""
    lengths = (300,) * len(counts)
    step = ragged_step(lengths, (1,) * len(counts), 5 * len(counts))
    rng, layout = np.random.default_rng(0), latent_layout(cache_type, rank, rope)
    blocks = poisoned_cache(layout, step, lengths, 5 * len(counts))
    chosen = np.full((len(counts), max(counts)), -1, np.int32)
    for row, count in zip(chosen, counts, strict=True):
        row[:count] = np.sort(rng.choice(300, count, replace=False))
    q = CUDA.normal(len(counts), heads, rank + rope, seed=2)
    cache, out = CUDA.latent(layout, blocks), CUDA.unset(len(counts), heads, rank)
    sparse_in_splits(CUDA.put(q), *cache, on_device(step), CUDA.put(chosen), 0.1, out, splits, teams)
    assert_close(memory.to_host(out), sparse(q, *blocks, step, chosen, 0.1), **HALF)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_chosen_positions_split_over_blocks(cache_type):
    """Shares of four tiles or more; lists that end early have fewer."""
    check_sparse(cache_type, 3, 32, 16, (280, 129, 33, 1), 9)


@pytest.mark.parametrize("cache_type", [name for name, qtype in CACHE_TYPES.items() if ggml.BLOCK_SIZE[qtype] > 1])
def test_chosen_rows_that_wait_in_their_own_type(cache_type):
    """Rows of blocks are copied as they are where 16 divides their bytes."""
    assert ggml.row_bytes(CACHE_TYPES[cache_type], 256) % 16 == 0
    check_sparse(cache_type, 2, 256, 16, (40,), None)
    check_sparse(cache_type, 17, 256, 16, (3,), None, teams=2)


@pytest.mark.parametrize("heads", [3, 17, 33])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "f32"])
def test_teams_share_rows(cache_type, heads):
    """Of heads that do not fill the last team, or leave one without any."""
    check_sparse(cache_type, heads, 32, 16, (70, 33), 1, teams=2)
    check_sparse(cache_type, heads, 32, 16, (280,), 2, teams=2)


def test_what_does_not_fit_is_refused():
    step, one = on_device(ragged_step((1,), (1,), 1)), memory.zeros((1, 1), np.int32)
    mixed = QTensor(CACHE_TYPES["q4_0"], memory.zeros((PAGE, ggml.row_bytes(CACHE_TYPES["q4_0"], 32)), np.uint8))
    q, weights = memory.zeros((1, 1, 32), np.float32), memory.zeros((1, 1), np.float32)
    with pytest.raises(PymlaError, match="choose: keys are mixed rows"):
        attention.choose(q, weights, mixed, step, one)
    with pytest.raises(PymlaError, match="at most 256 numbers on the CUDA backend, not 288"):
        plan_of(ggml.F16, 288, 1)
    rows = [QTensor(ggml.F16, memory.zeros((PAGE, 2 * width), np.uint8)) for width in (8, 16)]
    with pytest.raises(PymlaError, match="16 divides"):
        attention.sparse(
            memory.zeros((1, 1, 24), np.float32), *rows, step, one, 1.0, memory.empty((1, 1, 8), np.float32)
        )


def test_blocks_fit_shared_memory():
    """Two blocks on a multiprocessor of Ampere's large cards, which have 164 KiB, one on those that have 100."""
    layouts = [tuple(qtype for qtype, _ in latent_layout(name, 512, 64)) for name in CACHE_TYPES]
    sizes = [sparse_kernel(layout, 512, 64, 1)[1] for layout in layouts]
    sizes += [plan_of(ggml.F16, 128, heads).shared_bytes for heads in (32, 64)]
    for nbytes in sizes:
        assert 2 * (nbytes + 1024) <= 164 * 1024
        assert nbytes + 1024 <= 100 * 1024
    for layout in layouts:  # a block of several teams has a multiprocessor for itself
        assert sparse_kernel(layout, 512, 64, TEAMS)[1] + 1024 <= 100 * 1024
