"""NumPy's reference against the definitions, a number at a time, in float64: a step in a narrower type shows."""

import numpy as np
import pytest
from cases import TIES, poisoned_cache, ragged_step, random_qtensor, routing, rows_to_norm

from pymla import ggml
from pymla.pages import CACHE_TYPES, PAGE
from pymla.reference import attention, graph, memory, moe, norm, quant, rope
from pymla.tensor import QTensor

pytestmark = pytest.mark.filterwarnings("error")

CLOSE = {"rtol": 64 * np.finfo(np.float64).eps, "atol": 64 * np.finfo(np.float64).eps}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def poisoned(*shape):
    return np.full(shape, np.nan)


def dense(w):
    return quant.dequantise(w.data, w.qtype).astype(np.float64)


# Norm and rope --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norm(dtype):
    x, weight, eps, _ = rows_to_norm(70)
    x = x.astype(dtype) / 3
    expected = np.array([row / np.sqrt(row @ row / 70 + eps) * weight for row in x.astype(np.float64)])
    tolerance = {"rtol": 16 * np.finfo(dtype).eps, "atol": 1e-30}
    for y in (None, x[::-1].copy()):
        total = x.copy() if y is None else x - y
        out = np.full_like(x, np.nan)
        activation = norm.normed(total, weight, eps, out, y)
        assert activation.x is out
        np.testing.assert_allclose(total, x, rtol=tolerance["rtol"], atol=np.finfo(dtype).eps)
        np.testing.assert_allclose(out, norm.rms_norm(total, weight, eps, np.empty_like(x)), rtol=0)
        if y is None:
            np.testing.assert_allclose(out, expected, **tolerance)
    assert norm.rms_norm(x, weight, eps, x) is x  # in place
    np.testing.assert_allclose(x, expected, **tolerance)


def test_rope_turns_pairs_as_complex_numbers():
    positions, inv_freq, magnitude = [0, 3, 100_000], [1.0, 0.3, 1e-4], 1.25
    cos_sin = rope.angles(np.array(positions, np.int32), np.array(inv_freq), magnitude, poisoned(3, 3, 2))
    x = normal(3, 2, 10)
    rotated = rope.rope_interleaved(x.copy(), cos_sin)
    np.testing.assert_array_equal(rotated[..., :4], x[..., :4])
    for t, position in enumerate(positions):
        for h in range(2):
            for i, frequency in enumerate(inv_freq):
                before, after = (np.array(each[t, h, 4 + 2 * i : 6 + 2 * i]) @ [1, 1j] for each in (x, rotated))
                assert after == pytest.approx(before * magnitude * np.exp(1j * position * frequency), rel=1e-9)


# Attention ------------------------------------------------------------------------------------------------------------

LENGTHS, NEW, PAGES = (1, 64, 65, 130), (1, 1, 3, 20), 9
HEADS, RANK, NOPE, ROPE, V = 3, 64, 32, 32, 32


