"""Tokens from text and back."""

import random
from pathlib import Path

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
