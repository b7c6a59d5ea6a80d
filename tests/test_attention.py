"""Attention of every backend against its definition, at odd sizes.

What a token may not see is poisoned with NaN: rows behind its position, in the last page as well, and unused pages.
"""

import numpy as np
import pytest
from cases import REPRESENTATIVES, latent_layout, poisoned_cache, ragged_step, random_qtensor
from compare import assert_close
from definitions import absorbed, cached, dense, expand, expanded, full
from tested import SIMULATED, each_backend

from pymla import ggml
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES, PAGE
from pymla.reference.attention.hadamard import mix
from pymla.reference.quant import dequantise, quantise
from pymla.tensor import QTensor

pytestmark = [each_backend, pytest.mark.filterwarnings("error")]

EXACT = {"rtol_max": 2e-6, "reason": "order of summation"}
FLOAT = {"rtol_max": 1e-5, "reason": "float32 in another order"}
HALF = {"rtol_max": 2e-3, "reason": "queries, softmax weights and float32 rows become float16: 11 bits"}
BFLOAT = {"rtol_max": 6e-3, "reason": "queries and softmax weights become bfloat16: 8 bits"}
INTEGERS = {"rtol_max": 0.02, "reason": "queries, softmax weights and values have 8 bits"}
CODES = {"rtol_max": 1e-3, "reason": "rotated dimensions are codes up to 4095"}

PAGES = 12


#: Cache types that keys and values of heads may have.
FULL_TYPES = [name for name, qtype in CACHE_TYPES.items() if qtype not in HADAMARD_TYPES]


def in_blocks(cache_type):
    return ggml.BLOCK_SIZE[CACHE_TYPES[cache_type]] > 1


def on_tensor_cores(cache_type):
    return BFLOAT if cache_type == "bf16" else HALF


#: Heads, rank, rotated numbers, lengths of the sequences and their new tokens. Of one token alone the CPU splits the
#: pages over its threads.
RAGGED = ((1, 63, 130), (1, 1, 2)) if SIMULATED else ((1, 63, 64, 65, 200), (1, 1, 3, 2, 20))
ABSORBED = [(cache_type, 3, 64, 32, *RAGGED) for cache_type in CACHE_TYPES]
if SIMULATED:  # 16 divides all sizes
    ABSORBED += [
        ("f16", 1, 32, 16, (65, 64), (1, 1)),
        ("bf16", 16, 48, 32, (65, 64), (1, 1)),
        ("q8_0", 17, 32, 16, (65, 64), (1, 1)),
        ("q8_0", 16, 96, 16, (65, 64), (1, 1)),
        ("f32", 33, 16, 16, (65, 64), (1, 1)),
        ("f16", 16, 512, 64, (70,), (1,)),
        ("q8_0", 16, 512, 64, (70,), (1,)),
    ]
else:
    ABSORBED += [(cache_type, 3, 64, rope, *RAGGED) for cache_type in CACHE_TYPES for rope in (12, 200)]
    ABSORBED += [(cache_type, 3, 64, 32, (200,), (1,)) for cache_type in CACHE_TYPES]


def check_absorbed(backend, attend, tolerance, case, rope_type=None):
    """`rope_type`: the ggml type of the rotated rows, where it is not the cache type's own."""
    cache_type, heads, rank, rope, lengths, new = case
    step, layout = ragged_step(lengths, new, PAGES), latent_layout(cache_type, rank, rope)
    if rope_type is not None:
        layout = layout[0], (rope_type, rope)
    blocks = poisoned_cache(layout, step, lengths, PAGES)
    q = backend.normal(len(step.positions), heads, rank + rope, seed=2)
    expected = absorbed(q, *blocks, step, 0.1)
    assert np.isfinite(expected).all()
    cache = backend.latent(layout, blocks)
    actual = backend.result_in_part(attend, q, *cache, step, 0.1, shape=expected.shape)
    assert_close(actual, expected, **backend.tolerance(**tolerance))


