"""Text to token ids and back, from the tokenizer in a GGUF file.

Byte-level BPE (``tokenizer.ggml.model`` "gpt2"): text is split by the pre-tokenizer's regular expressions, one after
the other, each piece's UTF-8 bytes are written as printable characters, and the tokenizers package merges them.
"""

import codecs
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Bpe
from tokenizers import models

from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.text.byte_alphabet import BYTES, CHARACTERS
from pymla.text.pre_tokenizers import PRE_TOKENIZERS
from pymla.text.special_tokens import TEMPLATE_NAMES, end_ids, ends_by_name, special_ids

#: Kinds of tokens, as ``tokenizer.ggml.token_type`` numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Tokenizer:
    """A model's tokenizer.

    Parameters
    ----------
    tokens : texts of the tokens, by their ids; normal tokens are written in the byte alphabet
    kinds : of each token
    merges : pairs of tokens that are joined, with a space between, the first one first
    pre : name of the pre-tokenizer
    where : the file, for messages
    bos_id, eos_ids, add_bos : see below

    Attributes
    ----------
    vocab_size : int
        Tokens in the file. A model's matrices may have rows for more.
    bos_id : int or None
    eos_ids : frozenset of int
        Tokens that end a text.
    add_bos : bool
        Whether the model expects BOS in front of a text.
    special_tokens : dict of str to str
        Special tokens by the names that chat templates have for them: "bos_token", "eos_token", "unk_token" …
    chat_template : str or None
    chat_templates : dict of str to str
        Templates that the file has by name, as "tool_use".
    warnings : list of str
        Oddities of the file, and how they were taken.

    Raises
    ------
    PymlaError
        The pre-tokenizer is not known, the vocabulary lacks bytes, or merges name tokens that it does not have.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        kinds: Iterable[int],
        merges: Iterable[str],
        pre: str,
        *,
        where: str | Path = "tokenizer",
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
    ):
        if pre not in PRE_TOKENIZERS:
            raise PymlaError(
                f"{where}: metadata tokenizer.ggml.pre is {pre!r}, which pymla does not know; it knows "
                f"{', '.join(PRE_TOKENIZERS)}"
            )
        self._tokens, self._kinds = tokens, list(kinds)
        self._ids = {token: i for i, token in enumerate(tokens)}
        missing = sum(character not in self._ids for character in CHARACTERS)
        if missing:
            raise PymlaError(f"{where}: metadata tokenizer.ggml.tokens lacks {missing} of the 256 bytes")
        self._bpe = _bpe(self._ids, merges, where)
        self._bpe.pre_tokenizer = PRE_TOKENIZERS[pre]
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_ids = ends_by_name(eos_ids, tokens, self._ids)
        for token in self.eos_ids if bos_id is None else self.eos_ids | {bos_id}:
            if self._kinds[token] in (NORMAL, USER_DEFINED) and not self._is_ordinary(token):
                self._kinds[token] = CONTROL  # the file says so elsewhere
        self._whole = _splitter(tokens, self._kinds, (USER_DEFINED,))
        self._special = _splitter(tokens, self._kinds, (USER_DEFINED, CONTROL, UNKNOWN))
        self.add_bos = add_bos
        self.special_tokens: dict[str, str] = {}
        self.chat_template: str | None = None
        self.chat_templates: dict[str, str] = {}
        self.warnings: list[str] = []

    @classmethod
    def from_gguf(cls, file: str | Path | ModelFile) -> "Tokenizer":
        """The tokenizer of a model file, or of a file that has nothing but a vocabulary.

        Raises
        ------
        PymlaError
            The tokenizer is of a kind that is not implemented, or its metadata is damaged.
        """
        if not isinstance(file, ModelFile):
            file = ModelFile.open(file)
        model = file.get("tokenizer.ggml.model", str)
        if model != "gpt2":
            raise PymlaError(
                f"{file.path}: metadata tokenizer.ggml.model is {model!r}; pymla runs 'gpt2' (byte-level BPE)"
            )
        tokens = _strings(file, "tokenizer.ggml.tokens")
        merges, kinds = _merges(file), _kinds(file, len(tokens))
        ids, warnings = special_ids(file, len(tokens))
        ends, more_warnings = end_ids(file, tokens, ids)
        bos_id = ids.get("bos")
        tokenizer = cls(
            tokens,
            kinds,
            merges,
            file.get("tokenizer.ggml.pre", str),
            where=file.path,
            bos_id=bos_id,
            eos_ids=ends,
            add_bos=file.get("tokenizer.ggml.add_bos_token", bool, bos_id is not None) and bos_id is not None,
        )
        tokenizer.warnings = warnings + more_warnings
        if tokenizer.eos_ids:
            ids.setdefault("eos", min(tokenizer.eos_ids))
        tokenizer.special_tokens = {
            name: tokenizer.token_bytes(ids[key]).decode(errors="replace")
            for key, name in TEMPLATE_NAMES.items()
            if key in ids
        }
        tokenizer.chat_template, tokenizer.chat_templates = _chat_templates(file)
        return tokenizer

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
        add_bos : bool
            Put BOS in front, if the file says that the model expects it. If the text begins with BOS already, under
            `parse_special`, no other one is added.
        parse_special : bool
            Whether the name of a control token in the text becomes that token. Names of user-defined tokens always do.

        Raises
        ------
        PymlaError
            The text has a lone surrogate: it did not come from valid UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PymlaError(
                f"the text has an invalid character at position {error.start}; it must be valid UTF-8"
            ) from None
        ids = []
        splitter = self._special if parse_special else self._whole
        for i, piece in enumerate(splitter.split(text) if splitter else [text]):
            if i % 2:
                ids.append(self._ids[piece])
            elif piece:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
        if add_bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name."""
        if not 0 <= token < len(self._tokens):
            raise PymlaError(f"token id {token} is outside the vocabulary of {len(self._tokens)}")
        text = self._tokens[token]
        if self._kinds[token] == NORMAL and all(character in BYTES for character in text):
            return bytes(BYTES[character] for character in text)
        return text.encode()

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of decoded text: control, unknown and unused tokens."""
        return not 0 <= token < len(self._kinds) or self._kinds[token] in (CONTROL, UNKNOWN, UNUSED)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        kept = (i for i in ids if not (skip_special and 0 <= i < self.vocab_size and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def stream(self) -> "TextStream":
        """A `TextStream` that decodes tokens one by one."""
        return TextStream(self)

    def _is_ordinary(self, token: int) -> bool:
        """Whether merges make a token from its text, so that it is no special token."""
        try:
            text = self.token_bytes(token).decode()
        except UnicodeDecodeError:  # part of a character
            return True
        return self._bpe.encode(text, add_special_tokens=False).ids == [token]


class TextStream:
    """Text from tokens as they come, never half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this token."""
        if self._tokenizer.is_special(token):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for a character that never became complete."""
        return self._decoder.decode(b"", final=True)


