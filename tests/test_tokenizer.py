"""Tokens from text and back."""

import json
import random
from pathlib import Path

import gguf
import gguf_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Bpe
from tokenizers import models, pre_tokenizers, trainers

from pymla.engine.loading import demo_path
from pymla.errors import PymlaError
from pymla.text.byte_alphabet import BYTES, CHARACTERS
from pymla.text.byte_level import ByteLevel
from pymla.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import CONTROL, NORMAL, USER_DEFINED

SHARED = Path(__file__).parents[2] / "shared" / "data"
ZOO = "Hello, world!\n\n  def f(x):\n\treturn x ** 2  # 🦙 ÄÖÜ 你好 привет 1234567\r\n'tis   \u200b e\u0301 \U0010ffff"


def small(pre="deepseek-llm"):
    """A tokenizer trained on a few lines, with a control and a user-defined token at the end."""
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = PRE_TOKENIZERS["deepseek-llm"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(BYTES), show_progress=False)
    bpe.train_from_iterator([ZOO, Path(__file__).read_text(encoding="utf-8")], trainer)
    vocabulary = bpe.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    kinds = [NORMAL] * len(tokens) + [CONTROL, USER_DEFINED]
    bos = len(tokens)
    vocabulary = ByteLevel([*tokens, "<|bos|>", "<tool>"], kinds, merges, pre)
    return Tokenizer(vocabulary, bos_id=bos, eos_ids=[bos], add_bos=True)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_round_trip(pre):
    tokenizer = small(pre)
    generator = random.Random(0)
    texts = [ZOO, "", " ", "\n"]
    texts += [
        "".join(chr(generator.choice((32, 10, 65, 955, 0x4E00, 0x1F999)) + generator.randrange(8)) for _ in range(40))
        for _ in range(50)
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_patterns_split_one_after_the_other():
    """Each splits what the ones before it left; what none finds stays in one piece, and all of it becomes bytes."""
    split = pre_tokenizer(("b+", "[0-9]", "[a-z][0-9]"))
    assert [piece for piece, _ in split.pre_tokenize_str("abba12é c'd!")] == ["a", "bb", "a", "1", "2", "Ã©Ġc'd!"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("deepseek-llm", "Don|'|t|\n| pay| |123456|€| |你好| !!"),
        ("deepseek-coder", "Don|'|t|\n| pay| |1|2|3|4|5|6|€| |你好| !!"),
        ("deepseek-v3", "Don|'t|\n| pay| |123|456|€| |你好| !!"),
    ],
)
def test_pieces_of_a_text(pre, pieces):
    found = PRE_TOKENIZERS[pre].pre_tokenize_str(pieces.replace("|", ""))
    assert [bytes(map(BYTES.get, piece)).decode() for piece, _ in found] == pieces.split("|")


def test_streams_never_print_half_a_character():
    tokenizer = small()
    ids = [ALPHABET.index(CHARACTERS[byte]) for byte in "🦙".encode()]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🦙"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens():
    tokenizer = small()
    control, user = tokenizer.bos_id, tokenizer.bos_id + 1
    assert control not in tokenizer.encode("a<|bos|>b", add_bos=False)
    assert control in tokenizer.encode("a<|bos|>b", add_bos=False, parse_special=True)
    assert user in tokenizer.encode("a<tool>b", add_bos=False)
    assert tokenizer.decode([control, user]) == "<tool>"
    assert tokenizer.decode([control], skip_special=False) == "<|bos|>"
    assert [tokenizer.stream().push(token) for token in (control, user)] == ["", "<tool>"]
    shown = tokenizer.stream(skip_special=False)
    assert [shown.push(token) for token in (control, user, user + 1, -1)] == ["<|bos|>", "<tool>", "", ""]


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_the_longest_special_token_is_matched(kind):
    """Wherever the shorter ones stand in the vocabulary."""
    alphabet = sorted(BYTES)
    specials = ["<a", "<a>", "<a>b", "<a>b<a", "b<a>"]
    for order in (specials, specials[::-1]):
        tokens, kinds = [*alphabet, *order], [NORMAL] * 256 + [kind] * len(order)
        tokenizer = Tokenizer(ByteLevel(tokens, kinds, [], "deepseek-llm"))
        for text, pieces in (
            ("<a>b", ["<a>b"]),
            ("x<a>", ["x", "<a>"]),
            ("<a>b<a>", ["<a>b<a", ">"]),
            ("<a<a>", ["<a", "<a>"]),
        ):
            assert [tokens[i] for i in tokenizer.encode(text, parse_special=True)] == pieces


