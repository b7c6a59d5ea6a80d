"""SentencePiece vocabularies (``tokenizer.ggml.model`` "llama").

Adjacent parts of a text whose concatenation is a token are joined, the pair with the highest score first, the leftmost
of several with one score: BPE by score, whatever algorithm the vocabulary was trained with, as in llama.cpp
(llm_tokenizer_spm in src/llama-vocab.cpp). Blanks are written as U+2581, and characters without a token as their bytes.
"""

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pymla.errors import PymlaError
from pymla.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

#: The character that stands for a blank.
BLANK = "▁"

#: Words whose ids are kept, and the characters of the longest one of them.
_KEPT_WORDS, _LONGEST_KEPT = 1 << 16, 64


class SentencePiece:
    """A SentencePiece vocabulary.

    Parameters
    ----------
    tokens : texts of the tokens, by their ids
    kinds : of each token
    scores : float32 (tokens,)
        Pairs that make a token of a higher score are joined first.
    prefix : str
        Text that `encode` puts in front of a text: a blank or none.
    where : the file, for messages

    Attributes
    ----------
    ids : dict of str to int
        Ids of the tokens by their texts.

    Raises
    ------
    PymlaError
        Bytes have no token, and there is none for unknown text either.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        kinds: Sequence[int],
        scores: np.ndarray,
        *,
        prefix: str = " ",
        where: str | Path = "tokenizer",
    ):
        self.tokens, self.kinds, self.prefix = tokens, kinds, prefix
        self.ids = {token: i for i, token in enumerate(tokens)}
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        self._byte_ids = [self.ids.get(name) for name in names]
        found = ((self.ids[name], byte) for name, byte in names.items() if name in self.ids)
        self._bytes = {i: byte for i, byte in found if kinds[i] in (NORMAL, BYTE)}
        self._unknown = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
        if None in self._byte_ids and self._unknown is None:
            raise PymlaError(
                f"{where}: metadata tokenizer.ggml.tokens lacks {self._byte_ids.count(None)} of the 256 bytes, and a "
                "token for unknown text"
            )
        # Control tokens and bytes are never joined from text that spells them, as in SentencePiece.
        made = [
            (token, i)
            for token, i in self.ids.items()
            if kinds[i] in (NORMAL, USER_DEFINED, UNUSED) and i not in self._bytes
        ]
        values = scores.tolist()
        self._costs = {token: -values[i] for token, i in made}
        self._usable = {token: i for token, i in made if kinds[i] != UNUSED}
        self._inside = {token[at : at + 2] for token, _ in made for at in range(len(token) - 1)}
        self._kept = lru_cache(_KEPT_WORDS)(self._word)

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Token ids of a text in which no special tokens are looked for, with the prefix in front, unless the text is
        `inside` another one."""
        ids: list[int] = []
        for word in self._words((text if inside else self.prefix + text).replace(" ", BLANK)):
            ids += self._kept(word) if len(word) <= _LONGEST_KEPT else self._word(word)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name."""
        if token in self._bytes:
            return bytes((self._bytes[token],))
        text = self.tokens[token]
        return (text if self.kinds[token] in (CONTROL, UNKNOWN) else text.replace(BLANK, " ")).encode()

    def _words(self, text: str) -> Iterator[str]:
        """Parts of a text that are encoded alone: no token has the two characters on both sides of a cut."""
        start = 0
        for at in range(1, len(text)):
            if text[at - 1 : at + 1] not in self._inside:
                yield text[start:at]
                start = at
        yield text[start:]

    def _word(self, word: str) -> list[int]:
        """Token ids of a word of n characters, in n log n steps."""
        costs, end = self._costs, len(word)
        parts = list(word)  # a part that was joined to the one on its left is empty
        before, behind = list(range(-1, end - 1)), list(range(1, end + 1))
        halves: dict[str, tuple[str, str]] = {}
        pairs = [(costs[pair], at, 2) for at in range(end - 1) if (pair := word[at : at + 2]) in costs]
        heapq.heapify(pairs)

        def add(left: int, right: int) -> None:
            pair = parts[left] + parts[right]
            if pair in costs:
                heapq.heappush(pairs, (costs[pair], left, len(pair)))

        while pairs:
            _, left, size = heapq.heappop(pairs)
            right = behind[left]
            if not parts[left] or right == end or len(parts[left]) + len(parts[right]) != size:
                continue  # one of the two was joined to another part
            joined = parts[left] + parts[right]
            halves[joined] = parts[left], parts[right]
            parts[left], parts[right], behind[left] = joined, "", behind[right]
            if behind[left] < end:
                before[behind[left]] = left
                add(left, behind[left])
            if before[left] >= 0:
                add(before[left], left)
        return [token for part in parts if part for token in self._part_ids(part, halves)]

    def _part_ids(self, part: str, halves: dict[str, tuple[str, str]]) -> Iterator[int]:
        """Token ids of a part. Unused tokens are taken apart again, and characters without a token are bytes."""
        rest = [part]
        while rest:
            part = rest.pop()
            if part in self._usable:
                yield self._usable[part]
            elif part in halves:
                rest += halves[part][::-1]
            else:
                yield from self._spelt(part)

    def _spelt(self, character: str) -> list[int]:
        """Tokens of a character's bytes, or the one for unknown text where a byte has none."""
        ids = [self._byte_ids[byte] for byte in character.encode()]
        known = [i for i in ids if i is not None]
        if len(known) == len(ids):
            return known
        assert self._unknown is not None  # which __init__ has seen to
        return [self._unknown]
