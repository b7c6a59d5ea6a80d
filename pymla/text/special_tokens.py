"""Special tokens of a model file: by the keys of its metadata, by the names in chat templates, and ends of a text."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.printable import shown

#: Names of tokens that end a text even if the metadata does not say so, as in llama.cpp (src/llama-vocab.cpp). The last
#: two are of DeepSeek-Coder and GLM.
_END_NAMES = frozenset(
    (
        "<｜end▁of▁sentence｜>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|tool_response>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<eos>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<|EOT|>",
        "<|user|>",
    )
)

#: Tokens of fill-in-the-middle that end a text, by the key of their id, with the names they have where there is no key.
_FIM_NAMES = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

#: Names of the tokens around the parts of a text for fill-in-the-middle: control tokens, whatever the file calls them.
_FIM_PARTS = frozenset(
    (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    )
)

#: Special tokens that end a text, by the key of their id.
END_KEYS = ("eos", "eot", "eom", *_FIM_NAMES)

#: Names that chat templates have for special tokens, by the key of their id; GGUF spells "seperator" so.
TEMPLATE_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}


def special_ids(
    file: ModelFile, count: int, defaults: Mapping[str, int] = MappingProxyType({})
) -> tuple[dict[str, int], list[str]]:
    """Special tokens that a file names, by its keys ``tokenizer.ggml.*_token_id``.

    Parameters
    ----------
    file : ModelFile
    count : int
        Tokens in the vocabulary.
    defaults : dict of str to int
        Ids of special tokens that the file has no key for.

    Returns
    -------
    ids : dict of str to int
        By the key without "_token_id", as "bos". An id outside the vocabulary is left out: converters write -1, or
        4294967295, for a token that is not there. So is one that is no integer, where `Tokenizer` can do without.
    warnings : list of str
        One for each id that is left out.

    Raises
    ------
    PymlaError
        BOS, or a token that ends a text, is no integer.
    """
    ids = {
        name: token
        for name, token in defaults.items()
        if token < count and f"tokenizer.ggml.{name}_token_id" not in file.metadata
    }
    warnings = []
    for key, value in file.metadata.items():
        name = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
        if key != f"tokenizer.ggml.{name}_token_id":
            continue
        token = file.get(key, int) if name in ("bos", "eos", "eot", "eom") else value
        if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < count:
            ids[name] = token
        else:
            warnings.append(_outside(file, key, token, count))
    return ids, warnings


def end_ids(file: ModelFile, tokens: Sequence[str], ids: Mapping[str, int]) -> tuple[set[int], list[str]]:
    """Tokens that end a text by the metadata of a file, whose `special_ids` are `ids`, and warnings as there.

    Raises
    ------
    PymlaError
        The array ``tokenizer.ggml.eos_token_ids``, which Ollama writes, does not hold integers.
    """
    key, count = "tokenizer.ggml.eos_token_ids", len(tokens)
    values = file.get(key, list, [])
    if len(values) and (isinstance(values, list) or not np.issubdtype(values.dtype, np.integer)):
        raise PymlaError(f"{file.path}: metadata {key} is no array of integers")
    given = [int(value) for value in values]
    ends = {token for token in given if 0 <= token < count} | {ids[key] for key in END_KEYS if key in ids}
    warnings = [_outside(file, key, token, count) for token in given if not 0 <= token < count]
    return ends | _fim_ends(tokens, ids), warnings


def ends_by_name(ids: Iterable[int], tokens: Sequence[str], vocabulary: Mapping[str, int]) -> frozenset[int]:
    """Tokens that end a text: `ids`, and tokens of a known name, whatever their type, as in llama.cpp.

    Parameters
    ----------
    ids : given by the metadata
    tokens, vocabulary : texts by their ids, and ids by their texts
    """
    ends = {*ids, *(vocabulary[name] for name in _END_NAMES if name in vocabulary)}
    names = {tokens[token]: token for token in ends}
    # gpt-oss and Solar end a text otherwise, and put <|end|> between its parts. Gemma 4 and PLaMo have </s> as text.
    if names.keys() & {"<|call|>", "<|calls|>"} and names.keys() & {"<|return|>", "<|flush|>"}:
        ends -= {names.get("<|end|>")}
    if names.keys() & {"<|tool_response>", "<|plamo:eos|>"}:
        ends -= {names.get("</s>")}
    return frozenset(ends)


def control_by_name(vocabulary: Mapping[str, int]) -> set[int]:
    """Tokens for fill-in-the-middle, which are control tokens by their names, as in llama.cpp."""
    return {vocabulary[name] for name in _FIM_PARTS if name in vocabulary}


def _outside(file: ModelFile, key: str, token: Any, count: int) -> str:
    return (
        f"{file.path}: metadata {key} is {shown(token)}, and the vocabulary has {count} tokens; it is taken as absent"
    )


def _fim_ends(tokens: Sequence[str], ids: Mapping[str, int]) -> set[int]:
    """Tokens of fill-in-the-middle that end a text, found by name where the metadata has no id for them."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = (
        [vocabulary[name] for name in names if name in vocabulary]
        for key, names in _FIM_NAMES.items()
        if key not in ids
    )
    return {each[0] for each in found if each}
