"""The engine: texts that are computed together are those that are computed alone, whoever reads them and how."""

import asyncio
import contextlib
import gc
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from make_model import PRESETS, make_model
from pretend_runner import PretendRunner

import pymla
from pymla.engine.driving import Driver
from pymla.engine.engine import Engine
from pymla.engine.requests import AHEAD, Request
from pymla.engine.speculation import NgramDrafter, Speculation, StepTimes
from pymla.errors import PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
#: Where two logits are closer than this, rounding decides which token comes first.
TIE = 1e-3
WAIT = 60


# A model without weights ----------------------------------------------------------------------------------------------


def following(tokens):
    """The token that follows a text."""
    return (31 * len(tokens) + 7 * tokens[-1] + 3 * tokens[0]) % 97


def text_of(prompt, count):
    """What a text alone would be."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


@pytest.fixture
def driver():
    return Driver(PretendRunner(following, ctx=500, pages=50))


def submitted(driver, prompt, count=20, **options):
    request = Request(list(prompt), GREEDY, count, **options)
    driver.submit([request])
    return request


def read(driver, request):
    """The rest of a text."""
    tokens = []
    while True:
        driver.wait(request)
        output = driver.take(request)
        if output is None:
            return tokens
        tokens.append(output.sampled.token)


def in_threads(*calls):
    """Results of calls on threads of their own; an error is a result."""
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "a thread hangs"
    return results


def test_one_reader_computes_all(driver):
    """Its steps bring the others on, as far as they may go ahead."""
    requests = [submitted(driver, [i] * 5, 40) for i in range(3)]
    assert read(driver, requests[0]) == text_of([0] * 5, 40)
    assert [len(request.unread) for request in requests] == [0, AHEAD, AHEAD]
    assert len(driver.runner.steps) == 40
    assert [len(step) for step in driver.runner.steps] == [3] * AHEAD + [1] * (40 - AHEAD)
    assert read(driver, requests[2]) == text_of([2] * 5, 40)
    assert len(requests[1].unread) == AHEAD
    assert read(driver, requests[1]) == text_of([1] * 5, 40)


def test_nothing_is_computed_while_nobody_waits(driver):
    request = submitted(driver, [1, 2])
    assert driver.runner.steps == []
    driver.wait(request)
    assert len(driver.runner.steps) == 1
    driver.take(request)
    assert len(driver.runner.steps) == 1


def test_readers_on_threads_share_steps(driver):
    step = driver.runner.step

    def slow(*arguments):
        time.sleep(0.002)  # in which readers take their tokens, as beside kernels
        return step(*arguments)

    driver.runner.step = slow
    prompts = [[i, i + 1] * (i + 1) for i in range(8)]
    requests = [submitted(driver, prompt, 50 + i) for i, prompt in enumerate(prompts)]
    results = in_threads(*(lambda r=request: read(driver, r) for request in requests))
    assert results == [text_of(prompt, 50 + i) for i, prompt in enumerate(prompts)]
    assert len(driver.runner.steps) < 8 * 50 / 3
    assert driver.runner.room == driver.runner.pages


def test_running_generations_keep_their_rate_while_a_long_prompt_comes_in(monkeypatch):
    """A step takes 10 ms, and a token of a prompt 1 ms more."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    runner = PretendRunner(following, ctx=5000, pages=500)
    driver, step = Driver(runner), runner.step

    def timed(batch, *rest):
        clock[0] += 0.01 + 0.001 * sum(len(new) for _, new in batch if len(new) > 1)
        return step(batch, *rest)

    runner.step = timed
    first = submitted(driver, [1], None)
    read_some(driver, first, 50)
    second, began, before = submitted(driver, [2] * 4000, 5), clock[0], first.generated
    while not second.is_readable:
        read_some(driver, first, 1)
    assert (first.generated - before) * 0.01 / (clock[0] - began) >= 0.7
    # And the prompt gets what is left.
    assert 4000 * 0.001 / (clock[0] - began) >= 0.2
    assert read(driver, second) == text_of([2] * 4000, 5)


def read_some(driver, request, count):
    for _ in range(count):
        driver.wait(request)
        driver.take(request)


