"""Errors that a user can mend. The command line prints them in one line and exits with code 2."""

from pymla.printable import one_line


class PymlaError(Exception):
    """A mistake in the input or the environment. The message names the file, the tensor and the value, and what to
    do. It is one line, printable and no longer than a screen, whatever the file holds."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class CacheFull(PymlaError):
    """No page or no position is left for another token."""


class NoRoom(PymlaError):
    """A model, or the part of it that was asked for, does not fit a GPU's memory, or what is left does not fit the
    host's."""
