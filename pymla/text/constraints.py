"""Constrained output: texts that fit a JSON schema, a regular expression or a grammar.

The llguidance package (https://github.com/guidance-ai/llguidance) computes which tokens may come next: a lexer of
derivatives of regular expressions below an Earley parser, walked along the trie of the vocabulary. This module gives it
pymla's vocabularies and turns its errors into one line. It is imported when a constraint is first asked for.

A `Grammar` is compiled once for a tokenizer. Each text that it constrains has a `Matcher` of its own:

>>> grammar = Grammar.of(tokenizer, regex="yes|no")     # doctest: +SKIP
>>> matcher = grammar.matcher()                         # doctest: +SKIP
>>> chosen = sampler.sample(logits, matcher.mask())     # doctest: +SKIP
>>> matcher.accept(chosen.token)                        # doctest: +SKIP
>>> matcher.is_finished                                 # doctest: +SKIP
"""

import json
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pymla import checks
from pymla.errors import PymlaError
from pymla.host.cores import usable_cores
from pymla.text import gbnf

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from pymla.text.tokenizer import Tokenizer

#: Blanks that a text under a JSON schema may have between two of its parts. Without a bound, a small model at a low
#: temperature writes blanks for ever.
BLANKS = r"[ \t\n\r]{1,40}"

#: Grammars that are kept for a tokenizer: requests of a server bring the same few again and again.
_KEPT_GRAMMARS = 32

#: A rule of GBNF. Lark has a colon in place of `::=`.
_GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z0-9-]+[ \t]*::=", re.MULTILINE)

#: Where llguidance found an error in a grammar, and what it says of it.
_PLACE = re.compile(r"(?:at )?(?P<line>\d+)\((?P<column>\d+)\): (?P<reason>.*)")


