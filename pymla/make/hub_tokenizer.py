"""The tokenizer of a Hugging Face folder, as llama.cpp's converter writes a byte-level BPE into GGUF metadata.

Where several files say the same, that one counts which transformers reads: names in tokenizer_config.json come before
ids in config.json, chat_template.jinja before the template in tokenizer_config.json. The gguf package's SpecialVocab is
not used: it takes one id for the end of a text, and trusts the shape of everything in the files.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from tokenizers import Tokenizer, normalizers

from pymla.errors import PymlaError
from pymla.files.gguf_writer import Value
from pymla.files.textfile import decode
from pymla.make.hub_config import HubConfig, Values
from pymla.printable import shown
from pymla.text.pre_tokenizers import IGNORE_MERGES, PRE_TOKENIZERS

#: Special tokens that have a key in GGUF, the end of a text apart.
_SPECIAL = ("bos", "unk", "sep", "pad", "mask")

#: Keys of up to three tokens that end a text.
END_KEYS = ("eos", "eot", "eom")

# Where pre-tokenizers differ: line ends, indentation, digits in rows, Chinese, Japanese and Korean beside Latin text,
# capitals, accents, symbols, contractions, punctuation beside letters. The accent written apart shows a normaliser.
_PROBE = (
    "def f(x_1):\n    return  x*3333 + 12.5e-10\r\n\n\n \t\n  I'm sure, we'LL see: 'it's'!!  \n"
    "在apple工作1314151天～ 「東京」はひらがなカタカナ、한국어도 됩니다。 нещо на Български Ça été e\u0301 ΑΒΓ\n"
    "fooBar HTTPServer's ʰX 中abc中ABC ab、cㄅㄆ한a //\n/ \u0301x\n"
    '$100 ^_^ <tag/>#!/bin/sh (a)[b]{c} 3.3 3..3 ½ ² Ⅷ ٣٤ 🚀 👩\u200d🚀 \u00a0x\u3000y\u2003z ----==== `"""` end   '
)
_USER_DEFINED = gguf.TokenType.USER_DEFINED


class HubTokenizer(NamedTuple):
    """A tokenizer as GGUF holds it."""

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    pre: str
    special: dict[str, int]  # ids by the name of their key: bos, unk, sep, pad, mask
    ends: list[int]  # ids of all tokens that end a text, the most usual first
    add: dict[str, bool]  # whether bos and eos are put around a text, where the files say so
    chat_template: str | list[dict[str, str]] | None
    notes: list[str]  # for the user

    def metadata(self) -> dict[str, Value]:
        """Keys and values of the tokenizer."""
        keys = gguf.Keys.Tokenizer
        found: dict[str, Value] = {
            keys.MODEL: "gpt2",
            keys.PRE: self.pre,
            keys.LIST: self.tokens,
            keys.TOKEN_TYPE: np.array(self.types, np.int32),
            keys.MERGES: self.merges,
        }
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
    folder, vocab_size = config.path.parent, config.size("vocab_size")
    path = folder / "tokenizer.json"
    if pre is not None and pre not in PRE_TOKENIZERS:
        raise PymlaError(f"unknown pre-tokenizer {pre!r} as `pre`; choose {', '.join(PRE_TOKENIZERS)}")
    values = Values(path)
    model = _bpe(values)
    entries = _entries(values, model, vocab_size)
    tokens, types = zip(*(entries.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocab_size)), strict=True)
    notes: list[str] = []
    settings = Values(folder / "tokenizer_config.json", optional=True)
    ids = _ids_by_content(values, model)
    special = dict(_special(settings, config, ids, vocab_size, notes))
    ends = list(_ends(settings, config, ids, tokens, types, notes))
    return HubTokenizer(
        list(tokens),
        list(types),
        _merges(path, model),
        pre or detect_pre(path),
        special,
        ends,
        _added(settings, values, ids, special.get("bos"), ends),
        _chat_template(settings, notes),
        notes,
    )


def detect_pre(path: Path) -> str:
    """Name of the pre-tokenizer that leads to the tokens of a file's own in a telling text.

    Of several, one that also cuts the text in the same places comes first, then one that takes pieces which are tokens
    as the file does, with or without merging them (``ignore_merges``). Pieces may differ in files that say the same
    differently: DeepSeek's take numbers apart digit by digit, llama.cpp's deepseek-llm leaves them whole, and no merge
    of that vocabulary joins digits.
    """
    try:
        tokenizer = Tokenizer.from_str(decode(path.read_bytes(), path))
        own = tokenizer.pre_tokenizer
        pieces = own.pre_tokenize_str(_PROBE) if own else None
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        ignore_merges = bool(getattr(tokenizer.model, "ignore_merges", False))
    except Exception as error:  # the tokenizers package raises nothing more precise
        reason = ascii(str(error))[1:-1]
        raise PymlaError(f"{path}: cannot be read by the tokenizers package ({reason:.200})") from error
    tokenizer.normalizer = normalizers.Sequence([])  # llama.cpp's have none
    found: dict[tuple[bool, bool], str] = {}
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        tokenizer.pre_tokenizer = pre_tokenizer
        if tokenizer.encode(_PROBE, add_special_tokens=False).ids == ids:
            same_pieces = pre_tokenizer.pre_tokenize_str(_PROBE) == pieces
            found.setdefault((same_pieces, (name in IGNORE_MERGES) == ignore_merges), name)
    if not found:
        raise PymlaError(f"{path}: its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}; name one as `pre`")
    return found[max(found)]


def _bpe(values: Values) -> dict[str, Any]:
    """The model of a tokenizer.json."""
    model = values.get("model", dict, {})
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise PymlaError(f"{values.path}: no byte-pair encoding; other tokenizers are not converted")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            values.refuse(f"model.{key}", model[key], "GGUF cannot hold it")
    return model


def _entries(values: Values, model: dict[str, Any], vocab_size: int) -> dict[int, tuple[str, gguf.TokenType]]:
    """Tokens and their types by id."""
    vocab = model["vocab"]
    added = _added_tokens(values)
    ids = [*vocab.values(), *(token["id"] for token in added)]
    for token_id in ids:
        if type(token_id) is not int:
            values.refuse("damaged vocabulary: an id", token_id, "download it again")
    if not ids or len(set(vocab.values())) < len(vocab):
        raise PymlaError(f"{values.path}: damaged vocabulary: empty, or two tokens have one id; download it again")
    if min(ids) < 0 or max(ids) >= vocab_size:
        found = f"token ids {shown(min(ids))} to {shown(max(ids))}"
        raise PymlaError(f"{values.path}: has {found}; config.json's vocab_size is {vocab_size}")
    entries = {token_id: (token, gguf.TokenType.NORMAL) for token, token_id in vocab.items()}
    for token in added:
        content, special = token["content"], token.get("special") or _looks_special(token["content"])
        # llama.cpp compares a user-defined token with the text as it stands.
        entry = (content, gguf.TokenType.CONTROL) if special else (content.replace("▁", " "), _USER_DEFINED)
        entries[token["id"]] = entry
    return entries


def _added_tokens(values: Values) -> list[dict[str, Any]]:
    added = values.get("added_tokens", list, [])
    if not all(isinstance(each, dict) and "id" in each and isinstance(each.get("content"), str) for each in added):
        raise PymlaError(f"{values.path}: damaged vocabulary: added_tokens without an id or content; download it again")
    return added


def _looks_special(token: str) -> bool:
    """Whether it is a control token by its looks: DeepSeek's files do not flag all of theirs."""
    return token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>"))


def _ids_by_content(values: Values, model: dict[str, Any]) -> dict[str, int]:
    return model["vocab"] | {token["content"]: token["id"] for token in _added_tokens(values)}


def _merges(path: Path, model: dict[str, Any]) -> list[str]:
    """Merges, which files have as strings or as pairs."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise PymlaError(f"{path}: no list of merges; download it again")
    return [_merge(path, merge) for merge in merges]


def _merge(path: Path, merge: Any) -> str:
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
        merge = " ".join(merge)
    if not isinstance(merge, str):
        raise PymlaError(f"{path}: damaged merges: {shown(merge)}; two tokens are expected, download it again")
    return merge


def _named(settings: Values, name: str, ids: dict[str, int]) -> int | None:
    """The id of a special token that tokenizer_config.json names."""
    token = settings.get(f"{name}_token", (str, dict))
    if isinstance(token, dict):
        token = settings.get("content", str, among=token)
    return ids.get(token)


def _special(
    settings: Values, config: HubConfig, ids: dict[str, int], vocab_size: int, notes: list[str]
) -> Iterator[tuple[str, int]]:
    """Names and ids of the special tokens that there are."""
    for name in _SPECIAL:
        token_id = _named(settings, name, ids)
        if token_id is None:
            token_id = config.get(f"{name}_token_id", int)
        if _is_token(token_id, f"{name}_token_id of config.json", vocab_size, notes):
            yield name, token_id


def _ends(
    settings: Values,
    config: HubConfig,
    ids: dict[str, int],
    tokens: Sequence[str],
    types: Sequence[int],
    notes: list[str],
) -> Iterator[int]:
    """Ids of tokens that end a text, each once: first the token that the tokenizer names, then the tokens at which
    transformers ends a generation, then the tokens of config.json."""
    first = _named(settings, "eos", ids)
    found = [] if first is None else [first]
    yield from found
    for values in (Values(config.path.with_name("generation_config.json"), optional=True), config):
        where = f"eos_token_id of {values.path.name}"
        given = values.get("eos_token_id", (int, list), [])
        for token_id in given if isinstance(given, list) else [given]:
            if type(token_id) is not int:
                values.refuse("eos_token_id", token_id, "a token id, or several, are expected")
            if token_id in found or not _is_token(token_id, where, len(tokens), notes):
                continue
            # Saved configurations carry defaults that are another model's: there, common text would end a generation.
            if found and types[token_id] not in (gguf.TokenType.CONTROL, _USER_DEFINED):
                notes.append(f"{where}: token {token_id}, {tokens[token_id]!r:.60}, is ordinary text and left out")
                continue
            found.append(token_id)
            yield token_id


def _is_token(token_id: int | None, where: str, vocab_size: int, notes: list[str]) -> bool:
    """Whether there is such a token; -1 stands for none."""
    if token_id is None or token_id == -1:
        return False
    if 0 <= token_id < vocab_size:
        return True
    notes.append(f"{where}: {shown(token_id)} is outside the vocabulary of {vocab_size} tokens and left out")
    return False


def _added(settings: Values, values: Values, ids: dict[str, int], bos: int | None, ends: list[int]) -> dict[str, bool]:
    """Whether the tokenizer puts BOS and EOS around a text, where the files say so."""
    first, last = _template_ends(values)
    found = {}
    if first is not None:
        found["bos"] = ids.get(first) == bos
    if last is not None:
        found["eos"] = ids.get(last) in ends
    for name in ("bos", "eos"):
        flag = settings.get(f"add_{name}_token", bool)
        if flag is not None:
            found[name] = flag
    return found


def _template_ends(values: Values) -> tuple[str | None, str | None]:
    """Special tokens with which a tokenizer's post-processor begins and ends a text."""
    post_processor = values.get("post_processor", dict, {})
    for processor in values.get("processors", list, [post_processor], among=post_processor):
        if isinstance(processor, dict) and processor.get("type") == "TemplateProcessing":
            pieces = values.get("single", list, [], among=processor)
            if len(pieces) > 1:
                return _special_name(pieces[0]), _special_name(pieces[-1])
    return None, None


def _special_name(piece: Any) -> str | None:
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None


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