def test_a_failing_request_fails_alone():
    """Logits that are no numbers, as of damaged weights."""
    driver = Driver(PretendRunner(lambda tokens: None if tokens[0] == 9 and len(tokens) > 4 else following(tokens)))
    good, bad = submitted(driver, [1, 2]), submitted(driver, [9, 9])
    good_text, error = in_threads(lambda: read(driver, good), lambda: read(driver, bad))
    assert good_text == text_of([1, 2], 20)
    assert isinstance(error, PymlaError)
    assert "weights are damaged" in str(error)
    assert len(bad.tokens) == 5
    assert driver.runner.room == driver.runner.pages


def test_an_error_of_progress_ends_its_request_alone(driver):
    def refuse(done, total):
        raise ValueError("no more")

    good, bad = submitted(driver, [1, 2]), submitted(driver, [9, 9], progress=refuse)
    assert read(driver, good) == text_of([1, 2], 20)
    with pytest.raises(ValueError, match="no more"):
        read(driver, bad)


def test_progress_counts_the_tokens_of_slices():
    driver, told = Driver(PretendRunner(following, pages=100), step_tokens=40), []
    request = submitted(driver, [1] * 100, 2, progress=lambda *call: told.append(call))
    driver.runner.step_layers = 10
    read(driver, request)
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_an_error_of_the_model_ends_those_that_took_part(driver, monkeypatch):
    first, second = submitted(driver, [1, 2]), submitted(driver, [3, 4])

    def broken(*_):
        raise OSError("no device")

    with monkeypatch.context() as patch:
        patch.setattr(driver.runner, "step", broken)
        for request in (first, second):
            with pytest.raises(OSError, match="no device"):
                read(driver, request)
    third = submitted(driver, [5])
    assert read(driver, third) == text_of([5], 20)


@pytest.mark.parametrize("is_before", [True, False])
def test_an_interrupt_takes_nothing_from_others(driver, monkeypatch, is_before):
    own, other = submitted(driver, [1, 2]), submitted(driver, [3, 4])
    driver.wait(own)
    step = driver.runner.step

    def interrupted(*arguments):
        if not is_before:
            step(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver.runner, "step", interrupted)
        driver.take(own)
        with pytest.raises(KeyboardInterrupt):
            driver.wait(own)
    driver.cancel(own)
    assert read(driver, other) == text_of([3, 4], 20)


def test_cancelled_requests_give_their_pages_back_at_once(driver):
    requests = [submitted(driver, [i] * 100) for i in range(3)]
    driver.wait(requests[0])
    assert driver.runner.room == 50 - 6
    driver.cancel(requests[1])
    assert driver.runner.room == 50 - 4
    driver.cancel(requests[1])
    del requests[1]
    for request in requests:
        assert read(driver, request) == text_of(request.prompt, 20)
    assert driver.runner.room == 50


def test_a_reader_of_a_cancelled_request_goes_on(driver):
    """Though another thread takes the steps."""
    first, second = submitted(driver, [1], 10), submitted(driver, [2], 10)
    waiting = threading.Event()
    step = driver.runner.step

    def slow(*arguments):
        waiting.set()
        second_is_cancelled.wait(WAIT)
        return step(*arguments)

    second_is_cancelled = threading.Event()
    driver.runner.step = slow

    def cancel():
        waiting.wait(WAIT)
        driver.cancel(second)
        second_is_cancelled.set()

    results = in_threads(lambda: read(driver, first), lambda: (waiting.wait(WAIT), read(driver, second))[1], cancel)
    assert results[0] == text_of([1], 10)
    assert len(results[1]) <= 1


def test_forks_begin_behind_their_prompt(driver):
    params = [SamplingParams(temperature=0) for _ in range(3)]
    requests = [Request([5] * 100, each, 10 + i) for i, each in enumerate(params)]
    driver.submit(requests)
    for i, request in enumerate(requests):
        assert read(driver, request) == text_of([5] * 100, 10 + i)
    assert sum(len(tokens) for step in driver.runner.steps for tokens in step) == 100 + 9 + 10 + 11


@pytest.mark.parametrize("cancelled", [0, 1])
def test_forks_outlive_their_parent(driver, cancelled):
    requests = [Request([5] * 10, GREEDY, 10) for _ in range(3)]
    driver.submit(requests)
    driver.cancel(requests[cancelled])
    for request in requests:
        assert read(driver, request) == ([] if request is requests[cancelled] else text_of([5] * 10, 10))
    assert driver.runner.room == driver.runner.pages


