"""Text to token ids and back, from the tokenizer in a GGUF file.

A `Tokenizer` looks for special tokens and has a vocabulary of one of two kinds encode the text between them: byte-level
BPE (`pymla.text.byte_level`) or SentencePiece (`pymla.text.sentencepiece`).
"""

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.text.byte_level import ByteLevel, merged_tokens
from pymla.text.pre_tokenizers import ADD_BOS
from pymla.text.sentencepiece import SentencePiece
from pymla.text.special_tokens import TEMPLATE_NAMES, control_by_name, end_ids, ends_by_name, special_ids
from pymla.text.vocabulary import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_kinds,
    read_merges,
    read_scores,
    read_tokens,
    with_control,
)


class Vocabulary(Protocol):
    """A vocabulary, and how a text in which no special tokens are looked for is encoded."""

    @property
    def tokens(self) -> Sequence[str]:
        """Texts of the tokens, by their ids."""

    @property
    def kinds(self) -> Sequence[int]:
        """Kinds of the tokens (`pymla.text.vocabulary`), by their ids."""

    @property
    def ids(self) -> Mapping[str, int]:
        """Ids of the tokens, by their texts."""

    @property
    def prefix(self) -> str:
        """What `encode` puts in front of a text."""

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Token ids of a text; `inside` another one, without the prefix."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name."""


class Tokenizer:
    """A model's tokenizer.

    Parameters
    ----------
    vocabulary : ByteLevel or SentencePiece
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
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
    ):
        self._vocabulary = vocabulary
        tokens, kinds = vocabulary.tokens, vocabulary.kinds
        self._whole = _splitter(tokens, kinds, (USER_DEFINED,))
        self._special = _splitter(tokens, kinds, (USER_DEFINED, CONTROL, UNKNOWN))
        self.vocab_size = len(tokens)
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.add_bos = add_bos
        self.special_tokens: dict[str, str] = {}
        self.chat_template: str | None = None
        self.chat_templates: dict[str, str] = {}
        self.warnings: list[str] = []

    @property
    def tokens(self) -> Sequence[str]:
        """Texts of the tokens in the vocabulary's own alphabet, by their ids."""
        return self._vocabulary.tokens

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
        if model not in _READERS:
            raise PymlaError(
                f"{file.path}: metadata tokenizer.ggml.model is {model!r}; pymla runs 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece)"
            )
        tokens = read_tokens(file)
        kinds = read_kinds(file, len(tokens))
        ids, warnings = special_ids(file, len(tokens), _DEFAULT_IDS.get(model, MappingProxyType({})))
        ends, more_warnings = end_ids(file, tokens, ids)
        by_text = {token: i for i, token in enumerate(tokens)}
        eos_ids = ends_by_name(ends, tokens, by_text)
        bos_id = ids.get("bos")
        control = {*eos_ids, *control_by_name(by_text), *(() if bos_id is None else (bos_id,))}
        made = _READERS[model](file, tokens, kinds, control)
        add_bos = file.get("tokenizer.ggml.add_bos_token", bool, made.add_bos)
        tokenizer = cls(made.vocabulary, bos_id=bos_id, eos_ids=eos_ids, add_bos=add_bos and bos_id is not None)
        tokenizer.warnings = [*warnings, *more_warnings, *made.warnings]
        if eos_ids:
            ids.setdefault("eos", min(eos_ids))
        tokenizer.special_tokens = {
            name: tokenizer.token_bytes(ids[key]).decode(errors="replace")
            for key, name in TEMPLATE_NAMES.items()
            if key in ids
        }
        tokenizer.chat_template, tokenizer.chat_templates = _chat_templates(file)
        return tokenizer

    def encode(
        self, text: str, add_bos: bool = True, parse_special: bool = False, *, inside: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
        add_bos : bool
            Put BOS in front, if the file says that the model expects it. If the text begins with BOS already, under
            `parse_special`, no other one is added.
        parse_special : bool
            Whether the name of a control token in the text becomes that token. Names of user-defined tokens always do.
        inside : bool
            The text continues another one: it has no BOS, nor the blank that SentencePiece puts in front of a text.

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
                ids.append(self._vocabulary.ids[piece])
            elif piece:
                ids += self._vocabulary.encode(piece, inside)
        if inside:
            return ids
        if add_bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name.

        Raises
        ------
        PymlaError
            There is no such token.
        """
        if not 0 <= token < self.vocab_size:
            raise PymlaError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._vocabulary.token_bytes(token)

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of decoded text: control, unknown and unused tokens."""
        return not 0 <= token < self.vocab_size or self._vocabulary.kinds[token] in (CONTROL, UNKNOWN, UNUSED)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        The blank that a SentencePiece vocabulary puts in front of a text is left out again.

        Raises
        ------
        PymlaError
            An id is outside the vocabulary.
        """
        kept = [i for i in ids if not (skip_special and 0 <= i < self.vocab_size and self.is_special(i))]
        text = b"".join(map(self.token_bytes, kept)).decode(errors="replace")
        if kept and self._vocabulary.kinds[kept[0]] != USER_DEFINED:
            return text.removeprefix(self._vocabulary.prefix)
        return text

    def stream(self, skip_special: bool = True, shown: Collection[int] = ()) -> "TextStream":
        """A `TextStream` that decodes tokens one by one. They continue a text: a blank in front of it stays. Of special
        tokens those in `shown` have their names in the text even if others are skipped."""
        return TextStream(self, skip_special, shown)


class TextStream:
    """Text from tokens as they come, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, shown: Collection[int] = ()):
        self._tokenizer, self._skip_special, self._shown = tokenizer, skip_special, frozenset(shown)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this token."""
        known = 0 <= token < self._tokenizer.vocab_size
        if not known or (self._skip_special and token not in self._shown and self._tokenizer.is_special(token)):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for a character that never became complete."""
        return self._decoder.decode(b"", final=True)


