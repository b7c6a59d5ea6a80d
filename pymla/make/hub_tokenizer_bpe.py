"""Byte-level BPE from tokenizer.json, the file of the tokenizers package."""

from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, normalizers

from pymla.errors import PymlaError
from pymla.files.textfile import decode
from pymla.make.hub_vocabulary import Entry, HubVocabulary, added_entry, check_ids, padded
from pymla.make.json_values import Values
from pymla.printable import shown
from pymla.text.pre_tokenizers import IGNORE_MERGES, PRE_TOKENIZERS

NAME = "tokenizer.json"

# Where pre-tokenizers differ: line ends, indentation, digits in rows, Chinese, Japanese and Korean beside Latin text,
# capitals, accents, symbols, contractions, punctuation beside letters. The accent written apart shows a normaliser.
_PROBE = (
    "def f(x_1):\n    return  x*3333 + 12.5e-10\r\n\n\n \t\n  I'm sure, we'LL see: 'it's'!!  \n"
    "在apple工作1314151天～ 「東京」はひらがなカタカナ、한국어도 됩니다。 нещо на Български Ça été e\u0301 ΑΒΓ\n"
    "fooBar HTTPServer's ʰX 中abc中ABC ab、cㄅㄆ한a //\n/ \u0301x\n"
    '$100 ^_^ <tag/>#!/bin/sh (a)[b]{c} 3.3 3..3 ½ ² Ⅷ ٣٤ 🚀 👩\u200d🚀 \u00a0x\u3000y\u2003z ----==== `"""` end   '
)


def is_byte_level(values: Values) -> bool:
    """Whether a tokenizer.json holds byte-level BPE, and not a SentencePiece model, whose bytes are tokens apart."""
    model = values.get("model", dict, {})
    return model.get("type") == "BPE" and not model.get("byte_fallback")


def read_bpe(values: Values, vocab_size: int, pre: str | None) -> HubVocabulary:
    """The vocabulary of a tokenizer.json.

    Parameters
    ----------
    vocab_size : tokens of the model; ids that no token has are unused ones
    pre : name of the pre-tokenizer; None: found out

    Raises
    ------
    PymlaError
        The file is damaged, or holds something that is not converted.
    """
    model = _bpe(values)
    tokens, types = padded(_entries(values, model, vocab_size), vocab_size)
    ids = model["vocab"] | {token["content"]: token["id"] for token in _added_tokens(values)}
    merges = _merges(values.path, model)
    pre = pre or detect_pre(values.path)
    return HubVocabulary("gpt2", pre, tokens, types, ids, merges, around=_template_ends(values))


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
    if model.get("byte_fallback"):
        raise PymlaError(f"{values.path}: a SentencePiece model; put its tokenizer.model beside it")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            values.refuse(f"model.{key}", model[key], "GGUF cannot hold it")
    return model


def _entries(values: Values, model: dict[str, Any], vocab_size: int) -> dict[int, Entry]:
    """Tokens and their types by id."""
    vocab = model["vocab"]
    added = _added_tokens(values)
    ids = [*vocab.values(), *(token["id"] for token in added)]
    for token_id in ids:
        if type(token_id) is not int:
            values.refuse("damaged vocabulary: an id", token_id, "download it again")
    if not ids or len(set(vocab.values())) < len(vocab):
        raise PymlaError(f"{values.path}: damaged vocabulary: empty, or two tokens have one id; download it again")
    check_ids(values, ids, vocab_size)
    entries = {token_id: (token, TokenType.NORMAL) for token, token_id in vocab.items()}
    return entries | {token["id"]: added_entry(token["content"], bool(token.get("special"))) for token in added}


def _added_tokens(values: Values) -> list[dict[str, Any]]:
    added = values.get("added_tokens", list, [])
    if not all(isinstance(each, dict) and "id" in each and isinstance(each.get("content"), str) for each in added):
        raise PymlaError(f"{values.path}: damaged vocabulary: added_tokens without an id or content; download it again")
    return added


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
