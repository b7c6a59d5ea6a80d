"""Files that hold a vocabulary: tiktoken.model, tekken.json and tokenizer.model, sound and damaged."""

import base64
import json
import shutil

import gguf
import numpy as np
import pytest
import sentencepiece
from byte_pairs import merges, trained, written
from hub import write_json
from hub_models import PAIRS, PIECES, ranks, sentencepiece_bytes, tekken_tokenizer, tiktoken_tokenizer, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_text import lines
from test_tokenizer_sentencepiece import trained as trained_sentencepiece
from test_tokenizer_vocabularies import MISTRAL, TEKKEN, kind, needs_mistral

from pymla.errors import PymlaError
from pymla.make.convert import convert
from pymla.make.hub_tokenizer_sentencepiece import read_sentencepiece
from pymla.make.hub_tokenizer_tekken import read_tekken
from pymla.make.hub_tokenizer_tiktoken import merges_from_ranks, read_ranks, read_tiktoken
from pymla.make.json_values import Values
from pymla.make.sentencepiece_model import read_model

CONTROL, NORMAL, UNUSED, USER = (gguf.TokenType[name] for name in ("CONTROL", "NORMAL", "UNUSED", "USER_DEFINED"))


def no_settings(folder):
    return Values(folder / "tokenizer_config.json", optional=True)


def test_tiktoken(tmp_path):
    tiktoken_tokenizer(tmp_path)
    found = read_tiktoken(tmp_path / "tiktoken.model", no_settings(tmp_path), 600, None)
    assert (found.model, found.pre, found.scores) == ("gpt2", "kimi-k2", None)
    assert found.tokens[:256] == [written(bytes((byte,))) for byte in range(256)]
    assert found.tokens[256:270] == list(map(written, PAIRS))
    assert found.tokens[270:274] == ["[BOS]", "[EOS]", "<|im_end|>", "<|reserved_token_273|>"]
    assert found.tokens[525:527] == ["<|reserved_token_525|>", "[PAD526]"]
    assert [found.types[i] for i in (0, 269, 270, 525, 526)] == [NORMAL, NORMAL, CONTROL, CONTROL, UNUSED]
    assert found.ids["[EOS]"] == 271
    # "the" is th + e, and " the" is what the pairs of lower ranks leave: " " + "the".
    assert found.merges[:6] == ["Ġ a", "t h", "th e", "i n", "e r", "Ġ the"]
    # "ion" is made of "i" and "on", though "io" would come first in the text.
    assert found.merges[-2:] == ["o n", "i on"]


def test_merges_lead_to_the_tokens():
    """Of a vocabulary whose tokens reach across all that pre-tokenizers cut."""
    vocabulary = trained(tuple(line for line in lines() if len(line) < 100), 700)
    assert merges_from_ranks(vocabulary.ranks) == vocabulary.merges == merges(vocabulary.ranks)


def test_a_token_to_which_no_pair_leads_has_no_merge():
    assert merges_from_ranks({b"a": 0, b"b": 1, b"abab": 2}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has no tokens"),
        (b"YQ== 0\nYg== 2\n", "line 2 has rank 2, 1 and a new token"),
        (b"YQ== 0\nYQ== 1\n", "line 2 has rank 1, 1 and a new token"),
        (b"YQ== zero\n", "line 1 is no token in base64 and a rank"),
        (b"YQ==\n", "line 1 is no token"),
        (b"YQ== 0 0\n", "line 1 is no token"),
        (b"Y!== 0\n", "the token of line 1 is not valid base64"),
        (b"== 0\n", "the token of line 1"),
        (base64.b64encode(b"x" * 300) + b" 0\n", "the token of line 1 has 300 bytes"),
        (b"\xff\xfe\x00 0\n", "not valid base64"),
    ],
)
def test_damaged_tiktoken(text, message, tmp_path):
    (tmp_path / "tiktoken.model").write_bytes(text)
    with pytest.raises(PymlaError, match=message) as error:
        read_ranks(tmp_path / "tiktoken.model")
    assert str(error.value).isprintable()


