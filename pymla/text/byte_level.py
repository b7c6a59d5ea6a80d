"""Byte-level BPE (``tokenizer.ggml.model`` "gpt2").

A text is cut by the pre-tokenizer's regular expressions, one after the other. Each piece's UTF-8 bytes are written as
printable characters, and the tokenizers package merges them.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

from tokenizers import Tokenizer as Bpe
from tokenizers import models

from pymla.errors import PymlaError
from pymla.text.byte_alphabet import BYTES, CHARACTERS
from pymla.text.pre_tokenizers import IGNORE_MERGES, PRE_TOKENIZERS
from pymla.text.vocabulary import CONTROL, NORMAL, UNKNOWN, UNUSED


class ByteLevel:
    """A vocabulary of byte-level BPE.

    Parameters
    ----------
    tokens : texts of the tokens, by their ids; normal tokens are written in the byte alphabet
    kinds : of each token
    merges : pairs of tokens that are joined, with a space between, the first one first
    pre : name of the pre-tokenizer
    where : the file, for messages

    Attributes
    ----------
    ids : dict of str to int
        Ids of the tokens by their texts.
    prefix : str
        Text that `encode` puts in front of a text: none.

    Raises
    ------
    PymlaError
        The pre-tokenizer is not known, the vocabulary lacks bytes, or merges name tokens that it does not have.
    """

    prefix = ""

    def __init__(
        self,
        tokens: Sequence[str],
        kinds: Sequence[int],
        merges: Sequence[str],
        pre: str,
        *,
        where: str | Path = "tokenizer",
    ):
        if pre not in PRE_TOKENIZERS:
            raise PymlaError(
                f"{where}: metadata tokenizer.ggml.pre is {pre!r}, which pymla does not know; it knows "
                f"{', '.join(PRE_TOKENIZERS)}"
            )
        self.tokens, self.kinds = tokens, kinds
        self.ids = {token: i for i, token in enumerate(tokens)}
        missing = sum(character not in self.ids for character in CHARACTERS)
        if missing:
            raise PymlaError(f"{where}: metadata tokenizer.ggml.tokens lacks {missing} of the 256 bytes")
        special = {token for token, i in self.ids.items() if kinds[i] in (CONTROL, UNKNOWN, UNUSED)}
        self._bpe = _bpe(self.ids, merges, special.difference(CHARACTERS), pre in IGNORE_MERGES, where)
        self._bpe.pre_tokenizer = PRE_TOKENIZERS[pre]

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Token ids of a text in which no special tokens are looked for; the same ones `inside` another text.

        Raises
        ------
        PymlaError
            The text has millions of letters, or of blanks, in a row: Oniguruma gives up after ten million steps.
        """
        try:
            ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # a panic of the tokenizers package is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise PymlaError(f"the text, of {len(text)} characters, has too many of one kind in a row") from error
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name."""
        text = self.tokens[token]
        if self.kinds[token] == NORMAL:
            with contextlib.suppress(KeyError):  # a text outside the alphabet stands for itself
                return bytes(map(BYTES.__getitem__, text))
        return text.encode()


def merged_tokens(merges: Iterable[str]) -> frozenset[str]:
    """Tokens that text is made of: single bytes, and what merges make."""
    return frozenset((*CHARACTERS, *(merge.replace(" ", "", 1) for merge in merges)))


def _bpe(
    ids: Mapping[str, int], merges: Iterable[str], special: Set[str], ignore_merges: bool, where: str | Path
) -> Bpe:
    """Byte-pair encoding that makes no `special` token of a text, even if merges say so or a piece spells its name."""
    vocabulary = {token: i for token, i in ids.items() if token not in special}
    split = (merge.partition(" ") for merge in merges)
    pairs = [(left, right) for left, _, right in split if special.isdisjoint((left, right, left + right))]
    try:
        return Bpe(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges))
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise PymlaError(f"{where}: metadata tokenizer.ggml.merges cannot be used: {error}") from error