def test_what_can_never_fit_is_refused_by_numbers():
    driver = Driver(PretendRunner(following, ctx=1000, pages=3))
    with pytest.raises(PymlaError, match="prompt has 200 tokens, which take 4 pages of 64, and the cache has 3"):
        submitted(driver, [1] * 200)
    request = submitted(driver, [1] * 192, 5)
    assert read(driver, request) == text_of([1] * 192, 1)
    assert request.finish_reason == "context"


def test_the_youngest_waits_where_pages_are_few():
    driver = Driver(PretendRunner(following, ctx=1000, pages=4))
    requests = [submitted(driver, [i] * 60, 60) for i in range(4)]
    results = [read(driver, requests[0])]  # nobody reads the second one meanwhile: its pages go to the third
    results += in_threads(*(lambda r=request: read(driver, r) for request in requests[1:]))
    assert results == [text_of([i] * 60, 60) for i in range(4)]
    assert driver.runner.swaps > 0
    assert driver.runner.room == 4


def test_a_thread_that_has_the_turn_takes_steps_itself(driver):
    """Another one that takes steps waits for it."""
    first, second = submitted(driver, [1], 30), submitted(driver, [2], 30)
    held, done = threading.Event(), threading.Event()

    def with_turn():
        with driver.runner.turn:
            held.set()
            assert not done.wait(0.05)
            return read(driver, first)

    def without():
        held.wait(WAIT)
        text = read(driver, second)
        done.set()
        return text

    assert in_threads(with_turn, without) == [text_of([1], 30), text_of([2], 30)]


class Only:
    """A constraint: multiples of a number, at most so many."""

    def __init__(self, number, count):
        self.number, self.left, self.threads = number, count, set()

    @property
    def is_finished(self):
        return self.left == 0

    def mask(self):
        self.threads.add(threading.get_ident())
        if self.left < 0:
            raise PymlaError("the grammar allows no token here")
        bits = np.arange(320) % self.number == 0
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token):
        assert token % self.number == 0
        self.left -= 1

    def rollback(self, count):
        self.left += count


def test_constraints(driver):
    only, plain = Only(7, 5), submitted(driver, [1, 2])
    request, bad = submitted(driver, [1, 2], constraint=only), submitted(driver, [1, 2], constraint=Only(7, -1))
    tokens = read(driver, request)
    assert len(tokens) == 5
    assert not any(token % 7 for token in tokens)
    assert request.finish_reason == "stop"
    assert threading.get_ident() not in only.threads
    assert read(driver, plain) == text_of([1, 2], 20)
    with pytest.raises(PymlaError, match="allows no token"):
        read(driver, bad)


def cycle(tokens):
    """A text that repeats itself after ten tokens, but for every 17th."""
    return 90 if len(tokens) % 17 == 0 else len(tokens) % 10


def speculation_of(**options):
    return Speculation(NgramDrafter(), StepTimes(lambda tokens: 1.0 + tokens / 100), **options)


@pytest.mark.parametrize("constraint", [None, Only(1, 1000)])
def test_drafts_make_steps_fewer_and_texts_the_same(constraint):
    runner = PretendRunner(cycle, ctx=300, pages=20)
    driver, speculation = Driver(runner), speculation_of(adapts=False)
    plain = submitted(driver, range(10), 100)
    request = submitted(driver, range(10), 100, speculation=speculation, constraint=constraint)
    expected = [cycle(range(10 + i)) for i in range(100)]
    assert read(driver, request) == expected
    assert len(runner.steps) < 60
    assert read(driver, plain) == expected
    assert request.text.counts.accepted > 50
    assert runner.room == runner.pages
    # As far as the context goes.
    request = submitted(driver, range(10), None, speculation=speculation)
    assert read(driver, request) == [cycle(range(10 + i)) for i in range(291)]


# A small model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny.gguf", PRESETS["tiny"], qtype="q8_0", seed=4)


@pytest.fixture(scope="module")
def bare(path):
    """Greedy texts by bare steps, and how far the two best logits were apart."""
    with pymla.load(path, device="reference", cache_type="f32", ctx=320) as language_model:
        model, known = language_model.model, {}

        def text(ids, count):
            key = tuple(ids)
            if len(known.get(key, ())) < count:
                sequence, new, found = model.new_sequence(), list(ids), []
                for _ in range(count):
                    logits = model.forward([(sequence, np.array(new, np.int32))])[0]
                    second, first = np.sort(logits)[-2:]
                    found.append((int(logits.argmax()), float(first - second)))
                    new = [found[-1][0]]
                known[key] = found
                model.free(sequence)
            return known[key][:count]

        yield text


