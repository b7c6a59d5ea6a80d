"""What the CPU's attention has for itself (`test_attention.py` and `test_sparse.py` have what all backends share):
integers, in the cache and in expanded keys and values of 8 bits; the largest scores; portions of tokens."""

import numpy as np
import pytest
from cases import latent_layout, ragged_step, random_qtensor

from pymla import cpu, ggml, reference
from pymla.cpu.attention import index_keys, indexer, largest, sparse_form
from pymla.cpu.machine.simd_ordered import LOWEST
from pymla.pages import PAGE, Step


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)


def test_many_rotated_dimensions_stay_within_int32():
    rank, rope = 32, 200
    step = ragged_step([2], [1], 1)
    rows = np.zeros((2, PAGE, rope), np.float32)
    rows[:, step.block_tables[0, 0] * PAGE] = 1  # the first position: its latent row and key are ones
    cache = cpu.attention.latent_cache([(ggml.Q8_0, rank), (ggml.F16, rope)], PAGE)
    slots = np.arange(PAGE, dtype=np.int32)
    cpu.attention.store(rows[0, :, :rank], slots, cache.latent)
    cpu.attention.store(rows[1], slots, cache.rope)
    out = cpu.attention.absorbed(np.ones((1, 1, rank + rope), np.float32), *cache, step, 0.01, poisoned(1, 1, rank))
    assert np.allclose(out, 1 / (1 + np.exp(-0.01 * (rank + rope))), atol=0.01)


@pytest.mark.parametrize("cache_type", ["q8_0", "q6_0", "q5_0", "q4_0"])
def test_pages_have_the_numbers_of_the_reference(cache_type):
    rank, layout = 96, latent_layout(cache_type, 96, 32)
    rows, slots = normal(5, rank), np.array([3, 64, 127, 65, 70], np.int32)
    rows[1, 32:64], rows[2, 5], rows[4, 9] = 0, np.nan, np.inf
    read = []
    for be in (reference, cpu):
        latent = be.attention.latent_cache(layout, 2 * PAGE).latent
        latent.data[:] = 0
        with np.errstate(invalid="ignore"):
            be.attention.store(rows, slots, latent)
            read.append(be.attention.load(latent, np.array([1, 0], np.int32), poisoned(2 * PAGE, rank)))
    np.testing.assert_array_equal(np.isfinite(read[1]), np.isfinite(read[0]))
    finite = np.isfinite(read[0])
    np.testing.assert_array_equal(read[1][finite], read[0][finite])


def attended(be, length, tokens, *, qtypes=(ggml.Q4_0, ggml.Q4_0), fault=None, sizes=(128, 64, 128), exact=False):
    """The last tokens of a sequence, by expanded attention; `fault` is put into the values of a token of `c_kv`."""
    heads, rank, (nope, rope, v) = 2, 256, sizes
    k_b, v_b = random_qtensor(qtypes[0], heads, nope, rank), random_qtensor(qtypes[1], heads, v, rank, seed=1)
    c_kv, k_pe = normal(length, rank), normal(length, rope, seed=1)
    if fault is not None:
        c_kv[fault] = np.nan
    kv = be.attention.expand(c_kv, k_pe, k_b, v_b, be.attention.keys_values(length, heads, nope, rope, v, exact))
    positions = np.arange(length - tokens, length, dtype=np.int32)
    q = normal(tokens, heads, nope + rope, seed=2)
    return be.attention.expanded(q, kv, positions, (nope + rope) ** -0.5, poisoned(tokens, heads, v))


@pytest.mark.parametrize("sizes", [(128, 64, 128), (40, 8, 24)])
@pytest.mark.parametrize(
    "qtypes",
    # k_b is F16 where it was derived from a quantised one, beside a v_b as the file has it.
    [(ggml.Q4_0,) * 2, (ggml.Q8_0,) * 2, (ggml.F16,) * 2, (ggml.F16, ggml.Q4_0), (ggml.Q8_0, ggml.Q4_0)],
    ids=lambda pair: "-".join(map(ggml.NAME.get, pair)),
)
@pytest.mark.parametrize(("length", "tokens"), [(1, 1), (97, 97), (129, 5), (420, 300), (1100, 40)])
def test_expanded_attention_on_integers(length, tokens, qtypes, sizes):
    expected = attended(reference, length, tokens, qtypes=qtypes, sizes=sizes)
    actual = attended(cpu, length, tokens, qtypes=qtypes, sizes=sizes)
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.sqrt((error**2).mean()) < 0.02


