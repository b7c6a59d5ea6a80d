"""A record of how far an output is written, beside its partial file, for the run that goes on after an interrupt."""

import contextlib
import os
from pathlib import Path


class Journal:
    """A file with the key of a run in its first line, and in each further one a number of pieces that are complete.

    Parameters
    ----------
    path : of the journal
    key : a line that two runs share only if they would write the same bytes

    Attributes
    ----------
    exists : bool
        Whether the file is there and of this key.
    """

    def __init__(self, path: Path, key: str):
        self.path, self._key = path, key
        self.exists = False

    def read(self) -> int | None:
        """Pieces that an earlier run of the same key has completed, 0 if there was none; None: the file is of another
        key."""
        try:
            # What was cut off in the middle of a line does not count.
            *lines, _ = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return 0
        if lines[:1] != [self._key]:
            return None
        self.exists = True
        counts = [line for line in lines[1:] if line.isdecimal()]
        return int(counts[-1][:18]) if counts else 0

    def record(self, count: int) -> None:
        """Note that so many pieces are complete, on the disk when this returns."""
        text = f"{count}\n" if self.exists else f"{self._key}\n{count}\n"
        with self.path.open("a" if self.exists else "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file)
        self.exists = True

    def remove(self) -> None:
        """Delete the file, if it is there."""
        with contextlib.suppress(OSError):  # the output is complete, or refused, all the same
            self.path.unlink(missing_ok=True)
        self.exists = False
