"""What drafts tokens: the interface of all drafters."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from pymla.backend import Array
from pymla.engine.cache import Sequence as Cached
from pymla.text.sampling import SamplingParams

State = TypeVar("State")


class Draft(NamedTuple):
    """Tokens that may come next in a text."""

    tokens: list[int]
    #: float32 (n, V): the distribution that each token was drawn from, in the drafter's opinion of the text and the
    #: tokens before it. None: every token is certain, which is a distribution of one token.
    probabilities: np.ndarray | None = None


#: The draft of a drafter that has nothing to say.
NO_DRAFT = Draft([])


class Drafter(Protocol[State]):
    """Proposes tokens for several texts. What it knows of a text is its `State`.

    Attributes
    ----------
    wants_hidden : bool
        Whether `read` and `commit` need the hidden states of the model that verifies.
    """

    wants_hidden: bool

    def begin(self, prompt: Sequence[int], params: SamplingParams, sequence: Cached | None = None) -> State:
        """Take up a text.

        Parameters
        ----------
        prompt : sequence of int
        params : SamplingParams
            How the text's tokens are chosen: a drafter that draws from a distribution does well to draw alike. With a
            seed, and at temperature 0, it should be certain, as then the text does not depend on it (`verify`).
        sequence : pymla.engine.cache.Sequence, optional
            Of the text, in the cache of the model that verifies. Where `wants_hidden`.
        """

    def read(self, state: State, start: int, hidden: Array) -> None:
        """Learn from a slice of the prompt, once it is computed. Where `wants_hidden`; slices that a kept prefix
        spares the model are left out.

        Parameters
        ----------
        state : State
        start : int
            Position of its first token.
        hidden : array (n, hidden_size)
            Hidden states of its tokens.
        """

    def kind(self, state: State) -> int:
        """Of the draft that a text would get now: drafts of one kind are right about as often. A few at most, as drafts
        of each kind have to show that they are worth it."""

    def draft(self, states: Sequence[State], most: Sequence[int]) -> list[Draft]:
        """Tokens that may come next in each of several texts, at most `most` of them, which may be 0."""

    def commit(self, state: State, tokens: Sequence[int], hidden: Array | None = None) -> None:
        """Continue a text.

        Parameters
        ----------
        state : State
        tokens : sequence of int
            n tokens that became part of the text.
        hidden : array (n, hidden_size), optional
            For each of them the hidden state of the model that it was predicted from: that of the token before it.
            Where `wants_hidden`.
        """

    def end(self, state: State) -> None:
        """Forget a text."""
