"""Every CPU kernel against its twin in the reference, at odd sizes."""

import dataclasses

import numpy as np
import pytest
from cases import (
    ROWS,
    TIES,
    TOKENS,
    as_multiplied,
    columns,
    latent_layout,
    on_cpu,
    panel_codes,
    poisoned_cache,
    ragged_step,
    random_qtensor,
    routing,
    rows_to_norm,
)
from compare import assert_close

from pymla import cpu, ggml, reference
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES, PAGE
from pymla.tensor import QTensor

EXACT = {"rtol_max": 2e-6, "reason": "order of summation"}
INT8 = {"rtol_max": 5e-6, "reason": "the reference multiplies the same int8 activations, in float64"}
ONE_ROW = {"rtol_max": 1e-5, "reason": "a single result may cancel to a 400th of its terms"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_matmul(qtype, tokens):
    for rows in ROWS:
        for k in columns(qtype):
            w = random_qtensor(qtype, rows, k)
            x = normal(tokens, k)
            actual = cpu.quant.matmul(w, cpu.quant.Activation(x), poisoned(tokens, rows))
            seen = reference.quant.Activation(as_multiplied(x, qtype).astype(np.float64))
            tolerance = ONE_ROW if rows == tokens == 1 else INT8
            assert_close(actual, reference.quant.matmul(w, seen, np.empty((tokens, rows))), **tolerance)


@pytest.mark.parametrize("byte", [0, 255, 0x80, 0x7F])
@pytest.mark.parametrize("qtype", ggml.QUANTISED, ids=ggml.NAME.get)
def test_matmul_at_extreme_codes(qtype, byte):
    """All codes alike, against activations of ±127: where 16-bit sums of products would overflow. Blocks of 32 come in
    an eight, a four and one by itself."""
    count = 13 if ggml.BLOCK_SIZE[qtype] == 32 else 2
    block = np.full((3, count, ggml.BLOCK_BYTES[qtype]), byte, np.uint8)
    for at in ggml.TYPES[qtype].halves:
        block[..., at : at + 2] = np.array([1], np.float16).view(np.uint8)
    w = QTensor(qtype, block.reshape(3, -1))
    size = count * ggml.BLOCK_SIZE[qtype]
    for tokens in (1, 9):
        for sign in (np.ones(size), -np.ones(size), np.resize([1, -1], size)):
            x = np.tile(sign.astype(np.float32), (tokens, 1))
            actual = cpu.quant.matmul(w, cpu.quant.Activation(x), poisoned(tokens, 3))
            expected = x.astype(np.float64) @ reference.quant.dequantise(w.data, qtype).astype(np.float64).T
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-3)


def test_quantise_activations():
    x = normal(7, 96)
    x[2, :32] = 0
    made = cpu.quant.Activation(x).panels(ggml.Q4_0)
    codes, scale, sums = panel_codes(made), made.scale, made.sums
    expected_codes, expected_scale = reference.quant.quantise_activations(x)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_allclose(sums, codes.reshape(7, 3, 32).sum(-1) * scale, rtol=1e-6)


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_embedding_rows(qtype):
    w = random_qtensor(qtype, 9, 768)
    tokens = np.array([8, 0, 3, 3], np.int32)
    actual = cpu.quant.embedding_rows(w, tokens, poisoned(4, 768))
    assert_close(actual, reference.quant.embedding_rows(w, tokens, np.empty((4, 768), np.float32)), **EXACT)


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_matmul_heads(qtype):
    w, x = random_qtensor(qtype, 3, 5, 256), normal(7, 3, 256)
    actual = cpu.quant.matmul_heads(w, x, poisoned(7, 3, 5))
    seen = as_multiplied(x.reshape(21, 256), qtype).reshape(x.shape)
    assert_close(actual, reference.quant.matmul_heads(w, seen, np.empty((7, 3, 5))), **INT8)


