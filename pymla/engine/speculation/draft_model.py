"""A draft model: a smaller model with the same vocabulary writes ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pymla.backend import Array, TokenSampler
from pymla.engine.cache import Sequence as Cached
from pymla.engine.model import Model
from pymla.engine.speculation.drafting import NO_DRAFT, Draft
from pymla.errors import PymlaError
from pymla.pages import pages_of
from pymla.printable import shown
from pymla.text.sampling import SamplingParams, draw

if TYPE_CHECKING:
    from pymla.engine.language_model import LanguageModel


@dataclass
class Ahead:
    """A text that a draft model writes ahead.

    Attributes
    ----------
    tokens : list of int
        The text.
    written : list of int
        Tokens in the draft model's cache: a part of the text, and what was drafted behind it.
    agreed : int
        How many of `written` are the text's.
    """

    sequence: Cached
    sampler: TokenSampler
    certain: bool
    tokens: list[int]
    written: list[int] = field(default_factory=list)
    agreed: int = 0

    @property
    def missing(self) -> list[int]:
        """Tokens of the text that the draft model has not read: the last one at least."""
        return self.tokens[self.agreed :]


@dataclass
class _Writing:
    """A draft in the making."""

    ahead: Ahead
    most: int
    sampler: TokenSampler  # a copy that knows the drafted tokens, too
    tokens: list[int] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: Array, vocab_size: int) -> None:
        """Choose the next token of the draft after logits (V,)."""
        candidates = self.sampler.distribution(logits)
        if self.ahead.certain:
            token = int(candidates.ids[0])
        else:
            # The numbers of the copy's stream would come again in the next draft.
            token = draw(candidates, self.ahead.sampler.random())
            row = np.zeros(vocab_size, np.float32)
            row[candidates.ids] = candidates.probabilities
            self.probabilities.append(row)
        self.sampler.accept(token)
        self.tokens.append(token)

    def draft(self) -> Draft:
        return Draft(self.tokens, None if self.ahead.certain else np.stack(self.probabilities))


class DraftModel:
    """Drafts what another model writes, which has the same vocabulary.

    A draft is drawn by the text's own parameters of sampling, which brings the draft's distribution close to that of
    the text. At temperature 0, and for a text with a seed, the likeliest tokens are drafted, and are certain.

    The drafts of several texts take as many steps together as the longest draft has tokens: each step brings one token
    to all. The first one also reads the tokens that the draft model has not seen, such as the prompt, or those in place
    of rejected ones.

    Parameters
    ----------
    draft : LanguageModel
        Texts that do not fit its cache together take turns.
    target : LanguageModel
        The model that verifies.

    Raises
    ------
    PymlaError
        The vocabularies differ.
    """

    wants_hidden = False

    def __init__(self, draft: "LanguageModel", target: "LanguageModel") -> None:
        check_vocabularies(draft, target)
        self._model: Model = draft.model
        self._vocab_size = target.config.vocab_size

    def begin(self, prompt: Sequence[int], params: SamplingParams, sequence: Cached | None = None) -> Ahead:
        """Take up a text. The draft model reads it with the first draft."""
        certain = params.temperature == 0 or params.seed is not None
        return Ahead(self._model.new_sequence(), self._model.sampler(params, prompt), certain, list(prompt))

    def read(self, state: Ahead, start: int, hidden: Array) -> None:
        """Nothing: the draft model reads the prompt itself."""

    def kind(self, state: Ahead) -> int:
        """All drafts are of one."""
        return 0

    def draft(self, states: Sequence[Ahead], most: Sequence[int]) -> list[Draft]:
        """At most `most` tokens for each text, and none where the draft model's context or its cache has no room."""
        writings, pages = [], self._model.cache.pages
        for state, count in zip(states, most, strict=True):
            room = min(count, self._model.ctx - len(state.tokens))
            wanted = pages_of(len(state.tokens) + room)
            if room > 0 and wanted <= pages:
                pages -= wanted
                # A draft that nobody verified is forgotten.
                self._rewind(state, min(state.agreed, len(state.tokens) - 1))
            else:
                room = 0
            writings.append(_Writing(state, room, state.sampler.copy()))
        while unfinished := [each for each in writings if len(each.tokens) < each.most]:
            self._step(unfinished)
        return [each.draft() if each.tokens else NO_DRAFT for each in writings]

    def commit(self, state: Ahead, tokens: Sequence[int], hidden: Array | None = None) -> None:
        """Continue a text. Drafted tokens that are not part of it leave the cache."""
        state.tokens.extend(tokens)
        for token in tokens:
            state.sampler.accept(token)
        known = min(len(state.written), len(state.tokens))
        while state.agreed < known and state.written[state.agreed] == state.tokens[state.agreed]:
            state.agreed += 1
        self._rewind(state, state.agreed)

    def end(self, state: Ahead) -> None:
        """Give the text's cache back."""
        self._model.free(state.sequence)

    def _rewind(self, state: Ahead, length: int) -> None:
        """Leave so many tokens of a text in the draft model's cache."""
        state.agreed = length
        del state.written[length:]
        if state.sequence.length > length:
            with self._model.turn:
                self._model.cache.truncate(state.sequence, length)

    def _step(self, writings: list[_Writing]) -> None:
        """Another token for each draft."""
        new = [each.tokens[-1:] or each.ahead.missing for each in writings]
        batch = [(each.ahead.sequence, np.array(t, np.int32)) for each, t in zip(writings, new, strict=True)]
        with self._model.turn:
            logits = self._model.step(batch)
            for i, (each, tokens) in enumerate(zip(writings, new, strict=True)):
                if not each.tokens:
                    each.ahead.agreed += len(tokens)
                each.ahead.written.extend(tokens)
                each.add(logits[i][: self._vocab_size], self._vocab_size)


def check_vocabularies(draft: "LanguageModel", target: "LanguageModel") -> None:
    """Refuse a draft model whose tokens are not those of the model that verifies.

    Raises
    ------
    PymlaError
        It names both files, and the first token that differs.
    """
    ours, theirs = draft.tokenizer.tokens, target.tokenizer.tokens
    files = f"{draft.file.path} cannot draft for {target.file.path}: "
    if len(ours) != len(theirs):
        raise PymlaError(f"{files}its vocabulary has {len(ours)} tokens, and the other one {len(theirs)}")
    for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            raise PymlaError(f"{files}token {i} is {shown(own)}, and {shown(other)} in the other one")
