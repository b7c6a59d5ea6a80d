"""The scheduler against a model of pages: random requests, readers, interrupts and cancels, on the real cache.

The model of this runner is a table: every token's row in the cache holds the token and its position, and a step looks
at all rows of its sequences before it says which token follows. So a page that is shared wrongly, lost or given away
too early is found by what it holds.
"""

import contextlib
import threading
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pretend_runner import PretendRunner

from pymla import reference
from pymla.engine.cache import PagedCache, Sequence
from pymla.engine.forward import Outputs
from pymla.engine.pace import LEAST, MOST, SHARE, Pace
from pymla.engine.requests import Request
from pymla.engine.scheduler import Scheduler
from pymla.engine.stepping import Stepper
from pymla.pages import PAGE
from pymla.text.sampling import SamplingParams

VOCABULARY = 97
CONFIG = SimpleNamespace(
    num_attention_heads=1,
    qk_head_dim=2,
    v_head_dim=2,
    kv_lora_rank=2,
    qk_rope_head_dim=2,
    num_hidden_layers=1,
    indexer=None,
    vocab_size=VOCABULARY,
    context_length=1000,
)


def following(tokens):
    """The token that follows a text: one of its own kind."""
    return (31 * len(tokens) + 7 * tokens[-1] + 3 * tokens[0]) % VOCABULARY