def test_norm_and_residual():
    x, weight = normal(5, 99), normal(99, seed=1)
    actual = cpu.norm.rms_norm(x[:, :70], weight[:70], 1e-6, poisoned(5, 70))
    assert_close(actual, reference.norm.rms_norm(x[:, :70], weight[:70], 1e-6, poisoned(5, 70)), **EXACT)
    y = normal(5, 99, seed=2)
    np.testing.assert_array_equal(cpu.norm.add(x.copy(), y), x + y)
    for other in (None, y):
        there, here = x.copy(), x.copy()
        actual = cpu.norm.normed(there, weight, 1e-6, poisoned(5, 99), other)
        assert_close(actual.x, reference.norm.normed(here, weight, 1e-6, poisoned(5, 99), other).x, **EXACT)
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("columns", [8, 70])
def test_eps_of_the_norm(columns):
    x, weight, eps, expected = rows_to_norm(columns)
    for actual in (
        cpu.norm.rms_norm(x, weight, eps, poisoned(4, columns)),
        cpu.norm.normed(x, weight, eps, poisoned(4, columns)).x,
    ):
        for row, wanted in zip(actual, expected, strict=True):  # each by itself: their sizes differ by a million
            assert_close(row, wanted, **EXACT)


def test_rope():
    positions = np.array([0, 5, 100_000], np.int32)
    cos_sin = cpu.rope.angles(positions, np.array([1.0, 0.01]), 1.5, poisoned(3, 2, 2))
    x = normal(3, 2, 7)
    actual = cpu.rope.rope_interleaved(x.copy(), cos_sin)
    assert_close(actual, reference.rope.rope_interleaved(x.copy(), cos_sin), **EXACT)
    np.testing.assert_array_equal(actual[..., :3], x[..., :3])


def random_experts(qtype, count, hidden, inner, seed=1):
    """Gate, up and down of several experts; without `count` of one, as matrices."""
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    return [
        random_qtensor(qtype, *((count,) if count else ()), *shape, seed=seed + i) for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("qtype", [ggml.F32, ggml.Q4_0, ggml.Q8_0], ids=ggml.NAME.get)
@pytest.mark.parametrize("choice", ["random", "one takes all", "one token", "five tokens"])
@pytest.mark.parametrize("shared", [None, "of the type", "of another type"])
def test_experts(qtype, choice, shared):
    tokens = {"one token": 1, "five tokens": 5}.get(choice, 17)
    used, experts, hidden, inner = 2, 6, 96, 64
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :used].astype(np.int32)
    if choice == "one takes all":
        ids[:] = (4, 1)
    weights = rng.random((tokens, used), dtype=np.float32)
    matrices, own = random_experts(qtype, experts, hidden, inner), None
    if shared:
        own = random_experts(qtype if shared == "of the type" else ggml.Q4_1, None, hidden, 2 * inner, seed=5)
    x = as_multiplied(normal(tokens, hidden), ggml.Q4_0)
    before = normal(tokens, hidden, seed=9)
    for add in (False, True):
        begin = before if add else poisoned(tokens, hidden)
        actual = cpu.moe.experts(cpu.quant.Activation(x), ids, weights, *matrices, begin.copy(), own, add)
        seen = reference.quant.Activation(x)
        expected = reference.moe.experts(seen, ids, weights, *matrices, begin.copy(), own, add)
        exact = qtype == ggml.F32 and shared != "of another type"
        tolerance = EXACT if exact else {"rtol_max": 0.03, "reason": "hidden activations are int8"}
        assert_close(actual, expected, **tolerance)


def test_gate_and_up_of_two_types():
    """Their rows read the codes of the same activations in different orders."""
    gate, _, down = random_experts(ggml.Q4_0, 4, 512, 64)
    _, up, _ = random_experts(ggml.Q8_0, 4, 512, 64)
    ids, weights, x = np.array([[2, 0]], np.int32), np.array([[0.5, 0.25]], np.float32), normal(1, 512)
    actual = cpu.moe.experts(cpu.quant.Activation(x), ids, weights, gate, up, down, poisoned(1, 512))
    seen = reference.quant.Activation(as_multiplied(x, ggml.Q4_0))
    expected = reference.moe.experts(seen, ids, weights, gate, up, down, poisoned(1, 512))
    assert_close(actual, expected, rtol_max=0.03, reason="hidden activations are int8")


