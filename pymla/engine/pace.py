"""How many tokens of prompts a step has beside running generations, so that these keep their rate and their rhythm."""

#: Share of the time that generations give to prompts: they keep 1 - SHARE of their rate, with a margin over the 70 %
#: that is promised.
SHARE = 0.22
#: What a step may take longer because of prompts: so many times the step without them, and limits in seconds.
TIMES, LEAST_SECONDS, MOST_SECONDS = 6, 0.02, 0.25
#: Least and most tokens of a slice. With fewer, most of its time goes into reading experts that few of them use. Where
#: nothing was measured yet, a slice has the fewest.
LEAST, MOST = 64, 1024
#: Weight of a new measurement in a mean.
NEW = 0.3


class Pace:
    """Measures steps, and shares time between generations and prompts.

    A step with a slice of a prompt takes longer than one without. The difference is a debt, which later steps pay off
    that have no slice, by ``SHARE / (1 - SHARE)`` of their time. So a prompt that comes in gets its first slice soon,
    and over some steps no more than its share of the time.
    """

    def __init__(self) -> None:
        self._step: float | None = None  # seconds of a step without slices
        self._token: float | None = None  # seconds of a token in a slice
        self._debt = 0.0

    def tokens(self) -> int:
        """Tokens of prompts in the next step, in which generations run as well."""
        if self._step is None or self._debt > 0:
            return 0
        if self._token is None:
            return LEAST
        seconds = min(max(TIMES * self._step, LEAST_SECONDS), MOST_SECONDS)
        return int(min(max(seconds / max(self._token, 1e-9), LEAST), MOST))

    def saw(self, prompt_tokens: int, seconds: float) -> None:
        """Count a step of generations, and of so many tokens of prompts."""
        if not prompt_tokens:
            self._step = _mean(self._step, seconds)
        step = seconds if self._step is None else self._step
        more = max(0.0, seconds - step) if prompt_tokens else 0.0
        if prompt_tokens:
            self._token = _mean(self._token, more / prompt_tokens)
        self._debt = max(0.0, self._debt + more - (seconds - more) * SHARE / (1 - SHARE))


def _mean(mean: float | None, value: float) -> float:
    """A mean that follows its values."""
    return value if mean is None else mean + NEW * (value - mean)
