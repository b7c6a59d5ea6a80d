"""The paged cache: what its rows take, which slots tokens get, and what happens when pages are not enough."""

from types import SimpleNamespace

import numpy as np
import pytest
from cache_checks import give_way_and_come_back
from hypothesis import given, settings
from hypothesis import strategies as st
from make_model import PRESETS, make_model

from pymla import cpu, ggml, reference
from pymla.engine.cache import PagedCache, Sequence
from pymla.engine.cache_layout import row_bytes, row_layout
from pymla.errors import CacheFull, PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES, HADAMARD_TYPES, PAGE, FullCache, LatentCache, Step, block_rows

# V2-Lite's sizes, with fewer layers.
CONFIG = SimpleNamespace(
    num_attention_heads=16,
    qk_head_dim=192,
    v_head_dim=128,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    num_hidden_layers=3,
    indexer=None,
)


def cache(pages=4, ctx=10_000, cache_type="q8_0", mla="auto", layers=1):
    return PagedCache(CONFIG, cache_type, mla, pages, ctx, [reference] * layers)


def tokens(count, first=0):
    return np.arange(first, first + count, dtype=np.int32)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache_type", "mla", "layout", "nbytes"),
    [
        ("f32", "auto", [(ggml.F32, 512), (ggml.F32, 64)], 4 * 576),
        ("f16", "1", [(ggml.F16, 512), (ggml.F16, 64)], 2 * 576),
        ("bf16", "3", [(ggml.BF16, 512), (ggml.BF16, 64)], 2 * 576),
        ("q8_0", "2", [(ggml.Q8_0, 512), (ggml.F16, 64)], 34 * 16 + 2 * 64),
        ("q6_0", "auto", [(ggml.ID["Q6_0"], 512), (ggml.F16, 64)], 26 * 16 + 2 * 64),
        ("q5_0", "1", [(ggml.Q5_0, 512), (ggml.F16, 64)], 22 * 16 + 2 * 64),
        ("q4_0", "3", [(ggml.Q4_0, 512), (ggml.F16, 64)], 18 * 16 + 2 * 64),
        ("f16", "0", [(ggml.F16, 3072), (ggml.F16, 2048)], 2 * 5120),
        ("q8_0", "0", [(ggml.Q8_0, 3072), (ggml.Q8_0, 2048)], 34 * 160),
    ],
)
def test_rows(cache_type, mla, layout, nbytes):
    assert row_layout(CONFIG, cache_type, mla) == layout
    assert row_bytes(CONFIG, cache_type, mla) == 3 * nbytes
    paged = cache(2, cache_type=cache_type, mla=mla, layers=3)
    assert (paged.row_bytes, type(paged.row_bytes)) == (3 * nbytes, int)
    assert paged.cache_type == cache_type
    assert paged.exact == (not cache_type.startswith("q"))
    assert len(paged.layers) == 3
    for layer in paged.layers:
        assert type(layer) is (FullCache if mla == "0" else LatentCache)
        for rows, (qtype, width) in zip(layer, layout, strict=True):
            assert rows.qtype == qtype
            assert rows.data.dtype == np.uint8
            assert rows.data.shape == (2 * PAGE, ggml.row_bytes(qtype, width))


def test_types_that_do_not_fit():
    with pytest.raises(PymlaError, match="unknown cache type 'q3_0'; choose f32, f16, bf16, q8_0, q6_0, q5_0, q4_0"):
        row_layout(CONFIG, "q3_0", "auto")
    with pytest.raises(PymlaError, match="cache type q4_0 is for latent rows, which MLA mode 0 does not keep"):
        row_layout(CONFIG, "q4_0", "0")
    odd = {"kv_lora_rank": 500, "qk_rope_head_dim": 40, "qk_head_dim": 168, "v_head_dim": 100}
    for name, mla in (("kv_lora_rank", "auto"), ("qk_head_dim", "0"), ("v_head_dim", "0")):
        config = SimpleNamespace(**vars(CONFIG) | {name: odd[name]})
        with pytest.raises(PymlaError, match=f"cache type q8_0 needs a {name} that 32 divides, and it is {odd[name]}"):
            row_layout(config, "q8_0", mla)
        assert row_layout(config, "f16", mla)
    # The rotated part has 16 bits, whose blocks are single values.
    assert row_layout(SimpleNamespace(**vars(CONFIG) | {"qk_rope_head_dim": 40}), "q8_0", "auto")[1] == (ggml.F16, 40)


