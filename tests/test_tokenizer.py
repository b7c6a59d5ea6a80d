"""Tokens from text and back."""

import random
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer as Bpe
from tokenizers import models, trainers

from pymla.errors import PymlaError
from pymla.tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED, Tokenizer, _byte_alphabet

SHARED = Path(__file__).parents[2] / "shared" / "data"
ZOO = "Hello, world!\n\n  def f(x):\n\treturn x ** 2  # 🦙 ÄÖÜ 你好 привет 1234567\r\n'tis   \u200b e\u0301 \U0010ffff"


def small(pre="deepseek-llm", **kwargs):
    """A tokenizer trained on a few lines, with a control and a user-defined token at the end."""
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = PRE_TOKENIZERS["deepseek-llm"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(_byte_alphabet()), show_progress=False)
    bpe.train_from_iterator([ZOO, Path(__file__).read_text(encoding="utf-8")], trainer)
    vocabulary = bpe.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    import json

    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    kinds = [NORMAL] * len(tokens) + [CONTROL, USER_DEFINED]
    bos = len(tokens)
    return Tokenizer(
        [*tokens, "<|bos|>", "<tool>"], kinds, merges, pre, bos_id=bos, eos_ids=[bos], add_bos=True, **kwargs
    )


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


def test_streams_never_print_half_a_character():
    tokenizer = small()
    alphabet = {byte: character for character, byte in _byte_alphabet().items()}
    ids = [tokenizer._ids[alphabet[byte]] for byte in "🦙".encode()]
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


def test_refusals():
    with pytest.raises(PymlaError, match="llama-bpe"):
        small("llama-bpe")
    tokenizer = small()
    with pytest.raises(PymlaError, match="token id 999999"):
        tokenizer.decode([999999])
    with pytest.raises(PymlaError, match="position 1"):
        tokenizer.encode("a\udc80")
    with pytest.raises(PymlaError, match="256 bytes"):
        Tokenizer(["a"], [NORMAL], [], "deepseek-llm")
    with pytest.raises(PymlaError, match="merges"):
        Tokenizer(sorted(_byte_alphabet()), [NORMAL] * 256, ["a zz"], "deepseek-llm")


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

ALPHABET = sorted(_byte_alphabet())
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
        writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "deepseek2")
        kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32, bool: gguf.GGUFValueType.BOOL}
        for key, value in (VOCABULARY | changes).items():
            name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
            if isinstance(value, list):
                writer.add_array(name, value)
            elif value is not None:
                writer.add_key_value(name, value, kinds.get(type(value), gguf.GGUFValueType.INT32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Tokenizer.from_gguf(tmp_path / "vocabulary.gguf")

    return read


def test_vocabulary_file(vocabulary):
    tokenizer = vocabulary(chat_template="{{ bos_token }}")
    assert tokenizer.encode("the<tool>t") == [258, 257, 260, ALPHABET.index("t")]
    assert tokenizer.decode([258, 257, 260]) == "the<tool>"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (261, 258, True)
    assert tokenizer.chat_template == "{{ bos_token }}"


def test_tokens_that_end_a_text(vocabulary):
    """What the metadata says, and control tokens of a known name."""
    assert vocabulary().eos_ids == {259}
    assert vocabulary(eos_token_id=3, eot_token_id=4).eos_ids == {3, 4, 259}
    assert vocabulary(token_type=None).eos_ids == set()


def test_bos_is_added_where_the_file_says_so(vocabulary):
    assert vocabulary(add_bos_token=True).encode("the") == [258, 257]
    assert vocabulary(add_bos_token=False).encode("the") == [257]
    assert vocabulary(bos_token_id=None).encode("the") == [257]
    assert vocabulary(bos_token_id=None, add_bos_token=True).encode("the") == [257]
    assert vocabulary().encode("the", add_bos=False) == [257]


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges"])
def test_missing_keys(vocabulary, key):
    with pytest.raises(PymlaError, match=rf"vocabulary.gguf: metadata tokenizer.ggml.{key} is missing"):
        vocabulary(**{key: None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"model": 7}, "tokenizer.ggml.model is 7"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'.*deepseek-llm"),
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
        ({"bos_token_id": 261}, "tokenizer.ggml.bos_token_id is 261; the vocabulary has 261"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id is -1"),
        ({"bos_token_id": "<|bos|>"}, "tokenizer.ggml.bos_token_id is '<|bos|>'"),
        ({"eos_token_id": 1000}, "tokenizer.ggml.eos_token_id is 1000"),
        ({"eos_token_id": 1.0}, "tokenizer.ggml.eos_token_id is 1.0"),
        ({"eot_token_id": 1000}, "tokenizer.ggml.eot_token_id is 1000"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token is 'yes'"),
        ({"chat_template": 3}, "tokenizer.chat_template is 3"),
    ],
)
def test_damaged_files(vocabulary, changes, words):
    with pytest.raises(PymlaError, match=words.replace("|", r"\|")) as caught:
        vocabulary(**changes)
    assert "vocabulary.gguf: metadata " in str(caught.value)
    assert "\n" not in str(caught.value)
