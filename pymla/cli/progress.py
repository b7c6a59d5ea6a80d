"""Progress of commands that write files, on standard error: a bar on a terminal, elsewhere a line now and then."""

import time

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pymla.cli import interrupt
from pymla.host.memory import size_text
from pymla.printable import one_line

#: Seconds between two lines where standard error is no terminal.
INTERVAL = 30.0


class WriteProgress:
    """Shows how much of a file is written, at which rate, how long the rest takes, and what is being written.

    It is called with (bytes written, bytes in all, what is being written). Bytes that are there at the first call, from
    an interrupted run, count for no rate. Take it as a context: the bar goes away at the end.

    Parameters
    ----------
    console : standard error by default
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began: tuple[float, int] | None = None  # seconds, and bytes that were there
        self._told = 0.0

    def __enter__(self) -> "WriteProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        interrupt.terminal_reset = b""

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began, self._told = (now, done), now
        if self._console.is_terminal:
            self._show(done, total, name)
        elif now - self._told >= INTERVAL:
            self._told = now
            self.note(self._line(now, done, total, name))

    def note(self, message: str) -> None:
        """Print a line, above the bar where there is one."""
        text = f"pymla: {one_line(message)}"
        if self._bar is None:
            click.echo(text, err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, done: int, total: int, name: str) -> None:
        if self._bar is None:
            columns = (
                *(BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()),
                TextColumn("{task.description}", markup=False),
            )
            # Without a thread of its own, which a limit on processes may refuse.
            self._bar = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
            interrupt.terminal_reset = interrupt.WITHOUT_BAR
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, completed=done)
        self._bar.update(self._task, completed=done, total=total, description=one_line(name), refresh=True)

    def _line(self, now: float, done: int, total: int, name: str) -> str:
        """What the bar would show."""
        assert self._began is not None
        began, before = self._began
        rate = (done - before) / (now - began)
        left = f", {duration((total - done) / rate)} left" if rate else ""
        return f"{size_text(done)} of {size_text(total)}, {size_text(rate)}/s{left}: {one_line(name)}"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(4000)
    '1 h 7 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