def agree(tokens, expected):
    """Whether a text is the expected one, up to where two tokens are as likely as each other."""
    for token, (other, apart) in zip(tokens, expected, strict=True):
        if token != other:
            return apart < TIE
    return True


PROMPTS = [
    *(np.random.default_rng(i).integers(5, 250, length).tolist() for i, length in enumerate((1, 7, 40, 64, 90, 150))),
    *([*np.random.default_rng(0).integers(5, 250, 130).tolist(), i] for i in range(3)),
]


def options_for(language_model, count):
    return {
        "max_tokens": count,
        "temperature": 0,
        "logit_bias": dict.fromkeys(language_model.tokenizer.eos_ids, -100.0),
    }


@pytest.mark.parametrize(("cache_tokens", "step_tokens"), [(4096, 2048), (320, 2048), (512, 48)])
def test_texts_are_those_of_texts_alone(path, bare, cache_tokens, step_tokens):
    """Mixed lengths, joins, leaves, cancels, shared prefixes, and too few pages."""
    with pymla.load(path, device="reference", cache_type="f32", ctx=320, cache_tokens=cache_tokens) as language_model:
        engine = Engine(language_model, step_tokens=step_tokens)
        chance = random.Random(cache_tokens)

        def reader(prompt, count, leaves):
            generation = engine.generation(prompt, **options_for(language_model, count))
            for _ in generation:
                if leaves and len(generation.tokens) >= leaves:
                    break
            generation.close()
            return generation.tokens

        calls = [(prompt, chance.randint(3, 24), chance.choice([0, 0, 0, 2])) for prompt in PROMPTS]
        results = in_threads(*(lambda c=call: reader(*c) for call in calls))
        for (prompt, count, leaves), tokens in zip(calls, results, strict=True):
            assert not isinstance(tokens, BaseException), tokens
            assert len(tokens) == count or 2 <= leaves <= len(tokens)
            assert agree(tokens, bare(prompt, len(tokens))), prompt
        assert language_model.model.cache.room == language_model.model.cache.pages


def test_a_prefix_is_computed_once(path, bare):
    with pymla.load(path, device="reference", cache_type="f32", ctx=320) as language_model:
        options = options_for(language_model, 6)
        for prompt, reused in ((PROMPTS[6], 0), (PROMPTS[7], 128), (PROMPTS[8], 128)):
            generation = language_model.generation(prompt, **options)
            list(generation)
            assert agree(generation.tokens, bare(prompt, 6))
            assert generation.stats.reused_tokens == reused
        # The next turn of a conversation.
        turn = [*PROMPTS[8], *generation.tokens, *PROMPTS[4]]
        generation = language_model.generation(turn, **options)
        list(generation)
        assert generation.stats.reused_tokens == 128
        assert agree(generation.tokens, bare(turn, 6))


def test_texts_of_one_prompt(path):
    with pymla.load(path, device="reference", cache_type="f32", ctx=320, cache_tokens=2048) as language_model:
        options = {"max_tokens": 8, "temperature": 2.0, "top_k": 0, "seed": 7}
        alone = []
        for i in range(4):
            generation = language_model.generation(PROMPTS[5], **options | {"seed": 7 + i})
            list(generation)
            alone.append(generation.tokens)
        together = language_model.engine.generations(PROMPTS[5], 4, **options)
        assert in_threads(*(lambda g=each: "".join(g) for each in together)) == ["".join(each) for each in together]
        assert [each.tokens for each in together] == alone
        assert len(set(map(tuple, alone))) == 4
        with pytest.raises(PymlaError, match="`n` is 0"):
            language_model.engine.generations(PROMPTS[5], 0)


def test_speculation_changes_no_text(path, bare):
    with pymla.load(path, device="reference", cache_type="f32", ctx=320) as language_model:
        options = options_for(language_model, 24) | {"speculation": speculation_of(adapts=False)}
        generations = [language_model.generation(prompt, **options) for prompt in PROMPTS[:3]]
        in_threads(*(lambda g=each: list(g) for each in generations))
        for prompt, generation in zip(PROMPTS, generations, strict=False):
            assert agree(generation.tokens, bare(prompt, 24))


