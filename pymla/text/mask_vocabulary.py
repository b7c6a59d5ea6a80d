"""A tokenizer's vocabulary as llguidance knows it, and the masks that it computes for it."""

import os
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pymla.errors import PymlaError
from pymla.host.cores import usable_cores
from pymla.text.constraint_source import reason

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from pymla.text.tokenizer import Tokenizer

#: Grammars that are kept for a tokenizer: requests of a server bring the same few again and again.
_KEPT_GRAMMARS = 32


class MaskVocabulary:
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
        ends = ends or [vocab_size]
        wrapped: Any = _Wrapped(tokenizer, self._llg_size, ends)
        self.tokens = LLTokenizer(wrapped, n_vocab=self._llg_size, eos_token=ends)
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
            raise PymlaError(f"`{name}`: {reason(name, made.get_error())}")
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
_vocabularies: "weakref.WeakKeyDictionary[Tokenizer, dict[int, MaskVocabulary]]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def vocabulary_of(tokenizer: "Tokenizer", vocab_size: int) -> MaskVocabulary:
    """The vocabulary of a tokenizer; the first call takes half a second for 130,000 tokens."""
    with _making:
        by_size = _vocabularies.setdefault(tokenizer, {})
        if vocab_size not in by_size:
            by_size[vocab_size] = MaskVocabulary(tokenizer, vocab_size)
        return by_size[vocab_size]


@lru_cache(1)
def _executor() -> "LLExecutor":
    """llguidance's threads, for masks of several texts."""
    from llguidance import LLExecutor

    return LLExecutor(usable_cores())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executor.cache_clear)  # a forked process has none of these threads