class TableRunner(PretendRunner):
    """A runner over a `PagedCache` whose rows are the tokens and their positions."""

    def __init__(self, pages, ctx):
        super().__init__(following, ctx=ctx, pages=pages, vocab_size=VOCABULARY)
        self.config = CONFIG
        self.cache = PagedCache(CONFIG, "f32", "auto", pages, ctx, [reference])
        self.rows = self.cache.layers[0].latent.data.view(np.float32)
        self.fork, self.attach, self.keep = self.cache.fork, self.cache.attach, self.cache.keep
        self.truncate, self.swap_out = self.cache.truncate, self.cache.swap_out
        self.free, self.pages_needed = self.cache.free, self.cache.pages_needed
        self.new_sequence = Sequence
        self.interrupt = None  # "before" the step's tokens count, or "after"
        self.clock, self.token_seconds = 0.0, 0.0

    @property
    def room(self):
        return self.cache.room

    def step(self, batch, rows, progress, hidden):
        room = self.cache.room
        needed = sum(self.cache.pages_needed(sequence, len(new)) for sequence, new in batch)
        assert needed <= room, f"a step takes {needed} pages, and there is room for {room}"
        step = self.cache.extend(batch)
        self.rows[step.slots, 0], self.rows[step.slots, 1] = step.tokens, step.positions
        interrupt, self.interrupt = self.interrupt, None
        if interrupt == "before":
            raise KeyboardInterrupt
        logits, at = [], 0
        for row, (sequence, new) in enumerate(batch):
            text = [*sequence.tokens, *new.tolist()]
            positions = np.arange(len(text))
            slots = step.block_tables[row][positions // PAGE] * PAGE + positions % PAGE
            np.testing.assert_array_equal(self.rows[slots], np.stack([text, positions], 1))
            wanted = [len(new) - 1] if rows is None else [i for i in range(len(new)) if at + i in rows]
            logits += [self.logits(text[: len(text) - len(new) + i + 1]) for i in wanted]
            at += len(new)
        self.cache.advance(batch)
        self.clock += 0.001 + self.token_seconds * at
        if interrupt == "after":
            raise KeyboardInterrupt
        return Outputs(np.array(logits), None)


def alone(prompt, count, ctx):
    """The text of a request that is alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and len(tokens) <= ctx:
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class Requests(RuleBasedStateMachine):
    """Random callers of the engine's steps."""

    CTX = 4 * PAGE

    @initialize(
        pages=st.integers(4, 9),
        step_tokens=st.sampled_from([16, 100, 1000]),
        running=st.integers(1, 6),
        token_seconds=st.sampled_from([0, 1e-5, 1e-3]),
    )
    def begin(self, pages, step_tokens, running, token_seconds):
        self.runner = TableRunner(pages, self.CTX)
        self.runner.token_seconds = token_seconds
        self.clock = patch("time.perf_counter", lambda: self.runner.clock)
        self.clock.start()
        self.scheduler = Scheduler(self.runner, running, step_tokens)
        self.stepper = Stepper(self.runner, self.scheduler)
        self.wanted, self.running = [], running

    def request(self, prompt, count):
        request = Request(prompt, SamplingParams(temperature=0), count)
        request.sequence = self.runner.new_sequence()
        request.sampler = self.runner.sampler(request.params, prompt)
        request.is_submitted = True
        return request

    @rule(
        kind=st.integers(0, 2),
        length=st.one_of(st.integers(1, 200), st.integers(1, 3)),
        count=st.integers(1, 60),
        forks=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def submit(self, kind, length, count, forks):
        """Prompts of one kind begin alike."""
        prompt = [(5 * i + kind) % VOCABULARY for i in range(min(length, self.CTX))]
        requests = [self.request(prompt, count + i) for i in range(forks + 1)]
        requests[0].forks = requests[1:]
        for fork in requests[1:]:
            fork.parent = requests[0]
        self.stepper.add(requests[0])
        self.wanted += requests

    @rule(count=st.integers(1, 20))
    def steps(self, count):
        for _ in range(count):
            before = {id(request): list(request.tokens) for request in self.wanted}
            self.stepper.step()
            if any(request.may_run for request in self.scheduler.requests):
                grown = [request for request in self.wanted if request.tokens != before[id(request)]]
                assert len(grown) <= 4 * self.running  # with forks

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), allowance=st.sampled_from([0, 1, 16]))
    def read(self, data, allowance):
        """A reader comes back, or goes away."""
        data.draw(st.sampled_from(self.wanted)).allowance = allowance

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(self.wanted))
        request.cancelled = True
        if not request.has_ended:
            self.stepper.end(request)
        self.wanted.remove(request)

    @rule(moment=st.sampled_from(["before", "after"]))
    def interrupt(self, moment):
        self.runner.interrupt = moment
        with contextlib.suppress(KeyboardInterrupt):
            self.stepper.step()
        self.runner.interrupt = None

    @invariant()
    def pages_belong_to_requests_that_run(self):
        if not hasattr(self, "runner"):
            return
        for request in self.wanted:
            if request.error:
                raise request.error
            assert request.tokens[len(request.prompt) :] == alone(request.prompt, request.generated, self.CTX)
            if request.has_ended:
                assert not request.sequence.pages
                assert request.sequence.saved is None
        held = {page for request in self.scheduler.requests for page in request.sequence.pages}
        assert self.runner.cache.room == self.runner.cache.pages - len(held), "a page is nobody's"

    def teardown(self):
        """Every request comes to its end, within as many steps as its tokens can take."""
        if not hasattr(self, "runner"):
            return
        try:
            self.come_to_an_end()
        finally:
            self.clock.stop()

    def come_to_an_end(self):
        for _ in range(4000):
            for request in self.wanted:
                request.allowance = 16
            if all(request.has_ended for request in self.wanted):
                break
            self.stepper.step()
        for request in self.wanted:
            assert request.finish_reason in ("length", "context"), f"a request starves: {request.error}"
            expected = alone(request.prompt, request.max_tokens, self.CTX)
            assert request.tokens[len(request.prompt) :] == expected
            assert [output.sampled.token for output in request.unread] == expected
        assert self.runner.cache.room == self.runner.cache.pages
        assert self.scheduler.requests == []


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduled():
    """A scheduler with requests of some prompt lengths, whose prompts have nothing in common."""

    def make(lengths, pages=100, running=8, step_tokens=100, generated=()):
        runner = TableRunner(pages, 10_000)
        scheduler = Scheduler(runner, running, step_tokens)
        requests = []
        for i, length in enumerate(lengths):
            requests.append(Request([i, *[50 + i] * (length - 1)], SamplingParams(temperature=0)))
            requests[-1].sequence = runner.new_sequence()
            scheduler.add(requests[-1])
        for i in generated:
            compute(runner, requests[i], lengths[i])
            requests[i].tokens.append(1)
        return runner, scheduler, requests

    return make


def compute(runner, request, count):
    at = request.sequence.length
    runner.step([(request.sequence, np.array(request.tokens[at : at + count], np.int32))], None, None, False)


def counts(scheduler, requests):
    """Tokens of each request in the next step."""
    parts = {id(part.request): part.tokens for part in scheduler.plan()}
    return [parts.get(id(request), 0) for request in requests]


def test_a_prompt_alone_takes_the_whole_step(scheduled):
    _, scheduler, requests = scheduled([250])
    assert counts(scheduler, requests) == [100]


def test_half_a_step_is_the_oldest_prompts_and_short_ones_come_next(scheduled):
    _, scheduler, requests = scheduled([500, 90, 20])
    assert counts(scheduler, requests) == [50, 30, 20]
    _, scheduler, requests = scheduled([500, 10, 20])
    assert counts(scheduler, requests) == [70, 10, 20]
    _, scheduler, requests = scheduled([10, 500, 20])
    assert counts(scheduler, requests) == [10, 70, 20]


