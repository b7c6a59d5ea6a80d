"""Pages that several sequences share: forks, kept prefixes, copy on write, and rows that leave the cache."""

import contextlib
import functools
import hashlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pymla import reference
from pymla.engine.cache import PagedCache, Sequence, pages_of
from pymla.engine.prefixes import KeptPages, page_digests
from pymla.errors import CacheFull, PymlaError
from pymla.pages import PAGE

PAGES, CTX = 9, 6 * PAGE - 3
# Rows of 16 bytes each.
CONFIG = SimpleNamespace(
    num_attention_heads=1, qk_head_dim=8, v_head_dim=4, kv_lora_rank=4, qk_rope_head_dim=4, num_hidden_layers=1,
    indexer=None,
)  # fmt: skip


def new_cache(pages=7, ctx=CTX):
    return PagedCache(CONFIG, "f32", "auto", pages, ctx, [reference])


def rows_of(tokens, start=0):
    """What the slots of a text's tokens hold in these tests: a digest of the text up to there, uint8 (n, 16)."""
    return _rows_of(tuple(tokens))[start:]


@functools.cache
def _rows_of(tokens):
    digest, rows = hashlib.md5(), []
    for token in tokens:
        digest.update(b"%d " % token)
        rows.append(digest.copy().digest())
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16)


def write(cache, step, batch):
    """What a forward pass does to the cache."""
    start = 0
    for sequence, tokens in batch:
        rows = rows_of([*sequence.tokens, *tokens], sequence.length)
        slots = step.slots[start : start + len(tokens)]
        cache.layers[0].latent.data[slots], cache.layers[0].rope.data[slots] = rows, rows[:, ::-1]
        start += len(tokens)


def append(cache, *batch):
    """A step of some sequences and their new tokens."""
    write(cache, cache.extend(batch), batch)
    cache.advance(batch)


def new_sequence(cache, tokens):
    sequence = Sequence()
    append(cache, (sequence, tokens))
    return sequence