class _Made(NamedTuple):
    """A vocabulary that was read from a file."""

    vocabulary: Vocabulary
    add_bos: bool  # where the file does not say
    warnings: list[str]


def _byte_level(file: ModelFile, tokens: list[str], kinds: list[int], control: set[int]) -> _Made:
    """Byte-level BPE. A token of the set `control` that merges make is text, nevertheless."""
    pre, warnings = file.get("tokenizer.ggml.pre", str, ""), []
    if not pre:
        pre = "default"
        warnings.append(
            f"{file.path}: metadata tokenizer.ggml.pre is missing; text is split as llama.cpp does by default "
            f"({pre!r}). If the model was trained with another splitting its answers are worse: convert it again"
        )
    merges = read_merges(file)
    merged = merged_tokens(merges)
    kinds = with_control(kinds, (token for token in control if tokens[token] not in merged))
    return _Made(ByteLevel(tokens, kinds, merges, pre, where=file.path), pre in ADD_BOS, warnings)


def _sentencepiece(file: ModelFile, tokens: list[str], kinds: list[int], control: set[int]) -> _Made:
    prefix = " " if file.get("tokenizer.ggml.add_space_prefix", bool, True) else ""
    scores, kinds = read_scores(file, len(tokens)), with_control(kinds, control)
    return _Made(SentencePiece(tokens, kinds, scores, prefix=prefix, where=file.path), True, [])


#: How a vocabulary is read, by ``tokenizer.ggml.model``.
_READERS = {"gpt2": _byte_level, "llama": _sentencepiece}

#: Special tokens of files that do not name them, by ``tokenizer.ggml.model``, as in llama.cpp.
_DEFAULT_IDS = {"llama": {"unknown": 0, "bos": 1, "eos": 2}}


def _splitter(tokens: Sequence[str], kinds: Sequence[int], wanted: Collection[int]) -> re.Pattern[str] | None:
    """A regular expression that finds tokens of some kinds, the longest first, or None."""
    found = sorted((t for t, kind in zip(tokens, kinds, strict=True) if kind in wanted and t), key=len, reverse=True)
    # A thousand names begin with "<": only those are tried one by one that have the text's next two characters.
    rests: dict[str, list[str]] = {}
    for token in found:
        rests.setdefault(token[:2], []).append(re.escape(token[2:]))
    starts = (f"{re.escape(start)}(?:{'|'.join(rests[start])})" for start in sorted(rests, key=len, reverse=True))
    return re.compile(f"({'|'.join(starts)})") if found else None


def _chat_templates(file: ModelFile) -> tuple[str | None, dict[str, str]]:
    """The default chat template of a file, or None, and those it has by name."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): file.get(key, str) for key in file.metadata if key.startswith(prefix)}
    return file.get("tokenizer.chat_template", str, named.get("default")), named
