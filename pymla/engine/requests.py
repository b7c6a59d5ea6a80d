"""A request: a text that the engine is to generate, from token ids to token ids."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from pymla.backend import Progress, TokenSampler
from pymla.engine.cache import Sequence
from pymla.engine.speculation.step import SpeculatedText, Speculation
from pymla.text.sampling import Sampled, SamplingParams

#: Tokens that are computed for a request before its reader asks again. Readers of one step need not be in time for the
#: next one then, and a text whose reader went away takes no more of the others' time.
AHEAD = 16


class Constraint(Protocol):
    """What a text may be: tells after each token which ones may come next."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing may come next."""

    def mask(self) -> np.ndarray:
        """Tokens that may come next: uint32 (ceil(V / 32),), bit i % 32 of word i // 32 for token i."""

    def accept(self, token: int) -> object:
        """Go on by a token that the mask allows."""

    def rollback(self, count: int) -> object:
        """Forget the last `count` tokens."""


class Output(NamedTuple):
    """A generated token, for the reader of a request."""

    sampled: Sampled
    seconds: float  # of the steps that it took: for the first token, those of the prompt
    cache_tokens: int  # tokens of the text in the cache


@dataclass(eq=False)
class Request:
    """A text to be generated, and how far it is.

    Parameters
    ----------
    prompt : list of int
        At least one token.
    params : SamplingParams
    max_tokens : int, optional
        At least 1. None: until the text ends or the context is full.
    ends : frozenset of int
        Tokens that end the text.
    progress : callable(done, total), optional
        Told of layers of the prompt's steps, on the thread that takes them. An error that it raises ends the request.
    constraint : Constraint, optional
    speculation : Speculation, optional

    Attributes
    ----------
    tokens : list of int
        The prompt and what was generated. Those behind ``sequence.length`` are not in the cache yet.
    unread : deque of Output
    allowance : int
        Tokens that may be computed before the reader asks again; see `AHEAD`.
    finish_reason : str, optional
        "stop": a token of `ends` or the constraint; "length": `max_tokens`; "context": no room is left.
    error : BaseException, optional
        What ended the request instead.
    is_submitted : bool
        It has a sequence and a sampler.
    cancelled : bool
        Nobody wants its tokens.
    has_ended : bool
        Its pages are given back.
    forks : list of Request
        Requests with the same prompt that wait until it is computed.
    parent : Request, optional
        The request whose prompt this one waits for.
    text : SpeculatedText, optional
        What `speculation` knows of the text.
    seconds : float
        Of its steps since its last token.
    reused_tokens : int
        Of the prompt, those that the cache had kept.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    ends: frozenset[int] = frozenset()
    progress: Progress | None = None
    constraint: Constraint | None = None
    speculation: Speculation | None = None
    tokens: list[int] = field(init=False)
    sequence: Sequence = field(init=False)
    sampler: TokenSampler = field(init=False)
    unread: deque[Output] = field(default_factory=deque, init=False)
    allowance: int = field(default=AHEAD, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    is_submitted: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)
    has_ended: bool = field(default=False, init=False)
    forks: "list[Request]" = field(default_factory=list, init=False)
    parent: "Request | None" = field(default=None, init=False)
    text: SpeculatedText | None = field(default=None, init=False)
    seconds: float = field(default=0.0, init=False)
    reused_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def is_over(self) -> bool:
        """Whether no further token will be computed."""
        return self.has_ended or self.cancelled

    @property
    def is_readable(self) -> bool:
        """Whether its reader need not wait."""
        return bool(self.unread) or self.is_over

    @property
    def may_run(self) -> bool:
        """Whether a step may compute tokens of it."""
        return self.allowance > 0 and not self.is_over

    @property
    def generated(self) -> int:
        """Tokens that were generated."""
        return len(self.tokens) - len(self.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the next generated one needs in the cache, and that are not there yet. At least one: after an
        interrupt the last one may be there, though nothing was made of its logits."""
        return max(1, len(self.tokens) - self.sequence.length)


def common_prefix(first: Items[int], second: Items[int]) -> int:
    """Tokens that two texts begin with alike."""
    count = min(len(first), len(second))
    differs = np.flatnonzero(np.array(first[:count]) != np.array(second[:count]))
    return int(differs[0]) if len(differs) else count