def test_dropped_generations_take_no_room(path):
    with pymla.load(path, device="reference", ctx=128) as language_model:
        engine, room = language_model.engine, language_model.model.cache.room
        generation = engine.generation([1, 2, 3])
        next(iter(generation))
        assert language_model.model.cache.room == room - 1
        generation.itself = generation  # for the garbage collector
        del generation
        gc.collect()
        assert language_model.model.cache.room == room
        generation = engine.generation([1, 2, 3])
        next(iter(generation))
        generation.close()
        assert language_model.model.cache.room == room
        with pytest.raises(PymlaError, match=r"ended by close\(\)"):
            list(generation)


# Event loops ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(path):
    with pymla.load(path, device="reference", cache_type="f32", ctx=320, cache_tokens=4096) as language_model:
        yield language_model


async def told(language_model, prompt, count):
    return "".join(
        [piece async for piece in language_model.engine.generate(prompt, **options_for(language_model, count))]
    )


def test_event_loops(tiny):
    """Several loops and threads at a time."""
    alone = [tiny.generate(prompt, **options_for(tiny, 8)) for prompt in PROMPTS]

    async def together():
        return await asyncio.gather(*(told(tiny, prompt, 8) for prompt in PROMPTS))

    calls = [lambda: asyncio.run(together()), lambda: asyncio.run(together())]
    calls += [lambda: [tiny.generate(prompt, **options_for(tiny, 8)) for prompt in PROMPTS]]
    assert in_threads(*calls) == [alone] * 3
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "pymla-engine"]


def test_a_task_that_is_cancelled_frees_its_pages(tiny):
    cache = tiny.model.cache

    async def cancelled():
        task = asyncio.create_task(told(tiny, PROMPTS[5], 150))
        while cache.room == cache.pages:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for _ in range(1000):
            if cache.room == cache.pages:
                return
            await asyncio.sleep(0.001)

    asyncio.run(cancelled())
    assert cache.room == cache.pages


def test_a_generator_that_is_closed_frees_its_pages(tiny):
    cache = tiny.model.cache

    async def closed():
        pieces = tiny.engine.generate(PROMPTS[4], **options_for(tiny, 150))
        await anext(pieces)
        assert cache.room < cache.pages
        await pieces.aclose()
        while tiny.engine.driver.runner.room < cache.pages:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(closed(), WAIT))


def test_a_slow_reader_stops_nobody(tiny):
    async def both():
        slow = tiny.engine.generate(PROMPTS[1], **options_for(tiny, 30))
        first = await anext(slow)
        text = await told(tiny, PROMPTS[2], 30)
        rest = [piece async for piece in slow]
        return text, "".join([first, *rest])

    expected = tuple(tiny.generate(prompt, **options_for(tiny, 30)) for prompt in (PROMPTS[2], PROMPTS[1]))
    assert asyncio.run(asyncio.wait_for(both(), WAIT)) == expected


def test_errors_reach_event_loops(path):
    language_model = pymla.load(path, device="reference", ctx=128)

    async def of_a_closed_model():
        pieces = language_model.engine.generate([1, 2, 3])
        await anext(pieces)
        language_model.close()
        with pytest.raises(PymlaError, match="was closed; load it again"):
            async for _ in pieces:
                pass

    asyncio.run(asyncio.wait_for(of_a_closed_model(), WAIT))


def test_arguments(tiny):
    with pytest.raises(PymlaError, match="`max_running` is 0"):
        Engine(tiny, max_running=0)
    with pytest.raises(PymlaError, match="`step_tokens` is 'x'"):
        Engine(tiny, step_tokens="x")
    assert tiny.engine is tiny.engine
    assert isinstance(tiny.engine, pymla.Engine)


def test_many_requests_leave_nothing_behind():
    driver = Driver(PretendRunner(following, ctx=500, pages=9))
    kept = SimpleNamespace(requests=driver._scheduler.requests)
    for i in range(300):
        request = submitted(driver, [i % 90, 1, 2], 3)
        assert len(read(driver, request)) == 3
    assert kept.requests == []
    assert driver.runner.sequences == []
    assert not driver._cancelled
    assert driver.runner.room == 9
    assert PAGE == 64
