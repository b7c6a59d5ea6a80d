"""The text of one request: tokens from the engine in, pieces of text out."""

import threading
import weakref
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pymla import checks
from pymla.backend import Progress
from pymla.engine.driving import Driver
from pymla.engine.requests import Constraint, Output, Request
from pymla.engine.speculation.step import Counts, Speculation
from pymla.errors import PymlaError
from pymla.text.sampling import Sampled, SamplingParams
from pymla.text.tokenizer import Tokenizer


@dataclass
class Stats:
    """Tokens and seconds of a generation."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0  # the first comes from the prompt's own pass
    generation_seconds: float = 0.0
    cache_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the cache

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, of those that were computed."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_rate(self) -> float:
        """Generated tokens per second; the first, which the prompt's pass gave, does not count."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


class Submission:
    """Requests with one prompt, which are submitted together when the first of their readers asks."""

    def __init__(self, driver: Driver):
        self._driver, self._lock, self._submitted = driver, threading.Lock(), False
        self.requests: list[Request] = []

    def submit(self) -> None:
        """Submit the requests, once."""
        with self._lock:
            if not self._submitted:
                self._submitted = True
                self._driver.submit([request for request in self.requests if not request.cancelled])


@dataclass
class Generation:
    """A text being generated. Iterate over it, with ``for`` or ``async for``, for pieces of text; its attributes tell
    how it went.

    Nothing is computed before a piece is asked for, and after that a few tokens at most before the next one is. Pieces
    are kept: iterating again gives the same pieces, and goes on where the first reading left off. Several threads and
    event loops may read one generation, and generations of one model are computed together.

    Parameters
    ----------
    driver : Driver
    tokenizer : Tokenizer
    prompt : list of int
        At least one token.
    params : SamplingParams
    max_tokens : int or None
        None: until the model ends the text or the context is full.
    stop : str, or sequence of str
        Texts that end the generation, and are not part of the result.
    progress : callable(done, total), optional
        Told of the layers of the prompt's passes, on any thread that waits for tokens of the model.
    special : bool
        Whether control tokens have their names in the text, the one that ends it too.
    constraint : Constraint, optional
        What the text may be.
    speculation : Speculation, optional
        Drafts tokens of the text.
    submission : Submission, optional
        Shared by generations with the same prompt, which is then computed once.
    shown_tokens : collection of int
        Control tokens that have their names in the text even where `special` is False, but for those that end it.

    Attributes
    ----------
    finish_reason : str
        "stop": the model or a stop string ended the text; "length": max_tokens; "context": no room is left;
        "interrupted" as long as none of these has happened.
    sampled : list of Sampled
    stats : Stats

    Raises
    ------
    PymlaError
        An argument is of no use, or the prompt does not fit the context.
    """

    driver: Driver
    tokenizer: Tokenizer
    prompt: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    stop: str | Iterable[str] | None = ()
    progress: Progress | None = None
    special: bool = False
    constraint: Constraint | None = None
    speculation: Speculation | None = None
    submission: Submission | None = None
    shown_tokens: Collection[int] = ()
    finish_reason: str = field(default="interrupted", init=False)
    sampled: list[Sampled] = field(default_factory=list, init=False)
    stats: Stats = field(default_factory=Stats, init=False)

    def __post_init__(self) -> None:
        runner = self.driver.runner
        if not self.prompt:
            raise PymlaError("the prompt is empty, and this model has no token that begins a text; give some text")
        if len(self.prompt) > runner.ctx:
            raise PymlaError(
                f"the prompt has {len(self.prompt)} tokens and the context holds {runner.ctx}; "
                f"shorten it or raise `ctx` (the model's own limit is {runner.config.context_length})"
            )
        if self.max_tokens is not None:
            self.max_tokens = checks.integer("max_tokens", self.max_tokens, 0)
        for token in self.params.logit_bias:
            if not 0 <= token < runner.config.vocab_size:
                raise PymlaError(
                    f"`logit_bias` for token {token}: the vocabulary has {runner.config.vocab_size} tokens"
                )
        self.stop = stop = _stop_strings(self.stop)
        if self.progress is not None and not callable(self.progress):
            checks.refuse("progress", self.progress, "a function of two numbers is expected")
        ends = frozenset(self.tokenizer.eos_ids)
        how = self.progress, self.constraint, self.speculation
        self._request = Request(self.prompt, self.params, self.max_tokens, ends, *how)
        self._submission = Submission(self.driver) if self.submission is None else self.submission
        self._submission.requests.append(self._request)
        self._reading = threading.RLock()
        self._pieces: list[str] = []
        self._failure: str | None = None
        self._ended = False
        self._stream = self.tokenizer.stream(skip_special=not self.special, shown=self.shown_tokens)
        self._held, self._seconds = _Stop(stop), 0.0
        # A generation that is dropped, or that a traceback drops, needs no end.
        weakref.finalize(self, self.driver.cancel, self._request).atexit = False

    @property
    def tokens(self) -> list[int]:
        """Generated token ids."""
        return [each.token for each in self.sampled]

    @property
    def draft_counts(self) -> Counts | None:
        """What speculation did for the text so far; None without it."""
        return self._request.text.counts if self._request.text else None

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            with self._reading:
                if at == len(self._pieces) and not self._read():
                    return
                piece = self._pieces[at]
            yield piece
            at += 1

    async def __aiter__(self) -> AsyncIterator[str]:
        at = 0
        while True:
            while at == len(self._pieces) and not self._ended:
                self._submit()
                await self.driver.wait_async(self._request)
                with self._reading:
                    if at == len(self._pieces):
                        self._read_on()
            if at == len(self._pieces):
                return
            yield self._pieces[at]
            at += 1

    def close(self) -> None:
        """End the text here, and give back what it holds, if it is not at its end. Pieces that were read stay."""
        if not self._ended and self._failure is None:
            self._fail("close()")

    def _read(self) -> bool:
        """Generate another piece; False at the end of the text."""
        known = len(self._pieces)
        while not self._ended and len(self._pieces) == known:
            self._submit()
            try:
                self.driver.wait(self._request)
            except BaseException as error:
                self._fail(_described(error))
                raise
            self._read_on()
        return len(self._pieces) > known

    def _submit(self) -> None:
        """Let the engine compute the text, from the first time on that somebody asks for it."""
        if self._failure is not None:
            raise PymlaError(f"this generation was ended by {self._failure}; start another one")
        if self.max_tokens == 0:
            self._request.finish_reason, self._request.has_ended = "length", True
        else:
            self._submission.submit()

    def _read_on(self) -> None:
        """Read a token that is there, or the end of the text. An error that ended it is raised once, with its
        traceback."""
        try:
            output = self.driver.take(self._request)
        except BaseException as error:
            self._fail(_described(error))
            raise
        piece = self._at_end() if output is None else self._text(output)
        if piece:
            self._pieces.append(piece)

    def _text(self, output: Output) -> str:
        """The text that is certain with another token: none, where it may begin a stop string."""
        chosen, stats = output.sampled, self.stats
        stats.cache_tokens = output.cache_tokens
        if stats.prompt_tokens:
            self._seconds += output.seconds
        else:
            stats.prompt_tokens, stats.prompt_seconds = len(self.prompt), output.seconds
            stats.reused_tokens = self._request.reused_tokens
        if chosen.token in self.tokenizer.eos_ids:
            name = self._held.push(self._stream.push(chosen.token)) if self.special else ""
            return name + self._end("stop")
        self.sampled.append(chosen)
        stats.generated_tokens += 1
        stats.generation_seconds = self._seconds
        text = self._held.push(self._stream.push(chosen.token))
        return text + self._end("stop") if self._held.found else text

    def _at_end(self) -> str:
        """The rest of the text, where the request has ended behind its last token."""
        reason = self._request.finish_reason
        if reason is None:
            self._submit()  # which says why
            raise AssertionError("only a generation that failed has a request that was cancelled")
        return self._end(reason)

    def _end(self, reason: str) -> str:
        """End the text. Returns the end of it that was held back."""
        self.finish_reason, self._ended = reason, True
        if not self._request.is_over:
            self.driver.cancel(self._request)
        return self._held.push(self._stream.flush()) + self._held.flush()

    def _fail(self, cause: str) -> None:
        """Give up the text, which later readers are told."""
        if self._failure is None:
            self._failure = cause
            self.driver.cancel(self._request)


def _described(error: BaseException) -> str:
    """An error in words."""
    return type(error).__name__ + (f": {error}" if str(error) else "")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    """Stop strings, given as one or as several, as a tuple."""
    if stop is None:
        return ()
    # NumPy's arrays of no dimension have an iterator that raises.
    several = hasattr(stop, "__iter__") and not isinstance(stop, str | bytes) and getattr(stop, "ndim", 1) > 0
    texts: tuple[str, ...] = tuple(stop) if several else (stop,)
    for text in texts:
        if not isinstance(text, str):
            checks.refuse("stop", text, "a text, or a list of texts, is expected")
        if not text:
            raise PymlaError("`stop` has an empty text; leave it out")
    return texts


class _Stop:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [at for at in (self._held.find(each) for each in self._stop) if at >= 0]
        if ends:
            self.found = True
            safe, self._held = self._held[: min(ends)], ""
            return safe
        hold = max((_overlap(self._held, each) for each in self._stop), default=0)
        safe = self._held[: len(self._held) - hold]
        self._held = self._held[len(safe) :]
        return safe

    def flush(self) -> str:
        """The text that was held back when the text ended."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