def _bpe(vocabulary: dict[str, int], merges: Iterable[str], where: str | Path) -> Bpe:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        return Bpe(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise PymlaError(f"{where}: metadata tokenizer.ggml.merges cannot be used: {error}") from error


def _splitter(tokens: Sequence[str], kinds: Sequence[int], wanted: Collection[int]) -> re.Pattern[str] | None:
    """A regular expression that finds tokens of some kinds, the longest first, or None."""
    found = sorted((t for t, kind in zip(tokens, kinds, strict=True) if kind in wanted and t), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else None


def _strings(file: ModelFile, key: str) -> list[str]:
    values = file.get(key, list)
    if not isinstance(values, list):
        raise PymlaError(f"{file.path}: metadata {key} is an array of numbers; strings are expected")
    return values


def _merges(file: ModelFile) -> list[str]:
    merges = _strings(file, "tokenizer.ggml.merges")
    for merge in merges:
        if merge.count(" ") != 1:
            raise PymlaError(
                f"{file.path}: metadata tokenizer.ggml.merges has {merge!r}; two tokens and a space expected"
            )
    return merges


def _kinds(file: ModelFile, count: int) -> list[int]:
    """The kind of each of `count` tokens; without the key all are normal."""
    kinds = file.get("tokenizer.ggml.token_type", list, None)
    if kinds is None:
        return [NORMAL] * count
    if isinstance(kinds, list) or not np.issubdtype(kinds.dtype, np.integer):
        raise PymlaError(f"{file.path}: metadata tokenizer.ggml.token_type is no array of integers")
    if len(kinds) != count:
        raise PymlaError(
            f"{file.path}: metadata tokenizer.ggml.token_type has {len(kinds)} entries, for {count} tokens"
        )
    return kinds.tolist()


def _chat_templates(file: ModelFile) -> tuple[str | None, dict[str, str]]:
    """The default chat template of a file, or None, and those it has by name."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): file.get(key, str) for key in file.metadata if key.startswith(prefix)}
    return file.get("tokenizer.chat_template", str, named.get("default")), named
