"""Prompt lookup: what followed the same tokens earlier in the prompt or the text.

Saxena, "Prompt Lookup Decoding" (2023). It costs no model, and is right where a text repeats its prompt or itself: when
a text is edited, summarised or quoted.
"""

from array import array
from collections.abc import Iterable, Sequence
from functools import partial

from pymla import checks
from pymla.backend import Array
from pymla.engine.cache import Sequence as Cached
from pymla.engine.speculation.drafting import Draft
from pymla.text.sampling import SamplingParams

#: Tokens of the shortest match. One token in common says too little.
SHORTEST = 2
#: Tokens of the longest match that is looked up. A match that predicts right grows beyond it.
LONGEST = 6
#: Tokens that are searched; those before them are forgotten. A text of so many takes some 30 MB of memory.
WINDOW = 1 << 15
#: Tokens of matches from which on drafts are of another kind.
KINDS = (4, 8)


class NgramIndex:
    """Where the last tokens of a text occurred before.

    Two matches compete. One is looked up: of the last `longest` tokens, or else of fewer, down to `shortest`, the
    latest earlier occurrence. The other one is followed: the occurrence that the match of the token before ended at,
    one token on, if its next token is the one that was appended; so a match grows token by token. The longer match
    counts, of two as long as each other the one that is followed.

    A token costs as much time however long the text is.

    Parameters
    ----------
    tokens : iterable of int
        The beginning of the text.
    shortest, longest : int
        Tokens of a match that is looked up.
    window : int
        Tokens that are remembered; at least `longest` + 1.

    Attributes
    ----------
    matched : int
        Tokens of the match; 0: there is none. Of a followed match, those that are known to agree.
    source : int
        Position of the token that followed the match.
    """

    def __init__(
        self, tokens: Iterable[int] = (), *, shortest: int = SHORTEST, longest: int = LONGEST, window: int = WINDOW
    ) -> None:
        self._shortest = checks.integer("shortest", shortest, 1)
        self._longest = checks.integer("longest", longest, self._shortest)
        self._window = checks.integer("window", window, self._longest + 1)
        self._ring = array("i")  # the last tokens, each at its position modulo the window
        self._length = 0
        #: For each length of a match, the position behind the latest occurrence of each n-gram, which is given by the
        #: bytes of its tokens.
        self._after: dict[int, dict[bytes, int]] = {n: {} for n in range(self._longest, self._shortest - 1, -1)}
        self.matched, self.source = 0, 0
        self.extend(tokens)

    def __len__(self) -> int:
        """Tokens of the text, forgotten ones included."""
        return self._length

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._append(token)

    def continuation(self, most: int) -> list[int]:
        """At most `most` tokens that followed the match; where these reach the end of the text, it repeats itself."""
        if not self.matched:
            return []
        stretch = self._length - self.source
        return [self._ring[(self.source + i % stretch) % self._window] for i in range(most)]

    def _append(self, token: int) -> None:
        followed = self.matched + 1 if self.matched and self._ring[self.source % self._window] == token else 0
        source = self.source + 1
        self._forget()
        if len(self._ring) < self._window:
            self._ring.append(token)
        else:
            self._ring[self._length % self._window] = token
        self._length += 1
        found, behind = self._look_up()
        self.matched, self.source = (followed, source) if followed >= found else (found, behind)

    def _look_up(self) -> tuple[int, int]:
        """The longest match in the index, with the position behind it; enters the text's end into the index."""
        known = min(self._longest, len(self._ring))
        end, found, behind = self._bytes(self._length - known, known), 0, 0
        for n, after in self._after.items():
            if n > known:
                continue
            ngram = end[len(end) - n * self._ring.itemsize :]
            if not found and ngram in after:
                found, behind = n, after[ngram]
            after[ngram] = self._length
        return found, behind

    def _forget(self) -> None:
        """Before a token is overwritten, take the n-grams that begin with it out of the index."""
        first = self._length - self._window
        if first < 0:
            return
        for n, after in self._after.items():
            ngram = self._bytes(first, n)
            if after[ngram] == first + n:
                del after[ngram]

    def _bytes(self, first: int, count: int) -> bytes:
        """The bytes of `count` tokens from a position on."""
        begin = first % self._window
        tokens = self._ring[begin : begin + count]
        if len(tokens) < count:
            tokens.extend(self._ring[: count - len(tokens)])
        return tokens.tobytes()


class NgramDrafter:
    """Drafts what followed the last tokens of a text where they occurred before (`NgramIndex`). Always certain.

    Parameters
    ----------
    shortest, longest, window : int
        As for `NgramIndex`.
    """

    wants_hidden = False

    def __init__(self, *, shortest: int = SHORTEST, longest: int = LONGEST, window: int = WINDOW) -> None:
        self._new_index = partial(NgramIndex, shortest=shortest, longest=longest, window=window)
        self._new_index()  # refuses limits that are of no use

    def begin(
        self, prompt: Sequence[int], params: SamplingParams | None = None, sequence: Cached | None = None
    ) -> NgramIndex:
        """The index of a text."""
        return self._new_index(prompt)

    def read(self, state: NgramIndex, start: int, hidden: Array) -> None:
        """Nothing: the index has the whole prompt."""

    def kind(self, state: NgramIndex) -> int:
        """0, 1 or 2: the longer the match, the more often its continuation is right."""
        return sum(state.matched >= tokens for tokens in KINDS)

    def draft(self, states: Sequence[NgramIndex], most: Sequence[int]) -> list[Draft]:
        """The continuations of the matches."""
        return [Draft(index.continuation(count)) for index, count in zip(states, most, strict=True)]

    def commit(self, state: NgramIndex, tokens: Sequence[int], hidden: Array | None = None) -> None:
        """Append tokens to a text."""
        state.extend(tokens)

    def end(self, state: NgramIndex) -> None:
        """Nothing: the index goes with the last reference to it."""
