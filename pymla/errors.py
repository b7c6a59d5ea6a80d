"""Errors that a user can mend. The command line prints them in one line and exits with code 2."""

from pymla.printable import one_line


class PymlaError(Exception):
    """A mistake in the input or the environment. The message names the file, the tensor and the value, and the
    remedy. It is one line, printable and no longer than a screen, even if the file holds anything else."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class CacheFull(PymlaError):
    """No page or no position is left for another token."""


class NoRoom(PymlaError):
    """A model, or the part of it that was asked for, does not fit a GPU's memory, or the rest does not fit the host's
    memory."""
