"""One model, several callers: threads, streams that are left behind, event loops, and forked processes."""

import asyncio
import code
import contextlib
import gc
import io
import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import pymla
from pymla.errors import PymlaError

PROMPTS = ("def ", "class A(", "import ", "for i in ", "return self.", "if __name__")
GREEDY = {"max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def demo():
    with pymla.load(device="cpu", ctx=128) as language_model:
        yield language_model


@pytest.fixture(scope="module")
def alone(demo):
    """The text of each prompt, one generated after the other."""
    return [demo.generate(prompt, **GREEDY) for prompt in PROMPTS]


def in_threads(work, count=6):
    """Results of ``work(i)`` for every i below `count`, each on a thread of its own; an error is a result."""
    results = [None] * count

    def run(i):
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    return results


# Threads --------------------------------------------------------------------------------------------------------------


def test_texts_of_threads_are_those_of_one_after_the_other(demo, alone):
    for _ in range(3):
        assert in_threads(lambda i: demo.generate(PROMPTS[i], **GREEDY)) == alone


def test_streams_of_threads_take_turns(demo, alone):
    # Six streams of up to two pages each, of which the cache has two: their rows leave the cache and come back.
    assert demo.model.cache.pages == 2
    assert in_threads(lambda i: "".join(demo.stream(PROMPTS[i], **GREEDY))) == alone


def test_logits_of_threads(demo):
    ids = [demo.tokenize(prompt * 3) for prompt in PROMPTS]
    one_by_one = [demo.logits(each) for each in ids]
    for _ in range(3):
        for mine, expected in zip(in_threads(lambda i: demo.logits(ids[i])), one_by_one, strict=True):
            np.testing.assert_array_equal(mine, expected)


def test_readers_of_one_generation(demo, alone):
    generation = demo.generation(PROMPTS[0], **GREEDY)
    assert in_threads(lambda _: "".join(generation)) == [alone[0]] * len(PROMPTS)


def test_two_models_at_once(demo, alone):
    with pymla.load(device="cpu", ctx=64, cache_type="f32") as other:
        expected = other.generate("import ", **GREEDY)
        calls = [lambda: demo.generate(PROMPTS[0], **GREEDY), lambda: other.generate("import ", **GREEDY)] * 3
        assert in_threads(lambda i: calls[i]()) == [alone[0], expected] * 3


def test_event_loops(demo, alone):
    async def all_texts():
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(None, lambda p=p: demo.generate(p, **GREEDY)) for p in PROMPTS]
        return await asyncio.gather(*calls)

    async def one_loop_reads_two_streams():
        async def read(prompt):
            pieces = []
            for piece in demo.stream(prompt, **GREEDY):
                pieces.append(piece)
                await asyncio.sleep(0)
            return "".join(pieces)

        return await asyncio.gather(read(PROMPTS[0]), read(PROMPTS[1]))

    assert in_threads(lambda _: asyncio.run(all_texts()), 2) == [alone] * 2
    assert asyncio.run(one_loop_reads_two_streams()) == alone[:2]


def test_closing_while_others_generate(alone):
    language_model = pymla.load(device="cpu", ctx=128)
    started = threading.Barrier(len(PROMPTS) + 1)

    def work(i):
        started.wait()
        if i == len(PROMPTS):
            return language_model.close()
        return "".join(language_model.stream(PROMPTS[i], **GREEDY))

    *texts, closed = in_threads(work, len(PROMPTS) + 1)
    assert closed is None
    for text, expected in zip(texts, alone, strict=True):
        assert text == expected or (isinstance(text, PymlaError) and "was closed" in str(text)), text


def test_a_stream_of_a_closed_model_says_so():
    language_model = pymla.load(device="cpu", ctx=64)
    stream = language_model.stream("def ", **GREEDY)
    next(stream)
    language_model.close()
    with pytest.raises(PymlaError, match="was closed; load it again"):
        next(stream)
    language_model.close()


