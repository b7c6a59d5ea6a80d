"""Constrained output: texts that fit a JSON schema, a regular expression or a grammar.

The llguidance package (https://github.com/guidance-ai/llguidance) computes which tokens may come next: a lexer of
derivatives of regular expressions below an Earley parser, walked along the trie of the vocabulary. This module gives it
pymla's vocabularies and turns its errors into one line. It is imported when a constraint is first asked for.

A `Grammar` is compiled once for a tokenizer. Each text that it constrains has a `Matcher` of its own:

>>> from pymla.text.constraints import Grammar
>>> grammar = Grammar.of(tokenizer, regex="yes|no")     # doctest: +SKIP
>>> matcher = grammar.matcher()                         # doctest: +SKIP
>>> chosen = sampler.sample(logits, matcher.mask())     # doctest: +SKIP
>>> matcher.accept(chosen.token)                        # doctest: +SKIP
>>> matcher.is_finished                                 # doctest: +SKIP
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymla.errors import PymlaError
from pymla.text.constraint_source import first_line, source_of
from pymla.text.mask_vocabulary import MaskVocabulary, vocabulary_of

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from pymla.text.tokenizer import Tokenizer


class Grammar:
    """A constraint, compiled for a tokenizer. Threads may share it. `Grammar.of` makes one.

    Attributes
    ----------
    words : int
        Words of a mask: ceil(vocab_size / 32).
    """

    def __init__(self, tokenizer: "Tokenizer", vocabulary: "MaskVocabulary", prototype: "LLMatcher"):
        # The vocabulary has a weak reference to the tokenizer only.
        self.tokenizer, self._vocabulary, self._prototype = tokenizer, vocabulary, prototype
        self.words = vocabulary.words

    @classmethod
    def of(
        cls,
        tokenizer: "Tokenizer",
        *,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        lark: str | None = None,
        gbnf: str | None = None,
        after: str | None = None,
        vocab_size: int | None = None,
    ) -> "Grammar":
        """Compile a constraint, of which exactly one is given.

        Parameters
        ----------
        tokenizer : Tokenizer
        json_schema : dict, bool or str
            A JSON schema, as such or as its text.
        regex : str
            A regular expression of Rust's regex crate, without look-around and back-references. The whole text
            matches it.
        grammar : str
            A grammar in Lark's notation or in GBNF: one with `::=` is GBNF.
        lark, gbnf : str
            A grammar in the notation that the name says.
        after : str, optional
            A mark, such as ``</think>``: up to its end there may be any text, and from there on the constraint holds.
        vocab_size : int, optional
            Logits of a step (V), where the model has more than the tokenizer has tokens.

        Raises
        ------
        PymlaError
            None or several constraints are given, or the one given is damaged, or needs what is not implemented.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "lark": lark, "gbnf": gbnf}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            told = " and ".join(f"`{name}`" for name in names) if names else "none"
            raise PymlaError(
                f"exactly one constraint is expected, and there are {told}; give one of {', '.join(given)}"
            )
        name = names[0]
        source = source_of(name, given[name], tokenizer, after)
        vocabulary = vocabulary_of(tokenizer, vocab_size or tokenizer.vocab_size)
        return cls(tokenizer, vocabulary, vocabulary.compile(name, source))

    def matcher(self) -> "Matcher":
        """A matcher at the beginning of a text."""
        return Matcher(self, self._prototype.deep_copy())