def test_rows_lie_in_the_memory_of_their_backend():
    asked = []
    memory = SimpleNamespace(empty=lambda shape, dtype: asked.append((shape, dtype)) or np.empty(shape, dtype))
    block_rows(memory, [(ggml.Q8_0, 64), (ggml.F16, 8)], 5)
    assert asked == [((5, 68), np.uint8), ((5, 16), np.uint8)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, PRESETS["tiny"], qtype="f32", seed=1)
    return ModelConfig.from_gguf(ModelFile.open(path))


# Pages ----------------------------------------------------------------------------------------------------------------


def test_slots_of_a_batch():
    paged, a, b = cache(8), Sequence(), Sequence()
    paged.extend([(a, tokens(3))])
    paged.advance([(a, tokens(3))])
    assert (a.length, a.pages) == (3, [0])
    step = paged.extend([(b, tokens(130, 500).astype(np.int64)), (a, [700, 701])])
    assert (a.length, b.length) == (3, 0)  # counted when the step is done
    assert step.tokens.tolist() == [*range(500, 630), 700, 701]
    assert step.positions.tolist() == [*range(130), 3, 4]
    assert step.seq_of.tolist() == [0] * 130 + [1] * 2
    assert step.slots.tolist() == [*range(64, 194), 3, 4]
    assert step.block_tables.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert {array.dtype for array in step} == {np.dtype(np.int32)}
    paged.advance([(b, tokens(130)), (a, tokens(2))])
    assert (a.length, b.length) == (5, 130)


def test_pages_that_were_never_used_stay_so():
    """They take no memory until they are written: freed ones are used again first."""
    paged, a, b = cache(9), Sequence(), Sequence()
    for _ in range(2):
        paged.extend([(a, tokens(150))])
        paged.advance([(a, tokens(150))])
        assert a.pages == [0, 1, 2]
        paged.truncate(a, 65)
        assert (a.length, a.pages, paged.free_pages) == (65, [0, 1], 7)
        paged.extend([(b, tokens(70))])
        assert b.pages == [2, 3]
        paged.advance([(b, tokens(70))])
        paged.truncate(b, 6)
        assert (b.length, b.pages, paged.free_pages) == (6, [2], 6)
        paged.free(b)
        paged.truncate(a, 64)
        assert (a.length, a.pages, paged.free_pages) == (64, [0], 8)
        paged.free(a)
        assert (a.length, a.pages, paged.free_pages) == (0, [], 9)


def test_a_sequence_keeps_its_pages():
    """Its rows lie in them, whichever others become free."""
    paged, a, b = cache(5), Sequence(), Sequence()
    for sequence in (a, b):
        paged.extend([(sequence, tokens(70))])
        paged.advance([(sequence, tokens(70))])
    paged.free(a)
    paged.extend([(b, tokens(1))])
    assert b.pages == [2, 3]
    paged.extend([(b, tokens(60))])
    assert b.pages == [2, 3, 0]


def test_the_sequences_that_were_used_least_recently_give_way():
    paged, sequences = cache(4), [Sequence() for _ in range(5)]

    def step(*numbers):
        batch = [(sequences[i], tokens(1)) for i in numbers]
        paged.extend(batch)
        paged.advance(batch)
        return [i for i, each in enumerate(sequences) if each.pages]

    for i in range(4):
        step(i)
    assert step(1, 0) == [0, 1, 2, 3]
    assert step(4) == [0, 1, 3, 4]  # 2 is the oldest
    assert step(2) == [0, 1, 2, 4]  # comes back, for 3
    assert step(3, 2) in ([0, 2, 3, 4], [1, 2, 3, 4])  # 0 and 1 were used in one step
    assert step(0, 1, 2, 3) == [0, 1, 2, 3]
    assert [each.length for each in sequences] == [3, 3, 4, 3, 1]
    paged.free(sequences[4])
    assert (sequences[4].saved, sequences[4].length) == (None, 0)


@pytest.mark.parametrize("backend", [reference, cpu], ids=lambda backend: backend.NAME)
@pytest.mark.parametrize(
    ("cache_type", "mla"),
    [
        (name, mla)
        for name in CACHE_TYPES
        for mla in ("auto", "0")
        if mla == "auto" or CACHE_TYPES[name] not in HADAMARD_TYPES
    ],
)
def test_rows_come_back_as_they_were(config, backend, cache_type, mla):
    give_way_and_come_back(config, backend, cache_type, mla)