def test_a_fault_shows_where_it_is_seen_and_nowhere_else():
    clean, faulty = attended(cpu, 300, 300), attended(cpu, 300, 300, fault=200)
    np.testing.assert_array_equal(faulty[:200], clean[:200])
    assert np.isnan(faulty[200:]).all()


# Sparse attention -----------------------------------------------------------------------------------------------------


def of_codes(codes):
    """Numbers that become these codes when they are mixed, exactly: the largest of each row of codes is 127."""
    width = codes.shape[-1]
    x = codes.astype(np.float32).reshape(-1, width)
    for row in x:
        index_keys.mix_key(row.ctypes.data, width)
    return (x / (width & -width)).reshape(codes.shape)


def last_tokens(length, tokens):
    """The step of the last tokens of a sequence on shuffled pages."""
    return ragged_step([length], [tokens], -(-length // PAGE))


def index_of(rows, step, qtype=ggml.Q8_0):
    """A cache of keys (S, D) of one sequence."""
    positions = np.arange(len(rows), dtype=np.int32)
    keys = cpu.attention.index_cache(qtype, rows.shape[1], step.block_tables.size * PAGE)
    cpu.attention.store(rows, step.block_tables[0, positions // PAGE] * PAGE + positions % PAGE, keys)
    return keys


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(1, 32), (5, 96), (3, 128)])
def test_scores_of_8_bits_are_exact(heads, width, extreme):
    rng, length, tokens = np.random.default_rng(0), 300, 3
    keys, queries = (rng.integers(-127, 128, (rows, width)) for rows in (length, tokens * heads))
    if extreme:
        keys, queries = np.sign(keys) * 127, np.sign(queries) * 127
    keys[:, 3], queries[:, 5] = 127, -127
    queries, weights = queries.reshape(tokens, heads, width), rng.choice([-1, 1], (tokens, heads))
    scores = (np.maximum(queries @ keys.T, 0) * weights[..., None]).sum(1)
    step, out = last_tokens(length, tokens), np.zeros((tokens, 40), np.int32)
    index = index_of(of_codes(keys), step)
    cpu.attention.choose(of_codes(queries), weights.astype(np.float32), index, step, out)
    for t, position in enumerate(step.positions):
        expected = np.sort(np.argsort(-scores[t, : position + 1], kind="stable")[:40])
        np.testing.assert_array_equal(out[t], expected)


def test_index_keys_with_a_large_number():
    """A number that is 100 times larger than its neighbours leaves them their precision, as all are mixed."""
    step, rows = last_tokens(PAGE, 1), normal(PAGE, 128)
    rows[:, 7] *= 100
    out = np.empty_like(rows)
    cpu.attention.load(index_of(rows, step), step.block_tables[0], out)
    assert (np.sqrt(((out - rows) ** 2).mean(1)) < 0.1).all()


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_key_that_is_no_number_is_chosen_last(fault):
    step, rows, out = last_tokens(100, 1), normal(100, 64), np.zeros((1, 98), np.int32)
    rows[[3, 50], 9] = fault
    cpu.attention.choose(normal(1, 4, 64), normal(1, 4), index_of(rows, step), step, out)
    assert not {3, 50} & set(out[0].tolist())


def in_order(scores):
    """float32 scores as int32 of the same order."""
    bits = np.where(scores > -np.inf, scores, np.float32(-np.inf)).astype(np.float32).view(np.int32)
    return np.where(bits == LOWEST, 0, bits ^ (bits >> 31 & ~LOWEST))


def scores_of(kind, count):
    rng, x = np.random.default_rng(count), normal(count)
    if kind == "equal":
        return np.round(x).astype(np.float32)
    if kind == "zero":
        return np.where(rng.random(count) < 0.01, x, rng.choice([0, -0.0], count)).astype(np.float32)
    if kind == "no number":
        return np.where(rng.random(count) < 0.7, rng.choice([np.nan, np.inf, -np.inf], count), x).astype(np.float32)
    # What a sample of registers says is wrong then.
    return x + np.float32(100) * (np.arange(count) % 256 < 16) if kind == "periodic" else x


@pytest.mark.parametrize("kind", ["normal", "equal", "zero", "no number", "periodic"])
@pytest.mark.parametrize("count", [65, 1000, 4096, 4097, 30_001])
def test_the_largest_scores(count, kind):
    scores, padded = scores_of(kind, count), -(-count // PAGE) * PAGE
    ordered = np.full((1, padded), LOWEST, np.int32)
    ordered[0, :count] = in_order(scores)
    best = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    for k in (1, 40, 64, count // 3, min(2048, count - 1), count - 1):
        out = np.zeros((1, k), np.int32)
        largest.take_largest(0, 1, ordered, np.array([count - 1], np.int32), out)
        np.testing.assert_array_equal(out[0], np.sort(best[:k]))


def chosen_and_attended(step, keys, cache, k):
    """What `choose` and `sparse` give for random queries."""
    tokens = len(step.positions)
    chosen, out = np.zeros((tokens, k), np.int32), poisoned(tokens, 3, 64)
    cpu.attention.choose(normal(tokens, 5, 64), normal(tokens, 5), keys, step, chosen)
    cpu.attention.sparse(normal(tokens, 3, 96), *cache, step, chosen, 0.1, out)
    return chosen, out


def sparse_caches(cache_type, step):
    """The indexer's keys and a latent cache of a sequence, filled."""
    slots = step.block_tables.size * PAGE
    cache = cpu.attention.latent_cache(latent_layout(cache_type, 64, 32), slots)
    for rows, width in zip(cache, (64, 32), strict=True):
        cpu.attention.store(normal(slots, width), np.arange(slots, dtype=np.int32), rows)
    index_type = ggml.Q8_0 if cache_type == "q8_0" else ggml.F16
    return index_of(normal(slots, 64), step, index_type), cache


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_tokens_in_portions(cache_type, monkeypatch):
    step = last_tokens(400, 20)
    caches = sparse_caches(cache_type, step)
    whole = chosen_and_attended(step, *caches, 130)
    monkeypatch.setattr(indexer, "_SCORE_BYTES", 4 * PAGE * 7 * 3)
    monkeypatch.setattr(sparse_form, "_VALUE_BYTES", 4 * 3 * 64 * 8)
    for found, expected in zip(chosen_and_attended(step, *caches, 130), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_threads_share_a_token(cache_type):
    """By positions, and from four threads on by heads as well."""
    step, before = last_tokens(400, 1), cpu.thread_count()
    caches, chosen = sparse_caches(cache_type, step), np.arange(0, 390, 3, dtype=np.int32)[None]
    found = []
    try:
        for count in (1, 2, 3, 9):
            cpu.set_threads(count)
            choice, _ = chosen_and_attended(step, *caches, 130)
            out = cpu.attention.sparse(normal(1, 53, 96), *caches[1], step, chosen, 0.1, poisoned(1, 53, 64))
            found.append((choice, out))
    finally:
        cpu.set_threads(before)
    for choice, out in found[1:]:
        np.testing.assert_array_equal(choice, found[0][0])
        np.testing.assert_allclose(out, found[0][1], atol=2e-3 if cache_type == "q8_0" else 2e-6)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_recorded_steps_see_other_lengths(cache_type):
    """Recorded with a short sequence, and replayed with one that fills its pages."""
    full = last_tokens(400, 2)
    caches = sparse_caches(cache_type, full)
    step = full._replace(positions=np.array([0, 1], np.int32))
    graph = cpu.Graph(lambda: chosen_and_attended(step, *caches, 130))
    for positions in ([0, 1], [129, 130], [398, 399], [5, 300]):
        step.positions[:] = positions
        expected = chosen_and_attended(Step(*(array.copy() for array in step)), *caches, 130)
        for found, wanted in zip(graph.replay(), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