DEMO = Tokenizer.from_gguf(demo_path())
SPELT = st.sampled_from(
    [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence",
        "｜>",
        "\ufeff",
        "\x00",
        "\r\n",
        "e\u0301",
        "🦙",
        " ",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(SPELT, st.text(st.characters(codec="utf-8"), max_size=12)), max_size=8).map("".join))
def test_any_text_comes_back(text):
    """What looks like a special token is text, where it is not asked to be parsed."""
    ids = DEMO.encode(text, add_bos=False)
    assert DEMO.decode(ids) == DEMO.decode(ids, skip_special=False) == text
    assert not any(map(DEMO.is_special, ids))
    assert DEMO.encode(text) == [DEMO.bos_id, *ids]
    stream = DEMO.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    parsed = DEMO.encode(text, add_bos=False, parse_special=True)
    assert DEMO.decode(parsed, skip_special=False) == text


def test_a_spelt_bos_is_the_one_in_front():
    tokenizer = small()
    bos = tokenizer.bos_id
    assert tokenizer.encode("<|bos|>a", parse_special=True) == tokenizer.encode("a")
    assert tokenizer.encode("<|bos|><|bos|>a", parse_special=True) == [bos, *tokenizer.encode("a")]
    assert tokenizer.encode("a<|bos|>", parse_special=True).count(bos) == 2
    assert tokenizer.encode("<|bos|>a").count(bos) == 1
    assert tokenizer.encode("<|bos|>a", add_bos=False).count(bos) == 0


def test_refusals():
    with pytest.raises(PymlaError, match=r"^tokenizer: metadata tokenizer\.ggml\.pre is 'gemma4'"):
        small("gemma4")
    tokenizer = small()
    with pytest.raises(PymlaError, match="token id 999999"):
        tokenizer.decode([999999])
    with pytest.raises(PymlaError, match="position 1"):
        tokenizer.encode("a\udc80")
    with pytest.raises(PymlaError, match="256 bytes"):
        ByteLevel(["a"], [NORMAL], [], "deepseek-llm")
    with pytest.raises(PymlaError, match="merges"):
        ByteLevel(sorted(BYTES), [NORMAL] * 256, ["a zz"], "deepseek-llm")


@pytest.mark.skipif(not SHARED.exists(), reason="needs V2-Lite's vocabulary, which is not part of the project")
def test_ids_of_deepseek_llm():
    name = SHARED / "ggml-vocab-deepseek-llm.gguf"
    tokenizer = Tokenizer.from_gguf(name)
    texts = name.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = name.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_bos=False) == [int(i) for i in line.split()], repr(text)
    assert tokenizer.encode("") == [100000]
    assert tokenizer.eos_ids == {100001}


# Files ----------------------------------------------------------------------------------------------------------------

ALPHABET = sorted(BYTES)
VOCABULARY = {
    "model": "gpt2",
    "pre": "deepseek-llm",
    "tokens": [*ALPHABET, "th", "the", "<|bos|>", "<|im_end|>", "<tool>"],
    "token_type": [NORMAL] * 258 + [CONTROL, CONTROL, USER_DEFINED],
    "merges": ["t h", "th e"],
    "bos_token_id": 258,
}


@pytest.fixture
def vocabulary(tmp_path):
    """Write a vocabulary-only file with some keys changed, or left out where they are None; read its tokenizer."""

    def read(**changes):
        metadata = {
            f"tokenizer.{key}" if key.startswith("chat_template") else f"tokenizer.ggml.{key}": value
            for key, value in (VOCABULARY | changes).items()
        }
        return Tokenizer.from_gguf(gguf_files.write(tmp_path / "vocabulary.gguf", metadata))

    return read


def test_vocabulary_file(vocabulary):
    tokenizer = vocabulary(chat_template="{{ bos_token }}")
    assert tokenizer.encode("the<tool>t") == [258, 257, 260, ALPHABET.index("t")]
    assert tokenizer.decode([258, 257, 260]) == "the<tool>"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (261, 258, True)
    assert tokenizer.chat_template == "{{ bos_token }}"


