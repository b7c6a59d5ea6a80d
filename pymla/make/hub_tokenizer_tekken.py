"""Mistral's vocabulary from tekken.json: special tokens first, then byte pairs by rank.

The meaning of the file is mistral-common's (``tokens/tokenizers/tekken.py``). Metadata is that of llama.cpp's converter
(``_set_vocab_mistral``, gguf-py's ``MistralVocab``): all pairs of tokens that make a token are merges of it, scores are
integers, all 0, which nothing reads, and BOS is put in front of a text.
"""

from typing import Any

import numpy as np
from gguf import TokenType

from pymla.errors import PymlaError
from pymla.make.hub_vocabulary import Entry, HubVocabulary, decoded_base64, padded, written
from pymla.make.json_values import Values

NAME = "tekken.json"

_PRE = "tekken"
#: Names of the special tokens in files of version 3, which do not list them.
_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
#: Special tokens that have a key in GGUF.
_KEYS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def read_tekken(values: Values, vocab_size: int, pre: str | None) -> HubVocabulary:
    """The vocabulary of a tekken.json.

    Parameters
    ----------
    vocab_size : tokens of the model; ids that no token has are unused ones
    pre : name of the pre-tokenizer; None: Tekken's

    Raises
    ------
    PymlaError
        The file is damaged, or has more tokens than the model.
    """
    config = values.get("config", dict, {})
    count, total = (_size(values, config, key) for key in ("default_num_special_tokens", "default_vocab_size"))
    if not count < total <= vocab_size:
        expected = f"a number from {count + 1} to config.json's vocab_size {vocab_size} is expected"
        values.refuse("config.default_vocab_size", total, expected)
    names = _special_names(values, count)
    ranks = _ranks(values, total - count)
    entries: dict[int, Entry] = {i: (name, TokenType.CONTROL) for i, name in enumerate(names)}
    entries |= {count + rank: (written(token), TokenType.NORMAL) for token, rank in ranks.items()}
    tokens, types = padded(entries, vocab_size)
    ids = {name: i for i, name in enumerate(names)}
    return HubVocabulary(
        "gpt2",
        pre or _PRE,
        tokens,
        types,
        ids,
        _merges(ranks),
        scores=np.zeros(vocab_size, np.int32),
        special={key: ids[name] for key, name in _KEYS.items() if name in ids},
        add={"bos": True, "eos": False},
    )


def _size(values: Values, config: dict[str, Any], key: str) -> int:
    size = values.get(key, int, among=config)
    if size is None or size < 0:
        values.refuse(f"config.{key}", size, "a number of tokens is expected")
    return size


def _special_names(values: Values, count: int) -> list[str]:
    """Names of the special tokens by their ids; those that the file does not name are numbered."""
    listed = values.get("special_tokens", list)
    if listed is None:
        listed = [{"rank": i, "token_str": name} for i, name in enumerate(_SPECIAL[:count])]
    names = [f"<SPECIAL_{i}>" for i in range(count)]
    for token in listed:
        rank, name = (token.get(key) if isinstance(token, dict) else None for key in ("rank", "token_str"))
        if type(rank) is not int or not 0 <= rank < count or not isinstance(name, str):
            values.refuse("special_tokens", token, f"tokens with a name and a rank below {count} are expected")
        names[rank] = name
    return names


def _ranks(values: Values, count: int) -> dict[bytes, int]:
    """Ranks of the first `count` byte pairs."""
    vocab = values.get("vocab", list, [])
    if len(vocab) < count:
        raise PymlaError(f"{values.path}: vocab has {len(vocab)} tokens; config asks for {count}, download it again")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(vocab[:count]):
        if not isinstance(entry, dict) or entry.get("rank") != rank:
            values.refuse("vocab", entry, f"a token of rank {rank} is expected in its place")
        token = decoded_base64(entry.get("token_bytes"), f"{values.path}: token_bytes of the token of rank {rank}")
        if token in ranks:
            raise PymlaError(f"{values.path}: tokens of rank {ranks[token]} and {rank} are the same; download it again")
        ranks[token] = rank
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[str]:
    """Merges as GGUF has them: all pairs of tokens that make a token, by its rank, then by their own."""
    merges = []
    for token in ranks:
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [f"{written(left)} {written(right)}" for _, _, left, right in sorted(pairs)]
    return merges
