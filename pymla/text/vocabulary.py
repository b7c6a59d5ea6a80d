"""The vocabulary in a model file: texts of the tokens, their kinds, merges and scores."""

from collections.abc import Iterable, Sequence

import numpy as np

from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile

#: Kinds of tokens, as ``tokenizer.ggml.token_type`` numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def read_tokens(file: ModelFile) -> list[str]:
    """Texts of the tokens by their ids.

    Raises
    ------
    PymlaError
        The array is missing, or is no array of strings.
    """
    return _strings(file, "tokenizer.ggml.tokens")


def read_kinds(file: ModelFile, count: int) -> list[int]:
    """The kind of each of `count` tokens; without the key all are normal.

    Raises
    ------
    PymlaError
        The array has another length, or does not hold integers.
    """
    key = "tokenizer.ggml.token_type"
    kinds = file.get(key, list, None)
    return [NORMAL] * count if kinds is None else _numbers(file, key, kinds, count, "iu", "integers").tolist()


def read_merges(file: ModelFile) -> list[str]:
    """Pairs of tokens that byte-level BPE joins, with a space between, the first to be joined first.

    Raises
    ------
    PymlaError
        The array is missing, or has something else than pairs.
    """
    merges = _strings(file, "tokenizer.ggml.merges")
    for merge in merges:
        if merge.count(" ") != 1:
            raise PymlaError(
                f"{file.path}: metadata tokenizer.ggml.merges has {merge!r}; two tokens and a space expected"
            )
    return merges


def read_scores(file: ModelFile, count: int) -> np.ndarray:
    """The score of each of `count` tokens of a SentencePiece vocabulary: float32 (count,).

    Raises
    ------
    PymlaError
        The array is missing, has another length, or does not hold numbers.
    """
    key = "tokenizer.ggml.scores"
    scores = _numbers(file, key, file.get(key, list), count, "iuf", "numbers").astype(np.float32)
    if np.isnan(scores).any():
        raise PymlaError(f"{file.path}: metadata {key} has a NaN, for token {int(np.isnan(scores).argmax())}")
    return scores


def with_control(kinds: Iterable[int], control: Iterable[int]) -> list[int]:
    """Kinds, with `control` tokens as such where a converter took them for normal or user-defined ones."""
    kinds = list(kinds)
    for token in control:
        if kinds[token] in (NORMAL, USER_DEFINED):
            kinds[token] = CONTROL
    return kinds


def _strings(file: ModelFile, key: str) -> list[str]:
    values = file.get(key, list)
    if not isinstance(values, list):
        raise PymlaError(f"{file.path}: metadata {key} is an array of numbers; strings are expected")
    return values


def _numbers(
    file: ModelFile, key: str, values: Sequence[str] | np.ndarray, count: int, dtypes: str, name: str
) -> np.ndarray:
    """An array with a number for each token, of the kinds of dtype that NumPy's letters `dtypes` name."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in dtypes:
        raise PymlaError(f"{file.path}: metadata {key} is no array of {name}")
    if len(values) != count:
        raise PymlaError(f"{file.path}: metadata {key} has {len(values)} entries, for {count} tokens")
    return values
