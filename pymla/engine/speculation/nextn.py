"""Drafts by the block that predicts a further token (nextn) of the model itself (`pymla.models.nextn`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pymla.backend import Array
from pymla.engine.cache import Sequence as Cached
from pymla.engine.model import Model
from pymla.engine.nextn import Span
from pymla.engine.speculation.drafting import NO_DRAFT, Draft
from pymla.errors import PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import SamplingParams


@dataclass
class Followed:
    """A text whose hidden states the block follows.

    Attributes
    ----------
    sequence : Sequence
        In the model's cache, of which the block has a layer.
    prompt : int array (T,)
    drafted_at : int or None
        Tokens of the text in the cache when it was last drafted for; None if the text went on since then.
    start : int
        Position of the first of the next two.
    hidden : list of float array (hidden,)
        The last hidden states, in the host's memory, from the first that has no row in the block's cache; the last one
        in any case, which drafts begin with.
    tokens : list of int
        The token that each of them predicted.
    written : int
        How many have a row: 1 if a draft began with what was the last one, and otherwise 0.
    """

    sequence: Cached
    prompt: np.ndarray
    drafted_at: int | None = None
    start: int = 0
    hidden: list[np.ndarray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    written: int = 0


class NextnDrafter:
    """Drafts the likeliest tokens of a model's nextn block. Always certain.

    The first token of a draft comes from the model's last hidden state and the token that it gave, and each further one
    from the block's own hidden state and the token drafted before it, as in vLLM and llama.cpp. The drafts of several
    texts take as many steps of the block together as the longest has tokens.

    Rows of the block's cache are written a page at a time, or when a draft needs them: texts for which speculation is
    off cost little. A draft's own rows are overwritten by those of the tokens that the text really goes on with.

    Parameters
    ----------
    model : Model
        Loaded with its block.

    Raises
    ------
    PymlaError
        It has none.
    """

    wants_hidden = True

    def __init__(self, model: Model) -> None:
        if not model.has_nextn:
            raise PymlaError("no block that predicts further tokens is loaded; load the model with `nextn`")
        self._model, self._memory = model, model.backend.memory

    def begin(self, prompt: Sequence[int], params: SamplingParams, sequence: Cached | None = None) -> Followed:
        """Take up a text, whose sequence in the model's cache is needed."""
        if sequence is None:
            raise PymlaError("begin: `sequence` is missing, of which the block's rows are a part")
        return Followed(sequence, np.array(prompt, np.int32))

    def read(self, state: Followed, start: int, hidden: Array) -> None:
        """Write the rows of a slice of the prompt. The one of the last token waits for the token behind it."""
        tokens = state.prompt[start + 1 : start + 1 + len(hidden)]
        if len(tokens):
            self._model.nextn_fill(Span(state.sequence, start, tokens), hidden[: len(tokens)])

    def commit(self, state: Followed, tokens: Sequence[int], hidden: Array | None = None) -> None:
        """Continue a text, with the hidden state that each token was predicted from. Between two drafts a text goes on
        by single tokens; its sequence may still have rejected ones when it goes on by a draft."""
        if hidden is None:
            raise PymlaError("commit: `hidden` is missing, the hidden states that the tokens were predicted from")
        first = state.sequence.length - len(tokens) if state.drafted_at is None else state.drafted_at
        state.start, state.drafted_at = first - len(state.tokens), None
        state.hidden.extend(self._memory.to_host(hidden).copy())
        state.tokens.extend(tokens)
        if len(state.tokens) > PAGE:
            self._catch_up(state)

    def kind(self, state: Followed) -> int:
        """All drafts are of one."""
        return 0

    def draft(self, states: Sequence[Followed], most: Sequence[int]) -> list[Draft]:
        """At most `most` tokens for each text, and no more than the model's context has room for."""
        drafts: list[list[int]] = [[] for _ in states]
        for state in states:
            state.drafted_at = state.sequence.length
            state.start = state.drafted_at - len(state.tokens)
        rooms = [self._room(state, count) for state, count in zip(states, most, strict=True)]
        drafting = [i for i, room in enumerate(rooms) if room > 0]
        for i in drafting:
            self._catch_up(states[i])
        hidden = {i: states[i].hidden[-1] for i in drafting}
        while drafting:
            spans = [self._next_span(states[i], drafts[i]) for i in drafting]
            with self._model.turn:
                outputs = self._model.nextn_step(spans, np.stack([hidden[i] for i in drafting]))
                chosen = self._memory.to_host(outputs.logits).argmax(axis=1).tolist()
                own = self._memory.to_host(outputs.hidden).copy()
            for i, token, state in zip(drafting, chosen, own, strict=True):
                states[i].written = 1
                drafts[i].append(token)
                hidden[i] = state
            drafting = [i for i in drafting if len(drafts[i]) < rooms[i]]
        return [Draft(tokens) if tokens else NO_DRAFT for tokens in drafts]

    def end(self, state: Followed) -> None:
        """Nothing: the rows go with the text's sequence."""

    def _room(self, state: Followed, most: int) -> int:
        """Tokens that a draft may have: behind the text and its last token, which has no row in the cache yet."""
        return min(most, self._model.ctx - state.sequence.length - 1) if state.tokens else 0

    @staticmethod
    def _next_span(state: Followed, drafted: list[int]) -> Span:
        """The input of the next draft token."""
        token = drafted[-1] if drafted else state.tokens[-1]
        return Span(state.sequence, state.start + len(drafted), np.array([token], np.int32))

    def _catch_up(self, state: Followed) -> None:
        """Write the rows that are missing, but for the last one."""
        first, last = state.written, len(state.tokens) - 1
        if first < last:
            tokens, hidden = np.array(state.tokens[first:last], np.int32), np.stack(state.hidden[first:last])
            span = Span(state.sequence, state.start + first, tokens)
            self._model.nextn_fill(span, self._memory.to_device(hidden))
        if last > 0:
            state.start, state.written = state.start + last, 0
            del state.tokens[:last], state.hidden[:last]