def test_more_byte_pairs_than_tokens(tmp_path):
    tiktoken_tokenizer(tmp_path)
    with pytest.raises(PymlaError, match=r"has 270 tokens; config\.json's vocab_size is 269"):
        read_tiktoken(tmp_path / "tiktoken.model", no_settings(tmp_path), 269, None)


@pytest.mark.parametrize("decoder", [{"x": {"content": "a"}}, {"270": "a"}, {"270": {}}, {"-1": {"content": "a"}}])
def test_damaged_names_of_special_tokens(decoder, tmp_path):
    tiktoken_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(PymlaError, match=r"added_tokens_decoder\..* a token with its content is expected"):
        read_tiktoken(tmp_path / "tiktoken.model", no_settings(tmp_path), 300, None)


def tekken(folder, **changes):
    tekken_tokenizer(folder, special=24)
    values = json.loads((folder / "tekken.json").read_text())
    for key, value in changes.items():
        place = values["config"] if key in values["config"] else values
        place[key] = value
    write_json(folder / "tekken.json", values)
    return Values(folder / "tekken.json")


def test_tekken(tmp_path):
    found = read_tekken(tekken(tmp_path), 300, None)
    assert (found.model, found.pre) == ("gpt2", "tekken")
    assert (found.tokens[:4], found.tokens[20:25]) == (
        ["<unk>", "<s>", "</s>", "[INST]"],
        ["<SPECIAL_20>", "<SPECIAL_21>", "<SPECIAL_22>", "<SPECIAL_23>", written(b"\0")],
    )
    assert found.tokens[-7:] == [*map(written, PAIRS[-1:]), *(f"[PAD{i}]" for i in range(294, 300))]
    assert [found.types[i] for i in (23, 24, 294)] == [CONTROL, NORMAL, UNUSED]
    assert found.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 11}
    assert found.add == {"bos": True, "eos": False}
    # All pairs that make a token: "the" is both "t" + "he", were that one, and "th" + "e".
    assert found.merges[:4] == ["Ġ a", "t h", "th e", "i n"]
    assert [merge for merge in found.merges if merge.replace(" ", "") == "ion"] == ["i on"]
    assert not found.scores.any()


def test_tekken_names_its_special_tokens(tmp_path):
    names = [{"rank": 3, "token_str": "<s>", "is_control": True}, {"rank": 0, "token_str": "[X]", "is_control": True}]
    found = read_tekken(tekken(tmp_path, special_tokens=names), 300, "llama-bpe")
    assert found.tokens[:5] == ["[X]", "<SPECIAL_1>", "<SPECIAL_2>", "<s>", "<SPECIAL_4>"]
    assert found.special == {"bos": 3}
    assert found.pre == "llama-bpe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": []}, "config is an array of 0"),
        ({"default_vocab_size": None}, "config.default_vocab_size is null"),
        ({"default_num_special_tokens": -1}, "config.default_num_special_tokens is -1"),
        ({"default_num_special_tokens": 294}, "config.default_vocab_size is 294; a number from 295"),
        (
            {"default_vocab_size": 301},
            "config.default_vocab_size is 301; a number from 25 to config.json's vocab_size 300",
        ),
        ({"default_vocab_size": 300}, "vocab has 270 tokens; config asks for 276"),
        ({"vocab": {}}, "vocab is an object"),
        ({"vocab": [1] * 270}, "vocab is 1; a token of rank 0"),
        ({"vocab": [{"rank": 1}] * 270}, "vocab is an object; a token of rank 0"),
        ({"vocab": [{"rank": i, "token_bytes": "?"} for i in range(270)]}, "of rank 0 is not valid base64"),
        ({"vocab": [{"rank": i, "token_bytes": "YQ=="} for i in range(270)]}, "tokens of rank 0 and 1 are the same"),
        ({"vocab": [{"rank": i} for i in range(270)]}, "of rank 0 is not valid base64"),
        ({"special_tokens": [{"rank": 24, "token_str": "x"}]}, "special_tokens is an object; tokens with a name"),
        ({"special_tokens": [{"rank": 0, "token_str": 1}]}, "special_tokens is an object"),
        ({"special_tokens": ["x"]}, 'special_tokens is "x"'),
    ],
)
def test_damaged_tekken(changes, message, tmp_path):
    with pytest.raises(PymlaError, match=message) as error:
        read_tekken(tekken(tmp_path, **changes), 300, None)
    assert str(error.value).isprintable()