def test_generations_are_in_every_step_and_prompts_as_their_pace_allows(scheduled):
    _, scheduler, requests = scheduled([30, 40, 500], generated=[0, 1])
    assert counts(scheduler, requests) == [1, 1, 0]  # how long such a step takes is not known yet
    scheduler.saw(scheduler.plan(), 0.01)
    assert counts(scheduler, requests) == [1, 1, LEAST]


def test_who_went_away_is_left_out(scheduled):
    _, scheduler, requests = scheduled([30, 40], generated=[0])
    requests[0].allowance = 0
    assert counts(scheduler, requests) == [0, 40]


def test_a_step_has_so_many_requests_at_most(scheduled):
    _, scheduler, requests = scheduled([9] * 5, running=3, generated=range(5))
    assert counts(scheduler, requests) == [1, 1, 1, 0, 0]


def test_the_youngest_gives_way(scheduled):
    """Three texts at the end of their pages, and one page is left."""
    runner, scheduler, requests = scheduled([64, 64, 64], pages=4, generated=[0, 1, 2])
    assert counts(scheduler, requests) == [1, 1, 0]
    assert [bool(request.sequence.pages) for request in requests] == [True, True, False]
    assert requests[2].sequence.saved is not None
    for request in requests[:2]:
        compute(runner, request, 1)
    requests[0].allowance = 0
    requests[1].tokens.append(1)
    # Whose reader went away gives way as well, but only to those that find no page otherwise.
    assert counts(scheduler, requests) == [0, 1, 0]
    requests[1].cancelled = True
    scheduler.remove(requests[1])
    runner.free(requests[1].sequence)
    assert counts(scheduler, requests) == [0, 0, 1]


def test_a_prompt_waits_until_it_fits_and_others_behind_it(scheduled):
    runner, scheduler, requests = scheduled([100, 200, 10], pages=5, step_tokens=1000, generated=[0])
    assert counts(scheduler, requests) == [1, 0, 0]  # four pages, and one for the first text, and two are taken
    scheduler.remove(requests[0])
    runner.free(requests[0].sequence)
    assert counts(scheduler, requests) == [0, 200, 0]


def test_a_prompt_waits_for_one_that_begins_alike():
    runner = TableRunner(20, 10_000)
    scheduler = Scheduler(runner, 8, 100)
    shared = list(range(90)) * 2
    prompts = [[*shared, 1], [*shared, 2], [*shared[:70], 3], [4] * 30]
    requests = [Request(prompt, SamplingParams(temperature=0)) for prompt in prompts]
    for request in requests:
        request.sequence = runner.new_sequence()
        scheduler.add(request)
    assert counts(scheduler, requests) == [70, 0, 0, 30]
    compute(runner, requests[0], 70)
    runner.keep(requests[0].sequence)
    # 64 tokens are all that the third one can have; the second one waits for 128.
    assert counts(scheduler, requests) == [63, 0, 7, 30]
    assert requests[2].reused_tokens == 64
    compute(runner, requests[0], 111)
    runner.keep(requests[0].sequence)
    requests[0].allowance = 0
    assert counts(scheduler, requests) == [0, 53, 7, 30]
    assert requests[1].reused_tokens == 128


# The pace of prompts beside generations -------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "token"), [(0.04, 0.004), (0.0005, 0.00005), (0.3, 0.003), (0.005, 1e-6)])
def test_generations_keep_their_rate(step, token):
    """Steps take so long, and each token of a prompt adds to that: three quarters of the steps' number remain."""
    pace, seconds, steps, prompt = Pace(), 0.0, 0, 0
    while seconds < 60:
        tokens = pace.tokens()
        took = step + tokens * token
        pace.saw(tokens, took)
        seconds, steps, prompt = seconds + took, steps + 1, prompt + tokens
        assert tokens == 0 or LEAST <= tokens <= MOST
    assert steps * step / seconds >= 1 - SHARE - 0.02
    # Prompts get what is theirs, up to a part of a slice, unless they are so cheap that they cannot use it.
    assert prompt * token / seconds >= SHARE - 0.05 or prompt / steps > MOST - 1


def test_a_first_slice_does_not_wait():
    pace = Pace()
    for _ in range(100):
        pace.saw(0, 0.04)
    assert pace.tokens() == LEAST


def test_threads_are_not_needed():
    """A `Stepper` starts none by itself."""
    before = threading.active_count()
    runner = TableRunner(4, 100)
    Stepper(runner, Scheduler(runner, 1, 1)).step()
    assert threading.active_count() == before
