"""Kimi's vocabulary: byte pairs in tiktoken.model, special tokens in tokenizer_config.json.

tiktoken.model has a line for each token, its bytes in base64 and its rank. Merges, which GGUF wants, are recovered from
the ranks as llama.cpp's converter does it (``conversion/qwen.py``, QwenModel.bpe): the last pair that byte-pair
encoding joins when it makes a token out of its bytes.
"""

import itertools
from pathlib import Path

from gguf import TokenType

from pymla.errors import PymlaError
from pymla.make.hub_vocabulary import Entry, HubVocabulary, added_by_id, decoded_base64, padded, read_bytes, written
from pymla.make.json_values import Values

NAME = "tiktoken.model"

#: Ids behind the byte pairs that Kimi's tokenization_kimi.py reserves for special tokens.
RESERVED = 256
_PRE = "kimi-k2"


def read_tiktoken(path: Path, settings: Values, vocab_size: int, pre: str | None) -> HubVocabulary:
    """The vocabulary of a tiktoken.model.

    Parameters
    ----------
    settings : tokenizer_config.json
    vocab_size : tokens of the model; ids behind those that are reserved are unused ones
    pre : name of the pre-tokenizer, which the file does not say; None: Kimi-K2's

    Raises
    ------
    PymlaError
        The file is damaged, or has more tokens than the model.
    """
    ranks = read_ranks(path)
    if len(ranks) > vocab_size:
        raise PymlaError(f"{path}: has {len(ranks)} tokens; config.json's vocab_size is {vocab_size}")
    special = _special(settings, len(ranks), vocab_size)
    entries: dict[int, Entry] = {rank: (written(token), TokenType.NORMAL) for token, rank in ranks.items()}
    entries |= {token_id: (name, TokenType.CONTROL) for token_id, name in special.items()}
    tokens, types = padded(entries, vocab_size)
    ids = {name: token_id for token_id, name in special.items()}
    return HubVocabulary("gpt2", pre or _PRE, tokens, types, ids, merges_from_ranks(ranks))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of byte pairs, from 0 on without a gap, in their order.

    Raises
    ------
    PymlaError
        The file cannot be read or is damaged.
    """
    lines = read_bytes(path).splitlines()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            token, rank = _token(path, number, line)
            if rank != len(ranks) or token in ranks:
                raise PymlaError(f"{path}: line {number} has rank {rank}, {len(ranks)} and a new token are expected")
            ranks[token] = rank
    if not ranks:
        raise PymlaError(f"{path}: has no tokens; download it again")
    return ranks


def merges_from_ranks(ranks: dict[bytes, int]) -> list[str]:
    """The merges that lead to tokens, as GGUF has them; a token to which no pair leads has none."""
    parts = (_merged(token, ranks) for token in ranks if len(token) > 1)
    return [" ".join(map(written, pair)) for pair in parts if len(pair) == 2]


def _token(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    """The token and the rank in a line."""
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
        raise PymlaError(f"{path}: line {number} is no token in base64 and a rank; download it again")
    return decoded_base64(fields[0], f"{path}: the token of line {number}"), int(fields[1])


def _special(settings: Values, first: int, vocab_size: int) -> dict[int, str]:
    """Names of the special tokens from id `first` on, as tokenization_kimi.py has them."""
    names = {token_id: content for token_id, (content, _) in added_by_id(settings).items()}
    reserved = range(first, min(first + RESERVED, vocab_size))
    return {token_id: names.get(token_id, f"<|reserved_token_{token_id}|>") for token_id in reserved}


def _merged(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts to which byte pairs of lower ranks join the bytes of a token."""
    below = ranks[token]
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        pairs = ((ranks.get(left + right, below), at) for at, (left, right) in enumerate(itertools.pairwise(parts)))
        rank, at = min(pairs)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
