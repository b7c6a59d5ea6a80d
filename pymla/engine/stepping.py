"""One step of all requests that take part: tokens in, tokens out."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pymla.backend import Array, Progress
from pymla.engine.cache import Batch
from pymla.engine.requests import Output, Request
from pymla.engine.runner import Runner
from pymla.engine.scheduler import Part, Scheduler
from pymla.errors import PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import Sampled


class ProgressError(Exception):
    """The `progress` of a request raised an error. It ends this request, and the step."""

    def __init__(self, request: Request, error: Exception):
        super().__init__(str(error))
        self.request, self.error = request, error


class _Input(NamedTuple):
    """What a step is given."""

    batch: Batch
    ready: list[Request]  # those that get a token
    rows: np.ndarray | None  # tokens of the step after which logits are wanted; None: the last of each sequence


class Stepper:
    """Takes steps. Every method but `add` is for the thread that has the runner's turn.

    Parameters
    ----------
    runner : Runner
    scheduler : Scheduler
    """

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self._runner, self._scheduler = runner, scheduler
        self._new: deque[Request] = deque()
        self.forget_threads()

    def forget_threads(self) -> None:
        """Begin without threads, as a forked process does."""
        # Computes masks of constraints beside the model. It has no thread before it is used.
        self._beside = ThreadPoolExecutor(1, "pymla-masks")

    def add(self, request: Request) -> None:
        """Let a request take part, from the next step on. Any thread may call this."""
        self._new.append(request)

    def step(self) -> None:
        """Take a step: a token, or an error, for every request whose tokens are in the cache then.

        Whatever interrupts it leaves requests as they were, but for those that have their token already. Errors of the
        model end the requests that take part.
        """
        while self._new:
            request = self._new.popleft()
            if not request.cancelled:
                self._scheduler.add(request)
            elif not request.has_ended:
                self.end(request)
        parts = self._scheduler.plan()
        if not parts:
            if any(request.may_run for request in self._scheduler.requests):
                raise RuntimeError("no request has a part in the step that a reader waits for")
            return
        began = time.perf_counter()
        try:
            self._run(parts, began)
        except ProgressError as error:
            self.end(error.request, error=error.error)
        except Exception as error:
            for part in parts:
                self.end(part.request, error=error)
        else:
            self._scheduler.saw(parts, time.perf_counter() - began)

    def end(self, request: Request, reason: str | None = None, error: BaseException | None = None) -> None:
        """End a request, with one of the `finish_reason`s, an error, or neither where it was cancelled. The cache keeps
        what may serve another one."""
        self._scheduler.remove(request)
        if request.parent:
            request.parent.forks.remove(request)
        if request.forks:
            heir, *forks = request.forks
            heir.parent, request.forks = None, []
            for fork in forks:
                fork.parent = heir
            heir.forks = forks
            self._scheduler.add(heir)
        if error is None:
            self._runner.keep(request.sequence)
        self._runner.free(request.sequence)
        request.error, request.finish_reason = error, reason
        request.has_ended = True  # last, as readers look at it without a lock

    def _run(self, parts: list[Part], began: float) -> None:
        """Compute a step, and give the requests their tokens."""
        masks = {part.request: self._mask(part.request) for part in parts if part.request.constraint}
        step = self._input(parts)
        logits = self._runner.step(step.batch, step.rows, _progress(parts))
        ready, rows = self._with_forks(step.ready)
        results = self._chosen(ready, rows, logits, masks) if ready else []
        seconds = time.perf_counter() - began
        for request, _ in parts:
            request.seconds += seconds
            if not request.generated:
                self._runner.keep(request.sequence)  # others may begin with it
        for request, result in zip(ready, results, strict=True):
            if isinstance(result, PymlaError):
                self.end(request, error=result)
            else:
                self._take(request, result)

    def _input(self, parts: list[Part]) -> _Input:
        """The tokens of a step."""
        batch, ready, rows, end = [], [], [], 0
        for part in parts:
            request, sequence = part.request, part.request.sequence
            if sequence.length == len(request.tokens):
                # An interrupt came between the step and the choice of a token: the last row is computed again.
                self._runner.truncate(sequence, sequence.length - 1)
            at, end = sequence.length, end + part.count
            batch.append((sequence, np.array(request.tokens[at : at + part.count], np.int32)))
            if part.is_last:
                ready.append(request)
                rows.append(end - 1)
        # A step has a row of logits at least. Where nobody gets a token it is the last one, which nobody reads.
        return _Input(batch, ready, None if len(ready) == len(parts) else np.array(rows or [end - 1]))

    def _with_forks(self, ready: list[Request]) -> tuple[list[Request], list[int]]:
        """Requests that get a token, and their rows of logits; with forks, which begin with what their parents have."""
        rows = list(range(len(ready)))
        for row, parent in enumerate(list(ready)):
            if parent.forks:
                for fork in parent.forks:
                    fork.sequence = self._runner.fork(parent.sequence)
                    fork.seconds, fork.reused_tokens = parent.seconds, parent.reused_tokens
                ready, rows = ready + parent.forks, rows + [row] * len(parent.forks)
                self._scheduler.add_forks(parent)
        return ready, rows

    def _chosen(
        self, requests: list[Request], rows: list[int], logits: Array, masks: "dict[Request, Future[np.ndarray]]"
    ) -> list[Sampled | PymlaError]:
        """The next token of each request, or why there is none."""
        if len(rows) != rows[-1] + 1:
            logits = self._runner.take(logits, np.array(rows))
        own_masks = [masks[request].result() if request in masks else None for request in requests]
        return self._runner.sample([request.sampler for request in requests], logits, own_masks)

    def _mask(self, request: Request) -> "Future[np.ndarray]":
        assert request.constraint is not None
        return self._beside.submit(request.constraint.mask)

    def _take(self, request: Request, sampled: Sampled) -> None:
        """Give a request its next token."""
        token = sampled.token
        request.tokens.append(token)
        request.allowance -= 1
        output = Output(sampled, request.seconds, request.sequence.length)
        request.seconds = 0.0
        reason = self._reason(request, token)
        request.unread.append(output)
        if reason:
            self.end(request, reason)

    def _reason(self, request: Request, token: int) -> str | None:
        """The `finish_reason` of a request that got a token; None: it goes on."""
        if token in request.ends:
            return "stop"
        if request.constraint:
            request.constraint.accept(token)
            if request.constraint.is_finished:
                return "stop"
        if request.generated == request.max_tokens:
            return "length"
        # The token itself needs a place, before another one can follow.
        fits = len(request.tokens) <= min(self._runner.ctx, self._runner.pages * PAGE)
        return None if fits else "context"


def _progress(parts: list[Part]) -> Progress | None:
    """Tells the prompts of a step of its layers: how many of their own layers are done, by tokens."""
    told = [
        (part, part.request.sequence.length - part.request.reused_tokens)
        for part in parts
        if part.request.progress and not part.request.generated
    ]
    if not told:
        return None

    def report(done: int, total: int) -> None:
        for (request, count), before in told:
            assert request.progress is not None
            tokens = len(request.prompt) - request.reused_tokens
            try:
                request.progress((before * total + count * done) // tokens, total)
            except Exception as error:
                raise ProgressError(request, error) from error

    return report
