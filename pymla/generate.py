"""The prompt and the generation loop of one sequence: tokens in, pieces of text out."""

import time
from dataclasses import dataclass, field

import numpy as np

from pymla.errors import CacheFull, PymlaError


@dataclass
class Stats:
    """What a generation took."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0  # the first comes from the prompt's own pass
    generation_seconds: float = 0.0
    cache_tokens: int = 0

    @property
    def prompt_rate(self):
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_rate(self):
        """Generated tokens per second; the first, which the prompt's pass gave, does not count."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass
class Generation:
    """A text being generated. Iterate over it for pieces of text; the rest tells what happened.

    Parameters
    ----------
    model : Model
    tokenizer : Tokenizer
    prompt : list of int
        At least one token.
    params : SamplingParams
    max_tokens : int or None
        None: until the model ends the text or the context is full.
    stop : tuple of str
        Texts that end the generation. They are not part of what comes out.
    progress : callable(done, total), optional
        Layers of the prompt's pass.

    Attributes
    ----------
    finish_reason : str
        "stop": the model or a stop string ended the text; "length": max_tokens; "context": no room is left;
        "interrupted" as long as none of these has happened.
    sampled : list of Sampled
    stats : Stats
    """

    model: object
    tokenizer: object
    prompt: list
    params: object
    max_tokens: int | None = None
    stop: tuple = ()
    progress: object = None
    finish_reason: str = "interrupted"
    sampled: list = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self):
        if not self.prompt:
            raise PymlaError("the prompt is empty, and this model has no token that begins a text; give some text")
        if len(self.prompt) > self.model.ctx:
            raise PymlaError(
                f"the prompt has {len(self.prompt)} tokens and the context holds {self.model.ctx}; "
                "shorten it or raise --ctx (the model's own limit is "
                f"{self.model.config.context_length})"
            )
        if self.max_tokens is not None and self.max_tokens < 0:
            raise PymlaError(f"max_tokens is {self.max_tokens}; it must not be negative")
        for token in self.params.logit_bias:
            if not 0 <= token < self.model.config.vocab_size:
                raise PymlaError(
                    f"logit bias for token {token}: the vocabulary has {self.model.config.vocab_size} tokens"
                )
        if any(not text for text in self.stop):
            raise PymlaError("a stop string is empty; leave it out")

    @property
    def tokens(self):
        """Generated token ids."""
        return [each.token for each in self.sampled]

    def __iter__(self):
        sequence = self.model.new_sequence()
        try:
            yield from self._pieces(sequence)
        finally:
            self.stats.cache_tokens = sequence.length
            self.model.free(sequence)

    def _pieces(self, sequence):
        if self.max_tokens == 0:
            self.finish_reason = "length"
            return
        sampler = self.model.sampler(self.params, self.prompt)
        stream, held = self.tokenizer.stream(), _Stop(self.stop)
        began = time.perf_counter()
        logits = self.model.step([(sequence, np.array(self.prompt, np.int32))], progress=self.progress)
        chosen = sampler.sample(logits[0])  # which waits for a GPU
        self.stats.prompt_tokens = len(self.prompt)
        self.stats.prompt_seconds = time.perf_counter() - began
        began = time.perf_counter()
        while True:
            if chosen.token in self.tokenizer.eos_ids:
                self.finish_reason = "stop"
                break
            self.sampled.append(chosen)
            self.stats.generated_tokens += 1
            self.stats.generation_seconds = time.perf_counter() - began
            piece = held.push(stream.push(chosen.token))
            if piece:
                yield piece
            if held.found:
                self.finish_reason = "stop"
                return
            if len(self.sampled) == self.max_tokens:
                self.finish_reason = "length"
                break
            try:
                logits = self.model.step([(sequence, np.array([chosen.token], np.int32))])
            except CacheFull:
                self.finish_reason = "context"
                break
            chosen = sampler.sample(logits[0])
        rest = held.push(stream.flush()) + held.flush()
        if rest:
            yield rest


class _Stop:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop):
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text):
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

    def flush(self):
        """What was held back when the text ended."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text, stop):
    """Characters at the end of a text that a stop string may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
