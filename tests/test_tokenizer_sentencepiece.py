"""SentencePiece vocabularies, against the sentencepiece package where that has no normaliser."""

import functools
import io
import itertools
import time

import gguf
import gguf_files
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_text import lines

from pymla.errors import PymlaError
from pymla.text.sentencepiece import SentencePiece
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

USERS = ("<tool>", "[x]")


@functools.cache
def trained(**options):
    """A small vocabulary of sentencepiece, without characters of the far scripts."""
    texts = [line for line in lines() if 3 < len(line) < 400 and max(line) < "\u0600"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=2000,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_number=False,
        split_by_unicode_script=False,
        split_digits=False,
        character_coverage=1.0,
        control_symbols=["<|im_end|>"],
        user_defined_symbols=list(USERS),
        minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True} | options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind(model, token):
    tests = {UNKNOWN: "is_unknown", CONTROL: "is_control", UNUSED: "is_unused", BYTE: "is_byte"}
    kinds = (kind for kind, name in tests.items() if getattr(model, name)(token))
    return next(kinds, USER_DEFINED if model.id_to_piece(token) in USERS else NORMAL)


def metadata(model, **changes):
    """As llama.cpp's converter writes it."""
    ids = range(model.vocab_size())
    made = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": np.array([model.get_score(i) for i in ids], np.float32).tolist(),
        "token_type": [kind(model, i) for i in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return made | changes


@pytest.fixture
def read(tmp_path):
    """The tokenizer of a model, with some metadata changed, or left out where it is None."""

    def written(model, **changes):
        found = {f"tokenizer.ggml.{key}": value for key, value in metadata(model, **changes).items()}
        return Tokenizer.from_gguf(gguf_files.write(tmp_path / "spm.gguf", found))

    return written


TEXTS = [line for line in (*lines(), "\n".join(line for line in lines() if len(line) < 200)) if "\u2581" not in line]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_ids(read, model_type):
    """A vocabulary of whichever kind is merged by its scores; for those of BPE the package does the same."""
    model = trained(model_type=model_type)
    tokenizer = read(model)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, {2, model.piece_to_id("<|im_end|>")}, True)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if model_type == "bpe" and "\x00" not in text:
            assert ids == [1, *model.encode(text)], ascii(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids[1:]) == text


def test_without_a_blank_in_front(read):
    model = trained()
    tokenizer = read(model, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("the") != model.encode("the")
    assert tokenizer.encode(" the") == model.encode("the")
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_special_tokens(read):
    """A text that follows one has a blank in front, as in llama.cpp."""
    model = trained()
    tokenizer = read(model, add_bos_token=False)
    end, tool = model.piece_to_id("<|im_end|>"), model.piece_to_id("<tool>")
    assert end not in tokenizer.encode("a<|im_end|>b</s>")
    assert 2 not in tokenizer.encode("a<|im_end|>b</s>")
    assert tokenizer.encode("a<|im_end|>b</s>", parse_special=True) == [
        *(*model.encode("a"), end),
        *(*model.encode("b"), 2),
    ]
    assert tokenizer.encode("a<tool>b") == [*model.encode("a"), tool, *model.encode("b")]
    assert tokenizer.decode(tokenizer.encode("<tool>b")) == "<tool> b"
    assert tokenizer.eos_ids == {2, end}
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_streams_keep_the_blank(read):
    """They continue a text."""
    tokenizer = read(trained())
    ids = tokenizer.encode("the é\U0001f999", add_bos=False)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == " the é\U0001f999"
    assert tokenizer.stream().push(1) == ""
    assert tokenizer.stream(skip_special=False).push(1) == "<s>"


def test_bytes(read):
    """Characters without a token, and never text that spells a byte."""
    model = trained()
    tokenizer = read(model, add_bos_token=False)
    byte = model.piece_to_id("<0xF0>")
    assert byte in tokenizer.encode("\U0001f999")
    assert byte not in tokenizer.encode("<0xF0>")
    assert tokenizer.decode([byte]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode(tokenizer.encode("<0xF0>")) == "<0xF0>"


def test_unknown_text_where_bytes_have_no_token(read):
    model = trained(byte_fallback=False)
    tokenizer = read(model, add_bos_token=False)
    for text in ("a\U0001f999b", "the"):
        assert tokenizer.encode(text) == model.encode(text)
    assert 0 in tokenizer.encode("\U0001f999")
    tokens = ["x" if token == "<unk>" else token for token in metadata(model)["tokens"]]
    kinds = [NORMAL if kind == UNKNOWN else kind for kind in metadata(model)["token_type"]]
    with pytest.raises(PymlaError, match=r"lacks 256 of the 256 bytes, and a token for unknown"):
        read(model, tokens=tokens, token_type=kinds)


def test_special_tokens_that_the_file_does_not_name(read):
    """Those of Llama, as in llama.cpp; an id outside the vocabulary means none."""
    model, none = trained(), dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))
    tokenizer = read(model, **none)
    assert (tokenizer.bos_id, tokenizer.eos_ids - {model.piece_to_id("<|im_end|>")}) == (1, {2})
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    absent = (gguf.GGUFValueType.UINT32, 0xFFFFFFFF)
    tokenizer = read(model, **none | {"bos_token_id": absent})
    assert (tokenizer.bos_id, tokenizer.add_bos, len(tokenizer.warnings)) == (None, False, 1)