def stored(cache, sequence):
    """The rows of a sequence, wherever they are: two arrays (n, 16)."""
    if sequence.saved is not None:
        return [data.reshape(-1, 16)[: sequence.length] for data in sequence.saved]
    positions = np.arange(sequence.length)
    slots = np.array(sequence.pages, int)[positions // PAGE] * PAGE + positions % PAGE
    return [rows.data[slots] for rows in cache.layers[0]]


def check_rows(cache, sequence, tokens):
    """A sequence has these tokens, and their rows."""
    assert sequence.tokens == list(tokens)
    latent, rope = stored(cache, sequence)
    np.testing.assert_array_equal(latent, rows_of(tokens))
    np.testing.assert_array_equal(rope[:, ::-1], latent)


def kept(cache):
    """The pages that are kept, by digest."""
    return dict(cache._kept._entries)


def text(length, *changes):
    """The first tokens of a text, which is another one at each position of `changes`."""
    return [p + 1000 * changes.count(p) for p in range(length)]


# One thing at a time --------------------------------------------------------------------------------------------------


def test_a_fork_shares_pages_until_one_writes():
    cache = new_cache()
    first = new_sequence(cache, text(100))
    second, third = cache.fork(first), cache.fork(first)
    assert first.pages == second.pages == third.pages == [0, 1]
    assert (cache.free_pages, cache.room) == (5, 5)
    assert [cache.pages_needed(first, count) for count in (0, 1, 28, 29)] == [0, 1, 1, 2]
    append(cache, (second, [7]))
    assert (first.pages, second.pages, third.pages) == ([0, 1], [0, 2], [0, 1])
    append(cache, (first, [8]), (third, [9]))  # the last one of a page needs no copy of it
    assert (first.pages, third.pages, cache.free_pages) == ([0, 3], [0, 1], 3)
    assert [cache.pages_needed(each, 1) for each in (first, second, third)] == [0, 0, 0]
    for sequence, token in ((first, 8), (second, 7), (third, 9)):
        check_rows(cache, sequence, [*text(100), token])
    cache.free(first)
    cache.truncate(second, 64)
    append(cache, (second, [5]))  # a new page needs no copy
    assert (second.pages, cache.free_pages) == ([0, 2], 4)
    check_rows(cache, third, [*text(100), 9])


def test_truncating_into_shared_pages():
    cache = new_cache()
    first = new_sequence(cache, text(200))
    second = cache.fork(first)
    cache.truncate(second, 70)
    assert (second.pages, second.tokens) == ([0, 1], text(70))
    append(cache, (second, [1, 2, 3]))
    assert (first.pages, second.pages) == ([0, 1, 2, 3], [0, 4])
    check_rows(cache, first, text(200))
    check_rows(cache, second, [*text(70), 1, 2, 3])


def test_a_kept_prefix_is_found():
    cache = new_cache()
    first = new_sequence(cache, text(150))
    cache.keep(first)
    assert (cache.free_pages, cache.room) == (4, 4)
    cache.free(first)
    assert (cache.free_pages, cache.room) == (5, 7)  # two full pages stay
    for tokens, count in [
        (text(150), 128),
        (text(128), 64),  # the last token is computed, so that there are logits
        (text(129), 128),
        (text(129, 128), 128),
        (text(200, 127), 64),
        (text(200, 63), 0),
        (text(200, 63, 127), 0),
        (text(65), 64),
        (text(64), 0),
        ([], 0),
        (np.array(text(150), np.int32), 128),
    ]:
        second = Sequence()
        assert cache.attach(second, tokens) == count
        check_rows(cache, second, list(tokens[:count]))
        assert all(type(token) is int for token in second.tokens)
    second = Sequence()
    cache.attach(second, text(150))
    append(cache, (second, text(150)[128:]))
    check_rows(cache, second, text(150))
    with pytest.raises(PymlaError, match="attach: the sequence has 150 tokens; give an empty one"):
        cache.attach(second, text(150))


def test_pages_of_another_text_are_not_found():
    """A page's digest counts everything before it."""
    cache = new_cache()
    cache.keep(new_sequence(cache, text(192)))
    assert cache.attach(Sequence(), text(192)) == 128
    assert cache.attach(Sequence(), text(192, 10)) == 0
    assert cache.attach(Sequence(), text(192, 70)) == 64
    one, other = (list(page_digests([*start, *range(500)])) for start in ([1] * 64, [2] * 64))
    assert len(one) == 8
    assert not set(one) & set(other)
    assert list(page_digests(range(63))) == []


def test_a_kept_page_is_copied_before_it_is_written():
    cache = new_cache()
    first = new_sequence(cache, text(128))
    cache.keep(first)
    cache.truncate(first, 100)
    assert cache.pages_needed(first, 1) == 0  # the copy takes a page, and the kept one can be dropped
    append(cache, (first, [1]))
    assert first.pages == [0, 2]
    second = Sequence()
    assert cache.attach(second, text(129)) == 128
    check_rows(cache, second, text(128))
    check_rows(cache, first, [*text(100), 1])


def test_a_kept_page_does_not_stop_its_only_sequence():
    """Where there is no page for the copy, it is kept no longer."""
    cache = new_cache(pages=2)
    first = new_sequence(cache, text(128))
    cache.keep(first)
    cache.truncate(first, 100)
    append(cache, (first, [1]))
    assert first.pages == [0, 1]
    assert cache.attach(Sequence(), text(129)) == 64


def test_the_kept_pages_that_were_used_least_recently_go_first():
    cache = new_cache(pages=6)
    texts = [text(65, 0), text(129, 0, 0), text(65, 0, 0, 0)]
    for each in texts:
        sequence = new_sequence(cache, each)
        cache.keep(sequence)
        cache.free(sequence)

    def found():
        return [len(cache._kept.find(each)) for each in texts]

    assert found() == [1, 2, 1]
    assert cache.attach(Sequence(), texts[0]) == 64  # and is dropped at once
    one = new_sequence(cache, text(128, 5))
    assert (found(), cache.free_pages) == ([1, 2, 1], 0)
    more = [new_sequence(cache, text(1, 6))]
    assert found() == [1, 1, 1]  # a text's last page goes before its first one
    more.append(new_sequence(cache, text(1, 6)))
    assert found() == [1, 0, 1]
    more.append(new_sequence(cache, text(1, 6)))
    assert found() == [1, 0, 0]
    assert (cache.free_pages, cache.room) == (0, 1)
    assert one.saved is None


def test_kept_pages_that_a_sequence_has_stay():
    cache = new_cache(pages=4)
    first = new_sequence(cache, text(129))
    cache.keep(first)
    second = new_sequence(cache, text(64, 0))
    cache.keep(second)
    cache.free(second)
    third = new_sequence(cache, text(64, 0, 0))
    assert third.pages == [3]
    assert len(cache._kept.find(text(129))) == 2
    assert cache._kept.find(text(64, 0)) == {}
    check_rows(cache, first, text(129))


def test_the_index_survives_an_interrupt():
    """`_pages` is what `_entries` says, wherever a call was left."""
    index = KeptPages()
    index.add(text(128), [4, 2])
    index._pages = None
    assert index.pages == 0b10100
    assert index.evict(1, 1 << 4)
    assert (index.pages, list(index._entries.values())) == (0b10000, [4])
    assert not index.evict(1, 1 << 4)
    index.drop(4)
    assert (index.pages, index._entries) == (0, {})


def test_rows_leave_the_cache_and_come_back():
    cache = new_cache()
    first, second = new_sequence(cache, text(150)), new_sequence(cache, text(70, 0))
    cache.swap_out(first)
    assert (first.pages, cache.free_pages) == ([], 5)
    cache.swap_out(first)
    check_rows(cache, first, text(150))
    other = cache.fork(first)
    assert [cache.pages_needed(first, count) for count in (1, 42, 43)] == [3, 3, 4]
    append(cache, (second, [3]), (first, [4]))
    check_rows(cache, first, [*text(150), 4])
    assert (first.saved, first.pages) == (None, [0, 1, 2])
    append(cache, (other, [5]))
    check_rows(cache, other, [*text(150), 5])
    cache.truncate(second, 0)
    cache.swap_out(second)
    assert (second.saved, second.pages) == (None, [])


def test_a_copy_into_the_cache_that_is_interrupted(monkeypatch):
    cache = new_cache()
    first = new_sequence(cache, text(150))
    cache.swap_out(first)
    cache.layers[0].latent.data[:] = 0

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pymla.engine.cache.write_pages", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.extend([(first, [1])])
    assert first.pages == [0, 1, 2]
    cache.keep(first)  # its pages have no rows yet
    assert cache._kept.pages == 0
    assert cache.fork(first).pages == []
    append(cache, (first, [4]))
    check_rows(cache, first, [*text(150), 4])


def test_rows_that_are_kept_are_shared_when_a_sequence_comes_back():
    cache = new_cache()
    first = new_sequence(cache, text(150))
    cache.keep(first)
    second = cache.fork(first)
    cache.swap_out(second)
    assert cache.pages_needed(second, 1) == 1  # the others are in use
    append(cache, (second, [4]))
    assert (first.pages, second.pages) == ([0, 1, 2], [0, 1, 3])
    check_rows(cache, second, [*text(150), 4])
    cache.free(first)
    cache.swap_out(second)
    assert cache.pages_needed(second, 1) == 3  # from `room`, which counts kept pages


def test_forks_fit_where_copies_would_not():
    """Pages of a batch count once, and the copies that it needs."""
    cache = new_cache(pages=6)
    first = new_sequence(cache, text(4 * PAGE - 10))
    second, third = cache.fork(first), cache.fork(first)
    append(cache, (first, [1]), (second, [2]), (third, [3]))
    assert cache.free_pages == 0
    for sequence, token in ((first, 1), (second, 2), (third, 3)):
        check_rows(cache, sequence, [*text(4 * PAGE - 10), token])
    with pytest.raises(CacheFull, match="need 7 pages of 64 tokens, and the cache has 6"):
        cache.extend([(first, [0] * 10), (second, [0]), (third, [0])])


def test_a_fork_gives_way_to_the_step_of_the_other():
    cache = new_cache(pages=4)
    first = new_sequence(cache, text(4 * PAGE - 10))
    second = cache.fork(first)
    append(cache, (first, [1]))  # no page is left for a copy, so the fork leaves
    assert first.pages == [0, 1, 2, 3]
    check_rows(cache, first, [*text(4 * PAGE - 10), 1])
    check_rows(cache, second, text(4 * PAGE - 10))
    assert second.saved is not None


def test_sequences_that_nobody_has_any_more_give_their_pages_back():
    cache = new_cache()
    fork = cache.fork(new_sequence(cache, text(150)))
    assert cache.free_pages == 4
    del fork
    assert cache.free_pages == 7
    assert cache._holders == set()


# Anything in any order ------------------------------------------------------------------------------------------------


class Pages(RuleBasedStateMachine):
    """A cache against a list of texts: what each sequence's slots hold, and who has which pages."""

    def __init__(self):
        super().__init__()
        self.cache = new_cache(PAGES)
        self.sequences, self.texts, self.fresh = [], [], 10_000

    some = st.integers(0, 100)
    counts = st.sampled_from([1, 30, 64, 65, 100])

    def pick(self, number):
        return number % len(self.sequences)

    @precondition(lambda self: len(self.sequences) < 6)
    @rule(change=st.sampled_from([(), (0,), (70,)]), count=st.sampled_from([0, 65, 128, 150]), keep=st.booleans())
    def begin(self, change, count, keep):
        """A sequence, with what is kept of its text; the rest is computed."""
        sequence, tokens = Sequence(), text(count, *change)
        found = self.cache.attach(sequence, tokens)
        assert found % PAGE == 0
        assert found <= max(count - 1, 0)
        self.sequences.append(sequence)
        self.texts.append(tokens[:found])
        if found < count:
            self.append([len(self.texts) - 1], [tokens[found:]])
        if keep:
            self.cache.keep(sequence)

    @precondition(lambda self: self.sequences)
    @rule(numbers=st.lists(some, min_size=1, max_size=3), new=st.tuples(*[counts] * 3), keep=st.booleans())
    def step(self, numbers, new, keep):
        """Tokens that no other sequence has."""
        chosen = list(dict.fromkeys(map(self.pick, numbers)))
        news = []
        for _, count in zip(chosen, new, strict=False):
            self.fresh += 1
            news.append([self.fresh] * count)
        self.append(chosen, news)
        if keep:
            self.cache.keep(self.sequences[chosen[0]])

    @precondition(lambda self: self.sequences)
    @rule(number=some, count=counts)
    def interrupted_step(self, number, count):
        """Slots were found, and some written."""
        batch = [(self.sequences[self.pick(number)], [5] * count)]
        with contextlib.suppress(CacheFull):
            write(self.cache, self.cache.extend(batch), batch)

    @precondition(lambda self: self.sequences)
    @rule(number=some, by=counts)
    def truncate(self, number, by):
        i = self.pick(number)
        length = max(len(self.texts[i]) - by, 0)
        self.cache.truncate(self.sequences[i], length)
        self.texts[i] = self.texts[i][:length]

    @precondition(lambda self: 0 < len(self.sequences) < 6)
    @rule(number=some, step=st.booleans())
    def fork(self, number, step):
        i = self.pick(number)
        self.sequences.append(self.cache.fork(self.sequences[i]))
        self.texts.append(list(self.texts[i]))
        if step:
            self.append([i, len(self.texts) - 1], [[1], [2]])

    @precondition(lambda self: self.sequences)
    @rule(number=some)
    def swap_out(self, number):
        self.cache.swap_out(self.sequences[self.pick(number)])

    @precondition(lambda self: self.sequences)
    @rule(number=some, drop=st.booleans())
    def end(self, number, drop):
        i = self.pick(number)
        if not drop:
            self.cache.free(self.sequences[i])
        del self.sequences[i], self.texts[i]

    def append(self, chosen, news):
        """A step, and what it may do to the pages of others."""
        batch = [(self.sequences[i], new) for i, new in zip(chosen, news, strict=True)]
        before, room = kept(self.cache), self.cache.room
        state = [(list(each.pages), each.saved is None) for each in self.sequences]
        needed = sum(self.cache.pages_needed(sequence, len(new)) for sequence, new in batch)
        lengths = [sequence.length + len(new) for sequence, new in batch]
        try:
            step = self.cache.extend(batch)
        except CacheFull:
            assert max(lengths) > CTX or sum(map(pages_of, lengths)) > PAGES
            assert state == [(each.pages, each.saved is None) for each in self.sequences]
            assert kept(self.cache) == before
            return
        write(self.cache, step, batch)
        self.cache.advance(batch)
        for i, new in zip(chosen, news, strict=True):
            self.texts[i] = self.texts[i] + new
        others = [i for i in range(len(self.sequences)) if i not in chosen]
        left = [i for i in others if self.sequences[i].pages != state[i][0]]
        dropped = [page for digest, page in before.items() if digest not in kept(self.cache)]
        if needed <= room:
            assert not left
            stayed = {
                page
                for each, (pages, _) in zip(self.sequences, state, strict=True)
                for page, now in zip(pages, each.pages, strict=False)
                if page == now
            }
            assert not set(dropped) & stayed
        if dropped and not left:
            assert self.cache.free_pages == 0

    def in_use(self):
        return {page for sequence in self.sequences for page in sequence.pages}

    @invariant()
    def rows(self):
        for sequence, tokens in zip(self.sequences, self.texts, strict=True):
            check_rows(self.cache, sequence, tokens)

    @invariant()
    def pages(self):
        in_use, entries = self.in_use(), kept(self.cache)
        assert self.cache.room == PAGES - len(in_use)
        assert self.cache.free_pages == PAGES - len(in_use | set(entries.values()))
        assert len(set(entries.values())) == len(entries)
        for sequence in self.sequences:
            assert len(set(sequence.pages)) == len(sequence.pages)
        # A page of several has full rows of the same text for all of them, or the last ones of a text for forks.
        for page, count in Counter(page for sequence in self.sequences for page in sequence.pages).items():
            assert count == 1 or len({each.pages.index(page) for each in self.sequences if page in each.pages}) == 1


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
