"""The tokenizer of a Hugging Face folder, as llama.cpp's converter writes it into GGUF metadata.

The vocabulary is in one of four files, each with a reader of its own: ``tokenizer.json`` (byte-level BPE),
``tiktoken.model`` (Kimi), ``tekken.json`` (Mistral) and ``tokenizer.model`` (SentencePiece). Special tokens, ends of a
text and chat templates come from the files beside it.

Where several files say the same, that one counts which transformers reads: names in tokenizer_config.json come before
ids in config.json, chat_template.jinja before the template in tokenizer_config.json. The gguf package's SpecialVocab is
not used: it takes one id for the end of a text, and trusts the shape of everything in the files.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
from gguf import TokenType

from pymla.errors import PymlaError
from pymla.files.gguf_writer import Value
from pymla.files.textfile import decode
from pymla.make import (
    generation_config,
    hub_tokenizer_bpe,
    hub_tokenizer_tekken,
    hub_tokenizer_tiktoken,
    sentencepiece_model,
)
from pymla.make.hub_config import HubConfig
from pymla.make.hub_tokenizer_bpe import is_byte_level, read_bpe
from pymla.make.hub_tokenizer_sentencepiece import read_sentencepiece
from pymla.make.hub_tokenizer_tekken import read_tekken
from pymla.make.hub_tokenizer_tiktoken import read_tiktoken
from pymla.make.hub_vocabulary import HubVocabulary
from pymla.make.json_values import Values
from pymla.printable import shown
from pymla.text.pre_tokenizers import PRE_TOKENIZERS

#: Special tokens that have a key in GGUF, the end of a text apart.
_SPECIAL = ("bos", "unk", "sep", "pad", "mask")

#: Keys of up to three tokens that end a text.
END_KEYS = ("eos", "eot", "eom")

#: Files that hold a vocabulary, the first to be taken before others.
_FILES = (hub_tokenizer_bpe.NAME, hub_tokenizer_tiktoken.NAME, hub_tokenizer_tekken.NAME, sentencepiece_model.NAME)


class HubTokenizer(NamedTuple):
    """A tokenizer as GGUF holds it."""

    vocabulary: HubVocabulary
    special: dict[str, int]  # ids by the name of their key: bos, unk, sep, pad, mask
    ends: list[int]  # ids of all tokens that end a text, the most usual first
    add: dict[str, bool]  # whether bos and eos are put around a text, where the files say so
    chat_template: str | list[dict[str, str]] | None
    notes: list[str]  # for the user

    @property
    def tokens(self) -> list[str]:
        """Texts of the tokens, by their ids."""
        return self.vocabulary.tokens

    def metadata(self) -> dict[str, Value]:
        """Keys and values of the tokenizer."""
        keys = gguf.Keys.Tokenizer
        found = self.vocabulary.metadata()
        for name, token_id in (*self.special.items(), *zip(END_KEYS, self.ends, strict=False)):
            found[getattr(keys, f"{name.upper()}_ID")] = token_id
        for name, value in self.add.items():
            found[getattr(keys, f"ADD_{name.upper()}")] = value
        return found | self._templates()

    def _templates(self) -> dict[str, Value]:
        """The chat template, or several by name, in which GGUF has letters and digits only."""
        keys = gguf.Keys.Tokenizer
        if self.chat_template is None or isinstance(self.chat_template, str):
            return {keys.CHAT_TEMPLATE: self.chat_template or ""}
        named = {re.sub("[^a-zA-Z0-9]", "_", each["name"]): each["template"] for each in self.chat_template}
        default = named.pop("default", "")
        found: dict[str, Value] = {keys.CHAT_TEMPLATE_N.format(name=name): text for name, text in named.items() if name}
        return found | {keys.CHAT_TEMPLATES: [name for name in named if name], keys.CHAT_TEMPLATE: default}


def read_tokenizer(config: HubConfig, pre: str | None = None) -> HubTokenizer:
    """The tokenizer beside a config.json, with as many tokens as that says; ids that no token has are unused ones.

    Parameters
    ----------
    config : HubConfig
    pre : name of the pre-tokenizer; found out by default

    Raises
    ------
    PymlaError
        A file is missing or damaged, or says something that is not converted.
    """
    folder = config.path.parent
    if pre is not None and pre not in PRE_TOKENIZERS:
        raise PymlaError(f"unknown pre-tokenizer {pre!r} as `pre`; choose {', '.join(PRE_TOKENIZERS)}")
    settings = Values(folder / "tokenizer_config.json", optional=True)
    vocabulary = _read_vocabulary(folder, settings, config.size("vocab_size"), pre)
    notes = list(vocabulary.notes)
    special = dict(_special(settings, config, vocabulary, notes))
    ends = list(_ends(settings, config, vocabulary, notes))
    add = _added(settings, vocabulary, special.get("bos"), ends)
    return HubTokenizer(vocabulary, special, ends, add, _chat_template(settings, notes), notes)


def _read_vocabulary(folder: Path, settings: Values, vocab_size: int, pre: str | None) -> HubVocabulary:
    """The vocabulary, from the first of `_FILES` that is there."""
    json, tiktoken, tekken, sentencepiece = (folder / name for name in _FILES)
    if json.exists():
        values = Values(json)
        if is_byte_level(values) or not sentencepiece.exists():
            return read_bpe(values, vocab_size, pre)
    elif tiktoken.exists():
        return read_tiktoken(tiktoken, settings, vocab_size, pre)
    elif tekken.exists():
        return read_tekken(Values(tekken), vocab_size, pre)
    elif not sentencepiece.exists():
        raise PymlaError(f"{folder}: no tokenizer: {', '.join(_FILES)} are converted, and none is there")
    return read_sentencepiece(sentencepiece, settings, vocab_size)


def _named(settings: Values, name: str, vocabulary: HubVocabulary) -> int | None:
    """The id of a special token that tokenizer_config.json names, or the vocabulary itself."""
    token = settings.get(f"{name}_token", (str, dict))
    if isinstance(token, dict):
        token = settings.get("content", str, among=token)
    return vocabulary.ids.get(token, vocabulary.special.get(name))


def _special(
    settings: Values, config: HubConfig, vocabulary: HubVocabulary, notes: list[str]
) -> Iterator[tuple[str, int]]:
    """Names and ids of the special tokens that there are, first by the tokenizer's files, then by config.json, then by
    the model's class."""
    for name in _SPECIAL:
        token_id = _named(settings, name, vocabulary)
        if token_id is None:
            token_id = config.get(f"{name}_token_id", int)
        if token_id is None and name in config.family.special:
            token_id = vocabulary.ids.get(config.family.special[name])
        where = f"{name}_token_id of {config.path.name}"
        if token_id is not None and _is_token(token_id, where, len(vocabulary.tokens), notes):
            yield name, token_id