def grammar_of(tokenizer: "Tokenizer", vocab_size: int, given: Mapping[str, Any]) -> Grammar | None:
    """The grammar that a caller's options `json_schema`, `regex` or `grammar` ask for; None where all are None.

    `grammar` may be compiled already.

    Raises
    ------
    PymlaError
        As for `Grammar.of`, or the grammar was compiled for another tokenizer.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    grammar = given.get("grammar")
    if len(given) > 1 or not isinstance(grammar, Grammar):
        return Grammar.of(tokenizer, vocab_size=vocab_size, **given)
    if grammar.tokenizer is not tokenizer or grammar._vocabulary.size != vocab_size:
        raise PymlaError("`grammar` was compiled for another model; compile it with this one's tokenizer")
    return grammar


class Matcher:
    """How far a text has come in its `Grammar`, and what may follow. One thread at a time may use it."""

    def __init__(self, grammar: Grammar, matcher: "LLMatcher"):
        self.grammar = grammar
        self._matcher = matcher
        self._mask: np.ndarray | None = None

    def mask(self) -> np.ndarray:
        """The tokens that may come next: uint32 (words,); bit i % 32 of word i // 32 is set for an allowed token i.

        It is computed once for a state, without Python's lock; `compute_masks` computes those of several matchers in
        parallel. Tokens that end a text are allowed where the grammar may end.

        Raises
        ------
        PymlaError
            No token may come next, or the grammar is too complex for llguidance's limits.
        """
        if self._mask is None:
            compute_masks([self])
        assert self._mask is not None
        return self._mask

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow, except for a token that ends it."""
        if self._matcher.is_stopped() or not self._matcher.is_accepting():
            return self._matcher.is_stopped()
        return not (self.mask() & ~self.grammar._vocabulary.ends).any()

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises
        ------
        PymlaError
            The grammar does not allow it; the matcher stays where it is.
        """
        if self._matcher.validate_tokens([token]) != 1:
            self._check()
            raise PymlaError(f"the grammar does not allow token {token} here")
        self._mask = None
        self._matcher.consume_token(token)
        self._check()

    def rollback(self, count: int) -> None:
        """Take the last `count` accepted tokens back."""
        if count:
            self._mask = None
            if not self._matcher.rollback(count):
                raise PymlaError(f"{count} tokens cannot be taken back: {first_line(self._matcher.get_error())}")

    def forced(self) -> list[int]:
        """Tokens that must come next, as the tokenizer itself would cut their text; none where there is a choice."""
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def copy(self) -> "Matcher":
        """Another matcher in the same state."""
        made = Matcher(self.grammar, self._matcher.deep_copy())
        made._mask = self._mask
        return made

    def _keep(self, mask: np.ndarray) -> None:
        """Take a mask that was computed for this state."""
        self._check()
        mask.flags.writeable = False
        self._mask = mask

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = first_line(self._matcher.get_error())
        if reason.startswith("NoExtension"):
            reason = "no token fits here, and the text is not complete"
        raise PymlaError(f"the grammar cannot be followed: {reason}")


def compute_masks(matchers: Sequence[Matcher]) -> None:
    """Compute the masks of several matchers in parallel, for `Matcher.mask` to give at once.

    Python's lock is released meanwhile: a thread may do this beside a step of the model.

    Raises
    ------
    PymlaError
        As for `Matcher.mask`.
    """
    wanted = [matcher for matcher in matchers if matcher._mask is None]
    for vocabulary, places in _by_vocabulary(wanted).items():
        group = [wanted[place] for place in places]
        for matcher, mask in zip(group, vocabulary.masks([each._matcher for each in group]), strict=True):
            matcher._keep(mask)


def draft_masks(drafts: Sequence[tuple[Matcher, Sequence[int]]]) -> list[np.ndarray]:
    """Masks that verify drafts, for several texts in parallel: before each of a draft's tokens, and after the last.

    The states of the matchers stay as they are, and Python's lock is released.

    Parameters
    ----------
    drafts : pairs of a matcher and the tokens that may follow, none included

    Returns
    -------
    list of numpy.ndarray
        For each: uint32 (n + 1, words), where the grammar allows the first n tokens of the draft, and all of them in
        most cases.

    Raises
    ------
    PymlaError
        As for `Matcher.mask`.
    """
    made: dict[int, np.ndarray] = {}
    for vocabulary, places in _by_vocabulary([matcher for matcher, _ in drafts]).items():
        group = [(drafts[place][0]._matcher, list(drafts[place][1])) for place in places]
        allowed = [(matcher, draft[: matcher.validate_tokens(draft) if draft else 0]) for matcher, draft in group]
        made |= zip(places, vocabulary.draft_masks(allowed), strict=True)
    for place, (matcher, _) in enumerate(drafts):
        matcher._keep(made[place][0].copy())
    return [made[place] for place in range(len(drafts))]


def _by_vocabulary(matchers: Sequence[Matcher]) -> "dict[MaskVocabulary, list[int]]":
    """Places of matchers, grouped by the vocabularies of their grammars."""
    groups: dict[MaskVocabulary, list[int]] = {}
    for place, matcher in enumerate(matchers):
        groups.setdefault(matcher.grammar._vocabulary, []).append(place)
    return groups
