"""What the CPU's attention has for itself (`test_attention.py` has what all backends share): integers, in the cache and
in expanded keys and values of 8 bits."""

import numpy as np
import pytest
from cases import latent_layout, ragged_step, random_qtensor

from pymla import cpu, ggml, reference
from pymla.pages import PAGE


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