def test_tokens_that_end_a_text(vocabulary):
    """What the metadata says, and tokens of a known name."""
    assert vocabulary().eos_ids == {259}
    assert vocabulary(eos_token_id=3, eot_token_id=4, eom_token_id=5).eos_ids == {3, 4, 5, 259}
    assert vocabulary(eos_token_ids=[6, 7, -1]).eos_ids == {6, 7, 259}
    assert vocabulary(fim_pad_token_id=3, fim_rep_token_id=4, fim_sep_token_id=5).eos_ids == {3, 4, 5, 259}
    assert vocabulary(fim_pre_token_id=3, padding_token_id=4, unknown_token_id=5).eos_ids == {259}


def with_specials(vocabulary, *names, kind=CONTROL, **changes):
    """The names of the tokens that end a text, in a vocabulary with some more special tokens."""
    tokens = [*ALPHABET, "th", "the", *names]
    kinds = [NORMAL] * 258 + [kind] * len(names)
    tokenizer = vocabulary(tokens=tokens, token_type=kinds, bos_token_id=None, **changes)
    return {tokens[i] for i in tokenizer.eos_ids}


# The list of llama.cpp (src/llama-vocab.cpp), and tokens of DeepSeek-Coder and GLM.
ENDS = (
    "<|eot_id|> <|im_end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> "
    "[EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ <|EOT|> "
    "<|user|> <|end|> </s> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> "
    "<reponame> <|file_sep|>"
)


@pytest.mark.parametrize("kind", [CONTROL, NORMAL, USER_DEFINED])
@pytest.mark.parametrize("name", ENDS.split())
def test_names_that_end_a_text(vocabulary, name, kind):
    """Converters forget the type now and then; then they are control tokens all the same."""
    others = "<|im_start|>", "<｜User｜>", "<pad>", "<|eot|>"
    assert with_specials(vocabulary, *others, name, kind=kind) == {name}


def test_types_of_tokens_that_end_a_text(vocabulary):
    tokenizer = vocabulary(token_type=None)
    assert tokenizer.eos_ids == {259}
    assert tokenizer.encode("<|bos|>the<|im_end|>", parse_special=True) == [258, 257, 259]
    assert tokenizer.decode([258, 257, 259]) == "the"
    assert vocabulary(token_type=None, eos_token_id=257).decode([257]) == "the"  # ordinary text stays what it is


def test_end_tokens_that_others_stand_in_for(vocabulary):
    """As in llama.cpp: gpt-oss and Solar have <|end|> between parts of a text, Gemma 4 has </s> as text."""
    assert with_specials(vocabulary, "<|end|>", "<|return|>", "<|call|>") == {"<|return|>", "<|call|>"}
    assert with_specials(vocabulary, "<|end|>", "<|flush|>", "<|calls|>") == {"<|flush|>", "<|calls|>"}
    assert with_specials(vocabulary, "<|end|>", "<|return|>") == {"<|end|>", "<|return|>"}
    assert with_specials(vocabulary, "<|end|>", "<|call|>") == {"<|end|>", "<|call|>"}
    assert with_specials(vocabulary, "</s>", "<|tool_response>") == {"<|tool_response>"}
    assert with_specials(vocabulary, "</s>", "<|plamo:eos|>", eos_token_id=259) == {"<|plamo:eos|>"}
    assert with_specials(vocabulary, "<|fim_pad|>", "[PAD]") == {"<|fim_pad|>"}
    assert with_specials(vocabulary, "x", "[PAD]", fim_pad_token_id=258) == {"x"}
    assert with_specials(vocabulary, "x", "[PAD]", fim_pad_token_id=-1) == {"[PAD]"}


KEYS = "bos eos eot eom unknown seperator padding mask cls fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep prefix"
UINT32, UINT64 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.UINT64


@pytest.mark.parametrize("key", KEYS.split())
@pytest.mark.parametrize("value", [-1, (UINT32, 0xFFFFFFFF), 261, (UINT64, (1 << 64) - 1), -(1 << 63)])
def test_an_id_outside_the_vocabulary_is_absent(vocabulary, key, value):
    """Converters write -1, or 4294967295, for none."""
    tokenizer, without = (vocabulary(**{f"{key}_token_id": each}) for each in (value, None))
    for name in ("bos_id", "eos_ids", "add_bos", "special_tokens"):
        assert getattr(tokenizer, name) == getattr(without, name)
    (warning,) = tokenizer.warnings
    number = value[1] if isinstance(value, tuple) else value
    assert f"vocabulary.gguf: metadata tokenizer.ggml.{key}_token_id is {number}, " in warning
    assert "261 tokens" in warning
    assert without.warnings == []


