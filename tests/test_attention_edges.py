"""Attention at the edges of what it takes, on the backends of the host: nothing to do, positions in any order, keys and
values of two types, and types that a form does not have."""

import numpy as np
import pytest
from cases import latent_layout, poisoned_cache, ragged_step, random_qtensor
from compare import assert_close
from test_attention import FULL_TYPES

from pymla import cpu, ggml, reference
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.tensor import QTensor

EXACT = {"rtol_max": 2e-6, "reason": "order of summation"}


@pytest.fixture(params=[reference, cpu], ids=lambda backend: backend.NAME)
def backend(request):
    return request.param


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_no_tokens(backend, cache_type):
    """Every operation does nothing, and leaves the cache as it is."""
    attention, (heads, rank, rope, v) = backend.attention, (3, 64, 32, 32)
    none = np.zeros(0, np.int32)
    step = Step(none, none, none, none, np.zeros((1, 1), np.int32))
    cache = attention.latent_cache(latent_layout(cache_type, rank, rope), PAGE)
    for rows in cache:
        rows.data[:] = 0xFF
    attention.store(poisoned(0, rank), none, cache.latent)
    assert (cache.latent.data == 0xFF).all()
    assert attention.load(cache.latent, none, poisoned(0, rank)).shape == (0, rank)
    q = poisoned(0, heads, rank + rope)
    for attend in (attention.absorbed, attention.absorbed_materialised):
        assert attend(q, *cache, step, 0.1, poisoned(0, heads, rank)).shape == (0, heads, rank)
    if cache_type in FULL_TYPES:
        no_tokens_of_whole_heads(attention, CACHE_TYPES[cache_type], heads, v, step)
    k_b, v_b = random_qtensor(ggml.Q4_0, heads, 32, rank), random_qtensor(ggml.Q4_0, heads, v, rank)
    assert attention.absorb(poisoned(0, heads, 64), k_b, poisoned(0, heads, rank + 32)).shape[0] == 0
    for exact in (True, False):
        made = attention.keys_values(0, heads, 32, 32, v, exact)
        assert attention.expand(poisoned(0, rank), poisoned(0, 32), k_b, v_b, made) is made
        out = attention.expanded(poisoned(0, heads, 64), made, none, 0.1, poisoned(0, heads, v))
        assert out.shape == (0, heads, v)


def no_tokens_of_whole_heads(attention, qtype, heads, v, step):
    whole = [QTensor(qtype, np.full((PAGE, ggml.row_bytes(qtype, heads * size)), 0xFF, np.uint8)) for size in (64, v)]
    assert attention.full(poisoned(0, heads, 64), *whole, step, 0.1, poisoned(0, heads, v)).shape == (0, heads, v)


@pytest.mark.parametrize("exact", [True, False])
def test_expanded_at_positions_in_any_order(backend, exact):
    """A query sees the rows up to its own position, wherever it stands among the others."""
    heads, rank, nope, rope, v, length = 2, 64, 48, 16, 32, 300
    k_b, v_b = random_qtensor(ggml.F32, heads, nope, rank), random_qtensor(ggml.F32, heads, v, rank, seed=1)
    made = backend.attention.keys_values(length, heads, nope, rope, v, exact)
    backend.attention.expand(normal(length, rank), normal(length, rope, seed=1), k_b, v_b, made)
    q = normal(length, heads, nope + rope, seed=2)
    ascending = np.arange(length, dtype=np.int32)
    expected = backend.attention.expanded(q, made, ascending, 0.1, poisoned(length, heads, v))
    order = np.random.default_rng(3).permutation(length)
    actual = backend.attention.expanded(q[order], made, ascending[order], 0.1, poisoned(length, heads, v))
    assert_close(actual, expected[order], **EXACT)


def test_full_at_positions_in_any_order(backend):
    heads, size, v, lengths, pages = 2, 32, 32, (130, 70), 5
    step = ragged_step(lengths, lengths, pages)
    cache = poisoned_cache([(ggml.F16, heads * size), (ggml.F16, heads * v)], step, lengths, pages)
    q = normal(200, heads, size)
    expected = backend.attention.full(q, *cache, step, 0.1, poisoned(200, heads, v))
    order = np.concatenate([np.random.default_rng(3).permutation(130), np.arange(130, 200)[::-1]])
    mixed = Step(*(array[order] for array in step[:4]), step.block_tables)
    actual = backend.attention.full(q[order], *cache, mixed, 0.1, poisoned(200, heads, v))
    assert_close(actual, expected[order], **EXACT)


# Keys are read by functions of their own type, and so are values: each type has another beside it once.
@pytest.mark.parametrize(("keys", "values"), zip(FULL_TYPES, FULL_TYPES[1:] + FULL_TYPES[:1], strict=True))
def test_full_takes_keys_and_values_of_every_type(keys, values):
    heads, size, v, lengths = 3, 96, 64, (1, 65)
    step = ragged_step(lengths, (1, 3), 4)
    cache = poisoned_cache([(CACHE_TYPES[keys], heads * size), (CACHE_TYPES[values], heads * v)], step, lengths, 4)
    q = normal(4, heads, size)
    expected, actual = (be.attention.full(q, *cache, step, 0.1, poisoned(4, heads, v)) for be in (reference, cpu))
    assert np.isfinite(expected).all()
    assert_close(actual, expected, **EXACT)


def test_full_refuses_types_without_rows_of_heads(backend):
    """Blocks that reach over two heads, and the CPU's rows that lie page by page."""
    step = ragged_step((5,), (1,), 1)
    q, out = normal(1, 2, 48), poisoned(1, 2, 32)
    values = QTensor(ggml.F32, np.zeros((PAGE, 256), np.uint8))
    keys = QTensor(ggml.Q8_0, np.zeros((PAGE, 102), np.uint8))
    with pytest.raises(PymlaError, match=r"full: keys is Q8_0; a type whose blocks divide a head's 48 numbers"):
        backend.attention.full(q, keys, values, step, 0.1, out)
    latent = cpu.attention.latent_cache([(ggml.Q8_0, 96), (ggml.F16, 64)], PAGE)
    keys = QTensor(ggml.F32, np.zeros((PAGE, 384), np.uint8))
    for cache in [(latent.latent, values), (keys, latent.rope)]:
        with pytest.raises(PymlaError, match=r"full: (keys|values) is of type 10\d\d"):
            backend.attention.full(q, *cache, step, 0.1, out)