@pytest.mark.parametrize("tokens", [1, 17])
def test_ffn(tokens):
    matrices, x = random_experts(ggml.F32, None, 96, 64), normal(tokens, 96)
    for add in (False, True):
        begin = normal(tokens, 96, seed=9) if add else poisoned(tokens, 96)
        actual = cpu.moe.ffn(cpu.quant.Activation(x), *matrices, begin.copy(), add)
        expected = reference.moe.ffn(reference.quant.Activation(x), *matrices, begin.copy(), add)
        assert_close(actual, expected, **EXACT)


LENGTHS, NEW, PAGES = (1, 63, 64, 65, 200), (1, 1, 3, 2, 20), 12


@pytest.mark.parametrize("rope", [32, 12, 200])
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_absorbed_attention_reads_no_masked_token(cache_type, rope):
    heads, rank = 3, 64
    step = ragged_step(LENGTHS, NEW, PAGES)
    layout = latent_layout(cache_type, rank, rope)
    blocks = poisoned_cache(layout, step, LENGTHS, PAGES)
    cache = on_cpu(layout, blocks)
    q = normal(len(step.positions), heads, rank + rope)
    expected = reference.attention.absorbed(q, *blocks, step, 0.1, poisoned(len(q), heads, rank))
    assert np.isfinite(expected).all()
    integers = {"rtol_max": 0.02, "reason": "queries, softmax weights and values have 8 bits"}
    rounded = {"rtol_max": 1e-3, "reason": "rotated dimensions are codes up to 4095"}
    for attend in (cpu.attention.absorbed, cpu.attention.absorbed_materialised):
        tolerance = EXACT
        if cache_type == "q8_0":
            tolerance = integers if attend is cpu.attention.absorbed else rounded
        assert_close(attend(q, *cache, step, 0.1, poisoned(len(q), heads, rank)), expected, **tolerance)
    one = step.part(len(q) - 1, len(q))
    alone = cpu.attention.absorbed(q[-1:], *cache, one, 0.1, poisoned(1, heads, rank))
    tolerance = integers if cache_type == "q8_0" else EXACT  # pages of one token are split over threads
    assert_close(alone, expected[-1:], **tolerance)


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


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_full_attention_reads_no_masked_token(cache_type):
    heads, size, v = 3, 96, 64
    qtype = CACHE_TYPES[cache_type]
    step = ragged_step(LENGTHS, NEW, PAGES)
    keys, values = poisoned_cache([(qtype, heads * size), (qtype, heads * v)], step, LENGTHS, PAGES)
    q = normal(len(step.positions), heads, size)
    expected = reference.attention.full(q, keys, values, step, 0.1, poisoned(len(q), heads, v))
    assert np.isfinite(expected).all()
    assert_close(cpu.attention.full(q, keys, values, step, 0.1, poisoned(len(q), heads, v)), expected, **EXACT)


def test_expanded_attention_reads_no_masked_token():
    heads, size, v, length = 3, 99, 61, 150
    keys, values = normal(length + 9, heads, size), normal(length + 9, heads, v, seed=1)
    keys[length:] = values[length:] = np.nan
    for tokens in (1, 16, 17, length):
        positions = np.arange(length - tokens, length, dtype=np.int32)
        q = normal(tokens, heads, size, seed=2)
        expected, actual = (
            be.attention.expanded(q, be.attention.KeysValues(keys, values), positions, 0.1, poisoned(tokens, heads, v))
            for be in (reference, cpu)
        )
        assert np.isfinite(expected).all()
        assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("qtype", ggml.SUPPORTED, ids=ggml.NAME.get)
