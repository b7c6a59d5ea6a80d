"""A SentencePiece vocabulary from tokenizer.model, with the tokens that other files add.

Scores and types are those of llama.cpp's converter (``_create_vocab_sentencepiece``), but for user-defined symbols of
the model itself, which sentencepiece never takes apart: llama.cpp writes them as normal tokens.
"""

from pathlib import Path

import numpy as np
from gguf import TokenType

from pymla.errors import PymlaError
from pymla.files.checkpoint import read_json
from pymla.make.hub_vocabulary import Entry, HubVocabulary, added_by_id, added_entry, padded
from pymla.make.json_values import Values
from pymla.make.sentencepiece_model import read_model
from pymla.printable import shown

_PADDING_SCORE, _ADDED_SCORE = -10000.0, -1000.0


def read_sentencepiece(path: Path, settings: Values, vocab_size: int) -> HubVocabulary:
    """The vocabulary of a tokenizer.model, of added_tokens.json and of tokenizer_config.json.

    Parameters
    ----------
    settings : tokenizer_config.json
    vocab_size : tokens of the model; ids that no token has are unused ones

    Raises
    ------
    PymlaError
        A file is damaged, or has more tokens than the model.
    """
    model = read_model(path)
    if len(model.pieces) > vocab_size:
        raise PymlaError(f"{path}: has {len(model.pieces)} tokens; config.json's vocab_size is {vocab_size}")
    entries: dict[int, Entry] = {i: (piece.text, TokenType(piece.kind)) for i, piece in enumerate(model.pieces)}
    scores = np.full(vocab_size, _PADDING_SCORE, np.float32)
    scores[: len(entries)] = [piece.score for piece in model.pieces]
    added = _added(path.with_name("added_tokens.json"))
    added |= {i: added_entry(content, special) for i, (content, special) in added_by_id(settings).items()}
    outside = {i for i in added if i >= vocab_size}
    for token_id in added.keys() - outside:
        entries[token_id] = added[token_id]
        scores[token_id] = _ADDED_SCORE
    notes = []
    if outside:
        notes.append(f"{len(outside)} added tokens are outside the vocabulary of {vocab_size} tokens and left out")
    if model.normaliser not in ("", "identity"):
        notes.append(f"the model's own tokenizer normalises text by {model.normaliser!r:.60}, and GGUF's does not")
    tokens, types = padded(entries, vocab_size)
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    return HubVocabulary(
        "llama", "default", tokens, types, ids, scores=scores, space_prefix=model.dummy_prefix, notes=tuple(notes)
    )


def _added(path: Path) -> dict[int, Entry]:
    """Tokens of an added_tokens.json, which has their ids by their texts."""
    found: dict[int, Entry] = {}
    for token, token_id in (read_json(path) if path.exists() else {}).items():
        if type(token_id) is not int or not 0 <= token_id < 1 << 31:
            raise PymlaError(f"{path}: {shown(token)} is {shown(token_id)}; a token id is expected")
        found[token_id] = token, TokenType.USER_DEFINED
    return found