def test_a_step_is_not_taken_within_a_step(demo, alone):
    def nested(done, total):
        demo.generate("x", max_tokens=1)

    with pytest.raises(PymlaError, match="progress callback of its own step"):
        demo.generate("def " * 3, progress=nested, **GREEDY)
    with pytest.raises(PymlaError, match="progress callback of its own step"):
        demo.generate("def " * 3, progress=lambda *_: demo.close(), **GREEDY)
    assert demo.generate(PROMPTS[0], **GREEDY) == alone[0]


# Pages ----------------------------------------------------------------------------------------------------------------


def test_a_stream_that_a_traceback_keeps_takes_no_room(demo, alone):
    shell = code.InteractiveInterpreter({"m": demo})
    cell = "def f():\n    stream = m.stream('def ', max_tokens=80)\n    for piece in stream: raise RuntimeError\nf()\n"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            shell.runcode(compile(cell, "<cell>", "exec"))
        assert demo.model.cache.free_pages == 1
        generation = demo.generation("def ", max_tokens=120, temperature=0, logit_bias=never_ends(demo))
        text = "".join(generation)
        assert (generation.finish_reason, len(generation.tokens)) == ("length", 120)
    finally:
        del sys.last_type, sys.last_value, sys.last_traceback
    gc.collect()
    assert text == demo.generate("def ", max_tokens=120, temperature=0, logit_bias=never_ends(demo))


def never_ends(demo):
    return dict.fromkeys(demo.tokenizer.eos_ids, -float("inf"))


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize(("cache_type", "mla"), [("q8_0", "auto"), ("f16", "auto"), ("q8_0", "0")])
def test_streams_that_do_not_fit_together_give_way(device, cache_type, mla):
    """Texts of more than a page each, in a cache of two pages."""
    tokens = 90 if device == "cpu" else 66
    with pymla.load(device=device, ctx=128, cache_type=cache_type, mla=mla) as language_model:
        options = {"max_tokens": tokens, "temperature": 0, "logit_bias": never_ends(language_model)}
        expected = [language_model.generate(prompt, **options) for prompt in PROMPTS[:2]]
        streams = [language_model.stream(prompt, **options) for prompt in PROMPTS[:2]]
        texts, open_streams = ["", ""], [0, 1]
        while open_streams:
            for i in list(open_streams):
                for _ in range(7):
                    piece = next(streams[i], None)
                    if piece is None:
                        open_streams.remove(i)
                        break
                    texts[i] += piece
        assert texts == expected
        del streams
        assert language_model.model.cache.free_pages == 2


def test_dropped_sequences_need_not_be_freed(demo):
    free = demo.model.cache.free_pages
    sequence = demo.model.new_sequence()
    demo.model.forward([(sequence, demo.tokenize("def "))])
    assert demo.model.cache.free_pages == free - 1
    del sequence
    assert demo.model.cache.free_pages == free


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forks_while_another_thread_generates(demo, alone):
    context = multiprocessing.get_context("fork")
    done = threading.Event()

    def busy():
        while not done.is_set():
            demo.generate("class ", max_tokens=20, temperature=0)
            demo.logits(demo.tokenize("def f(x): return x" * 4))

    def child(queue):
        queue.put(demo.generate(PROMPTS[0], **GREEDY))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        texts = []
        for _ in range(12):
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            process.join(60)
            assert process.exitcode == 0, "a child hangs or failed"
            texts.append(queue.get())
    finally:
        done.set()
        thread.join()
    assert texts == [alone[0]] * 12


LIMITED = """
import resource, sys, threading
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_threads import add_to_each, threads

class Refused(threading.Thread):
    allowed = int(sys.argv[2])
    def start(self):
        if Refused.allowed == 0:
            raise RuntimeError("can't start new thread")
        Refused.allowed -= 1
        super().start()

threading.Thread = Refused
counts = np.zeros(100, np.int64)
for _ in range(3):
    threads.set_threads(4)
    add_to_each[100, 1](counts, 1)
    add_to_each[100, 1](counts, 1)
print(threads.thread_count(), (counts == 6).all())
"""


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_threads_that_the_system_refuses(allowed):
    command = [sys.executable, "-c", LIMITED, os.path.dirname(__file__), str(allowed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    count, right = result.stdout.split()
    assert right == "True"
    assert int(count) <= 1 + allowed
