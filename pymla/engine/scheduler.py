"""Which requests take part in a step, with how many tokens.

Requests are served in the order in which they came. A step has a token of every generation that may run, and slices of
prompts: all of them where nothing is generated, within limits; beside generations as many tokens as `pymla.engine.pace`
allows. Half of a step's prompt tokens belong to the oldest prompt, the others to the shortest ones, so that a short
prompt need not wait for a long one, and a long one gets on.

Where the cache has too few pages, an older request takes those of the youngest one, whose rows go to the host's memory
until there is room again. A request that has no pages yet waits until its whole prompt fits beside those that run.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pymla.engine.pace import Pace
from pymla.engine.requests import Request, common_prefix
from pymla.engine.runner import Runner
from pymla.pages import PAGE


class Part(NamedTuple):
    """The part of a request in a step."""

    request: Request
    tokens: int  # of its pending ones, the first

    @property
    def is_last(self) -> bool:
        """Whether all pending tokens are in it, so that the next one can be chosen."""
        return self.tokens == self.request.pending


class Scheduler:
    """The requests that are not at their end, and the composition of steps.

    Parameters
    ----------
    runner : Runner
    max_running : int
        Requests that take part in a step, at most.
    step_tokens : int
        Tokens of prompts in a step in which nothing is generated, at most.

    Attributes
    ----------
    requests : list of Request
        The oldest first.
    pace : Pace
    """

    def __init__(self, runner: Runner, max_running: int, step_tokens: int):
        self._runner, self._max_running, self._step_tokens = runner, max_running, step_tokens
        self.requests: list[Request] = []
        self.pace = Pace()
        # Requests whose prompt begins like one that is being computed, with that one and the tokens to wait for.
        self._leaders: dict[Request, tuple[Request, int]] = {}

    def add(self, request: Request) -> None:
        """Take a request in, as the youngest one."""
        leader = self._leader(request)
        if leader:
            self._leaders[request] = leader
        self.requests.append(request)

    def add_forks(self, request: Request) -> None:
        """Take in the forks of a request, whose prompt is in their sequences. They are as old as the request."""
        at = self.requests.index(request) + 1
        self.requests[at:at] = request.forks
        for fork in request.forks:
            fork.parent = None
        request.forks = []

    def remove(self, request: Request) -> None:
        """Let go of a request, if it is here. Its sequence is the caller's to free."""
        if request in self.requests:
            self.requests.remove(request)
        self._leaders.pop(request, None)

    def plan(self) -> list[Part]:
        """The next step. It has a part at least, if any request may run; rows of the others may leave the cache."""
        ready = [request for request in self.requests if request.may_run and not self._follows(request)]
        admitted = self._admitted(ready)
        generating = any(request.pending == 1 for request in admitted)
        parts = self._planned(admitted, self.pace.tokens() if generating else self._step_tokens)
        # Where no generation has found pages, there is none to slow down.
        return parts or self._planned(admitted, self._step_tokens)

    def room_beside(self, parts: Iterable[Part]) -> int:
        """Pages that a step leaves of the runner's room; below 0: that it lacks."""
        return self._runner.room - sum(self._runner.pages_needed(each.request.sequence, each.tokens) for each in parts)

    def saw(self, parts: Iterable[Part], seconds: float) -> None:
        """Count the seconds of a step."""
        counts = [part.tokens for part in parts]
        if 1 in counts:
            self.pace.saw(sum(count for count in counts if count > 1), seconds)

    def _admitted(self, ready: list[Request]) -> list[Request]:
        """The requests that may be part of the step: those that have pages, and the next ones for which there is room.
        They begin with what the cache has kept of their prompts."""
        admitted: list[Request] = []
        waits = False  # a request without pages, behind which others without pages stay
        for request in ready:
            if len(admitted) == self._max_running:
                break
            if not request.sequence.pages:
                waits = waits or (bool(admitted) and not self._fits(request, admitted))
                if waits:
                    continue
                if request.sequence.length == 0:
                    request.reused_tokens = self._runner.attach(request.sequence, request.tokens)
            admitted.append(request)
        return admitted

    def _fits(self, request: Request, others: list[Request]) -> bool:
        """Whether a request finds room for its pending tokens beside others for theirs, and for a page of each of them
        later: they would need this one's at once otherwise."""
        wanted = sum(self._runner.pages_needed(each.sequence, each.pending) for each in [*others, request])
        held = sum(len(each.sequence.pages) for each in self._yielding(request))
        return wanted + len(others) <= self._runner.room + held

    def _planned(self, admitted: list[Request], prompt_tokens: int) -> list[Part]:
        """A step with so many tokens of prompts at most."""
        slices = _slices([request for request in admitted if request.pending > 1], prompt_tokens)
        parts: list[Part] = []
        for request in admitted:
            count = 1 if request.pending == 1 else slices.get(request, 0)
            if count == 0:
                continue
            part = Part(request, count)
            pages = self._runner.pages_needed(request.sequence, count)
            # The oldest one is always served: what it lacks is held by sequences that are no requests, and gives way.
            if pages == 0 or self._make_room(part, parts) or request is admitted[0]:
                parts.append(part)
        return parts

    def _make_room(self, part: Part, parts: list[Part]) -> bool:
        """Take pages from others, the youngest first, until there are enough for another part of a step. False: there
        are not."""
        planned = {each.request for each in parts}
        # Counted anew each time: where rows come back into the cache, pages that another one gave up may be theirs.
        while self.room_beside([*parts, part]) < 0:
            others = [each for each in self._yielding(part.request) if each.sequence.pages and each not in planned]
            if not others:
                return False
            self._runner.swap_out(others[-1].sequence)
        return True

    def _yielding(self, request: Request) -> list[Request]:
        """Requests whose pages another one may take: the younger ones, and last those whose readers went away."""
        at = self.requests.index(request)
        return self.requests[at + 1 :] + [each for each in self.requests[:at] if not each.may_run]

    def _leader(self, request: Request) -> tuple[Request, int] | None:
        """A request that computes the most of what another one's prompt begins with, and the tokens, whole pages."""
        best = None
        for each in self.requests:
            if each.generated or each.prompt[:PAGE] != request.prompt[:PAGE]:
                continue
            common = min(common_prefix(each.prompt, request.prompt), len(request.prompt) - 1) // PAGE * PAGE
            if common > (best[1] if best else 0):
                best = each, common
        return best

    def _follows(self, request: Request) -> bool:
        """Whether a request should wait for what another one computes of its prompt."""
        leader = self._leaders.get(request)
        if leader is None:
            return False
        other, tokens = leader
        if other.may_run and other.sequence.length < tokens:
            return True
        del self._leaders[request]
        return False


def _slices(prompts: list[Request], tokens: int) -> dict[Request, int]:
    """Tokens of each prompt in a step of so many of them; the oldest prompt first."""
    if not prompts or tokens == 0:
        return {}
    oldest, *others = prompts
    wanted = sum(request.pending for request in others)
    slices = {oldest: min(oldest.pending, max(1, tokens - min(tokens // 2, wanted)))}
    left = tokens - slices[oldest]
    for request in sorted(others, key=lambda each: each.pending):
        slices[request] = min(request.pending, left)
        left -= slices[request]
    return slices