@pytest.mark.parametrize("value", ["<pad>", 1.0, True, [1, 2]])
def test_an_id_that_is_no_integer_is_absent_where_it_is_not_needed(vocabulary, value):
    tokenizer = vocabulary(padding_token_id=value)
    assert "pad_token" not in tokenizer.special_tokens
    assert len(tokenizer.warnings) == 1


def test_ids_outside_the_vocabulary_in_an_array(vocabulary):
    tokenizer = vocabulary(eos_token_ids=[3, -1, 261])
    assert tokenizer.eos_ids == {3, 259}
    assert len(tokenizer.warnings) == 2


def test_the_first_and_the_last_token_may_be_special(vocabulary):
    last = len(VOCABULARY["tokens"]) - 1
    tokenizer = vocabulary(bos_token_id=0, eos_token_ids=[0, last, last + 1, -1])
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_ids >= {0, last}
    assert tokenizer.eos_ids <= {*range(last + 1)}
    assert len(tokenizer.warnings) == 2
    for token, warning in zip((last + 1, -1), tokenizer.warnings, strict=True):
        assert f"metadata tokenizer.ggml.eos_token_ids is {token}, and the vocabulary has {last + 1} tokens" in warning


def test_tokens_outside_the_vocabulary_are_left_out(vocabulary):
    """A model's matrices may have rows for more."""
    tokenizer = vocabulary()
    assert [tokenizer.is_special(token) for token in (-1, 0, 260, 261, 262)] == [True, False, False, True, True]


def test_a_special_token_in_front_of_all_others():
    tokenizer = Tokenizer(ByteLevel(["<x>", *ALPHABET], [CONTROL] + [NORMAL] * 256, [], "deepseek-llm"))
    assert tokenizer.encode("a<x>a", parse_special=True) == [1 + ALPHABET.index("a"), 0, 1 + ALPHABET.index("a")]
    assert tokenizer.decode([0]) == ""
    assert tokenizer.decode([0], skip_special=False) == "<x>"
    with pytest.raises(PymlaError, match="token id 257"):
        tokenizer.decode([257])


def test_a_byte_may_be_a_special_token(vocabulary):
    """Part of a character is ordinary text, whatever the metadata calls it."""
    byte = ALPHABET.index("ä")  # 0xE4, which begins characters
    tokenizer = vocabulary(unknown_token_id=byte, eos_token_id=byte)
    assert tokenizer.special_tokens["unk_token"] == "\N{REPLACEMENT CHARACTER}"
    assert not tokenizer.is_special(byte)
    assert tokenizer.decode([byte]) == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_by_the_names_that_templates_have(vocabulary):
    tokenizer = vocabulary(eos_token_id=259, padding_token_id=257, unknown_token_id=260, seperator_token_id=256)
    assert tokenizer.special_tokens == {
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "the",
        "unk_token": "<tool>",
        "sep_token": "th",
    }
    assert vocabulary().special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}


def test_chat_templates_by_name(vocabulary):
    tokenizer = vocabulary(**{"chat_template": "a", "chat_template.tool_use": "b", "chat_templates": ["tool_use"]})
    assert (tokenizer.chat_template, tokenizer.chat_templates) == ("a", {"tool_use": "b"})
    tokenizer = vocabulary(**{"chat_template.default": "c", "chat_template.rag": "d"})
    assert (tokenizer.chat_template, tokenizer.chat_templates) == ("c", {"default": "c", "rag": "d"})
    assert vocabulary().chat_template is None
    assert vocabulary().chat_templates == {}
    with pytest.raises(PymlaError, match=r"tokenizer.chat_template.rag is 3"):
        vocabulary(**{"chat_template.rag": 3})


@pytest.mark.parametrize("pre", [None, ""])
def test_a_file_that_does_not_say_how_text_is_split(vocabulary, pre):
    """As llama.cpp splits it then."""
    tokenizer = vocabulary(pre=pre)
    (warning,) = tokenizer.warnings
    assert "vocabulary.gguf: metadata tokenizer.ggml.pre is missing" in warning
    for text in ("the (the) th 12345!?", ZOO):
        assert tokenizer.encode(text) == vocabulary(pre="default").encode(text)
    assert vocabulary(pre="default").warnings == []


def test_tokens_of_fill_in_the_middle_are_control_tokens(vocabulary):
    """By their names, as in llama.cpp."""
    tokens = [*VOCABULARY["tokens"], "<｜fim▁begin｜>", "<|fim_suffix|>", "<|code_middle|>", "<fim>"]
    tokenizer = vocabulary(tokens=tokens, token_type=VOCABULARY["token_type"] + [USER_DEFINED] * 4)
    assert [tokenizer.is_special(len(VOCABULARY["tokens"]) + i) for i in range(4)] == [True, True, True, False]