# The order of merges --------------------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def merging(scores, unused=(), kinds=()):
    """A vocabulary with some tokens and their scores behind the bytes."""
    tokens = [*BYTES, *scores]
    kinds = [BYTE] * 256 + [UNUSED if token in unused else dict(kinds).get(token, NORMAL) for token in scores]
    return SentencePiece(tokens, kinds, np.array([0.0] * 256 + list(scores.values()), np.float32), prefix="")


def test_the_highest_score_comes_first_and_then_the_leftmost():
    def parts(scores, text, **options):
        vocabulary = merging(scores, **options)
        return "|".join(vocabulary.tokens[token] for token in vocabulary.encode(text))

    letters = {"a": -9, "b": -9, "c": -9}
    assert parts(letters | {"ab": -1, "bc": -2}, "abc") == "ab|c"
    assert parts(letters | {"ab": -2, "bc": -1}, "abc") == "a|bc"
    assert parts(letters | {"ab": -1, "bc": -1}, "abc") == "ab|c"
    assert parts(letters | {"aa": -1}, "aaaaa") == "aa|aa|a"
    assert parts(letters | {"ab": -1, "ba": -1, "aba": -1, "abaab": -2}, "abaabaab") == "aba|abaab"
    assert parts({"ab": -1}, "abab") == "ab|ab"  # whose letters are no tokens
    assert parts({"a": -1}, "ax") == "a|<0x78>"
    assert parts(letters | {"ab": -1, "abc": -2}, "abc", unused=("ab",)) == "abc"
    assert parts(letters | {"ab": -1}, "abab", unused=("ab",)) == "a|b|a|b"
    assert parts(letters | {"abc": 0, "ab": -1}, "abc", kinds={"abc": CONTROL}.items()) == "ab|c"


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(-4, 0), max_size=25),
    st.text("abcd", max_size=24),
)
def test_words_are_merged_as_a_whole_text_would_be(scores, text):
    """Joining the best pair of the whole text, one after the other."""
    vocabulary = merging(scores)
    parts = list(text)
    while pairs := [
        (-scores[left + right], at)
        for at, (left, right) in enumerate(itertools.pairwise(parts))
        if left + right in scores
    ]:
        _, at = min(pairs)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    assert [vocabulary.tokens[token] for token in vocabulary.encode(text)] == [
        part if part in scores else f"<0x{ord(part):02X}>" for part in parts
    ]
    assert b"".join(map(vocabulary.token_bytes, vocabulary.encode(text))).decode() == text


def test_time_grows_with_the_length_of_a_text():
    """A text without a place to cut it, of which all merges are made, ten times as long as another one."""
    vocabulary = merging({"a" * (1 << n): -10 + n for n in range(10)})
    seconds = []
    for length in (20_000, 200_000):
        began = time.process_time()
        vocabulary.encode("a" * length)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 30 * max(seconds[0], 1e-3)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_comes_back(text):
    """But for the character that stands for a blank."""
    vocabulary = _vocabulary()
    found = b"".join(map(vocabulary.token_bytes, vocabulary.encode(text))).decode()
    assert found == " " + text.replace("\u2581", " ")


@functools.cache
def _vocabulary():
    found = metadata(trained())
    return SentencePiece(found["tokens"], found["token_type"], np.array(found["scores"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [1.0, 2.0]}, "tokenizer.ggml.scores has 2 entries, for 2000 tokens"),
        ({"scores": ["a"] * 2000}, "tokenizer.ggml.scores is no array of numbers"),
        ({"scores": [0.0, float("nan")] * 1000}, "tokenizer.ggml.scores has a NaN, for token 1"),
        ({"add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix is 1"),
    ],
)
def test_damaged_files(read, changes, words):
    with pytest.raises(PymlaError, match=words):
        read(trained(), **changes)
