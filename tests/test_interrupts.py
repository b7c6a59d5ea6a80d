"""Ctrl-C at any moment: exit code 130 within half a second, no traceback, and what can be kept is kept."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="other systems have no signals that a process can send"),
    pytest.mark.usefixtures("all_cores"),
]

#: Seconds until the process has ended. Half a second, and what a machine with other work needs to run it at all.
SOON = 1.5

PROGRAM = """
import ctypes, hashlib, os, signal, sys, time
from pymla import cli
from pymla.cli import interrupt

def long_call():
    "No signal ends it, and Python runs no handler meanwhile."
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)

def ready():
    print("ready", flush=True)

{body}
cli._run = run
cli.main()
"""

KEEPING = """
def run():
    try:
        with interrupt.graceful():
            {work}
    except KeyboardInterrupt:
        print("kept")
        return interrupt.CODE
    return 0
"""


def started(*command, **options):
    """A process whose SIGINT is not ignored, though that of the tests may be (``nohup``)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pipe = subprocess.PIPE
        streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "text": True}
        return subprocess.Popen([sys.executable, *command], **streams | options)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(process, *, times=1):
    """Send SIGINT to a process that says that it is ready; returns exit code, the rest of its output, and seconds."""
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(times):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


def program(body):
    return started("-c", PROGRAM.format(body=body))


@pytest.mark.parametrize("work", ["long_call()", "time.sleep(60)", "while True: pass", "sys.stdin.read(1)"])
def test_anywhere(work):
    reading, writing = os.pipe()
    body = f"def run():\n    ready()\n    {work}"
    process = started("-c", PROGRAM.format(body=body), stdin=reading)
    code, out, err, seconds = interrupted(process)
    os.close(reading)
    os.close(writing)
    assert (code, out, err) == (130, "", "")
    assert seconds < SOON


LOSES = """
class Loses:
    def __del__(self):
        ready()
        end = time.monotonic() + 0.3
        while time.monotonic() < end: pass
"""


def test_in_a_finaliser():
    """Where Python has nobody to give a KeyboardInterrupt to."""
    code, out, err, seconds = interrupted(program(LOSES + "def run():\n    Loses()\n    time.sleep(60)"))
    assert (code, out, err) == (130, "", "")
    assert seconds < SOON
    # What is to be kept is kept, all the same.
    for rest in ("time.sleep(60)", "pass"):
        body = LOSES + KEEPING.format(work=f"Loses(); {rest}")
        code, out, err, seconds = interrupted(program(body))
        assert (code, out, err) == (130, "kept\n", "")
        assert seconds < SOON


def test_what_is_kept():
    code, out, err, seconds = interrupted(program(KEEPING.format(work="ready(); time.sleep(60)")))
    assert (code, out, err) == (130, "kept\n", "")
    assert seconds < SOON


def test_twice():
    """Who presses Ctrl-C again does not want to wait for what could be kept."""
    code, out, err, seconds = interrupted(program(KEEPING.format(work="ready(); long_call()")), times=2)
    assert (code, out, err) == (130, "", "")
    assert seconds < SOON


def test_without_a_thread():
    """Where the system gives the process no other thread, as with a limit, the handler answers alone."""
    refuse = "import threading\ndef refuse(self): raise RuntimeError\nthreading.Thread.start = refuse\n"
    code, out, err, seconds = interrupted(program(refuse + "def run():\n    ready()\n    time.sleep(60)"))
    assert (code, out, err) == (130, "", "")
    assert seconds < SOON


def test_while_python_ends():
    body = "import atexit\ndef run(): atexit.register(lambda: (ready(), time.sleep(60)))"
    code, out, err, seconds = interrupted(program(body))
    assert (code, out, err) == (130, "", "")
    assert seconds < SOON


def test_errors_in_finalisers_are_still_printed():
    loses = "class A:\n    def __del__(self): raise ValueError('lost')\n"
    body = loses + "def run():\n    A()\n    ready()\n    time.sleep(60)"
    code, _, err, _ = interrupted(program(body))
    assert code == 130
    assert "ValueError: lost" in err


def test_ignored_signals_stay_ignored():
    """As under ``nohup``."""
    body = "def run():\n    ready()\n    time.sleep(0.5)\n    print('done')"
    text = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + PROGRAM.format(body=body)
    code, out, err, _ = interrupted(started("-c", text))
    assert (code, out, err) == (0, "done\n", "")


def test_a_library_answers_no_signals():
    text = """
import signal, sys, pymla
model = pymla.load(ctx=64)
model.generate("a", max_tokens=1)
import pymla.cli.app
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert sys.unraisablehook is sys.__unraisablehook__
assert signal.set_wakeup_fd(-1) == -1
"""
    subprocess.run([sys.executable, "-c", text], check=True)


MODULE = "import sys; print('ready', flush=True); sys.argv[0] = 'pymla'; from pymla.cli import main; main()"


@pytest.mark.parametrize("moment", range(8))
def test_at_random_moments(long_model, moment):
    """While modules are imported, kernels are loaded, a text is generated."""
    process = started(
        "-c", MODULE, "generate", "-m", str(long_model), "--device", "cpu", "--quiet", "-n", "1000000", "x"
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.02 + (moment + random.random()) / 5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("seconds", [0.5, 3])
def test_while_kernels_are_compiled(seconds, tmp_path):
    environment = os.environ | {"PYMLA_CACHE_DIR": str(tmp_path)}
    process = started("-m", "pymla", "generate", "--device", "cpu", "abc", env=environment)
    assert process.stderr.readline().startswith("pymla: compiling kernels")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert time.monotonic() - began < SOON


def test_a_benchmark_writes_what_it_has(tmp_path):
    options = "--pp", "16", "--tg", "4", "--depths", ",".join(map(str, range(0, 1000, 2)))
    process = started("-m", "pymla", "bench", "--device", "cpu", *options, "--csv", str(tmp_path / "rows.csv"))
    lines = []
    while len(lines) < 2:  # a row is printed before it is kept
        line = process.stdout.readline()
        assert line, process.stderr.read()
        lines += [line] if line.replace("|", " ").split()[:1] == ["16"] else []
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False)
    rows = (tmp_path / "rows.csv").read_text().splitlines()[1:]
    assert 1 <= len(rows) < 500
