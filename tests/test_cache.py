"""Pages of the cache: which are free, and what happens when they are not enough."""

import numpy as np
import pytest
from cache_checks import give_way_and_come_back
from hypothesis import given, settings
from hypothesis import strategies as st
from make_model import PRESETS, make_model

from pymla import cpu, reference
from pymla.cache import CACHE_TYPES, PAGE, PagedCache, Sequence
from pymla.config import ModelConfig
from pymla.errors import CacheFull
from pymla.modelfile import ModelFile


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, PRESETS["tiny"], qtype="f32", seed=1)
    return ModelConfig.from_gguf(ModelFile.open(path))


@pytest.mark.parametrize("backend", [reference, cpu], ids=lambda backend: backend.NAME)
@pytest.mark.parametrize("mla", ["auto", "0"])
@pytest.mark.parametrize("cache_type", list(CACHE_TYPES))
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


def test_an_interrupted_step_leaves_no_page_behind(config):
    cache = PagedCache(config, "f32", "auto", 3, 192, [reference] * config.num_hidden_layers)
    first, second = Sequence(), Sequence()
    cache.extend([(first, np.zeros(190, np.int32))])  # and no advance
    cache.extend([(first, np.zeros(3, np.int32)), (second, np.zeros(128, np.int32))])
    assert (len(first.pages), len(second.pages), cache.free_pages) == (1, 2, 0)


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