def attend(q, keys, values, scale):
    """A query over the keys and values that it sees."""
    weights = [np.exp(scale * (q @ key)) for key in keys]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def rows_of(cache, step, sequence, length):
    """A sequence's rows, slot by slot."""
    slots = [step.block_tables[sequence, p // PAGE] * PAGE + p % PAGE for p in range(length)]
    return np.concatenate([dense(QTensor(cache.qtype, cache.data[slot][None])) for slot in slots])


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
        k = np.array([[[*(matrix @ c[s]), *rotated[s]] for matrix in dense(k_b)] for s in range(length)])
        v = np.array([[matrix @ c[s] for matrix in dense(v_b)] for s in range(length)])
        memory = attention.keys_values(length, HEADS, NOPE + ROPE, V, True, np.float64)
        assert memory.keys.dtype == memory.values.dtype == np.float64
        assert attention.keys_values(1, 1, 1, 1, True).keys.dtype == np.float32
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


def test_full_attention():
    step, scale = ragged_step(LENGTHS, NEW, PAGES), 0.11
    size = NOPE + ROPE
    keys, values = poisoned_cache([(ggml.F32, HEADS * size), (ggml.Q8_0, HEADS * V)], step, LENGTHS, PAGES)
    q = normal(len(step.tokens), HEADS, size)
    out = attention.full(q, keys, values, step, scale, poisoned(len(q), HEADS, V))
    for t, b in enumerate(step.seq_of):
        seen = step.positions[t] + 1
        k = rows_of(keys, step, b, seen).reshape(seen, HEADS, size)
        v = rows_of(values, step, b, seen).reshape(seen, HEADS, V)
        for h in range(HEADS):
            np.testing.assert_allclose(out[t, h], attend(q[t, h], k[:, h], v[:, h], scale), **CLOSE)


def test_scores_of_any_height():
    """Only a head's differences of scores matter, where their exponentials would overflow, too."""
    heights, values = np.array([0.0, 20_000, -20_000]), normal(3, 3, 4)
    keys = heights[None, :, None] + np.array([0, 1, 0])[:, None, None]
    memory = attention.KeysValues(keys, values)
    out = attention.expanded(np.ones((1, 3, 1)), memory, np.array([2], np.int32), 1.0, poisoned(1, 3, 4))
    np.testing.assert_allclose(out[0], (values[0] + np.e * values[1] + values[2]) / (2 + np.e), **CLOSE)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_stored_rows_are_loaded_again(cache_type):
    qtype, slots = CACHE_TYPES[cache_type], np.array([70, 3, 64], np.int32)
    cache = QTensor(qtype, np.full((2 * PAGE, ggml.row_bytes(qtype, 64)), 0xFF, np.uint8))
    rows = np.rint(normal(3, 64) * 8) / 8
    rows[:, ::32] = 127 / 8  # makes the scale of every block of q8_0 an eighth
    attention.store(rows, slots, cache)
    back = attention.load(cache, np.array([0, 1], np.int32), poisoned(71, 64))
    np.testing.assert_array_equal(back[slots[[1, 2, 0]]], rows[[1, 2, 0]])
    untouched = np.setdiff1d(np.arange(2 * PAGE), slots)
    assert (cache.data[untouched] == 0xFF).all()


# Experts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIES)
def test_router_takes_the_lower_of_equals(name):
    logits, config, expected = TIES[name]
    ids, weights = np.empty((1, len(expected)), np.int32), poisoned(1, len(expected))
    moe.router(np.array([logits], np.float64), None, routing(**config), ids, weights)
    assert ids[0].tolist() == expected


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("height", [0, 20_000])
def test_router(scoring_func, groups, biased, norm_topk_prob, height):
    """Expert by expert; a token's logits lie higher than the last one's by `height`, which overflows exponentials."""
    best = 2 if scoring_func == "sigmoid" else 1
    config = routing(
        scoring_func=scoring_func,
        n_group=groups[0],
        topk_group=groups[1],
        group_score="top2" if best == 2 else "max",
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )
    logits = normal(6, 16)
    if scoring_func == "softmax":
        logits += height * np.arange(6)[:, None]
    before, bias = logits.copy(), normal(16, seed=1).astype(np.float32) if biased else None
    ids, weights = np.full((6, 3), -1, np.int32), poisoned(6, 3)
    moe.router(logits, bias, config, ids, weights)
    np.testing.assert_array_equal(logits, before)
    for row, chosen, given in zip(logits, ids, weights, strict=True):
        if scoring_func == "sigmoid":
            scores = [1 / (1 + np.exp(-x)) for x in row]
        else:
            total = sum(np.exp(x - row[0]) for x in row)
            scores = [np.exp(x - row[0]) / total for x in row]
        choice = [score + (float(bias[e]) if biased else 0) for e, score in enumerate(scores)]
        size = 16 // groups[0]
        worth = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(groups[0])]
        kept = sorted(range(groups[0]), key=lambda g: -worth[g])[: groups[1]]
        expected = sorted((e for e in range(16) if e // size in kept), key=lambda e: -choice[e])[:3]
        assert chosen.tolist() == expected
        total = sum(scores[e] for e in expected) if norm_topk_prob else 1
        np.testing.assert_allclose(given, [2.5 * scores[e] / total for e in expected], **CLOSE)


def test_weights_of_experts_without_a_score():
    """Sigmoids that are 0: a sum of 0 is no divisor."""
    ids, weights = np.empty((1, 2), np.int32), poisoned(1, 2)
    config = routing(scoring_func="sigmoid", norm_topk_prob=True)
    with np.errstate(over="ignore"):
        moe.router(np.full((1, 4), -20_000, np.float64), None, config, ids, weights)
    assert weights.tolist() == [[0, 0]]
    assert not np.signbit(weights).any()


def one_expert(x, gate, up, down):
    """A token through a gated network, number by number."""
    g, u = gate @ x, up @ x
    return down @ np.array([a / (1 + np.exp(-a)) * b for a, b in zip(g, u, strict=True)])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_experts(shared, add):
    tokens, experts, hidden, inner = 5, 4, 32, 64
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    matrices = [random_qtensor(ggml.Q8_0, experts, *shape, seed=i) for i, shape in enumerate(shapes)]
    own = [random_qtensor(ggml.F16, *shape, seed=3 + i) for i, shape in enumerate(shapes)]
    ids = np.array([[0, 3], [3, 0], [2, 3], [3, 2], [0, 2]], np.int32)  # nobody takes the second
    weights, x, before = normal(tokens, 2), normal(tokens, hidden, seed=1), normal(tokens, hidden, seed=2)
    out = before.copy() if add else poisoned(tokens, hidden)
    activation = quant.Activation(x.copy())
    assert moe.experts(activation, ids, weights, *matrices, out, own if shared else None, add) is out
    np.testing.assert_array_equal(activation.x, x)
    for t in range(tokens):
        expected = before[t].copy() if add else np.zeros(hidden, np.float64)
        if shared:
            expected += one_expert(x[t], *map(dense, own))
        for e, weight in zip(ids[t], weights[t], strict=True):
            expected += weight * one_expert(x[t], *(dense(w)[e] for w in matrices))
        np.testing.assert_allclose(out[t], expected, **CLOSE)


@pytest.mark.parametrize("add", [False, True])
def test_ffn(add):
    gate, up, down = (random_qtensor(ggml.Q8_0, *shape) for shape in ((64, 32), (64, 32), (32, 64)))
    x, before = normal(3, 32), normal(3, 32, seed=1)
    out = moe.ffn(quant.Activation(x), gate, up, down, before.copy() if add else poisoned(3, 32), add)
    for t in range(3):
        expected = one_expert(x[t], *map(dense, (gate, up, down))) + (before[t] if add else 0)
        np.testing.assert_allclose(out[t], expected, **CLOSE)
    # The output is overwritten unless told otherwise.
    np.testing.assert_allclose(
        moe.ffn(quant.Activation(x), gate, up, down, poisoned(3, 32)), out - add * before, **CLOSE
    )


# Products -------------------------------------------------------------------------------------------------------------


def test_products():
    w, x = random_qtensor(ggml.Q6_K, 5, 256), normal(3, 256)
    out = quant.matmul(w, quant.Activation(x), poisoned(3, 5))
    np.testing.assert_allclose(out, [[row @ each for row in dense(w)] for each in x], **CLOSE)
    w, x = random_qtensor(ggml.Q4_1, 4, 5, 32), normal(3, 4, 32)
    out = quant.matmul_heads(w, x, poisoned(3, 4, 5))
    np.testing.assert_allclose(out, [[dense(w)[h] @ each[h] for h in range(4)] for each in x], **CLOSE)
    x = normal(3, 4, 5)
    out = quant.matmul_heads_transposed(w, x, poisoned(3, 4, 32))
    np.testing.assert_allclose(out, [[dense(w)[h].T @ each[h] for h in range(4)] for each in x], **CLOSE)
    x = normal(3, 32)  # several matrices, one after the other
    out = quant.matmul(w, quant.Activation(x), poisoned(3, 20))
    np.testing.assert_allclose(out, [[row @ each for matrix in dense(w) for row in matrix] for each in x], **CLOSE)
    w, tokens = random_qtensor(ggml.Q4_0, 9, 64), np.array([8, 0, 3, 3], np.int32)
    np.testing.assert_array_equal(quant.embedding_rows(w, tokens, poisoned(4, 64)), [dense(w)[t] for t in tokens])


# Memory and graphs ----------------------------------------------------------------------------------------------------


def test_memory_is_the_hosts():
    array = np.arange(6).reshape(3, 2)
    assert memory.to_device(array) is memory.to_host(array) is array
    empty = memory.empty((3, 2), np.int16)
    assert (empty.shape, empty.dtype) == ((3, 2), np.int16)
    memory.write(empty, array)
    np.testing.assert_array_equal(empty, array)
    rows = memory.take(array, np.array([2, 0]))
    np.testing.assert_array_equal(rows, [[4, 5], [0, 1]])
    rows[:] = 9
    assert array[2, 0] == 4  # a copy


def test_a_graph_computes_again():
    calls = []
    recorded = graph.Graph(lambda: calls.append(1) or len(calls))
    assert [recorded.replay(), recorded.replay()] == [1, 2]
    assert graph.Graph.size(3) == 3
