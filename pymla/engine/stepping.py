"""One step of all requests that take part: tokens in, tokens out."""

import time
from collections import deque

import numpy as np

from pymla.backend import Progress
from pymla.engine.cache import Batch
from pymla.engine.choosing import Chooser, Ready
from pymla.engine.forward import Outputs
from pymla.engine.requests import Output, Request
from pymla.engine.runner import Runner
from pymla.engine.scheduler import Part, Scheduler
from pymla.engine.speculation.drafting import NO_DRAFT, Draft
from pymla.engine.speculation.step import Speculation
from pymla.errors import PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import Sampled


class ProgressError(Exception):
    """The `progress` of a request raised an error. It ends this request, and the step."""

    def __init__(self, request: Request, error: Exception):
        super().__init__(str(error))
        self.request, self.error = request, error


class Stepper:
    """Takes steps. Every method but `add` is for the thread that has the runner's turn.

    Parameters
    ----------
    runner : Runner
    scheduler : Scheduler
    """

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self._runner, self._scheduler = runner, scheduler
        self._chooser = Chooser(runner)
        self._new: deque[Request] = deque()

    def forget_threads(self) -> None:
        """Begin without threads, as a forked process does."""
        self._chooser.forget_threads()

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
        if request.speculation and request.text:
            request.speculation.end(request.text)
        if error is None:
            self._runner.keep(request.sequence)
        self._runner.free(request.sequence)
        request.error, request.finish_reason = error, reason
        request.has_ended = True  # last, as readers look at it without a lock

    def _run(self, parts: list[Part], began: float) -> None:
        """Compute a step, and give the requests their tokens."""
        for request, _ in parts:
            self._begin(request)
        last = [part.request for part in parts if part.is_last]
        speculations = {request.speculation for request, _ in parts if request.speculation}
        drafts = self._chooser.drafts(last, self._scheduler.room_beside(parts)) if speculations else {}
        masks = self._chooser.masks(drafts, [*last, *(fork for request in last for fork in request.forks)])
        batch, ready = _input(parts, drafts)
        wants_hidden = any(speculation.wants_hidden for speculation in speculations)
        asked = time.perf_counter()
        outputs = self._runner.step(batch, _rows(batch, ready), _progress(parts), wants_hidden)
        computed = time.perf_counter() - asked
        if wants_hidden:
            self._read_prompts(parts, batch, outputs)
        ready = self._with_forks(ready)
        results = self._chooser.choose(ready, outputs, masks)
        seconds = time.perf_counter() - began
        if speculations:
            self._tell_speculations(ready, None if any(part.tokens > 1 for part in parts) else computed)
        for request, _ in parts:
            request.seconds += seconds
            if not request.generated:
                self._runner.keep(request.sequence)  # others may begin with it
        for each, result in zip(ready, results, strict=True):
            if isinstance(result, PymlaError):
                self.end(each.request, error=result)
            else:
                self._take(each, result, outputs)

    def _begin(self, request: Request) -> None:
        """Make a request ready for a step."""
        if request.sequence.length >= len(request.tokens):
            # An interrupt came between the step and the choice of a token: the last row is computed again.
            self._runner.truncate(request.sequence, len(request.tokens) - 1)
        _take_up(request)

    @staticmethod
    def _read_prompts(parts: list[Part], batch: Batch, outputs: Outputs) -> None:
        """Let drafters that follow hidden states read those of the prompts."""
        end = 0
        for (request, _), (sequence, new) in zip(parts, batch, strict=True):
            begin, end = end, end + len(new)
            if not request.generated and request.speculation and request.speculation.wants_hidden:
                assert request.text is not None
                request.speculation.read(request.text, sequence.length - len(new), outputs.hidden[begin:end])

    def _with_forks(self, ready: list[Ready]) -> list[Ready]:
        """Requests that get a token; with forks, which begin with what their parents have."""
        found = list(ready)
        for each in ready:
            parent = each.request
            if parent.forks:
                for fork in parent.forks:
                    self._runner.free(fork.sequence)
                    fork.sequence = self._runner.fork(parent.sequence)
                    fork.seconds, fork.reused_tokens = parent.seconds, parent.reused_tokens
                    _take_up(fork)
                found += [each._replace(request=fork) for fork in parent.forks]
                self._scheduler.add_forks(parent)
        return found

    @staticmethod
    def _tell_speculations(ready: list[Ready], seconds: float | None) -> None:
        """Let drafters learn from a step how long it took; None: it had parts of prompts."""
        groups: dict[Speculation, int] = {}
        for each in ready:
            if each.request.speculation and each.request.generated:
                groups[each.request.speculation] = groups.get(each.request.speculation, 0) + 1
        for speculation, texts in groups.items():
            # With drafts of several drafters it is nobody's step.
            speculation.took(seconds if len(groups) == 1 else None, len(ready) - texts)

    def _take(self, ready: Ready, chosen: list[Sampled], outputs: Outputs) -> None:
        """Give a request its next tokens."""
        request, is_first = ready.request, not ready.request.generated
        reason, taken = None, []
        for sampled in chosen:
            request.tokens.append(sampled.token)
            taken.append(sampled)
            reason = self._reason(request, sampled.token)
            if reason:
                break
        if request.sequence.length >= len(request.tokens):  # rows of drafted tokens that are not part of the text
            self._runner.truncate(request.sequence, len(request.tokens) - 1)
        if is_first and request.speculation and request.text:
            hidden = outputs.hidden[ready.token : ready.token + 1] if request.speculation.wants_hidden else None
            request.speculation.commit(request.text, [chosen[0].token], hidden)
        request.allowance -= len(taken)
        for sampled in taken:
            request.unread.append(Output(sampled, request.seconds, request.sequence.length))
            request.seconds = 0.0
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


def _take_up(request: Request) -> None:
    """Let the drafter of a request take up its text."""
    if request.speculation and request.text is None:
        request.text = request.speculation.begin(request.prompt, request.params, request.sequence)


def _input(parts: list[Part], drafts: dict[Request, Draft]) -> tuple[Batch, list[Ready]]:
    """The tokens of a step, and the requests that get a token from it."""
    batch, ready, end, row = [], [], 0, 0
    for part in parts:
        request, at = part.request, part.request.sequence.length
        draft = drafts.get(request, NO_DRAFT)
        tokens = request.tokens[at : at + part.tokens] + draft.tokens
        if part.is_last:
            ready.append(Ready(request, end + part.tokens - 1, row, draft))
            row += len(draft.tokens) + 1
        end += len(tokens)
        batch.append((request.sequence, np.array(tokens, np.int32)))
    return batch, ready


def _rows(batch: Batch, ready: list[Ready]) -> np.ndarray | None:
    """The tokens of a step after which logits are wanted; None: the last of each sequence."""
    if len(ready) == len(batch) and not any(each.draft.tokens for each in ready):
        return None
    rows = [each.token + i for each in ready for i in range(len(each.draft.tokens) + 1)]
    # A step has a row at least. Where nobody gets a token it is the first one, which nobody reads.
    return np.array(rows or [0])


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
