"""What the GPU's attention has for itself (`test_attention.py` has what all backends share): positions that are split
over blocks of threads, what the tensor cores do not take, and the memory of a block."""

from functools import partial

import numpy as np
import pytest
import simulated  # noqa: F401
from cases import latent_layout, poisoned_cache, ragged_step
from compare import assert_close
from definitions import absorbed
from test_attention import FLOAT, HALF, PAGES, check_absorbed, check_full
from tested import BACKENDS

from pymla import ggml
from pymla.cuda import attention, memory
from pymla.cuda.attention.absorbed_form import absorbed_in_splits, absorbed_kernel
from pymla.cuda.attention.expanded_form import expanded_kernel
from pymla.cuda.attention.full_form import full_in_splits, full_kernel
from pymla.cuda.attention.materialised_form import materialised_in_splits
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE, Step
from pymla.reference.quant import quantise
from pymla.tensor import QTensor

CUDA = BACKENDS[0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def poisoned(*shape):
    return memory.empty(shape, np.float32)


def on_device(tensor):
    return QTensor(tensor.qtype, memory.to_device(tensor.data))


@pytest.mark.parametrize("attend", [absorbed_in_splits, materialised_in_splits], ids=["online", "materialised"])
@pytest.mark.parametrize(
    ("cache_type", "rope_type"),
    [("q8_0", ggml.Q8_0), ("q8_0", ggml.F32), ("q8_0", ggml.BF16), ("bf16", ggml.F16), ("f32", ggml.Q8_0)],
)
def test_absorbed_of_two_cache_types(cache_type, rope_type, attend):
    case = cache_type, 3, 32, 32, (65, 40), (1, 2)
    check_absorbed(CUDA, partial(attend, splits=None), {"cuda": HALF}, case, rope_type)


@pytest.mark.parametrize("new", [(1, 1), (2, 3)], ids=["tokens", "prompts"])
@pytest.mark.parametrize(
    ("cache_type", "value_type"), [("q8_0", ggml.F16), ("bf16", ggml.F32), ("f16", ggml.BF16), ("f32", ggml.Q8_0)]
)
def test_full_of_two_cache_types(cache_type, value_type, new):
    check_full(CUDA, attention.full, {"cuda": HALF}, (cache_type, 2, 32, 32, (5, 70), new), value_type)


@pytest.mark.parametrize("length", [1, 33, 128, 257, 400])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_absorbed_with_positions_split_over_blocks(cache_type, length):
    """Shares of four tiles or more; many of the blocks have none."""
    case = cache_type, 3, 32, 16, (length,), (1,)
    check_absorbed(CUDA, partial(absorbed_in_splits, splits=9), {"cuda": HALF}, case)


def test_absorbed_over_several_groups_of_columns():
    check_absorbed(CUDA, partial(absorbed_in_splits, splits=2), {"cuda": HALF}, ("q8_0", 2, 160, 32, (300,), (1,)))


@pytest.mark.parametrize("attend", [absorbed_in_splits, materialised_in_splits], ids=["online", "materialised"])
@pytest.mark.parametrize("splits", [1, 3])
def test_absorbed_with_large_scores(attend, splits):
    """A maximum that grows over the tiles, and scores that are far apart."""
    lengths, rank, rope = (300,), 32, 16
    step = ragged_step(lengths, (1,), PAGES)
    latent, k_pe = poisoned_cache(latent_layout("f32", rank, rope), step, lengths, PAGES)
    slots = [step.block_tables[0, p // PAGE] * PAGE + p % PAGE for p in range(300)]
    rows = np.linspace(-4, 4, 300, dtype=np.float32)[:, None] * np.ones(rank, np.float32)
    latent.data[slots] = quantise(rows, ggml.F32)
    q = np.ones((1, 2, rank + rope), np.float32)
    expected = absorbed(q, latent, k_pe, step, 1.0)
    inputs = memory.to_device(q), on_device(latent), on_device(k_pe), Step(*map(memory.to_device, step)), 1.0
    actual = memory.to_host(attend(*inputs, poisoned(1, 2, rank), splits))
    assert_close(actual, expected, rtol_max=2e-3, reason="scores up to 128 from float16 rows")


@pytest.mark.parametrize(
    ("cache_type", "heads", "rank", "rope", "lengths", "splits"),
    [("q8_0", 9, 32, 16, (33,), 9), ("f16", 2, 528, 16, (5,), 1), ("bf16", 1, 16, 16, (290, 5), 3)],
)
def test_absorbed_materialised_at_odd_sizes(cache_type, heads, rank, rope, lengths, splits):
    case = cache_type, heads, rank, rope, lengths, (1,) * len(lengths)
    check_absorbed(CUDA, partial(materialised_in_splits, splits=splits), {"cuda": FLOAT}, case)


def test_scores_of_many_tokens_are_computed_by_parts(monkeypatch):
    monkeypatch.setattr("pymla.cuda.attention.materialised_form.SCORES_BYTES", 2 * 4 * 2 * 64)
    check_absorbed(CUDA, attention.absorbed_materialised, {"cuda": FLOAT}, ("f16", 2, 32, 16, (9, 5), (3, 2)))


@pytest.mark.parametrize(
    ("cache_type", "size", "v", "length", "splits"),
    [("f16", 192, 128, 70, 1), ("q8_0", 192, 160, 400, 9), ("bf16", 16, 16, 257, 2), ("f32", 144, 272, 300, 9)],
)
def test_full_of_a_token_with_positions_split_over_blocks(cache_type, size, v, length, splits):
    check_full(CUDA, partial(full_in_splits, splits=splits), {"cuda": FLOAT}, (cache_type, 1, size, v, (length,), (1,)))


def test_a_fault_stays_in_its_sequence():
    """Infinite rows of a sequence whose neighbours are in the same window of queries."""
    heads, size, v, lengths, new = 1, 32, 16, (5, 6, 7), (2, 3, 2)
    step = ragged_step(lengths, new, PAGES)
    cache = poisoned_cache([(ggml.F16, heads * size), (ggml.F16, heads * v)], step, lengths, PAGES)
    for each in cache:
        row = np.full(each.data.shape[1] // 2, np.inf, np.float16)
        each.data[step.block_tables[1, 0] * PAGE + 2] = row.view(np.uint8)
    q, out = normal(len(step.positions), heads, size), poisoned(len(step.positions), heads, v)
    attention.full(memory.to_device(q), *map(on_device, cache), Step(*map(memory.to_device, step)), 0.1, out)
    faulty = ~np.isfinite(memory.to_host(out)).all((1, 2))
    np.testing.assert_array_equal(faulty, step.seq_of == 1)


def test_rows_are_contiguous():
    cache = on_device(QTensor(ggml.F16, np.zeros((PAGE, 64), np.uint8)))
    with pytest.raises(PymlaError, match=r"store: rows is .* one with contiguous rows"):
        attention.store(poisoned(2, 64)[:, ::2], memory.zeros(2, np.int32), cache)


def test_what_does_not_fit_is_refused():
    step, positions = ragged_step((1,), (1,), PAGES), memory.zeros(1, np.int32)

    def rows(width):
        return QTensor(ggml.F16, memory.zeros((PAGE, 2 * width), np.uint8))

    def attend_all(q, out):
        rotated = q.shape[2] - out.shape[2]
        yield lambda: attention.absorbed(q, rows(out.shape[2]), rows(rotated), step, 1.0, out)
        yield lambda: attention.absorbed_materialised(q, rows(out.shape[2]), rows(rotated), step, 1.0, out)
        yield lambda: attention.full(
            q, rows(q.shape[1] * q.shape[2]), rows(out.shape[1] * out.shape[2]), step, 1.0, out
        )
        keys_values = attention.keys_values(1, q.shape[1], q.shape[2] - 8, 8, out.shape[2], False)
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
    layouts = [tuple(qtype for qtype, _ in latent_layout(name, 512, 64)) for name in CACHE_TYPES]
    sizes = [absorbed_kernel(types, 512, 64)[1] for types in layouts]
    sizes += [expanded_kernel(192, 128)[1], full_kernel((ggml.F16, ggml.F16), 192, 128)[1]]
    for nbytes in sizes:
        assert 2 * (nbytes + 1024) <= 164 * 1024
        assert nbytes + 1024 <= 100 * 1024
