"""The vocabulary of a Hugging Face folder, whichever file it comes from, and what its readers share."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import TokenType

from pymla.errors import PymlaError
from pymla.files.gguf_writer import Value
from pymla.make.json_values import Values
from pymla.printable import shown
from pymla.text.byte_alphabet import CHARACTERS

#: The longest token of a vocabulary in base64; real ones end at 128 blanks.
_MAX_TOKEN_BYTES = 256

#: Bytes of a vocabulary's file, at most.
_MAX_BYTES = 1 << 28

#: A token's text and its type.
Entry = tuple[str, TokenType]


class HubVocabulary(NamedTuple):
    """A vocabulary as GGUF holds it."""

    model: str  # tokenizer.ggml.model: "gpt2" (byte-level BPE) or "llama" (SentencePiece)
    pre: str
    tokens: list[str]  # by their ids, as many as config.json says
    types: list[TokenType]
    ids: dict[str, int]  # of the tokens by which the files name special ones
    merges: list[str] | None = None  # of byte-level BPE
    scores: np.ndarray | None = None  # of SentencePiece, float32; Tekken has zeros, int32
    special: Mapping[str, int] = MappingProxyType({})  # ids that the vocabulary's file has for bos, eos, unk or pad
    add: Mapping[str, bool] = MappingProxyType({})  # whether it says that bos and eos are put around a text
    #: Special tokens with which the tokenizer's post-processor begins and ends a text.
    around: tuple[str | None, str | None] = (None, None)
    space_prefix: bool = True  # whether SentencePiece puts a blank in front of a text
    notes: tuple[str, ...] = ()  # for the user

    def metadata(self) -> dict[str, Value]:
        """Keys and values of the vocabulary."""
        keys = gguf.Keys.Tokenizer
        found: dict[str, Value] = {
            keys.MODEL: self.model,
            keys.PRE: self.pre,
            keys.LIST: self.tokens,
            keys.TOKEN_TYPE: np.array(self.types, np.int32),
        }
        if self.scores is not None:
            found[keys.SCORES] = self.scores
        if self.merges is not None:
            found[keys.MERGES] = self.merges
        if not self.space_prefix:
            found[keys.ADD_PREFIX] = False
        return found


def padded(entries: Mapping[int, Entry], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all tokens; ids without an entry are unused tokens."""
    rows = [entries.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def check_ids(values: Values, ids: list[int], vocab_size: int) -> None:
    """Raise PymlaError for token ids outside of what config.json says."""
    if min(ids) < 0 or max(ids) >= vocab_size:
        found = f"token ids {shown(min(ids))} to {shown(max(ids))}"
        raise PymlaError(f"{values.path}: has {found}; config.json's vocab_size is {vocab_size}")


def added_entry(content: str, special: bool) -> Entry:
    """The entry of a token that was added to a vocabulary, by whether the file calls it special."""
    if special or _looks_special(content):
        return content, TokenType.CONTROL
    # llama.cpp compares a user-defined token with the text as it stands.
    return content.replace("▁", " "), TokenType.USER_DEFINED


def added_by_id(settings: Values) -> dict[int, tuple[str, bool]]:
    """Added tokens in tokenizer_config.json, and whether each is special, by id."""
    found = {}
    for token_id, token in settings.get("added_tokens_decoder", dict, {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if not (re.fullmatch("[0-9]{1,9}", token_id) and isinstance(content, str)):
            settings.refuse(
                f"added_tokens_decoder.{shown(token_id, 40)}", token, "a token with its content is expected"
            )
        found[int(token_id)] = content, bool(token.get("special"))
    return found


def written(token: bytes) -> str:
    """The bytes of a token in the alphabet of byte-level BPE."""
    return "".join(CHARACTERS[byte] for byte in token)


def decoded_base64(text: Any, where: str) -> bytes:
    """The bytes of a token that a file has in base64; `where` names the token for the error."""
    try:
        token = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise PymlaError(f"{where} is not valid base64; download it again") from None
    if not 0 < len(token) <= _MAX_TOKEN_BYTES:
        raise PymlaError(f"{where} has {len(token)} bytes; 1 to {_MAX_TOKEN_BYTES} are expected, download it again")
    return token


def _looks_special(token: str) -> bool:
    """Whether it is a control token by its looks: DeepSeek's files do not flag all of theirs."""
    return token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>"))


def read_bytes(path: Path) -> bytes:
    """The bytes of a vocabulary's file.

    Raises
    ------
    PymlaError
        It cannot be read, or is larger than any vocabulary.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PymlaError(f"{path}: larger than any vocabulary; download it again")
        return path.read_bytes()
    except OSError as error:
        raise PymlaError(f"{path}: cannot be read ({error.strerror})") from error