@needs_mistral
@pytest.mark.parametrize("path", TEKKEN, ids=lambda path: path.name)
def test_tekken_of_mistral(path):
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    found = read_tekken(Values(path), config["default_vocab_size"], None)
    assert len(found.tokens) == config["default_vocab_size"]
    assert UNUSED not in found.types
    assert found.tokens[:3] == ["<unk>", "<s>", "</s>"]


def test_sentencepiece(tmp_path):
    folder = write_folder(tmp_path / "MiniCPM3", "MiniCPM3")
    found = read_sentencepiece(folder / "tokenizer.model", Values(folder / "tokenizer_config.json"), 300)
    assert (found.model, found.pre, found.merges) == ("llama", "default", None)
    assert found.tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert found.tokens[259:262] == ["▁a", "th", "the"]
    assert found.tokens[280:285] == ["<|tool|>", "a▁b", "<|im_end|>", "x y", "[PAD284]"]
    wanted = [CONTROL, USER, USER, CONTROL, USER, UNUSED]
    assert [found.types[i] for i in (1, 280, 281, 282, 283, 284)] == wanted
    assert [found.types[i].name for i in (0, 3, 259)] == ["UNKNOWN", "BYTE", "NORMAL"]
    assert found.scores[[0, 1, 261, 280, 282, 284]].tolist() == [0, -1000, -2, -1000, -1000, -10000]
    assert found.space_prefix
    assert found.notes == ()


def test_what_sentencepiece_says_of_texts(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(normaliser="nmt_nfkc", dummy_prefix=False))
    found = read_sentencepiece(tmp_path / "tokenizer.model", no_settings(tmp_path), 300)
    assert not found.space_prefix
    assert found.metadata()["tokenizer.ggml.add_space_prefix"] is False
    assert found.notes == ("the model's own tokenizer normalises text by 'nmt_nfkc', and GGUF's does not",)


def test_tokens_outside_the_vocabulary(tmp_path):
    folder = write_folder(tmp_path / "MiniCPM3", "MiniCPM3")
    found = read_sentencepiece(folder / "tokenizer.model", Values(folder / "tokenizer_config.json"), 282)
    assert found.notes == ("2 added tokens are outside the vocabulary of 282 tokens and left out",)
    with pytest.raises(PymlaError, match=f"has {len(PIECES)} tokens; config.json's vocab_size is 200"):
        read_sentencepiece(folder / "tokenizer.model", Values(folder / "tokenizer_config.json"), 200)


@pytest.mark.parametrize("added", [{"a": "b"}, {"a": -1}, {"a": True}, {"a": 1 << 40}])
def test_damaged_added_tokens(added, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes())
    write_json(tmp_path / "added_tokens.json", added)
    with pytest.raises(PymlaError, match=r"added_tokens\.json: 'a' is .*; a token id is expected"):
        read_sentencepiece(tmp_path / "tokenizer.model", no_settings(tmp_path), 300)


def assert_read_as_sentencepiece_does(path, model):
    found = read_model(path)
    ids = range(model.vocab_size())
    assert [piece.text for piece in found.pieces] == [model.id_to_piece(i) for i in ids]
    np.testing.assert_array_equal([piece.score for piece in found.pieces], [model.get_score(i) for i in ids])
    kinds = [piece.kind for piece in found.pieces]
    assert [NORMAL if each == USER else each for each in kinds] == [kind(model, i) for i in ids]


