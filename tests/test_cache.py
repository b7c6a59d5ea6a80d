"""The paged cache: what its rows take, and which slots tokens get."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla import ggml, reference
from pymla.cache import PAGE, FullCache, LatentCache, PagedCache, Sequence, Step, block_rows, row_bytes, row_layout
from pymla.errors import CacheFull, PymlaError

# V2-Lite's sizes, with fewer layers.
CONFIG = SimpleNamespace(
    num_attention_heads=16,
    qk_head_dim=192,
    v_head_dim=128,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    num_hidden_layers=3,
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
        ("f16", "0", [(ggml.F16, 3072), (ggml.F16, 2048)], 2 * 5120),
        ("q8_0", "0", [(ggml.Q8_0, 3072), (ggml.Q8_0, 2048)], 34 * 160),
    ],
)
def test_rows(cache_type, mla, layout, nbytes):
    assert row_layout(CONFIG, cache_type, mla) == layout
    assert row_bytes(CONFIG, cache_type, mla) == 3 * nbytes
    paged = cache(2, cache_type=cache_type, mla=mla, layers=3)
    assert paged.row_bytes == 3 * nbytes
    assert paged.cache_type == cache_type
    assert paged.exact == (cache_type != "q8_0")
    assert len(paged.layers) == 3
    for layer in paged.layers:
        assert type(layer) is (FullCache if mla == "0" else LatentCache)
        for rows, (qtype, width) in zip(layer, layout, strict=True):
            assert rows.qtype == qtype
            assert rows.data.dtype == np.uint8
            assert rows.data.shape == (2 * PAGE, ggml.row_bytes(qtype, width))


def test_types_that_do_not_fit():
    with pytest.raises(PymlaError, match="unknown cache type 'q4_0'; choose f32, f16, bf16, q8_0"):
        row_layout(CONFIG, "q4_0", "auto")
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


# Slots ----------------------------------------------------------------------------------------------------------------


def test_slots_of_a_batch():
    paged, a, b = cache(8), Sequence(), Sequence()
    paged.extend([(a, tokens(3))])
    paged.advance([(a, tokens(3))])
    assert (a.length, a.pages) == (3, [0])
    step = paged.extend([(b, tokens(130, 500)), (a, tokens(2, 700))])
    assert (a.length, b.length) == (3, 0)  # counted when the step is done
    assert step.tokens.tolist() == [*range(500, 630), 700, 701]
    assert step.positions.tolist() == [*range(130), 3, 4]
    assert step.seq_of.tolist() == [0] * 130 + [1] * 2
    assert step.slots.tolist() == [*range(64, 194), 3, 4]
    assert step.block_tables.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert {array.dtype for array in step} == {np.dtype(np.int32)}
    paged.advance([(b, tokens(130)), (a, tokens(2))])
    assert (a.length, b.length) == (5, 130)


def test_a_freed_sequences_pages_are_the_next_ones():
    """Pages that were never written take no memory; they stay so as long as others are free."""
    paged, a, b = cache(9), Sequence(), Sequence()
    for _ in range(2):
        paged.extend([(a, tokens(150))])
        paged.advance([(a, tokens(150))])
        assert a.pages == [0, 1, 2]
        paged.truncate(a, 65)
        assert (a.length, a.pages, paged.free_pages) == (65, [0, 1], 7)
        paged.extend([(b, tokens(70))])
        assert b.pages == [2, 3]
        paged.free(b)
        paged.truncate(a, 64)
        assert (a.length, a.pages, paged.free_pages) == (64, [0], 8)
        paged.free(a)
        assert (a.length, a.pages, paged.free_pages) == (0, [], 9)


def test_a_full_cache_changes_nothing():
    paged, a, b = cache(3, ctx=150), Sequence(), Sequence()
    for batch, words in (
        ([(a, tokens(151))], "151 tokens do not fit the context of 150"),
        ([(a, tokens(128)), (b, tokens(65))], "the cache has 3 free pages of 64 tokens and needs 4"),
    ):
        with pytest.raises(CacheFull, match=words):
            paged.extend(batch)
        assert (a.pages, b.pages, paged.free_pages) == ([], [], 3)
    paged.extend([(a, tokens(150))])  # both limits can be reached
    assert paged.free_pages == 0


SEQUENCES, POOL, CTX = 3, 6, 300
SHARE = st.integers(0, 200)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.lists(st.tuples(st.integers(0, SEQUENCES - 1), SHARE), min_size=1, max_size=3, unique_by=lambda x: x[0]),
            st.tuples(st.integers(0, SEQUENCES - 1), SHARE),
        ),
        max_size=12,
    )
)
def test_tokens_never_share_a_slot(operations):
    """Whatever is added, cut off and freed: a slot belongs to one token, which keeps it, and no page is lost."""
    paged, sequences = cache(POOL, CTX), [Sequence() for _ in range(SEQUENCES)]
    slots_of = [[] for _ in range(SEQUENCES)]
    for operation in operations:
        if isinstance(operation, tuple):
            i, length = operation
            length = min(length, len(slots_of[i]))
            paged.truncate(sequences[i], length)
            del slots_of[i][length:]
        else:
            batch = [(sequences[i], tokens(count)) for i, count in operation]
            lengths = [len(slots) for slots in slots_of]
            for i, count in operation:
                lengths[i] += count
            fits = max(lengths) <= CTX and sum(-(-length // PAGE) for length in lengths) <= POOL
            if not fits:
                with pytest.raises(CacheFull):
                    paged.extend(batch)
            elif sum(count for _, count in operation):
                step = paged.extend(batch)
                paged.advance(batch)
                for row, (i, _) in enumerate(operation):
                    old, new = slots_of[i], step.slots[step.seq_of == row].tolist()
                    assert step.positions[step.seq_of == row].tolist() == [*range(len(old), len(old) + len(new))]
                    old += new
                    table = step.block_tables[row]
                    assert old == [table[p // PAGE] * PAGE + p % PAGE for p in range(len(old))]
        taken = [slot for slots in slots_of for slot in slots]
        assert len(set(taken)) == len(taken)
        assert all(0 <= slot < POOL * PAGE for slot in taken)
        assert [sequence.length for sequence in sequences] == [len(slots) for slots in slots_of]
        assert paged.free_pages == POOL - sum(-(-len(slots) // PAGE) for slots in slots_of)


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