def test_bos_is_added_where_the_model_expects_it(vocabulary):
    """If the file does not say whether it does, as DeepSeek's do, and GLM's and Kimi's do not."""
    for pre, added in (
        ("deepseek-v3", True),
        ("llama-bpe", True),
        ("tekken", True),
        ("glm4", False),
        ("kimi-k2", False),
    ):
        assert vocabulary(pre=pre).add_bos == added
        assert vocabulary(pre=pre, add_bos_token=not added).add_bos != added


def test_bos_is_added_where_the_file_says_so(vocabulary):
    assert vocabulary(add_bos_token=True).encode("the") == [258, 257]
    assert vocabulary(add_bos_token=False).encode("the") == [257]
    assert vocabulary(bos_token_id=None).encode("the") == [257]
    assert vocabulary(bos_token_id=None, add_bos_token=True).encode("the") == [257]
    assert vocabulary().encode("the", add_bos=False) == [257]


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_keys(vocabulary, key):
    with pytest.raises(PymlaError, match=rf"vocabulary.gguf: metadata tokenizer.ggml.{key} is missing"):
        vocabulary(**{key: None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": 7}, "tokenizer.ggml.model is 7"),
        ({"pre": "gemma4"}, "tokenizer.ggml.pre is 'gemma4'.*deepseek-llm"),
        ({"pre": 7}, "tokenizer.ggml.pre is 7"),
        ({"tokens": "a b c"}, "tokenizer.ggml.tokens is 'a b c'"),
        ({"tokens": list(range(261))}, "tokenizer.ggml.tokens is an array of numbers"),
        ({"tokens": ["a"] * 261}, "tokenizer.ggml.tokens lacks 255 of the 256 bytes"),
        ({"tokens": [*ALPHABET, "th", "the"]}, "tokenizer.ggml.token_type has 261 entries, for 258 tokens"),
        ({"token_type": [NORMAL] * 260}, "tokenizer.ggml.token_type has 260 entries, for 261 tokens"),
        ({"token_type": NORMAL}, "tokenizer.ggml.token_type is 1"),
        ({"token_type": ["normal"] * 261}, "tokenizer.ggml.token_type is no array of integers"),
        ({"token_type": [1.5] * 261}, "tokenizer.ggml.token_type is no array of integers"),
        ({"merges": "t h"}, "tokenizer.ggml.merges is 't h'"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges is an array of numbers"),
        ({"merges": ["th"]}, "tokenizer.ggml.merges has 'th'"),
        ({"merges": ["t h e"]}, "tokenizer.ggml.merges has 't h e'"),
        ({"merges": ["t zz"]}, "tokenizer.ggml.merges cannot be used"),
        ({"merges": ["t "]}, "tokenizer.ggml.merges cannot be used"),
        ({"merges": ["e t"]}, "tokenizer.ggml.merges cannot be used"),
        ({"bos_token_id": "<|bos|>"}, "tokenizer.ggml.bos_token_id is '<|bos|>'"),
        ({"eos_token_ids": 3}, "tokenizer.ggml.eos_token_ids is 3"),
        ({"eos_token_ids": [1.5]}, "tokenizer.ggml.eos_token_ids is no array of integers"),
        ({"eos_token_ids": ["a"]}, "tokenizer.ggml.eos_token_ids is no array of integers"),
        ({"eos_token_id": 1.0}, "tokenizer.ggml.eos_token_id is 1.0"),
        ({"eot_token_id": False}, "tokenizer.ggml.eot_token_id is False"),
        ({"eom_token_id": [1]}, "tokenizer.ggml.eom_token_id is an array of 1"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token is 'yes'"),
        ({"chat_template": 3}, "tokenizer.chat_template is 3"),
    ],
)
def test_damaged_files(vocabulary, changes, words):
    with pytest.raises(PymlaError, match=words.replace("|", r"\|")) as caught:
        vocabulary(**changes)
    assert "vocabulary.gguf: metadata " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_alphabet_is_that_of_the_tokenizers_package():
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in map(chr, (0, 32, 127, 173, 255, 0x416)):
        ((piece, _),) = level.pre_tokenize_str(character)
        assert bytes(BYTES[each] for each in piece) == character.encode()
        assert "".join(CHARACTERS[byte] for byte in character.encode()) == piece
