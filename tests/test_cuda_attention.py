"""Attention of `pymla.cuda` against the reference, without a GPU, at small and odd sizes.

What a token may not see is poisoned: rows behind its position, in the last page as well, and unused pages.
"""

import numpy as np
import pytest
import simulated  # noqa: F401
from compare import assert_close

from pymla import ggml
from pymla.cache import CACHE_TYPES, PAGE, Step
from pymla.cuda import attention, memory
from pymla.cuda.attention_decode import absorbed, absorbed_kernel
from pymla.cuda.attention_prompt import expanded_kernel
from pymla.errors import PymlaError
from pymla.reference import attention as reference
from pymla.reference.quant import dequantise, quantise
from pymla.weights import QTensor

PAGES = 8
HALF = {"rtol_max": 2e-3, "reason": "queries, softmax weights and float32 rows become float16: 11 bits"}
BFLOAT = {"rtol_max": 6e-3, "reason": "queries and softmax weights become bfloat16: 8 bits"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def poisoned(*shape):
    return memory.empty(shape, np.float32)


def on_device(tensor):
    return QTensor(tensor.qtype, memory.to_device(tensor.data))


def step_of(lengths, new):
    """Sequences of some lengths, whose last `new` tokens make the step, on shuffled pages, which are not named beyond
    a sequence's end."""
    order = iter(np.random.default_rng(5).permutation(PAGES))
    tables = np.full((len(lengths), max(-(-n // PAGE) for n in lengths)), 10**6, np.int32)
    for b, n in enumerate(lengths):
        tables[b, : -(-n // PAGE)] = [next(order) for _ in range(-(-n // PAGE))]
    positions = np.concatenate([np.arange(n - k, n) for n, k in zip(lengths, new, strict=True)]).astype(np.int32)
    seq_of = np.repeat(np.arange(len(lengths), dtype=np.int32), new)
    slots = tables[seq_of, positions // PAGE] * PAGE + positions % PAGE
    return Step(np.zeros_like(positions), positions, seq_of, slots.astype(np.int32), tables)


def caches(cache_type, rank, rope, step, lengths):
    """``c_kv`` and ``k_pe``, with NaN in every row that no token of the step may see."""
    qtype = CACHE_TYPES[cache_type]
    seen = [
        step.block_tables[b, p // PAGE] * PAGE + p % PAGE for b, length in enumerate(lengths) for p in range(length)
    ]
    result = []
    for seed, (width, each) in enumerate([(rank, qtype), (rope, ggml.F16 if qtype == ggml.Q8_0 else qtype)]):
        data = np.full((PAGES * PAGE, ggml.row_bytes(each, width)), 0xFF, np.uint8)
        data[seen] = quantise(normal(len(seen), width, seed=seed), each)
        result.append(QTensor(each, data))
    return result


def check_absorbed(cache_type, heads, rank, rope, lengths, new, splits):
    step = step_of(lengths, new)
    latent, k_pe = caches(cache_type, rank, rope, step, lengths)
    q = normal(len(step.positions), heads, rank + rope, seed=2)
    expected = reference.absorbed(q, latent, k_pe, step, 0.1, np.empty((len(q), heads, rank), np.float32))
    actual = absorbed(
        memory.to_device(q),
        on_device(latent),
        on_device(k_pe),
        Step(*map(memory.to_device, step)),
        0.1,
        poisoned(len(q), heads, rank),
        splits=splits,
    )
    assert_close(memory.to_host(actual), expected, **(BFLOAT if cache_type == "bf16" else HALF))


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_absorbed(cache_type):
    check_absorbed(cache_type, 5, 64, 32, (1, 63, 130), (1, 1, 2), None)


@pytest.mark.parametrize(
    ("cache_type", "heads", "rank", "rope"),
    [("f16", 1, 32, 16), ("bf16", 16, 48, 32), ("q8_0", 17, 32, 16), ("q8_0", 16, 96, 16), ("f32", 33, 16, 16)],
)
def test_absorbed_at_odd_sizes(cache_type, heads, rank, rope):
    check_absorbed(cache_type, heads, rank, rope, (65, 64), (1, 1), 1)


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


def test_absorbed_with_large_scores():
    """A maximum that grows over the tiles, and scores that are far apart."""
    lengths, rank, rope = (300,), 32, 16
    step = step_of(lengths, (1,))
    latent, k_pe = caches("f32", rank, rope, step, lengths)
    slots = [step.block_tables[0, p // PAGE] * PAGE + p % PAGE for p in range(300)]
    rows = np.linspace(-4, 4, 300, dtype=np.float32)[:, None] * np.ones(rank, np.float32)
    latent.data[slots] = quantise(rows, ggml.F32)
    q = np.ones((1, 2, rank + rope), np.float32)
    expected = reference.absorbed(q, latent, k_pe, step, 1.0, np.empty((1, 2, rank), np.float32))
    on = Step(*map(memory.to_device, step))
    for splits in (1, 3):
        actual = absorbed(
            memory.to_device(q), on_device(latent), on_device(k_pe), on, 1.0, poisoned(1, 2, rank), splits
        )
        assert_close(memory.to_host(actual), expected, rtol_max=2e-3, reason="scores up to 128 from float16 rows")


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
    actual = attention.expanded(memory.to_device(q), own, memory.to_device(positions), 0.2, poisoned(tokens, heads, v))
    assert_close(memory.to_host(actual), expected, **HALF)


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


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_store_and_load(cache_type):
    qtype, width = CACHE_TYPES[cache_type], 160
    rows = normal(6, width + 7)
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


def test_what_does_not_fit_is_refused():
    q, out = poisoned(1, 1, 24), poisoned(1, 1, 8)
    cache = QTensor(ggml.F16, memory.zeros((PAGE, 16), np.uint8))
    with pytest.raises(PymlaError, match="16 divides"):
        attention.absorbed(q, cache, cache, None, 1.0, out)
    with pytest.raises(PymlaError, match="16 divides"):
        attention.expanded(q, None, None, 1.0, out)
    q, out = poisoned(1, 2, 64)[..., :48], poisoned(1, 2, 32)
    with pytest.raises(ValueError, match="contiguous"):
        attention.absorbed(q, cache, cache, None, 1.0, out)


def test_blocks_fit_shared_memory():
    """Two blocks on a multiprocessor of Ampere's large cards, which have 164 KiB, one on those that have 100; a block
    takes one for itself."""
    sizes = [absorbed_kernel(qtype, 512, 64)[1] for qtype in CACHE_TYPES.values()] + [expanded_kernel(192, 128)[1]]
    for nbytes in sizes:
        assert 2 * (nbytes + 1024) <= 164 * 1024
        assert nbytes + 1024 <= 100 * 1024