def _ends(settings: Values, config: HubConfig, vocabulary: HubVocabulary, notes: list[str]) -> Iterator[int]:
    """Ids of tokens that end a text, each once: first the token that the tokenizer names, then the tokens at which
    transformers ends a generation, then the tokens of config.json."""
    tokens, types = vocabulary.tokens, vocabulary.types
    first = _named(settings, "eos", vocabulary)
    found = [] if first is None else [first]
    yield from found
    for values in (Values(config.path.with_name(generation_config.NAME), optional=True), config):
        where = f"eos_token_id of {values.path.name}"
        given = values.get("eos_token_id", (int, list), [])
        for token_id in given if isinstance(given, list) else [given]:
            if type(token_id) is not int:
                values.refuse("eos_token_id", token_id, "a token id, or several, are expected")
            if token_id in found or not _is_token(token_id, where, len(tokens), notes):
                continue
            # Saved configurations carry defaults that are another model's: there, common text would end a generation.
            if found and types[token_id] not in (TokenType.CONTROL, TokenType.USER_DEFINED):
                notes.append(f"{where}: token {token_id}, {tokens[token_id]!r:.60}, is ordinary text and left out")
                continue
            found.append(token_id)
            yield token_id


def _is_token(token_id: int, where: str, vocab_size: int, notes: list[str]) -> bool:
    """Whether there is such a token; -1 stands for none."""
    if token_id == -1:
        return False
    if 0 <= token_id < vocab_size:
        return True
    notes.append(f"{where}: {shown(token_id)} is outside the vocabulary of {vocab_size} tokens and left out")
    return False


def _added(settings: Values, vocabulary: HubVocabulary, bos: int | None, ends: list[int]) -> dict[str, bool]:
    """Whether the tokenizer puts BOS and EOS around a text, where the files say so."""
    first, last = vocabulary.around
    found = dict(vocabulary.add)
    if first is not None:
        found["bos"] = vocabulary.ids.get(first) == bos
    if last is not None:
        found["eos"] = vocabulary.ids.get(last) in ends
    for name in ("bos", "eos"):
        flag = settings.get(f"add_{name}_token", bool)
        if flag is not None:
            found[name] = flag
    return found


def _chat_template(settings: Values, notes: list[str]) -> str | list[dict[str, str]] | None:
    """The template, or several by name."""
    folder = settings.path.parent
    template = settings.get("chat_template", (str, list, dict))
    if (folder / "chat_template.jinja").exists():
        template = _read_text(folder / "chat_template.jinja")
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if more:
            template = {"default": template} | {path.stem: _read_text(path) for path in more}
    elif template is None:
        template = Values(folder / "chat_template.json", optional=True).get("chat_template", (str, list, dict))
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if not isinstance(template, list):
        return template
    for each in template:
        if not (isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("name", "template"))):
            settings.refuse("chat_template", each, "templates with a name are expected")
    if not any(each["name"] == "default" for each in template):
        notes.append("chat_template: none of the templates is named default; a chat needs a template of its own")
    return template


def _read_text(path: Path) -> str:
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise PymlaError(f"{path}: cannot be read ({error.strerror})") from error
