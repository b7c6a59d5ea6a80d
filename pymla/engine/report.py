"""Progress and warnings that a caller hears of while a model is loaded."""

import sys
from typing import Any

from pymla import checks
from pymla.printable import one_line


class Report:
    """Told of progress and warnings; this one prints warnings to standard error and keeps the rest to itself. Derive a
    class from it, and override the methods that interest you."""

    def warn(self, message: str) -> None:
        """Something the user should know."""
        print(f"pymla: warning: {one_line(message)}", file=sys.stderr)

    def running(self, where: str) -> None:
        """Where the model runs, where that was for pymla to choose, and why there."""

    def reading(self, done: int, total: int) -> None:
        """Bytes of the file that are present."""

    def checking(self, done: int, total: int) -> None:
        """Bytes of tensors whose values were looked at."""

    def arranging(self, done: int, total: int) -> None:
        """Layers whose tensors are found."""

    def uploading(self, done: int, total: int) -> None:
        """Bytes that are on the GPU."""

    def compiling(self, done: int, total: int, name: str) -> None:
        """Kernels that are compiled."""


def as_report(report: Any) -> Report:
    """The argument `report` of a caller: a default one for None.

    Raises
    ------
    PymlaError
        It lacks a method of `Report`.
    """
    if report is None:
        return Report()
    missing = [name for name in vars(Report) if not name.startswith("_") and not callable(getattr(report, name, None))]
    if missing:
        names = ", ".join(missing)
        checks.refuse("report", report, f"it has no {names}; derive its class from pymla.engine.report.Report")
    return report
