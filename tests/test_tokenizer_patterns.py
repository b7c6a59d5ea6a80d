"""Every pre-tokenizer against the regex package and tiktoken, on lines of text that tokenizers get wrong."""

import pytest
import tokenizer_oracles
from byte_pairs import trained, written
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_text import lines, special_lines

from pymla.errors import PymlaError
from pymla.text.byte_alphabet import BYTES
from pymla.text.byte_level import ByteLevel
from pymla.text.pre_tokenizers import ADD_BOS, IGNORE_MERGES, PRE_TOKENIZERS
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

PATTERNS = tokenizer_oracles.PATTERNS
TEXTS = (*lines(), "\n".join(line for line in lines() if len(line) < 200))
CONTROLS = ("<|im_end|>", "<｜end▁of▁sentence｜>", "[EOS]", "<|user|>", "</s>", "<unk>")
USERS = ("<think>", "<|tool|>", "  ")
#: A word that is a token, and that no merges lead to.
WORD = b"unmergeable"


@pytest.fixture(scope="module")
def pairs():
    return trained(tuple(line for line in lines() if len(line) < 400), 6000)


@pytest.fixture(scope="module")
def oracle(pairs):
    return tokenizer_oracles.BytePairs(pairs.ranks)


@pytest.fixture(scope="module")
def made(pairs):
    """Tokenizers of the pairs by the name of their pre-tokenizer, with special tokens behind the pairs."""
    tokens = [*pairs.tokens, *CONTROLS, *USERS]
    kinds = [NORMAL] * len(pairs.ranks) + [CONTROL] * len(CONTROLS) + [USER_DEFINED] * len(USERS)
    return {pre: Tokenizer(ByteLevel(tokens, kinds, pairs.merges, pre)) for pre in PATTERNS}


def test_the_corpus():
    assert len(TEXTS) == len(set(TEXTS)) >= 3000
    assert sum(map(len, TEXTS)) > 180_000


@pytest.mark.parametrize("pre", PATTERNS)
def test_pieces(pre):
    for text in TEXTS:
        found = [bytes(map(BYTES.get, piece)).decode() for piece, _ in PRE_TOKENIZERS[pre].pre_tokenize_str(text)]
        assert found == tokenizer_oracles.pieces(text, PATTERNS[pre]), ascii(text)


@pytest.mark.parametrize("pre", PATTERNS)
def test_ids(made, oracle, pre):
    tokenizer, patterns = made[pre], PATTERNS[pre]
    whole = oracle.by_pattern(patterns[0]) if len(patterns) == 1 else None
    for text in TEXTS:
        if any(name in text for name in USERS):
            continue
        ids = tokenizer.encode(text)
        assert ids == oracle.of_pieces(tokenizer_oracles.pieces(text, patterns)), ascii(text)
        assert whole is None or ids == whole(text), ascii(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("pre", PATTERNS)
@pytest.mark.parametrize("parsed", [False, True])
def test_ids_of_special_tokens(pairs, made, oracle, pre, parsed):
    """Control tokens where they are parsed, user-defined ones everywhere, as those that begin first and are longest."""
    tokenizer = made[pre]
    names = sorted([*USERS, *CONTROLS] if parsed else USERS, key=len, reverse=True)
    ids = {name: len(pairs.ranks) + i for i, name in enumerate((*CONTROLS, *USERS))}
    for text in special_lines([*CONTROLS, *USERS]):
        expected, start, at = [], 0, 0
        while at <= len(text):
            name = next((name for name in names if text.startswith(name, at)), None)
            if name or at == len(text):
                expected += oracle.of_pieces(tokenizer_oracles.pieces(text[start:at], PATTERNS[pre]))
            if name:
                expected.append(ids[name])
                at = start = at + len(name)
            else:
                at += 1
        assert tokenizer.encode(text, parse_special=parsed) == expected, ascii(text)
        assert tokenizer.decode(expected, skip_special=False) == text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_piece_that_is_a_token(pairs, pre):
    """Some models take it as it is, whether or not merges lead to it. No piece becomes a control token."""
    tokens, kinds = [*pairs.tokens, written(WORD), "control"], [NORMAL] * (len(pairs.ranks) + 1) + [CONTROL]
    tokenizer = Tokenizer(ByteLevel(tokens, kinds, pairs.merges, pre))
    word = len(pairs.ranks)
    assert (tokenizer.encode(WORD.decode()) == [word]) == (pre in IGNORE_MERGES)
    assert word + 1 not in tokenizer.encode("control")
    assert tokenizer.encode("control", parse_special=True) == [word + 1]


@pytest.mark.parametrize("kind", [CONTROL, UNUSED, UNKNOWN])
@pytest.mark.parametrize("pre", ["deepseek-v3", "glm4"])
def test_merges_lead_to_no_special_token(pre, kind):
    """Whatever the file says: the text would be lost."""
    tokens, kinds = [*sorted(BYTES), "ab", "abc", "cd"], [NORMAL] * 256 + [kind, NORMAL, NORMAL]
    tokenizer = Tokenizer(ByteLevel(tokens, kinds, ["a b", "ab c", "c d"], pre))
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert [tokens[token] for token in tokenizer.encode("abcd")] == ["a", "b", "cd"]


def test_names_of_pre_tokenizers():
    assert PRE_TOKENIZERS.keys() >= PATTERNS.keys() | IGNORE_MERGES | ADD_BOS


@pytest.mark.parametrize("pre", {id(splits): name for name, splits in PRE_TOKENIZERS.items()}.values())
def test_long_texts(pre):
    """Time and memory grow with a text's length, and no engine gives up."""
    for character in "aA1 \n.é中\u0301":
        text = character * 300_000
        pieces = PRE_TOKENIZERS[pre].pre_tokenize_str(text)
        assert sum(len(piece) for piece, _ in pieces) == len(text.encode())


def test_texts_that_are_too_long(made):
    with pytest.raises(PymlaError, match="10500000 characters, has too many of one kind in a row"):
        made["tekken"].encode("A" * 10_500_000)


CHARACTERS = st.one_of(
    st.characters(codec="utf-8"), st.sampled_from("aA 1\t\n\r'.-/中あ한é\u0301ſß🦙\u200d\ufe0f\u3000\x85")
)


@settings(max_examples=150, deadline=None)
@given(st.text(CHARACTERS, max_size=40))
@pytest.mark.parametrize("pre", PATTERNS)
def test_any_text_comes_back(made, pre, text):
    tokenizer = made[pre]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True), skip_special=False) == text
