"""Who computes: readers of requests, on their own threads, take the steps of all requests.

A thread that waits for its request's next token takes steps until it has one. Where another thread does so already, it
waits for the results of that one's steps, and takes over when that one has what it wanted. So a single caller pays for
no other thread, an interrupt reaches the work, and nothing is computed while nobody waits. Event loops must not be held
up: one thread takes steps for all of them, and ends when no request of theirs is left to be computed.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from pymla.engine.requests import AHEAD, Output, Request
from pymla.engine.runner import Runner
from pymla.engine.scheduler import Scheduler
from pymla.engine.stepping import Stepper
from pymla.errors import PymlaError
from pymla.pages import PAGE, pages_of

if TYPE_CHECKING:
    import asyncio

#: Requests in a step, and tokens of prompts in a step in which nothing is generated.
MAX_RUNNING, STEP_TOKENS = 64, 2048


class Driver:
    """Takes requests in, computes them, and lets readers wait for their tokens.

    Parameters
    ----------
    runner : Runner
    max_running : int
        Requests that take part in a step, at most.
    step_tokens : int
        Tokens of prompts in a step in which nothing is generated, at most.
    """

    def __init__(self, runner: Runner, max_running: int = MAX_RUNNING, step_tokens: int = STEP_TOKENS):
        self.runner = runner
        self._scheduler = Scheduler(runner, max_running, step_tokens)
        self._stepper = Stepper(runner, self._scheduler)
        self._cancelled: deque[Request] = deque()
        self._forget_threads()
        _drivers.add(self)

    def _forget_threads(self) -> None:
        # Reentrant: the garbage collector cancels requests on any thread at any moment.
        self._changed = threading.Condition(threading.RLock())
        self._driving: int | None = None  # the thread that takes steps
        self._in_step: int | None = None  # the thread that is in a step
        self._thread: threading.Thread | None = None  # takes steps for event loops
        self._of_loops: set[Request] = set()
        self._futures: list[tuple[Request, asyncio.Future[None]]] = []

    # Requests ---------------------------------------------------------------------------------------------------------

    def submit(self, requests: Items[Request]) -> None:
        """Take in a request, or several with one prompt, which is computed once.

        Raises
        ------
        PymlaError
            The prompt can never fit.
        """
        first, *forks = requests
        self._check(len(first.prompt))
        for request in requests:
            request.sequence = self.runner.new_sequence()
            request.sampler = self.runner.sampler(request.params, request.prompt)
            request.is_submitted = True
        first.forks = forks
        for fork in forks:
            fork.parent = first
        self._stepper.add(first)

    def take(self, request: Request) -> Output | None:
        """The next token of a request; None at its end.

        Raises
        ------
        BaseException
            What ended the request.
        """
        request.allowance = AHEAD
        if request.unread:
            return request.unread.popleft()
        if request.error is not None:
            raise request.error
        return None

    def cancel(self, request: Request) -> None:
        """End a request whose tokens nobody wants. Its pages are free at once, or when the step that runs is done. Any
        thread may call this at any time, and so may the garbage collector."""
        request.cancelled = True
        if not request.is_submitted:
            return
        self._cancelled.append(request)
        self._free_cancelled()
        self._tell_readers()

    def _check(self, tokens: int) -> None:
        """Refuse a prompt that can never fit."""
        pages = pages_of(tokens)
        if pages > self.runner.pages:
            raise PymlaError(
                f"the prompt has {tokens} tokens, which take {pages} pages of {PAGE}, and the cache has "
                f"{self.runner.pages}; shorten it or raise `cache_tokens`"
            )

    def _free_cancelled(self) -> None:
        """Let go of cancelled requests, unless a step runs: who takes steps does this after each. A thread that has the
        turn already may be anywhere in a step: the garbage collector chooses its moment."""
        turn = self.runner.turn
        while self._cancelled and not _holds(turn) and turn.acquire(blocking=False):
            try:
                while self._cancelled:
                    request = self._cancelled.popleft()
                    if not request.has_ended:
                        self._stepper.end(request)
            finally:
                turn.release()

    # Threads ----------------------------------------------------------------------------------------------------------

    def wait(self, request: Request) -> None:
        """Return when a request has a token, or is at its end.

        Raises
        ------
        PymlaError
            The progress callback of a step waits for another step.
        """
        if self._in_step == threading.get_ident():
            raise PymlaError("a model cannot be used by the progress callback of its own step; use it afterwards")
        request.allowance = AHEAD
        try:
            while not request.is_readable and self._may_drive(request):
                self._step()
        finally:
            self._stop_driving()

    def _may_drive(self, request: Request) -> bool:
        """Wait until a request is readable, or this thread may take the next step."""
        me = threading.get_ident()
        with self._changed:
            while self._driving not in (None, me) and not request.is_readable:
                if _holds(self.runner.turn):
                    break  # whoever takes steps waits for this thread
                self._changed.wait()
            if request.is_readable:
                return False
            self._driving = me
            return True

    def _stop_driving(self) -> None:
        """Let another thread take steps."""
        with self._changed:
            if self._driving == threading.get_ident():
                self._driving = None
                self._changed.notify_all()

    def _step(self) -> None:
        """Take a step and tell readers."""
        with self.runner.turn:
            self._in_step = threading.get_ident()
            try:
                self._stepper.step()
            finally:
                self._in_step = None
        self._free_cancelled()
        self._tell_readers()

    def _tell_readers(self) -> None:
        """Wake the readers that wait, those of event loops by their futures."""
        with self._changed:
            self._changed.notify_all()
            if not self._futures:
                return
            ready, waiting = [], []
            for request, future in self._futures:
                if request.is_readable:
                    ready.append(future)
                else:
                    waiting.append((request, future))
            self._futures = waiting
            for loop in {future.get_loop() for future in ready}:
                own = [future for future in ready if future.get_loop() is loop]
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_set_results, own)

    # Event loops ------------------------------------------------------------------------------------------------------

    async def wait_async(self, request: Request) -> None:
        """`wait` for event loops."""
        import asyncio  # here, as it takes long and whoever calls this has it

        request.allowance = AHEAD
        while not request.is_readable:
            future = asyncio.get_running_loop().create_future()
            with self._changed:
                self._futures.append((request, future))
                self._of_loops.add(request)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._drive_for_loops, daemon=True, name="pymla-engine")
                    self._thread.start()
            # A step may have ended since the request was looked at.
            if request.is_readable:
                return
            await future

    def _drive_for_loops(self) -> None:
        """Take steps while event loops have requests to be computed."""
        me = threading.get_ident()
        while True:
            with self._changed:
                while self._driving is not None and self._is_wanted():
                    self._changed.wait()
                if not self._is_wanted():
                    self._thread = None
                    return
                self._driving = me
            try:
                self._step()
            except Exception as error:
                self._fail_all(error)
            finally:
                self._stop_driving()

    def _is_wanted(self) -> bool:
        """Whether a request of an event loop is to be computed."""
        self._of_loops = {request for request in self._of_loops if not request.is_over}
        return any(request.may_run for request in self._of_loops)

    def _fail_all(self, error: Exception) -> None:
        """End the requests of event loops by an error that is nobody's own."""
        with self.runner.turn:
            for request in list(self._of_loops):
                if not request.is_over:
                    self._stepper.end(request, error=error)
        self._tell_readers()

    def forget_others(self) -> None:
        """In a forked process no other thread goes on: none takes steps, and texts that they read are not computed
        before somebody asks."""
        self._forget_threads()
        self._stepper.forget_threads()
        for request in self._scheduler.requests:
            request.allowance = 0 if request.generated else 1


def _holds(turn: threading.RLock) -> bool:
    """Whether this thread has a lock."""
    try:
        threading.Condition(turn).notify(0)
    except RuntimeError:
        return False
    return True


def _set_results(futures: "list[asyncio.Future[None]]") -> None:
    """Let readers on an event loop go on, but for those that were cancelled."""
    for future in futures:
        if not future.done():
            future.set_result(None)


_drivers: "weakref.WeakSet[Driver]" = weakref.WeakSet()


def _forget_others() -> None:
    for driver in _drivers:
        driver.forget_others()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)
