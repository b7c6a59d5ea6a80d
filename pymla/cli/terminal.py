"""Progress and warnings of commands, on standard error."""

import time

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pymla.cli import interrupt
from pymla.cli.options import as_options
from pymla.engine.report import Report
from pymla.printable import one_line


class Terminal(Report):
    """Progress and warnings on standard error. A bar appears only for work that takes longer than a second."""

    def __init__(self, quiet: bool = False):
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._bar: Progress | _NoBar | None = None
        self._task = TaskID(0)
        self.begin("")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, title: str, enabled: bool = True) -> None:
        """Start another piece of work."""
        self.close()
        self._title, self._began = title, time.monotonic()
        self._enabled = enabled and not self._quiet

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
        self._bar = None
        interrupt.terminal_reset = b""

    def warn(self, message: object) -> None:
        text = as_options(message, click.get_current_context().command)
        click.echo(f"pymla: warning: {one_line(text)}", err=True)

    def running(self, where: str) -> None:
        if not self._quiet:
            click.echo(f"pymla: running on {one_line(where)}", err=True)

    def reading(self, done: int, total: int) -> None:
        self.show("reading the model, MiB", done >> 20, total >> 20)

    def checking(self, done: int, total: int) -> None:
        self.show("checking tensors, MiB", done >> 20, total >> 20)

    def arranging(self, done: int, total: int) -> None:
        self.show("arranging weights, layers", done, total)

    def uploading(self, done: int, total: int) -> None:
        self.show("sending weights to the GPU, MiB", done >> 20, total >> 20)

    def compiling(self, done: int, total: int, name: str) -> None:
        self.show("compiling kernels (once; they are kept on disk)", done, total, delay=0)

    def prompt(self, done: int, total: int) -> None:
        """Layers of the prompt that are computed."""
        self.show("prompt, layers", done, total)

    def show(self, title: str, done: int, total: int, delay: float = 1.0, figure: str = "") -> None:
        """Show how much of a piece of work is done, once it has taken `delay` seconds; with a bar a figure, too."""
        if title != self._title:
            self.begin(title)
        if not self._enabled or time.monotonic() - self._began < delay:
            return
        if not self._console.is_terminal:
            if self._bar is None and done < total:
                click.echo(f"pymla: {title} …", err=True)
                self._bar = _NoBar()
            return
        if not isinstance(self._bar, Progress):
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            # Without a thread of its own, which a limit on processes may refuse.
            self._bar = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
            interrupt.terminal_reset = interrupt.WITHOUT_BAR
            self._bar.start()
            self._task = self._bar.add_task(title, total=total)
        self._bar.update(self._task, description=title + figure, completed=done, total=total, refresh=True)


class _NoBar:
    """Stands for a bar where standard error is no terminal: the title was printed once."""

    def stop(self) -> None:
        pass
