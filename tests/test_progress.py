"""Progress of commands that write files."""

import io

import pytest
from rich.console import Console

from pymla.cli import interrupt, progress
from pymla.cli.progress import WriteProgress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_lines_where_there_is_no_terminal(capsys, clock):
    with WriteProgress() as shown:
        shown(1 << 30, 5 << 30, "blk.0.x")  # there from an interrupted run
        clock[0] += 29
        shown(2 << 30, 5 << 30, "blk.1.x")
        assert capsys.readouterr().err == ""
        clock[0] += 3
        shown(3 << 30, 5 << 30, "blk.2.x\x1b[2J")
        shown(4 << 30, 5 << 30, "blk.3.x")
        shown.note("goes on")
    assert capsys.readouterr().err.splitlines() == [
        "pymla: 3.00 GiB of 5.00 GiB, 64.00 MiB/s, 32 s left: blk.2.x\\x1b[2J",
        "pymla: goes on",
    ]


def test_nothing_written_yet(capsys, clock):
    with WriteProgress() as shown:
        shown(0, 100, "x")
        clock[0] += 31
        shown(0, 100, "x")
    assert capsys.readouterr().err == "pymla: 0 B of 100 B, 0 B/s: x\n"


def test_a_bar_on_a_terminal():
    file = io.StringIO()
    with WriteProgress(Console(file=file, force_terminal=True, width=150)) as shown:
        shown(0, 4 << 20, "blk.0.[bold]x")
        shown.note("a note with [brackets]")
        shown(1 << 20, 4 << 20, "blk.1.x")
        assert interrupt.terminal_reset == interrupt.WITHOUT_BAR
    text = file.getvalue()
    assert "1.0/4.2 MB" not in text
    assert "1.0/4.0 MiB" in text
    assert "blk.0.[bold]x" in text
    assert "pymla: a note with [brackets]" in text
    assert interrupt.terminal_reset == b""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