@pytest.mark.parametrize("case", ABSORBED, ids=str)
def test_absorbed(backend, case):
    tolerance = {"cpu": INTEGERS if in_blocks(case[0]) else EXACT, "cuda": on_tensor_cores(case[0])}
    check_absorbed(backend, backend.attention.absorbed, tolerance, case)


@pytest.mark.parametrize("case", ABSORBED[:4] if SIMULATED else ABSORBED, ids=str)
def test_absorbed_materialised(backend, case):
    tolerance = {"cpu": CODES if in_blocks(case[0]) else EXACT, "cuda": FLOAT}
    check_absorbed(backend, backend.attention.absorbed_materialised, tolerance, case)


#: Heads, sizes of a key and of a value, lengths of the sequences and their new tokens: in the simulator in one window
#: of queries and over two.
FULL = [(name, 2, 64, 32, (3, 90, 40), (3, 66, 2)) for name in FULL_TYPES if SIMULATED]
FULL += [(name, 3, 96, 64, *RAGGED) for name in FULL_TYPES if not SIMULATED]
FULL += [
    ("f16", 1, 48, 16, (1, 2), (1, 2)),
    ("q8_0", 1, 192, 128, (70,), (9,)),
    ("bf16", 3, 16, 48, (65, 64), (64, 64)),
]
#: One token of each sequence, which the GPU computes in float32.
SINGLE = [(name, 3, 64, 32, (1, 63, 130), (1, 1, 1)) for name in FULL_TYPES]


def check_full(backend, attend, tolerance, case, value_type=None):
    """`value_type`: the ggml type of the values' rows, where it is not that of the keys."""
    cache_type, heads, size, v, lengths, new = case
    step, qtype = ragged_step(lengths, new, PAGES), CACHE_TYPES[cache_type]
    layout = (qtype, heads * size), (qtype if value_type is None else value_type, heads * v)
    cache = poisoned_cache(layout, step, lengths, PAGES)
    q = backend.normal(len(step.positions), heads, size, seed=2)
    expected = full(q, *cache, step, 0.1)
    assert np.isfinite(expected).all()
    actual = backend.result_in_part(attend, q, *cache, step, 0.1, shape=expected.shape)
    assert_close(actual, expected, **backend.tolerance(**tolerance))


@pytest.mark.parametrize("case", FULL + SINGLE, ids=str)
def test_full(backend, case):
    tolerance = {"cpu": EXACT, "cuda": FLOAT if case in SINGLE else on_tensor_cores(case[0])}
    check_full(backend, backend.attention.full, tolerance, case)


#: Heads, sizes of a key and of a value, new tokens, length.
EXPANDED = [(1, 48, 32, 1, 1), (2, 32, 16, 65, 65), (3, 48, 48, 3, 130), (2, 96, 64, 70, 101), (1, 192, 128, 9, 40)]
EXPANDED += [(3, 99, 61, tokens, 150) for tokens in (1, 16, 17, 150) if not SIMULATED]


@pytest.mark.parametrize("case", EXPANDED, ids=str)
def test_expanded(backend, case):
    heads, size, v, tokens, length = case
    q = backend.normal(tokens, heads, size)
    rows = [backend.normal(length, heads, width, seed=1 + width).astype(np.float16) for width in (size, v)]
    positions = np.arange(length - tokens, length, dtype=np.int32)
    expected = expanded(q, *rows, positions, 0.2)
    made = backend.attention.keys_values(length + 40, heads, size - 16, 16, v, True, backend.dtype)
    for target, source in zip(made, rows, strict=True):
        whole = np.full(target.shape, np.nan, target.dtype)
        whole[:length] = source
        backend.memory.write(target, whole)
    actual = backend.result_in_part(backend.attention.expanded, q, made, positions, 0.2, shape=expected.shape)
    assert_close(actual, expected, **backend.tolerance(cpu=EXACT, cuda=HALF))