def test_expand_and_absorb(qtype):
    heads, rank, nope, rope, v, length = 3, 256, 256, 32, 40, 70
    k_b, v_b = random_qtensor(qtype, heads, nope, rank), random_qtensor(qtype, heads, v, rank, seed=1)
    c_kv, k_pe = as_multiplied(normal(length, rank), qtype), normal(length, rope, seed=1)
    results = []
    for be in (cpu, reference):
        out = be.attention.keys_values(length, heads, nope + rope, v, True)
        out.keys[:], out.values[:] = np.nan, np.nan
        results.append(be.attention.expand(c_kv, k_pe, k_b, v_b, out))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, **EXACT)
    q = normal(5, heads, nope + rope)
    actual = cpu.attention.absorb(q, k_b, poisoned(5, heads, rank + rope))
    assert_close(actual, reference.attention.absorb(q, k_b, poisoned(5, heads, rank + rope)), **EXACT)


def attended(be, length, tokens, *, qtypes=(ggml.Q4_0, ggml.Q4_0), fault=None, sizes=(128, 64, 128), exact=False):
    """The last tokens of a sequence, by expanded attention; `fault` is put into the values of a token of `c_kv`."""
    heads, rank, (nope, rope, v) = 2, 256, sizes
    k_b, v_b = random_qtensor(qtypes[0], heads, nope, rank), random_qtensor(qtypes[1], heads, v, rank, seed=1)
    c_kv, k_pe = normal(length, rank), normal(length, rope, seed=1)
    if fault is not None:
        c_kv[fault] = np.nan
    kv = be.attention.expand(c_kv, k_pe, k_b, v_b, be.attention.keys_values(length, heads, nope + rope, v, exact))
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


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_store_and_load(cache_type):
    qtype = CACHE_TYPES[cache_type]
    rows, slots = normal(5, 96), np.array([130, 64, 0, 7, 100], np.int32)
    rows[1, :32] = 0
    width = ggml.row_bytes(qtype, 96)
    actual, expected = (QTensor(qtype, np.zeros((3 * PAGE, width), np.uint8)) for _ in range(2))
    cpu.attention.store(rows, slots, actual)
    reference.attention.store(rows, slots, expected)
    np.testing.assert_array_equal(actual.data, expected.data)
    table = np.array([2, 0, 1], np.int32)
    out = cpu.attention.load(actual, table, poisoned(150, 96))
    np.testing.assert_array_equal(out, reference.attention.load(expected, table, poisoned(150, 96)))


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_router(scoring_func, groups):
    """Against the definition, token by token."""
    fields = dict.fromkeys((f.name for f in dataclasses.fields(ModelConfig)), 0)
    fields |= {"scoring_func": scoring_func, "n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": True}
    best = 2 if scoring_func == "sigmoid" else 1
    fields |= {"group_score": "top2" if best == 2 else "max", "routed_scaling_factor": 2.5}
    config = ModelConfig(**fields)
    logits, bias = normal(9, 16), normal(16, seed=1)
    ids, weights = np.empty((9, 3), np.int32), poisoned(9, 3)
    cpu.moe.router(logits, bias, config, ids, weights)
    for t in range(9):
        scores = (
            1 / (1 + np.exp(-logits[t])) if scoring_func == "sigmoid" else np.exp(logits[t]) / np.exp(logits[t]).sum()
        )
        choice = (scores + bias).reshape(groups[0], -1)
        rank = sorted(range(groups[0]), key=lambda g: -sum(sorted(choice[g])[-best:]))[: groups[1]]
        allowed = [g * choice.shape[1] + i for g in rank for i in range(choice.shape[1])]
        expected = sorted(allowed, key=lambda e: -choice.reshape(-1)[e])[:3]
        assert ids[t].tolist() == expected
        np.testing.assert_allclose(weights[t], scores[expected] / scores[expected].sum() * 2.5, rtol=1e-5)


@pytest.mark.parametrize("name", TIES)
def test_router_takes_the_lower_of_equals(name):
    logits, config, expected = TIES[name]
    ids, weights = np.empty((1, len(expected)), np.int32), poisoned(1, len(expected))
    cpu.moe.router(np.array([logits], np.float32), None, routing(**config), ids, weights)
    assert ids[0].tolist() == expected
