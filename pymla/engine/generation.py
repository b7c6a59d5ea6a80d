"""The prompt and the generation loop of one sequence: tokens in, pieces of text out."""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymla import checks
from pymla.backend import Progress, TokenSampler
from pymla.engine.model import Model
from pymla.errors import CacheFull, PymlaError
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

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_rate(self) -> float:
        """Generated tokens per second; the first, which the prompt's pass gave, does not count."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass
class Generation:
    """A text being generated. Iterate over it for pieces of text; its attributes tell how it went.

    Nothing is computed before a piece is asked for. Pieces are kept: iterating again gives the same pieces, and goes on
    where the first reading left off. Several threads may read one generation, and several generations take
    turns on one model, step by step.

    Parameters
    ----------
    model : Model
    tokenizer : Tokenizer
    prompt : list of int
        At least one token.
    params : SamplingParams
    max_tokens : int or None
        None: until the model ends the text or the context is full.
    stop : str, or sequence of str
        Texts that end the generation, and are not part of the result.
    progress : callable(done, total), optional
        Told of the layers of the prompt's pass.
    special : bool
        Whether control tokens have their names in the text, the one that ends it too.

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

    model: Model
    tokenizer: Tokenizer
    prompt: list[int]
    params: SamplingParams
    max_tokens: int | None = None
    stop: str | Iterable[str] | None = ()
    progress: Progress | None = None
    special: bool = False
    finish_reason: str = field(default="interrupted", init=False)
    sampled: list[Sampled] = field(default_factory=list, init=False)
    stats: Stats = field(default_factory=Stats, init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise PymlaError("the prompt is empty, and this model has no token that begins a text; give some text")
        if len(self.prompt) > self.model.ctx:
            raise PymlaError(
                f"the prompt has {len(self.prompt)} tokens and the context holds {self.model.ctx}; "
                "shorten it or raise `ctx` (the model's own limit is "
                f"{self.model.config.context_length})"
            )
        if self.max_tokens is not None:
            self.max_tokens = checks.integer("max_tokens", self.max_tokens, 0)
        for token in self.params.logit_bias:
            if not 0 <= token < self.model.config.vocab_size:
                raise PymlaError(
                    f"`logit_bias` for token {token}: the vocabulary has {self.model.config.vocab_size} tokens"
                )
        self.stop = stop = _stop_strings(self.stop)
        if self.progress is not None and not callable(self.progress):
            checks.refuse("progress", self.progress, "a function of two numbers is expected")
        self._reading = threading.RLock()
        self._pieces: list[str] = []
        self._failure: str | None = None
        self._ended = False
        # The cache counts the sequence's pages as free once nobody refers to it: a generation that is dropped, or that
        # a traceback drops, needs no end.
        self._sequence = self.model.new_sequence()
        self._sampler: TokenSampler | None = None
        self._stream = self.tokenizer.stream(skip_special=not self.special)
        self._held, self._seconds = _Stop(stop), 0.0

    @property
    def tokens(self) -> list[int]:
        """Generated token ids."""
        return [each.token for each in self.sampled]

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            with self._reading:
                if at == len(self._pieces) and not self._read():
                    return
                piece = self._pieces[at]
            yield piece
            at += 1

    def _read(self) -> bool:
        """Generate another piece; False at the end of the text."""
        if self._failure is not None:
            raise PymlaError(f"this generation was ended by {self._failure}; start another one")
        try:
            while not self._ended:
                piece = self._advance()
                if piece:
                    self._pieces.append(piece)
                    return True
        except BaseException as error:
            # The step that raised it is half done. The error is raised once, with its traceback.
            self._failure = type(error).__name__ + (f": {error}" if str(error) else "")
            self.model.free(self._sequence)
            raise
        return False

    def _advance(self) -> str:
        """Generate a token. Returns the text that is certain with it: none, where it may begin a stop string."""
        if len(self.sampled) == self.max_tokens:
            return self._end("length")
        try:
            chosen = self._next()
        except CacheFull:
            return self._end("context")
        if chosen.token in self.tokenizer.eos_ids:
            name = self._held.push(self._stream.push(chosen.token)) if self.special else ""
            return name + self._end("stop")
        self.sampled.append(chosen)
        self.stats.generated_tokens += 1
        self.stats.generation_seconds = self._seconds
        text = self._held.push(self._stream.push(chosen.token))
        return text + self._end("stop") if self._held.found else text

    def _next(self) -> Sampled:
        """The token that follows the last one, or the prompt. Another caller's step may come before or after it, but
        not between the logits and their reading."""
        new = [self.sampled[-1].token] if self.sampled else self.prompt
        with self.model.turn:
            began = time.perf_counter()
            if self._sampler is None:
                self._sampler = self.model.sampler(self.params, self.prompt)
            progress = None if self.sampled else self.progress
            logits = self.model.step([(self._sequence, np.array(new, np.int32))], progress=progress)
            chosen = self._sampler.sample(logits[0])  # which waits for a GPU
            seconds = time.perf_counter() - began
        self.stats.cache_tokens = self._sequence.length
        if self.sampled:
            self._seconds += seconds
        else:
            self.stats.prompt_tokens, self.stats.prompt_seconds = len(new), seconds
        return chosen

    def _end(self, reason: str) -> str:
        """End the text. Returns the end of it that was held back."""
        self.finish_reason, self._ended = reason, True
        self.model.free(self._sequence)
        return self._held.push(self._stream.flush()) + self._held.flush()


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