def test_scores_of_any_height(backend):
    """Only a head's differences of scores matter, where their exponentials would overflow, too."""
    size = 16  # of a key, the numbers of which are all alike; powers of two that float16 holds
    heights, values = np.array([0.0, 16_384, -16_384]), backend.normal(3, 3, size).astype(np.float16)
    keys = (heights[None, :, None] + np.array([0, 16, 0])[:, None, None] + np.zeros(size)).astype(np.float16)
    made = backend.attention.keys_values(3, 3, 8, size - 8, size, True, backend.dtype)
    for target, source in zip(made, (keys, values), strict=True):
        backend.memory.write(target, source.astype(target.dtype))
    q, positions = np.ones((1, 3, size), backend.dtype), np.array([2], np.int32)
    actual = backend.result(backend.attention.expanded, q, made, positions, 1 / 256, shape=(1, 3, size))
    values = values.astype(np.float64)
    expected = (values[0] + np.e * values[1] + values[2]) / (2 + np.e)
    for head in range(3):  # each by itself: scores of a thousand have fewer digits behind the point
        tolerance = {"cpu": {"rtol_max": 1e-4, "reason": "float32 scores of 1024"}, "cuda": HALF}
        assert_close(actual[0, head], expected[head], **backend.tolerance(**tolerance))


#: Numbers of a key that are not rotated, and that are, and of a value: those of tiny models, V2 and V3, GLM-4.7-Flash.
HEAD_SIZES = [(32, 32, 32), (128, 64, 128), (192, 64, 256)]
CODES_OF_KEYS = {"rtol_max": 0.03, "reason": "queries, keys, values and softmax weights have 8 bits"}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("outliers", ["rotated", "other"])
@pytest.mark.parametrize("sizes", HEAD_SIZES[:1] if SIMULATED else HEAD_SIZES, ids=str)
def test_keys_with_a_few_large_dimensions(backend, sizes, outliers, exact):
    """Trained models have some dimensions in which keys are far larger than in the others, and queries far smaller. The
    scores are those of keys and queries that are all alike."""
    (nope, rope, v), heads, rank, length, tokens = sizes, 2, 64, *((40, 9) if SIMULATED else (200, 70))
    k_b, v_b = random_qtensor(ggml.F32, heads, nope, rank), random_qtensor(ggml.F32, heads, v, rank, seed=1)
    c_kv, k_pe = backend.normal(length, rank), backend.normal(length, rope, seed=1)
    q, positions = (
        backend.normal(tokens, heads, nope + rope, seed=2),
        np.arange(length - tokens, length, dtype=np.int32),
    )
    if outliers == "rotated":
        k_pe[:, 4:8] *= 100
        q[..., nope + 4 : nope + 8] /= 100
    else:
        k_b = QTensor(ggml.F32, k_b.data.copy())
        k_b.data.view(np.float32)[:, 4:8] *= 10
        q[..., 4:8] /= 10
    scale = (nope + rope) ** -0.5
    expected = expanded(q, *expand(c_kv, k_pe, k_b, v_b), positions, scale)
    made = backend.attention.keys_values(length, heads, nope, rope, v, exact, backend.dtype)
    backend.attention.expand(*map(backend.put, (c_kv, k_pe, k_b, v_b)), made)
    actual = backend.result(backend.attention.expanded, q, made, positions, scale, shape=expected.shape)
    assert_close(actual, expected, **backend.tolerance(cpu=EXACT if exact else CODES_OF_KEYS, cuda=HALF))


#: Type of the matrices, heads, rank, numbers of a key that are not rotated and that are, of a value, tokens.
EXPAND = [(ggml.F32, 2, 32, 16, 16, 32, 3)]
EXPAND += [(qtype, 3, 256, 256, 32, 40, 70) for qtype in REPRESENTATIVES if not SIMULATED]


