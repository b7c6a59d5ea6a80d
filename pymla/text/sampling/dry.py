"""DRY, "don't repeat yourself": a penalty on tokens that would continue a repetition.

Of oobabooga's text-generation-webui (pull request 5677 by p-e-w); sequence breakers on text as in KoboldCpp (pull
request 982 by pi6am) and llama.cpp.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pymla.text.sampling.pool import Pool
from pymla.text.sampling.state import State

if TYPE_CHECKING:
    from pymla.text.tokenizer import Tokenizer

#: Bytes of a sequence breaker, and tokens of the part of it that follows its first token.
LONGEST_BREAKER, _LONGEST_TAIL = 40, 20

#: The logarithm of the largest float32, which a penalty stays below.
_LARGEST = 88.7228391


class Breakers:
    """Sequences of tokens at which repetitions end, as no text is repeated across them.

    Parameters
    ----------
    tails : dict of int to list of tuple of int
        Of each token that may begin a breaker, the tokens that follow it: none where it has the breaker in its text.
    """

    #: Those of texts, by tokenizer: to look at all tokens of a vocabulary takes 0.2 s.
    _known: ClassVar["weakref.WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], Breakers]]"] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, tails: dict[int, list[tuple[int, ...]]]):
        self._tails = {head: sorted(set(found), key=len, reverse=True) for head, found in tails.items()}
        self._is_head = np.zeros(max(self._tails, default=-1) + 2, bool)  # the last one stands for all tokens above
        self._is_head[list(self._tails)] = True
        #: Tokens that are breakers of their own, ascending.
        self.single = np.array(sorted(head for head, found in self._tails.items() if () in found), np.int64)

    @classmethod
    def of(cls, tokenizer: "Tokenizer", texts: Sequence[str]) -> "Breakers":
        """The breakers of some texts: tokens that have one in their text, and tokens that end with the beginning of
        one, followed by the tokens of the rest. llama.cpp: ``get_overlapping_token_sequences``."""
        known = cls._known.setdefault(tokenizer, {})
        key = tuple(texts)
        if key not in known:
            known[key] = cls(_tails(tokenizer, key))
        return known[key]

    def tokens_after(self, window: np.ndarray) -> int:
        """How many tokens follow the last breaker in a window of tokens: all where it has none."""
        heads = self._is_head[np.minimum(window, len(self._is_head) - 1)]
        for at in np.flatnonzero(heads)[::-1]:
            after = len(window) - 1 - int(at)
            following = tuple(window[at + 1 : at + 1 + _LONGEST_TAIL].tolist())
            for tail in self._tails[int(window[at])]:
                if following[: len(tail)] == tail:
                    return after - len(tail)
        return len(window)


def _tails(tokenizer: "Tokenizer", texts: Sequence[str]) -> dict[int, list[tuple[int, ...]]]:
    # The bytes of a breaker, and what its beginnings are followed by.
    breakers = []
    for text in texts:
        parts = [(text[:n].encode(), text[n:]) for n in range(1, len(text))]
        tokens = [(part, tuple(tokenizer.encode(rest, add_bos=False))[:_LONGEST_TAIL]) for part, rest in parts]
        breakers.append((text.encode(), tokens))
    found: dict[int, list[tuple[int, ...]]] = {}
    for token in range(tokenizer.vocab_size):
        word = tokenizer.token_bytes(token)
        for text_bytes, beginnings in breakers:
            if text_bytes in word:
                found.setdefault(token, []).append(())
            else:
                for beginning, tail in beginnings:
                    if word.endswith(beginning):
                        found.setdefault(token, []).append(tail)
    return found


@dataclass(frozen=True)
class Dry:
    """Lowers the logit of each token x that followed earlier what the text ends with now, by ``multiplier * base ** (n
    - allowed_length)`` where the n tokens before an earlier x are the text's last ones and n is at least
    `allowed_length`; the largest n counts. No sequence breaker is among the n tokens, nor is x one of a single token.

    llama.cpp: ``llama_sampler_dry_apply``.
    """

    multiplier: float
    base: float
    allowed_length: int
    window: int  # tokens that are looked back on; 0: all
    breakers: Breakers
    keeps_likeliest = False

    def __call__(self, pool: Pool, state: State) -> Pool:
        tokens, lengths = self._repeated(state.history.last(self.window))
        if not len(tokens):
            return pool
        at, which = pool.find(tokens)
        penalties = self.multiplier * self.base ** (lengths[which] - self.allowed_length)
        return pool.edited(at, pool.logits[at] - penalties)

    @property
    def _longest(self) -> int:
        """The length from which on a repetition is penalised no harder: llama.cpp's largest exponent."""
        return self.allowed_length + (0 if self.base == 1 else math.floor(_LARGEST / math.log(self.base)))

    def _repeated(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that would continue a repetition, ascending, and how long that is already: int64 (n,) each."""
        longest = min(self.breakers.tokens_after(window), self._longest)
        if longest < self.allowed_length or len(window) <= self.allowed_length:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        backwards = window[::-1]
        lengths = _common_lengths(backwards, longest)
        # The token after the repeated ones is the one before, backwards.
        at = np.flatnonzero(lengths[1:] >= self.allowed_length)
        tokens, which = np.unique(backwards[at], return_inverse=True)
        found = np.zeros(len(tokens), np.int64)
        np.maximum.at(found, which, lengths[1:][at])
        left = np.isin(tokens, self.breakers.single, invert=True)
        return tokens[left], found[left]


def _common_lengths(tokens: np.ndarray, longest: int) -> np.ndarray:
    """How many tokens from each position on are those from the first position on, at most `longest`: int64 (n,)."""
    lengths = np.zeros(len(tokens), np.int64)
    at, length = np.arange(len(tokens)), 0
    while length < longest:
        at = at[at + length < len(tokens)]
        at = at[tokens[at + length] == tokens[length]]
        if len(at) <= 1:  # the first position itself
            break
        length += 1
        lengths[at] = length
    return lengths