def test_a_batch_that_cannot_fit_changes_nothing(config):
    cache = PagedCache(config, "f32", "auto", 3, 192, [reference] * config.num_hidden_layers)
    first, second = Sequence(), Sequence()
    cache.extend([(first, np.zeros(100, np.int32))])
    cache.advance([(first, np.zeros(100, np.int32))])
    pages = list(first.pages)
    with pytest.raises(CacheFull, match=r"193 tokens do not fit the context of 192.*`ctx`"):
        cache.extend([(first, np.zeros(93, np.int32))])
    with pytest.raises(CacheFull, match="need 4 pages of 64 tokens, and the cache has 3"):
        cache.extend([(first, np.zeros(1, np.int32)), (second, np.zeros(65, np.int32))])
    assert (first.length, first.pages, second.pages, first.saved) == (100, pages, [], None)
    cache.extend([(first, np.zeros(92, np.int32))])  # both limits can be reached
    assert (len(first.pages), cache.free_pages) == (3, 0)


def test_an_interrupted_step_leaves_no_page_behind(config):
    cache = PagedCache(config, "f32", "auto", 3, 192, [reference] * config.num_hidden_layers)
    first, second = Sequence(), Sequence()
    cache.extend([(first, np.zeros(190, np.int32))])  # and no advance
    cache.extend([(first, np.zeros(3, np.int32)), (second, np.zeros(128, np.int32))])
    assert (len(first.pages), len(second.pages), cache.free_pages) == (1, 2, 0)
    cache.extend([(Sequence(), np.zeros(190, np.int32))])  # for which those two give way, though they have no rows
    assert (first.pages, second.pages, cache.free_pages) == ([], [], 3)
    cache.extend([(first, np.zeros(3, np.int32))])
    assert (len(first.pages), first.saved) == (1, None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["extend", "truncate", "free", "drop"]), st.integers(1, 200)))
)
def test_no_page_is_lost_or_held_twice(config, calls):
    """Whatever is done, slots of a step lie in the sequence's own pages, and position p in page p // 64 of them."""
    cache = PagedCache(config, "q8_0", "auto", 4, 256, [reference] * config.num_hidden_layers)
    sequences = [Sequence() for _ in range(4)]
    for which, call, count in calls:
        sequence = sequences[which]
        if call == "extend":
            tokens = np.zeros(count, np.int32)
            if sequence.length + count > 256:
                with pytest.raises(CacheFull):
                    cache.extend([(sequence, tokens)])
                continue
            step = cache.extend([(sequence, tokens)])
            positions = np.arange(sequence.length, sequence.length + count)
            np.testing.assert_array_equal(step.positions, positions)
            expected = np.array(sequence.pages)[positions // PAGE] * PAGE + positions % PAGE
            np.testing.assert_array_equal(step.slots, expected)
            cache.advance([(sequence, tokens)])
        elif call == "truncate":
            cache.truncate(sequence, min(count, sequence.length))
        elif call == "free":
            cache.free(sequence)
        else:
            sequences[which] = sequence = Sequence()
        held = [page for each in sequences for page in each.pages]
        assert len(held) == len(set(held))
        assert cache.free_pages == 4 - len(held)


# Steps ----------------------------------------------------------------------------------------------------------------


def test_steps_are_cut_and_packed():
    paged, a, b = cache(8), Sequence(), Sequence()
    step = paged.extend([(a, tokens(70, 10)), (b, tokens(5, 90))])
    part = step.part(69, 72)
    assert [array.tolist() for array in part[:4]] == [[79, 90, 91], [69, 0, 1], [0, 1, 1], [69, 128, 129]]
    assert part.block_tables is step.block_tables
    for pages in (None, 2, 7):
        packed = step.packed(pages)
        assert packed.dtype == np.int32
        assert len(packed) == 4 * 75 + 2 * (pages or 2)
        back = Step.unpacked(packed, 75, 2)
        for mine, other in zip(back[:4], step, strict=False):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(back.block_tables[:, :2], step.block_tables)
        assert not back.block_tables[:, 2:].any()
        assert np.shares_memory(back.slots, packed)
    there = step.on(reference)
    for mine, other in zip(there, step, strict=True):
        np.testing.assert_array_equal(mine, other)