class Grammar:
    """A constraint, compiled for a tokenizer. Threads may share it. `Grammar.of` makes one.

    Attributes
    ----------
    words : int
        Words of a mask: ceil(vocab_size / 32).
    """

    def __init__(self, tokenizer: "Tokenizer", vocabulary: "_Vocabulary", prototype: "LLMatcher"):
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
        source = _source(name, given[name], tokenizer)
        vocabulary = _vocabulary(tokenizer, vocab_size or tokenizer.vocab_size)
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
    if all(value is None for value in given.values()):
        return None
    grammar = given.get("grammar")
    if not isinstance(grammar, Grammar):
        return Grammar.of(tokenizer, vocab_size=vocab_size, **given)
    if grammar.tokenizer is not tokenizer or grammar.words != -(-vocab_size // 32):
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
                raise PymlaError(f"{count} tokens cannot be taken back: {_first_line(self._matcher.get_error())}")

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
        reason = _first_line(self._matcher.get_error())
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


def _by_vocabulary(matchers: Sequence[Matcher]) -> "dict[_Vocabulary, list[int]]":
    """Places of matchers, grouped by the vocabularies of their grammars."""
    groups: dict[_Vocabulary, list[int]] = {}
    for place, matcher in enumerate(matchers):
        groups.setdefault(matcher.grammar._vocabulary, []).append(place)
    return groups


class _Vocabulary:
    """The tokens of a tokenizer as llguidance knows them, for logits (V,).

    Attributes
    ----------
    words : int
        Words of a mask.
    ends : numpy.ndarray
        Mask of the tokens that end a text.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int):
        from llguidance import LLTokenizer

        self.size, self.words = vocab_size, -(-vocab_size // 32)
        ends = sorted(token for token in tokenizer.eos_ids if token < vocab_size)
        self.ends = np.zeros(self.words, np.uint32)
        for token in ends:
            self.ends[token // 32] |= np.uint32(1 << token % 32)
        # llguidance cannot do without a token that ends a text: where there is none, it is the one behind the last.
        self._llg_size = vocab_size if ends else vocab_size + 1
        wrapped = _Wrapped(tokenizer, self._llg_size, ends or [vocab_size])
        self.tokens = LLTokenizer(wrapped, n_vocab=self._llg_size, eos_token=ends or [vocab_size])
        self.compile = lru_cache(_KEPT_GRAMMARS)(self._compile)

    def masks(self, matchers: "Sequence[LLMatcher]") -> np.ndarray:
        """Masks of matchers: uint32 (matchers, words)."""
        out = self._buffer(len(matchers))
        if len(matchers) == 1:  # without a thread
            matchers[0].unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        else:
            rows = [(matcher, row) for row, matcher in enumerate(matchers)]
            _executor().unsafe_compute_mask_ptr(rows, out.ctypes.data, out.strides[0], len(out))
        return self._cut(out)

    def draft_masks(self, drafts: "Sequence[tuple[LLMatcher, list[int]]]") -> list[np.ndarray]:
        """Masks before each of a draft's tokens, all allowed, and after the last: uint32 (n + 1, words)."""
        ends = np.cumsum([len(draft) + 1 for _, draft in drafts]).tolist()
        out = self._buffer(ends[-1])
        rows = [(matcher, end - len(draft) - 1, draft) for end, (matcher, draft) in zip(ends, drafts, strict=True)]
        where = out.ctypes.data, out.strides[0], len(out)
        # llguidance refuses a draft without a token, and a list without a matcher.
        if drafted := [row for row in rows if row[2]]:
            _executor().unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
        if plain := [row[:2] for row in rows if not row[2]]:
            _executor().unsafe_compute_mask_ptr(plain, *where)
        return np.split(self._cut(out), ends[:-1])

    def _buffer(self, rows: int) -> np.ndarray:
        return np.zeros((rows, -(-self._llg_size // 32)), np.uint32)

    def _cut(self, masks: np.ndarray) -> np.ndarray:
        """Masks without the token that llguidance has and the model has not."""
        masks = masks[:, : self.words]
        if self.size % 32:
            masks[:, -1] &= np.uint32((1 << self.size % 32) - 1)
        return masks

    def _compile(self, name: str, source: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        # Its messages would go to standard error, and its verbose errors are a page long.
        limits = LLParserLimits(verbose_errors=False)
        made = LLMatcher(self.tokens, source, log_level=0, limits=limits)
        if made.is_error():
            raise PymlaError(f"`{name}`: {_reason(name, made.get_error())}")
        return made


class _Wrapped:
    """A tokenizer in the form that llguidance asks for. The attributes' names are its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: "Tokenizer", size: int, ends: Sequence[int]):
        # llguidance keeps this object where Python's collector does not see it.
        self._tokenizer = weakref.ref(tokenizer)
        known = range(min(size, tokenizer.vocab_size))
        self.eos_token_id = ends[0]
        self.tokens = [tokenizer.token_bytes(token) for token in known] + [b""] * (size - len(known))
        # A token that ends a text must not pass for the text that its name spells.
        self.special_token_ids = sorted({token for token in known if tokenizer.is_special(token)} | {*ends})

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text that continues another one."""
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "a grammar keeps its tokenizer"
        return tokenizer.encode(text, inside=True)


#: Vocabularies of tokenizers that are alive, by the number of logits.
_vocabularies: "weakref.WeakKeyDictionary[Tokenizer, dict[int, _Vocabulary]]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _vocabulary(tokenizer: "Tokenizer", vocab_size: int) -> _Vocabulary:
    """The vocabulary of a tokenizer; the first call takes half a second for 130,000 tokens."""
    with _making:
        by_size = _vocabularies.setdefault(tokenizer, {})
        if vocab_size not in by_size:
            by_size[vocab_size] = _Vocabulary(tokenizer, vocab_size)
        return by_size[vocab_size]


@lru_cache(1)
def _executor() -> "LLExecutor":
    """llguidance's threads, for masks of several texts."""
    from llguidance import LLExecutor

    return LLExecutor(usable_cores())


def _source(name: str, value: Any, tokenizer: "Tokenizer") -> str:
    """A constraint as llguidance takes it."""
    from llguidance import LLMatcher

    if name == "json_schema":
        schema = _schema_text(value)
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": BLANKS})
    if not isinstance(value, str):
        checks.refuse(name, value, "a text is expected")
    if name == "regex":
        return LLMatcher.grammar_from_regex(value)
    if name == "gbnf" or (name == "grammar" and _GBNF_RULE.search(value)):
        value = gbnf.to_lark(value, name, lambda text: _token_id(tokenizer, text))
    return LLMatcher.grammar_from_lark(value)


def _token_id(tokenizer: "Tokenizer", text: str) -> int | None:
    """The token that a text is, or None where it is several or none."""
    ids = tokenizer.encode(text, parse_special=True, inside=True)
    return ids[0] if len(ids) == 1 else None


def _schema_text(value: Any) -> str:
    """A JSON schema as a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            message = f"{error.msg[:1].lower()}{error.msg[1:]}"
            raise PymlaError(f"`json_schema`: line {error.lineno}, column {error.colno}: {message}") from None
        except RecursionError:
            raise PymlaError("`json_schema` is nested too deeply") from None
    if not isinstance(value, Mapping | bool):
        checks.refuse("json_schema", value, "a JSON schema is expected: a dictionary, true or false")
    if value is False:
        raise PymlaError("`json_schema` is false, which no text fits")
    try:
        return json.dumps({} if value is True else dict(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise PymlaError(f"`json_schema` cannot be written as JSON: {error}") from None


def _reason(name: str, message: str) -> str:
    """What llguidance says of a constraint that it refuses, in one line, with the place where it is the caller's."""
    place = _PLACE.match(message)
    reason = _first_line(place["reason"] if place else message)
    inner = re.search(r"^error: (.*)", message, re.MULTILINE)
    if inner:
        reason = inner[1]
    if name == "regex":
        # The expression stands in a grammar that llguidance made for it.
        caret = re.search(r"^    ( *)\^", message, re.MULTILINE) if inner else None
        return f"column {len(caret[1]) + 1}: {reason}" if caret else reason
    # So do rules of GBNF, whose lines are others in the translation.
    shown = place and name in ("lark", "grammar")
    return f"line {place['line']}, column {place['column']}: {reason}" if place and shown else reason


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
