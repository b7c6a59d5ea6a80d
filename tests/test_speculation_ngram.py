"""Prompt lookup (`pymla.engine.speculation.ngram`)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymla.engine.speculation.ngram import NgramDrafter, NgramIndex
from pymla.errors import PymlaError


def naive(tokens, shortest, longest, window):
    """The match at the end of a text, by its definition: (matched, source)."""
    matched = source = 0
    for length in range(1, len(tokens) + 1):
        text, first = tokens[:length], max(0, length - window)
        followed = matched + 1 if matched and text[source] == text[-1] else 0
        found, behind = latest(text, first, shortest, longest)
        matched, source = (followed, source + 1) if followed >= found else (found, behind)
    return matched, source


def latest(text, first, shortest, longest):
    """The longest n-gram at the end of a text that occurs earlier, from position `first` on: (n, latest end)."""
    for n in range(min(longest, len(text) - first), shortest - 1, -1):
        for stop in range(len(text) - 1, first + n - 1, -1):
            if text[stop - n : stop] == text[-n:]:
                return n, stop
    return 0, 0


def repeated(tokens, source, count):
    """What follows a match, where the text goes on by what is said to follow."""
    text = list(tokens)
    for i in range(count):
        text.append(text[source + i])
    return text[len(tokens) :]


@given(
    tokens=st.lists(st.integers(0, 3), max_size=60),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
    room=st.integers(1, 40),
)
def test_matches_are_those_of_a_search(tokens, shortest, more, room):
    longest = shortest + more
    index = NgramIndex(shortest=shortest, longest=longest, window=longest + room)
    for i, token in enumerate(tokens):
        index.extend([token])
        matched, source = naive(tokens[: i + 1], shortest, longest, longest + room)
        assert index.matched == matched
        if matched:
            assert index.source == source
            assert index.continuation(7) == repeated(tokens[: i + 1], source, 7)
        else:
            assert index.continuation(7) == []
    assert len(index) == len(tokens)


def test_the_longest_match_counts_and_then_the_latest():
    index = NgramIndex([1, 2, 3, 7, 2, 3, 8, 9, 1, 2, 3])
    assert (index.matched, index.continuation(2)) == (3, [7, 2])
    index = NgramIndex([2, 3, 7, 2, 3, 8, 2, 3])
    assert (index.matched, index.continuation(1)) == (2, [8])


def test_a_match_that_is_right_is_followed():
    """The beginning is repeated; its middle also stands later, with another continuation."""
    beginning = [1, 2, 3, 4, 5, 6, 7]
    index = NgramIndex([*beginning, 0, 3, 4, 9, 0, *beginning[:4]], longest=2)
    assert (index.matched, index.continuation(3)) == (4, [5, 6, 7])


def test_a_text_that_repeats_its_end_goes_on_so():
    assert NgramIndex([5, 6, 7, 6, 7]).continuation(5) == [6, 7, 6, 7, 6]


def test_memory_is_bounded():
    index = NgramIndex(range(5000), shortest=2, longest=4, window=100)
    assert len(index._ring) == 100
    assert [len(after) for after in index._after.values()] == [97, 98, 99]
    index.extend([4950, 4951])
    assert index.continuation(2) == [4952, 4953]
    index.extend([100, 101, 102])  # forgotten
    assert index.matched == 0


def test_the_drafter():
    drafter = NgramDrafter(shortest=1)
    first, second = drafter.begin([1, 2, 3, 1]), drafter.begin([4])
    drafts = drafter.draft([first, second, first], [3, 3, 0])
    assert [draft.tokens for draft in drafts] == [[2, 3, 1], [], []]
    assert [drafter.kind(state) for state in (first, drafter.begin([*range(9)] * 2))] == [0, 2]
    assert all(draft.probabilities is None for draft in drafts)
    drafter.commit(second, [5, 4])
    assert drafter.draft([second], [1])[0].tokens == [5]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"shortest": 0}, "`shortest` is 0"),
        ({"shortest": 4, "longest": 3}, "`longest` is 3; a whole number from 4 on"),
        ({"longest": 6, "window": 6}, "`window` is 6; a whole number from 7 on"),
    ],
)
def test_limits_that_are_of_no_use(limits, message):
    with pytest.raises(PymlaError, match=message):
        NgramDrafter(**limits)
