"""What the NumPy reference has for itself: that its two forms of attention are one, float32 beside float64, memory and
graphs. `test_matrices.py`, `test_experts.py` and `test_attention.py` compare its operations with their definitions."""

import numpy as np
import pytest
from cases import poisoned_cache, ragged_step, random_qtensor, rows_to_norm
from definitions import attend, dense, expand, rms_norm, rows_of

from pymla import ggml
from pymla.pages import CACHE_TYPES
from pymla.reference import attention, graph, memory, norm

pytestmark = pytest.mark.filterwarnings("error")

CLOSE = {"rtol": 64 * np.finfo(np.float64).eps, "atol": 64 * np.finfo(np.float64).eps}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def poisoned(*shape):
    return np.full(shape, np.nan)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norm_in_the_type_of_its_rows(dtype):
    """In place as well, to their last digits."""
    x, weight, eps = rows_to_norm(70)
    x = x.astype(dtype) / 3
    expected = rms_norm(x, weight, eps)
    assert norm.rms_norm(x, weight, eps, x) is x
    np.testing.assert_allclose(x, expected, rtol=16 * np.finfo(dtype).eps, atol=1e-30)


LENGTHS, NEW, PAGES = (1, 64, 65, 130), (1, 1, 3, 20), 9
HEADS, RANK, NOPE, ROPE, V = 3, 64, 32, 32, 32


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_absorbed_and_expanded_attention_are_one(cache_type):
    """Each token of a ragged step, by the expanded keys and values of its sequence. What it must not see is NaN."""
    qtype, scale = CACHE_TYPES[cache_type], 0.11
    step = ragged_step(LENGTHS, NEW, PAGES)
    latent, k_pe = poisoned_cache([(qtype, RANK), (ggml.F16, ROPE)], step, LENGTHS, PAGES)
    k_b, v_b = random_qtensor(ggml.Q8_0, HEADS, NOPE, RANK), random_qtensor(ggml.F16, HEADS, V, RANK, seed=1)
    q = normal(len(step.tokens), HEADS, NOPE + ROPE)
    folded = attention.absorb(q, k_b, poisoned(len(q), HEADS, RANK + ROPE))
    mixed = attention.absorbed(folded, latent, k_pe, step, scale, poisoned(len(q), HEADS, RANK))
    for b, length in enumerate(LENGTHS):
        c = attention.load(latent, step.block_tables[b], poisoned(length, RANK))
        np.testing.assert_array_equal(c, rows_of(latent, step, b, length))
        rotated = rows_of(k_pe, step, b, length)
        k, v = expand(c, rotated, k_b, v_b)
        memory = attention.keys_values(length, HEADS, NOPE, ROPE, V, True, np.float64)
        assert memory.keys.dtype == memory.values.dtype == np.float64
        assert attention.keys_values(1, 1, 1, 1, 1, True).keys.dtype == np.float32
        keys, values = attention.expand(c, rotated, k_b, v_b, memory)
        np.testing.assert_allclose(keys, k, **CLOSE)
        np.testing.assert_allclose(values, v, **CLOSE)
        tokens = np.flatnonzero(step.seq_of == b)
        out = attention.expanded(q[tokens], memory, step.positions[tokens], scale, poisoned(len(tokens), HEADS, V))
        for t, result in zip(tokens, out, strict=True):
            seen = step.positions[t] + 1
            for h, matrix in enumerate(dense(v_b)):
                expected = attend(q[t, h], k[:seen, h], v[:seen, h], scale)
                np.testing.assert_allclose(result[h], expected, **CLOSE)
                np.testing.assert_allclose(matrix @ mixed[t, h], expected, **CLOSE)


def test_memory_is_the_hosts():
    array = np.arange(6).reshape(3, 2)
    assert memory.to_device(array) is memory.to_host(array) is array
    empty = memory.empty((3, 2), np.int16)
    assert (empty.shape, empty.dtype) == ((3, 2), np.int16)
    memory.write(empty, array)
    np.testing.assert_array_equal(empty, array)
    memory.copy(array[:1], empty[2:])
    np.testing.assert_array_equal(empty, [[0, 1], [2, 3], [0, 1]])
    rows = memory.take(array, np.array([2, 0]))
    np.testing.assert_array_equal(rows, [[4, 5], [0, 1]])
    rows[:] = 9
    assert array[2, 0] == 4  # a copy


def test_a_graph_computes_again():
    calls = []
    recorded = graph.Graph(lambda: calls.append(1) or len(calls))
    assert [recorded.replay(), recorded.replay()] == [1, 2]
    assert graph.Graph.size(3) == 3
