"""Threads that run kernels, and kernels' arguments."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from numba import types

from pymla.cpu.graph import Graph
from pymla.cpu.runtime import threads
from pymla.cpu.runtime.jit import kernel

pytestmark = pytest.mark.usefixtures("all_cores")

COUNTS = types.Array(types.int64, 1, "C")


@kernel(COUNTS, types.int64)
def add_to_each(first, last, counts, value):
    for i in range(first, last):
        counts[i] += value


@kernel(types.UniTuple(types.int64, 3), types.float64, types.Array(types.float32, 2, "C"))
def take_all(first, last, numbers, factor, array):
    array[0, 0] = factor * numbers[0]


@pytest.fixture(autouse=True)
def as_before():
    count = threads.thread_count()
    yield
    threads.set_threads(count)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_item_is_run_once(count):
    threads.set_threads(count)
    for items in (0, 1, 2, 7, 64, 1001):
        for grain in (None, 1, 3, 1000, 5000):
            counts = np.zeros(items + 3, np.int64)
            for _ in range(5):
                add_to_each[items, grain](counts, 1)
            assert (counts[:items] == 5).all()
            assert (counts[items:] == 0).all()


def test_graph_replays_what_it_recorded():
    first, second = np.zeros(100, np.int64), np.zeros(50, np.int64)

    def function():
        add_to_each[100](first, 1)
        add_to_each[50, 7](second, 10)
        add_to_each[0](second, 5)
        return second

    graph = Graph(function)
    assert not first.any(), "recording runs nothing"
    assert graph.replay() is second
    second[3] = -1000
    for count in (1, 3, 2):
        threads.set_threads(count)
        graph.replay()
    assert (first == 4).all()
    assert second[3] == -970
    assert (np.delete(second, 3) == 40).all()


def test_a_failed_recording_leaves_nothing_behind():
    with pytest.raises(TypeError):
        Graph(lambda: add_to_each[1](None, 1))
    counts = np.zeros(9, np.int64)
    add_to_each[9](counts, 1)
    assert (counts == 1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((1, 2, 3), 1.0), "takes 3 arguments, not 2"),
        (((1, 2), 1.0, np.zeros((2, 2), np.float32)), "argument 0"),
        (((1, 2, 3.5), 1.0, np.zeros((2, 2), np.float32)), "argument 0"),
        (((1, 2, 3), "x", np.zeros((2, 2), np.float32)), "argument 1"),
        (((1, 2, 3), 1.0, np.zeros((2, 2), np.float64)), "argument 2"),
        (((1, 2, 3), 1.0, np.zeros(4, np.float32)), "argument 2"),
        (((1, 2, 3), 1.0, np.zeros((4, 4), np.float32)[:, ::2]), "argument 2"),
        (((1, 2, 3), 1.0, [[1.0]]), "argument 2"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(TypeError, match=words) as caught:
        take_all[1](*arguments)
    assert "take_all" in str(caught.value)


def test_threads_wake_up_again():
    threads.set_threads(3)
    counts = np.zeros(300, np.int64)
    for i in range(4):
        add_to_each[300, 1](counts, 1)
        time.sleep(0.1 * i)  # long enough to fall asleep, from the second time on
    assert (counts == 4).all()


def test_callers_take_turns():
    threads.set_threads(2)
    counts = [np.zeros(500, np.int64) for _ in range(4)]

    def call(mine):
        for _ in range(50):
            add_to_each[500, 20](mine, 1)

    callers = [threading.Thread(target=call, args=(mine,)) for mine in counts]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert all((mine == 50).all() for mine in counts)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_threads import add_to_each, threads
threads.set_threads(2)
counts = np.zeros(100, np.int64)
add_to_each[100, 1](counts, 1)
child = os.fork()
add_to_each[100, 1](counts, 1)
good = (counts == 2).all()
if child == 0:
    os._exit(0 if good else 1)
print(good, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program, os.path.dirname(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.split() == ["True", "0"], result.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_interrupts_leave_the_threads_usable():
    threads.set_threads(2)
    counts = np.zeros(64, np.int64)
    add_to_each[64, 1](counts, 0)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for i in range(60):
            signal.setitimer(signal.ITIMER_REAL, 1e-3 + 1e-5 * i)
            try:
                while True:
                    add_to_each[64, 1](counts, 0)
            except KeyboardInterrupt:
                interrupted += 1
            add_to_each[64, 1](counts, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 60
    assert (counts == 60).all()
