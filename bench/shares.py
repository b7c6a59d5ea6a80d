"""Rates and shares of the machine's limits, as every benchmark of the processor takes them.

Rates are those of the fastest round, as the limits are: other programs can only slow a round down. Where bytes come
from memory, whose speed may change from second to second, every round follows a pass of the streaming read, and the
share is the median of the rounds' shares.
"""

import statistics
import time
from collections.abc import Callable, Sequence

from pymla.cpu import limits as machine

#: Seconds that a benchmark measures for, and how many rounds that may be at least and at most.
SECONDS, ROUNDS = 0.5, (5, 50)

Run = Callable[[], object]


def seconds_of(run: Run) -> float:
    """Seconds that a function takes once."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def round_count(run: Run, seconds: float = SECONDS) -> int:
    """Rounds of a function, which is run once for it."""
    return int(min(max(seconds / seconds_of(run), ROUNDS[0]), ROUNDS[1]))


class Passes:
    """Passes of the streaming read, one before each round.

    Attributes
    ----------
    rates : list of float
        Bytes per second of each pass.
    """

    def __init__(self, stream: machine.Stream, run: Run):
        self._stream, self._run = stream, run
        self.rates: list[float] = []

    def before_round(self) -> None:
        """Read once; then run once, because the pass has driven code out of the caches, Python's as well."""
        self.rates.append(self._stream.nbytes / seconds_of(self._stream.read))
        self._run()

    def share(self, nbytes: int, rounds: Sequence[float]) -> float:
        """Share of the streaming read that rounds of some seconds reach with `nbytes` each."""
        return statistics.median(nbytes / each / read for each, read in zip(rounds, self.rates, strict=True))
