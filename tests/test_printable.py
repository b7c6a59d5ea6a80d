"""Text for a terminal."""

import re
import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla.errors import PymlaError
from pymla.printable import LONGEST, for_terminal, one_line, printable, shortened, shown

#: Every code point, lone surrogates too, and often those that a terminal obeys or does not show.
TRICKY = st.sampled_from(
    "\x00\x07\x1b\x7f\x85\x9b\n\r\t\u200b\u200d\u202e\u2066\u2028\ufe0f\ufeff\u3164\U000e0041\ud800é🦙 "
)
TEXTS = st.text(st.one_of(TRICKY, st.characters(codec=None)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 60))
def test_messages_are_one_short_printable_line(text, times):
    message = one_line(text * times)
    assert len(message) <= LONGEST
    assert message.isprintable()
    assert not any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") for each in message)
    assert one_line(message) == message
    assert str(PymlaError(text * times)) == message


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_printable_text_stays_and_the_rest_can_be_read_back(text):
    shown_text = printable(text)
    assert shown_text.isprintable()
    plain = "".join(each for each in text if each.isascii() and each.isprintable() and each != "\\")
    assert printable(plain) == plain
    if text.isascii() and "\\" not in text:
        assert shown_text.encode().decode("unicode_escape") == text


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_generated_text_keeps_all_but_control_characters(text):
    safe = for_terminal(text)
    assert not any(
        unicodedata.category(each) == "Cc" for each in safe.replace("\r\n", "").replace("\n", "").replace("\t", "")
    )
    if not any(unicodedata.category(each) == "Cc" for each in text):
        assert safe == text


def test_escapes():
    assert printable("a\x1b[31m\u202e\n\ud800\ufe0f🦙") == r"a\x1b[31m\u202e\n\ud800\ufe0f🦙"
    assert one_line(" two\r\n  li\tnes\n") == r"two li\tnes"
    assert one_line("two\r\n  lines\n\n\x9b") == r"two lines \x9b"
    assert one_line("two  spaces") == "two  spaces"
    assert for_terminal("a\r\nb\rc\t\x1b[0m\u200f") == "a\r\nb\\rc\t\\x1b[0m\u200f"


def test_what_is_cut():
    assert shortened("x" * 10, 10) == "x" * 10
    assert shortened("abcdefghijk", 6) == "abc…jk"
    assert len(one_line("\x1b" * 100_000)) == LONGEST
    assert re.fullmatch("'a+…a+'", shown("a" * 60_000))
    assert len(shown("a" * 60_000)) <= 60
    assert len(shown("\x1b" * 60_000)) <= 60
    assert shown([1] * 100_000) == shown(np.zeros(100_000)) == "an array of 100000"
    assert len(shown(10**4000)) <= 60
    assert shown(10**5000) == "an integer of thousands of digits"
    assert shown(-1) == "-1"
    assert shown("é\n") == r"'é\n'"
