"""Speculation in a step of several texts: draft, let the model compute, verify, and learn from it.

Whoever drives steps, the engine or a loop over one text, does for each::

    drafts = speculation.draft(texts, most)
    # a step of the last token of each text and its draft, with logits after all of them
    chosen = [speculation.verify(text, sampler, logits[...], draft) for ...]
    # cut the sequence of each text to the tokens that are part of it: its length before, and len(chosen)
    speculation.took(seconds)
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pymla import checks
from pymla.backend import Array, TokenSampler
from pymla.engine.cache import Sequence as Cached
from pymla.engine.speculation.drafting import NO_DRAFT, Draft, Drafter
from pymla.engine.speculation.length import DraftLength
from pymla.engine.speculation.times import MEASUREMENTS, StepTimes
from pymla.engine.speculation.verify import verify
from pymla.text.sampling import Sampled, SamplingParams

#: Tokens of the longest draft. With the text's last token a step of as many as the CPU backend records.
MOST = 15
#: Costs of drafts are computed again after so many steps, which takes some 20 µs.
COSTS_EVERY = 16
#: One step of so many of a text has no draft, so that the time of a plain one is known. The first one is such a step.
PLAIN_EVERY = 64


@dataclass
class Counts:
    """What speculation did for a text."""

    steps: int = 0
    steps_with_draft: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class SpeculatedText:
    """A text that drafts are made for."""

    state: Any  # the drafter's
    lengths: dict[int, DraftLength] = field(default_factory=dict)  # by the kind of draft
    counts: Counts = field(default_factory=Counts)

    @property
    def is_on(self) -> bool:
        """Whether drafts of any kind are worth it, or are being tried."""
        return any(length.is_on for length in self.lengths.values())


class _Verified(NamedTuple):
    """A text's part in the step that runs."""

    text: SpeculatedText
    kind: int  # of its draft
    drafted: int
    accepted: int