@pytest.mark.parametrize("case", EXPAND, ids=lambda case: ggml.NAME[case[0]] + f"-{case[-1]}")
def test_expand_and_absorb(backend, case):
    qtype, heads, rank, nope, rope, v, length = case
    k_b, v_b = random_qtensor(qtype, heads, nope, rank), random_qtensor(qtype, heads, v, rank, seed=1)
    c_kv, k_pe = backend.seen(backend.normal(length, rank), qtype), backend.normal(length, rope, seed=1)
    made = backend.attention.keys_values(length, heads, nope, rope, v, True, backend.dtype)
    for target in made:
        backend.memory.write(target, np.full(target.shape, np.nan, target.dtype))
    assert backend.attention.expand(*map(backend.put, (c_kv, k_pe, k_b, v_b)), made) is made
    for actual, expected in zip(made, expand(c_kv, k_pe, k_b, v_b), strict=True):
        assert_close(backend.memory.to_host(actual), expected, **backend.tolerance(cpu=EXACT, cuda=HALF))
    q = backend.normal(5, heads, nope + rope)
    actual = backend.result(backend.attention.absorb, q, k_b, shape=(5, heads, rank + rope))
    expected = np.einsum("thn,hnr->thr", q[..., :nope].astype(np.float64), dense(k_b))
    assert_close(actual[..., :rank], expected, **backend.tolerance(cpu=EXACT, cuda=EXACT))
    np.testing.assert_array_equal(actual[..., rank:], q[..., nope:])


#: Types of the rows, where `store` takes several.
ROW_TYPES = [np.float32, np.float16] if SIMULATED else [None]


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_store_and_load(backend, cache_type, dtype):
    """Columns of a wider array, bit by bit; slots that are not written stay as they are."""
    qtype, width = CACHE_TYPES[cache_type], 160
    rows = backend.normal(6, width + 7).astype(dtype or backend.dtype)
    rows[2, 32:64] = 0
    slots = np.array([200, 64, 65, 70, 3, 127], np.int32)
    expected = np.full((4 * PAGE, ggml.row_bytes(qtype, width)), 0xFF, np.uint8)
    cache = backend.put(QTensor(qtype, expected.copy()))
    if backend.name == "cpu" and qtype in HADAMARD_TYPES:
        # `test_cpu_attention.py` has the pages in which it keeps them.
        with pytest.raises(PymlaError, match=f"store: cache is of type {ggml.NAME[qtype]}"):
            backend.attention.store(rows[:, 7:], slots, cache)
        return
    backend.attention.store(backend.put(rows)[:, 7:], backend.put(slots), cache)
    expected[slots] = quantise(as_stored(rows[:, 7:].astype(np.float32), qtype), qtype)
    np.testing.assert_array_equal(backend.memory.to_host(cache.data), expected)
    table = np.array([1, 3], np.int32)
    out = backend.result(backend.attention.load, cache, table, shape=(PAGE + 9, width))
    rows = QTensor(qtype, expected[[*range(PAGE, 2 * PAGE), *range(3 * PAGE, 3 * PAGE + 9)]])
    if qtype in HADAMARD_TYPES:
        np.testing.assert_allclose(out, cached(rows), rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(out, dequantise(rows.data, qtype))


def as_stored(rows, qtype):
    """float32 rows before they are rounded to a cache's type; mixed ones are rounded in the reference's order."""
    return mix(rows) * np.float32(1 / 4) if qtype in HADAMARD_TYPES else rows


@pytest.mark.parametrize("cache_type", ["q6_0", "q5_0", "q4_0"])
def test_mixed_rows_keep_their_small_numbers(backend, cache_type):
    """In a latent cache a number that is 100 times larger than its neighbours leaves them the precision of its type."""
    bits = int(cache_type[1])
    rows = backend.normal(PAGE, 96)
    rows[:, 40] *= 100
    layout = latent_layout(cache_type, 96, 32)
    cache = backend.attention.latent_cache(layout, PAGE).latent
    backend.attention.store(backend.put(rows), backend.put(np.arange(PAGE, dtype=np.int32)), cache)
    out = backend.result(backend.attention.load, cache, np.zeros(1, np.int32), shape=(PAGE, 96))
    error = np.sqrt(((out - rows) ** 2).mean(1).reshape(PAGE, 1))
    assert (error < 1.2 * np.sqrt((rows**2).mean(1, keepdims=True)) / 2 ** (bits - 1)).all()
