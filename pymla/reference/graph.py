"""The reference's graph: a step that is computed again each time. Twin of the other backends' graphs."""

from collections.abc import Callable
from typing import Any


class Graph:
    """A function whose launches the other backends record once.

    Parameters
    ----------
    function : callable()
        Must read everything that changes from replay to replay from arrays that stay the same.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    @staticmethod
    def size(sequences: int) -> int | None:
        """Sequences of the recorded step that serves a step of `sequences` sequences: as many; None would mean that
        it is not recorded."""
        return sequences

    def replay(self) -> Any:
        """Run the function. Returns what it returned."""
        return self._function()