class Speculation:
    """Speculation for the texts of a model. Not for several threads at a time: it belongs to whoever drives steps.

    Parameters
    ----------
    drafter : Drafter
    times : StepTimes
        Of the model; learns from `took`.
    most : int
        Tokens of the longest draft.
    adapts : bool
        Whether lengths follow acceptance and costs. Otherwise every draft has `most` tokens, where the drafter has
        them.
    """

    def __init__(self, drafter: Drafter[Any], times: StepTimes, *, most: int = MOST, adapts: bool = True) -> None:
        self._drafter, self._times = drafter, times
        self._most = checks.integer("most", most, 1)
        self._adapts = checks.flag("adapts", adapts)
        self._drafting: deque[float] = deque(maxlen=MEASUREMENTS)  # seconds per drafted token of the last drafts
        self._costs: dict[int, list[float]] = {}  # of drafts, by the texts of a step
        self._steps = 0
        self._step: list[_Verified] = []

    @property
    def wants_hidden(self) -> bool:
        """Whether `verify` needs the hidden states of the step."""
        return self._drafter.wants_hidden

    def begin(self, prompt: Sequence[int], params: SamplingParams, sequence: Cached | None = None) -> SpeculatedText:
        """Take up a text (`Drafter.begin`). Where `wants_hidden`, slices of the prompt are to be read, and in any case
        the token that its last slice gave is to be committed."""
        return SpeculatedText(self._drafter.begin(prompt, params, sequence))

    def read(self, text: SpeculatedText, start: int, hidden: Array) -> None:
        """Learn from a slice of the prompt (`Drafter.read`)."""
        self._drafter.read(text.state, start, hidden)

    def commit(self, text: SpeculatedText, tokens: Sequence[int], hidden: Array | None = None) -> None:
        """Continue a text by tokens that were not verified here (`Drafter.commit`)."""
        self._drafter.commit(text.state, tokens, hidden)

    def end(self, text: SpeculatedText) -> None:
        """Forget a text."""
        self._drafter.end(text.state)

    def draft(self, texts: Sequence[SpeculatedText], most: Sequence[int], others: int = 0) -> list[Draft]:
        """A draft for each text of the next step, which may be empty.

        Parameters
        ----------
        texts : sequence of SpeculatedText
        most : sequence of int
            Tokens that each may have at most: there must be room in the context, and one less than the text still
            needs is enough, as a step brings one token more than its draft.
        others : int
            Texts without speculation that the step brings a token to.
        """
        self._step = []
        lengths = [
            max(0, min(self._length(text, len(texts) + others), count)) for text, count in zip(texts, most, strict=True)
        ]
        if not any(lengths):
            return [NO_DRAFT] * len(texts)
        began = time.perf_counter()
        drafts = self._drafter.draft([text.state for text in texts], lengths)
        drafted = sum(len(draft.tokens) for draft in drafts)
        # With the first draft of a text a draft model reads the prompt, which is no cost of drafts.
        if drafted and all(text.counts.drafted or not length for text, length in zip(texts, lengths, strict=True)):
            self._drafting.append((time.perf_counter() - began) / drafted)
        return drafts

    def verify(
        self,
        text: SpeculatedText,
        sampler: TokenSampler,
        logits: Array,
        draft: Draft,
        *,
        hidden: Array | None = None,
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> list[Sampled]:
        """The next tokens of a text after a step (`pymla.engine.speculation.verify.verify`); the drafter is told.

        Parameters
        ----------
        hidden : array (n + 1, hidden_size), optional
            Hidden states of the step's tokens of this text, where `wants_hidden`.
        """
        chosen, kind = verify(sampler, logits, draft, masks), self._drafter.kind(text.state)
        tokens = [each.token for each in chosen]
        self._drafter.commit(text.state, tokens, None if hidden is None else hidden[: len(tokens)])
        drafted, accepted, counts = len(draft.tokens), len(chosen) - 1, text.counts
        counts.steps += 1
        counts.steps_with_draft += drafted > 0
        counts.drafted += drafted
        counts.accepted += accepted
        self._step.append(_Verified(text, kind, drafted, accepted))
        return chosen

    def took(self, seconds: float | None, others: int = 0) -> None:
        """Learn from the step whose texts were verified.

        Parameters
        ----------
        seconds : float or None
            Of the step, until its logits were there. None: it had parts of prompts as well, and its time tells nothing.
        others : int
            Tokens that the step had beside those of the verified texts.
        """
        plain = len(self._step) + others
        drafted = sum(each.drafted for each in self._step)
        if seconds is not None:
            self._times.saw(plain + drafted, seconds)
        cost = self._cost(plain, drafted) / drafted if drafted and self._adapts else 0.0
        for text, kind, count, accepted in self._step:
            if count and kind in text.lengths:
                text.lengths[kind].saw(count, accepted, cost * count)
            elif not count:
                for length in text.lengths.values():
                    length.saw(0, 0, 0.0)
        self._step = []
        self._steps += 1
        if self._steps % COSTS_EVERY == 0:
            self._costs.clear()

    def _length(self, text: SpeculatedText, texts: int) -> int:
        if not self._adapts:
            return self._most
        if not self._times.is_measured or text.counts.steps % PLAIN_EVERY == 0:
            return 0
        kind = self._drafter.kind(text.state)
        if kind not in text.lengths:
            text.lengths[kind] = DraftLength(self._most)
        return text.lengths[kind].next(lambda: self._costs_of(texts), texts)

    def _costs_of(self, texts: int) -> list[float]:
        """What drafts of 0, 1, … tokens cost in a step of so many texts, in plain tokens."""
        if texts not in self._costs:
            self._costs[texts] = [self._cost(texts, n) for n in range(self._most + 1)]
        return self._costs[texts]

    def _cost(self, plain: int, drafted: int) -> float:
        """What `drafted` tokens in a step of `plain` ones cost, in plain tokens: times in relation to what each of
        the step's texts would take without."""
        seconds = self._times.seconds(plain)
        drafting = statistics.median_low(self._drafting) if self._drafting else 0.0
        more = self._times.seconds(plain + drafted) - seconds + drafted * drafting
        return more * plain / seconds