@pytest.mark.parametrize("options", [{}, {"byte_fallback": False}])
def test_models_that_sentencepiece_trains(options, tmp_path):
    model = trained_sentencepiece(**options)
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    assert_read_as_sentencepiece_does(tmp_path / "tokenizer.model", model)
    found = read_model(tmp_path / "tokenizer.model")
    assert (found.normaliser, found.dummy_prefix) == ("identity", True)


@needs_mistral
@pytest.mark.parametrize("path", MISTRAL, ids=lambda path: path.name)
def test_models_of_mistral(path):
    assert_read_as_sentencepiece_does(path, sentencepiece.SentencePieceProcessor(model_file=str(path)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no tokens"),
        (b"\n", "it ends inside a number"),
        (b"\n\x05ab", "a field at byte 2 of 4 has 5 bytes"),
        (b"\x0f", "a field of kind 7"),
        (b"\x80" * 11, "a number of more than 64 bits"),
        (b"\x08\x01", "field 1 is a number"),
        (sentencepiece_bytes([("x", float("nan"), 1)]), "token 0 has score nan"),
        (sentencepiece_bytes([("x", 0.0, 7)]), "token 0 is of kind 7"),
        (b"\n\x03\n\x01\xff", "field 1 is no UTF-8"),
        (b"\n\x02\x10\x01", "a score is no float32"),
    ],
)
def test_damaged_sentencepiece(data, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(PymlaError, match=f"no vocabulary of sentencepiece, or damaged: {message}") as error:
        read_model(tmp_path / "tokenizer.model")
    assert str(error.value).isprintable()


READERS = {
    "tiktoken.model": lambda folder: read_tiktoken(folder / "tiktoken.model", no_settings(folder), 300, None),
    "tekken.json": lambda folder: read_tekken(Values(folder / "tekken.json"), 300, None),
    "tokenizer.model": lambda folder: read_sentencepiece(folder / "tokenizer.model", no_settings(folder), 300),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tekken_tokenizer(folder)
    tiktoken_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    return folder


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_bytes(sound, data):
    """Give a vocabulary with as many tokens as the model has, or one line."""
    name = data.draw(st.sampled_from(list(READERS)))
    raw = (sound / name).read_bytes()
    at = data.draw(st.integers(0, len(raw)))
    new = data.draw(st.binary(max_size=4) | st.sampled_from((b"\xff" * 9, b'"', b"[" * 20_000, b"\n")))
    changed = sound / "changed"
    changed.mkdir(exist_ok=True)
    (changed / name).write_bytes(raw[:at] + new + data.draw(st.sampled_from((raw[at:], raw[at + len(new) :], b""))))
    try:
        found = READERS[name](changed)
    except PymlaError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1000
    else:
        assert len(found.tokens) == len(found.types) == 300


def test_a_folder_without_a_vocabulary(tmp_path):
    folder = write_folder(tmp_path / "Kimi-K2", "Kimi-K2")
    (folder / "tiktoken.model").unlink()
    message = r"no tokenizer: tokenizer\.json, tiktoken\.model, tekken\.json, tokenizer\.model are converted"
    with pytest.raises(PymlaError, match=message):
        convert(folder, tmp_path / "m.gguf")


def test_sentencepiece_in_tokenizer_json(tmp_path):
    """The tokenizers package's form of it is passed over for the model, which must be there."""
    folder = write_folder(tmp_path / "MiniCPM3", "MiniCPM3")
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}})
    assert convert(folder, tmp_path / "m.gguf", qtype="f32").nbytes
    shutil.move(folder / "tokenizer.model", tmp_path)
    with pytest.raises(PymlaError, match=r"a SentencePiece model; put its tokenizer\.model beside it"):
        convert(folder, tmp_path / "m.gguf", qtype="f32")


def test_ranks_are_those_of_the_helper(tmp_path):
    tiktoken_tokenizer(tmp_path)
    assert read_ranks(tmp_path / "tiktoken.model") == ranks()
