"""Attention of `pymla.cuda` against the reference, without a GPU, at small and odd sizes.

What a token may not see is poisoned: rows behind its position, in the last page as well, and unused pages.
"""

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import latent_layout, poisoned_cache, ragged_step
from compare import assert_close

from pymla import ggml
from pymla.cuda import attention, memory
from pymla.cuda.attention.absorbed_form import absorbed_in_splits, absorbed_kernel
from pymla.cuda.attention.expanded_form import expanded_kernel
from pymla.cuda.attention.full_form import full_in_splits, full_kernel
from pymla.cuda.attention.materialised_form import materialised_in_splits
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.reference import attention as reference
from pymla.reference.quant import dequantise, quantise
from pymla.tensor import QTensor

PAGES = 8
HALF = {"rtol_max": 2e-3, "reason": "queries, softmax weights and float32 rows become float16: 11 bits"}
BFLOAT = {"rtol_max": 6e-3, "reason": "queries and softmax weights become bfloat16: 8 bits"}
FLOAT = {"rtol_max": 1e-5, "reason": "float32 in another order"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def poisoned(*shape):
    return memory.empty(shape, np.float32)


def on_device(tensor):
    return QTensor(tensor.qtype, memory.to_device(tensor.data))


def part_of_more(tokens, heads, v, attend):
    """What `attend` writes into some heads of some tokens of a larger array; the others stay as they are."""
    whole = poisoned(tokens + 2, heads + 3, v)
    attend(whole[1:-1, 2:-1])
    result = memory.to_host(whole)
    part = result[1:-1, 2:-1].copy()
    result[1:-1, 2:-1] = np.nan
    assert np.isnan(result).all()
    return part


def step_of(lengths, new):
    return ragged_step(lengths, new, PAGES)


def caches(layout, step, lengths):
    return poisoned_cache(layout, step, lengths, PAGES)


def check_absorbed(
    cache_type, heads, rank, rope, lengths, new, splits, attend=absorbed_in_splits, tolerance=None, rope_type=None
):
    step = step_of(lengths, new)
    of_latent, of_rope = latent_layout(cache_type, rank, rope)
    layout = of_latent, of_rope if rope_type is None else (rope_type, rope)
    latent, k_pe = caches(layout, step, lengths)
    q = normal(len(step.positions), heads, rank + rope, seed=2)
    expected = reference.absorbed(q, latent, k_pe, step, 0.1, np.empty((len(q), heads, rank), np.float32))
    inputs = memory.to_device(q), on_device(latent), on_device(k_pe), Step(*map(memory.to_device, step)), 0.1
    actual = part_of_more(*expected.shape, lambda out: attend(*inputs, out, splits=splits))
    assert_close(actual, expected, **(tolerance or (BFLOAT if cache_type == "bf16" else HALF)))


def check_materialised(*case):
    check_absorbed(*case, materialised_in_splits, FLOAT)


def check_full(cache_type, heads, size, v, lengths, new, splits=None, tolerance=None, value_type=None):
    qtype, step = CACHE_TYPES[cache_type], step_of(lengths, new)
    layout = (qtype, heads * size), (qtype if value_type is None else value_type, heads * v)
    keys, values = caches(layout, step, lengths)
    q = normal(len(step.positions), heads, size, seed=2)
    expected = reference.full(q, keys, values, step, 0.1, np.empty((len(q), heads, v), np.float32))
    inputs = memory.to_device(q), on_device(keys), on_device(values), Step(*map(memory.to_device, step)), 0.1
    actual = part_of_more(*expected.shape, lambda out: full_in_splits(*inputs, out, splits))
    assert_close(actual, expected, **(tolerance or (BFLOAT if cache_type == "bf16" else HALF)))


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_absorbed(cache_type):
    check_absorbed(cache_type, 5, 64, 32, (1, 63, 130), (1, 1, 2), None)


@pytest.mark.parametrize(
    ("cache_type", "heads", "rank", "rope"),
    [("f16", 1, 32, 16), ("bf16", 16, 48, 32), ("q8_0", 17, 32, 16), ("q8_0", 16, 96, 16), ("f32", 33, 16, 16)],
)
def test_absorbed_at_odd_sizes(cache_type, heads, rank, rope):
    check_absorbed(cache_type, heads, rank, rope, (65, 64), (1, 1), 1)


@pytest.mark.parametrize("attend", [absorbed_in_splits, materialised_in_splits], ids=["online", "materialised"])
@pytest.mark.parametrize(
    ("cache_type", "rope_type"),
    [("q8_0", ggml.Q8_0), ("q8_0", ggml.F32), ("q8_0", ggml.BF16), ("bf16", ggml.F16), ("f32", ggml.Q8_0)],
)
def test_absorbed_of_two_cache_types(cache_type, rope_type, attend):
    check_absorbed(cache_type, 3, 32, 32, (65, 40), (1, 2), None, attend, HALF, rope_type)


@pytest.mark.parametrize("length", [1, 33, 128, 257, 400])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_absorbed_with_positions_split_over_blocks(cache_type, length):
    """Shares of four tiles or more; many of the blocks have none."""
    check_absorbed(cache_type, 3, 32, 16, (length,), (1,), 9)


def test_absorbed_over_several_groups_of_columns():
    check_absorbed("q8_0", 2, 160, 32, (300,), (1,), 2)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_absorbed_at_real_sizes(cache_type):
    check_absorbed(cache_type, 16, 512, 64, (70,), (1,), 1)


@pytest.mark.parametrize("attend", [absorbed_in_splits, materialised_in_splits], ids=["online", "materialised"])
@pytest.mark.parametrize("splits", [1, 3])
def test_absorbed_with_large_scores(attend, splits):
    """A maximum that grows over the tiles, and scores that are far apart."""
    lengths, rank, rope = (300,), 32, 16
    step = step_of(lengths, (1,))
    latent, k_pe = caches(latent_layout("f32", rank, rope), step, lengths)
    slots = [step.block_tables[0, p // PAGE] * PAGE + p % PAGE for p in range(300)]
    rows = np.linspace(-4, 4, 300, dtype=np.float32)[:, None] * np.ones(rank, np.float32)
    latent.data[slots] = quantise(rows, ggml.F32)
    q = np.ones((1, 2, rank + rope), np.float32)
    expected = reference.absorbed(q, latent, k_pe, step, 1.0, np.empty((1, 2, rank), np.float32))
    inputs = memory.to_device(q), on_device(latent), on_device(k_pe), Step(*map(memory.to_device, step)), 1.0
    actual = memory.to_host(attend(*inputs, poisoned(1, 2, rank), splits))
    assert_close(actual, expected, rtol_max=2e-3, reason="scores up to 128 from float16 rows")


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_absorbed_materialised(cache_type):
    check_materialised(cache_type, 2, 64, 32, (1, 33, 66), (1, 1, 2), None)


@pytest.mark.parametrize(
    ("cache_type", "heads", "rank", "rope", "lengths", "splits"),
    [("q8_0", 9, 32, 16, (33,), 9), ("f16", 2, 528, 16, (5,), 1), ("bf16", 1, 16, 16, (290, 5), 3)],
)
def test_absorbed_materialised_at_odd_sizes(cache_type, heads, rank, rope, lengths, splits):
    check_materialised(cache_type, heads, rank, rope, lengths, (1,) * len(lengths), splits)


def test_scores_of_many_tokens_are_computed_by_parts(monkeypatch):
    monkeypatch.setattr("pymla.cuda.attention.materialised_form.SCORES_BYTES", 2 * 4 * 2 * 64)
    check_materialised("f16", 2, 32, 16, (9, 5), (3, 2), None)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_full_of_prompts(cache_type):
    """Sequences in one window and over two, with tokens in the cache before."""
    check_full(cache_type, 2, 64, 32, (3, 90, 40), (3, 66, 2))


@pytest.mark.parametrize(
    ("cache_type", "heads", "size", "v", "lengths", "new"),
    [("f16", 1, 48, 16, (1, 2), (1, 2)), ("q8_0", 1, 192, 128, (70,), (9,)), ("bf16", 3, 16, 48, (65, 64), (64, 64))],
)
def test_full_at_odd_sizes(cache_type, heads, size, v, lengths, new):
    check_full(cache_type, heads, size, v, lengths, new)


@pytest.mark.parametrize("new", [(1, 1), (2, 3)], ids=["tokens", "prompts"])
@pytest.mark.parametrize(
    ("cache_type", "value_type"), [("q8_0", ggml.F16), ("bf16", ggml.F32), ("f16", ggml.BF16), ("f32", ggml.Q8_0)]
)
def test_full_of_two_cache_types(cache_type, value_type, new):
    check_full(cache_type, 2, 32, 32, (5, 70), new, None, HALF, value_type)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_full_of_single_tokens(cache_type):
    check_full(cache_type, 3, 64, 32, (1, 63, 130), (1, 1, 1), tolerance=FLOAT)


@pytest.mark.parametrize(
    ("cache_type", "size", "v", "length", "splits"),
    [("f16", 192, 128, 70, 1), ("q8_0", 192, 160, 400, 9), ("bf16", 16, 16, 257, 2), ("f32", 144, 272, 300, 9)],
)
def test_full_of_a_token_with_positions_split_over_blocks(cache_type, size, v, length, splits):
    check_full(cache_type, 1, size, v, (length,), (1,), splits, FLOAT)


def test_a_fault_stays_in_its_sequence():
    """Infinite rows of a sequence whose neighbours are in the same window of queries."""
    heads, size, v, lengths, new = 1, 32, 16, (5, 6, 7), (2, 3, 2)
    step = step_of(lengths, new)
    cache = caches([(ggml.F16, heads * size), (ggml.F16, heads * v)], step, lengths)
    for each in cache:
        row = np.full(each.data.shape[1] // 2, np.inf, np.float16)
        each.data[step.block_tables[1, 0] * PAGE + 2] = row.view(np.uint8)
    q, out = normal(len(step.positions), heads, size), poisoned(len(step.positions), heads, v)
    attention.full(memory.to_device(q), *map(on_device, cache), Step(*map(memory.to_device, step)), 0.1, out)
    faulty = ~np.isfinite(memory.to_host(out)).all((1, 2))
    np.testing.assert_array_equal(faulty, step.seq_of == 1)


@pytest.mark.parametrize(
    ("heads", "size", "v", "tokens", "length"),
    [(1, 48, 32, 1, 1), (2, 32, 16, 65, 65), (3, 48, 48, 3, 130), (2, 96, 64, 70, 101), (1, 192, 128, 9, 40)],
)
def test_expanded(heads, size, v, tokens, length):
    q = normal(tokens, heads, size)
    keys, values = (normal(length, heads, width, seed=1 + width).astype(np.float16) for width in (size, v))
    positions = np.arange(length - tokens, length, dtype=np.int32)
    rows = reference.KeysValues(keys.astype(np.float32), values.astype(np.float32))
    expected = reference.expanded(q, rows, positions, 0.2, np.empty((tokens, heads, v), np.float32))
    # Rows behind the last position are NaN.
    own = attention.keys_values(length + 40, heads, size, v, True)
    for mine, host in zip(own, (keys, values), strict=True):
        memory.write(mine[:length], host)
    inputs = memory.to_device(q), own, memory.to_device(positions), 0.2
    actual = part_of_more(*expected.shape, lambda out: attention.expanded(*inputs, out))
    assert_close(actual, expected, **HALF)


def test_expand_and_absorb():
    heads, rank, nope, rope, v, length = 2, 32, 16, 16, 32, 3
    k_b, v_b = (
        QTensor(ggml.F32, quantise(normal(heads, rows, rank, seed=rows), ggml.F32).copy()) for rows in (nope, v)
    )
    c_kv, k_pe = normal(length, rank), normal(length, rope, seed=1)
    expected = reference.expand(c_kv, k_pe, k_b, v_b, reference.keys_values(length, heads, nope + rope, v, True))
    out = attention.keys_values(length, heads, nope + rope, v, True)
    attention.expand(memory.to_device(c_kv), memory.to_device(k_pe), on_device(k_b), on_device(v_b), out)
    for mine, other in zip(out, expected, strict=True):
        assert_close(memory.to_host(mine), other, **HALF)
    q = normal(2, heads, nope + rope)
    expected = reference.absorb(q, k_b, np.empty((2, heads, rank + rope), np.float32))
    actual = memory.to_host(attention.absorb(memory.to_device(q), on_device(k_b), poisoned(2, heads, rank + rope)))
    assert_close(actual, expected, **HALF)
    np.testing.assert_array_equal(actual[..., rank:], q[..., nope:])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_store_and_load(cache_type, dtype):
    qtype, width = CACHE_TYPES[cache_type], 160
    rows = normal(6, width + 7).astype(dtype)
    rows[2, 32:64] = 0
    slots = np.array([200, 64, 65, 70, 3, 127], np.int32)
    cache = on_device(QTensor(qtype, np.full((4 * PAGE, ggml.row_bytes(qtype, width)), 0xFF, np.uint8)))
    attention.store(memory.to_device(rows)[:, 7:], memory.to_device(slots), cache)
    expected = QTensor(qtype, np.full(cache.data.shape, 0xFF, np.uint8))
    reference.store(rows[:, 7:], slots, expected)
    actual = memory.to_host(cache.data)
    np.testing.assert_array_equal(actual, expected.data)
    table = np.array([1], np.int32)
    out = memory.to_host(attention.load(cache, memory.to_device(table), poisoned(2, width)))
    np.testing.assert_array_equal(out, dequantise(actual[64:66], qtype))


def test_rows_are_contiguous():
    cache = on_device(QTensor(ggml.F16, np.zeros((PAGE, 64), np.uint8)))
    with pytest.raises(PymlaError, match=r"store: rows is .* one with contiguous rows"):
        attention.store(poisoned(2, 64)[:, ::2], memory.zeros(2, np.int32), cache)


def test_what_does_not_fit_is_refused():
    step, positions = step_of((1,), (1,)), memory.zeros(1, np.int32)

    def rows(width):
        return QTensor(ggml.F16, memory.zeros((PAGE, 2 * width), np.uint8))

    def attend_all(q, out):
        rotated = q.shape[2] - out.shape[2]
        yield lambda: attention.absorbed(q, rows(out.shape[2]), rows(rotated), step, 1.0, out)
        yield lambda: attention.absorbed_materialised(q, rows(out.shape[2]), rows(rotated), step, 1.0, out)
        yield lambda: attention.full(
            q, rows(q.shape[1] * q.shape[2]), rows(out.shape[1] * out.shape[2]), step, 1.0, out
        )
        keys_values = attention.keys_values(1, q.shape[1], q.shape[2], out.shape[2], False)
        yield lambda: attention.expanded(q, keys_values, positions, 1.0, out)

    for call in attend_all(poisoned(1, 1, 24), poisoned(1, 1, 8)):
        with pytest.raises(PymlaError, match="16 divides"):
            call()
    for call in attend_all(poisoned(1, 2, 64)[..., :48], poisoned(1, 2, 32)):
        with pytest.raises(PymlaError, match=r"q is an array with strides .*; a contiguous one"):
            call()
    absorbed, _, full, expanded = attend_all(poisoned(1, 2, 48), poisoned(1, 2, 33)[..., :32])
    for call in (absorbed, full, expanded):
        with pytest.raises(PymlaError, match="multiples of 8 bytes"):
            call()
    with pytest.raises(PymlaError, match="expanded: keys is a NoneType; an array"):
        attention.expanded(poisoned(1, 1, 32), None, positions, 1.0, poisoned(1, 1, 16))


def test_blocks_fit_shared_memory():
    """Two blocks on a multiprocessor of Ampere's large cards, which have 164 KiB, one on those that have 100; a block
    takes one for itself."""
    sizes = [
        absorbed_kernel(tuple(qtype for qtype, _ in latent_layout(name, 512, 64)), 512, 64)[1] for name in CACHE_TYPES
    ]
    sizes += [expanded_kernel(192, 128)[1], full_kernel((ggml.F16, ggml.F16), 192, 128)[1]]
    for nbytes in sizes:
        assert 2 * (nbytes + 1024) <= 164 * 1024
        assert nbytes + 1024 <= 100 * 1024
