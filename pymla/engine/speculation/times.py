"""How long steps take, by their tokens: a prior's shape, corrected by measurements."""

import bisect
import statistics
from collections import deque
from collections.abc import Callable, Mapping

from pymla.engine.costs import step_ops
from pymla.files.gguf_reader import TensorInfo
from pymla.models.config import ModelConfig

#: Measurements of steps with as many tokens whose median counts: a few, as steps become slower with the text's length,
#: and not one, as the machine has other things to do at times.
MEASUREMENTS = 5


class StepTimes:
    """Seconds of a step by its tokens.

    Parameters
    ----------
    prior : callable(tokens)
        What a step costs by arithmetic, in any unit: measurements give the scale. Between two measured numbers of
        tokens the prior is corrected by a factor between theirs, and beyond all of them by that of the last.

    Attributes
    ----------
    is_measured : bool
        Whether any step counts. Before that there are no seconds to compare with.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = prior
        self._priors: dict[int, float] = {}
        self._measured: dict[int, deque[float]] = {}  # by tokens, seconds in relation to the prior
        #: Of the measured numbers of tokens, ascending: these, and their factors.
        self._tokens: list[int] = []
        self._factors: list[float] = []

    def saw(self, tokens: int, seconds: float) -> None:
        """Count a step of so many tokens. The first one does not count: a step that is recorded, or whose kernels are
        compiled, takes longer than those that follow."""
        if tokens not in self._measured:
            self._measured[tokens] = deque(maxlen=MEASUREMENTS)
            return
        measured = self._measured[tokens]
        measured.append(seconds / self._price(tokens))
        at = bisect.bisect_left(self._tokens, tokens)
        if len(measured) == 1:
            self._tokens.insert(at, tokens)
            self._factors.insert(at, 0.0)
        self._factors[at] = statistics.median_low(measured)

    @property
    def is_measured(self) -> bool:
        return bool(self._tokens)

    def seconds(self, tokens: int) -> float:
        """Seconds of a step of so many tokens."""
        return self._price(tokens) * self._factor(tokens)

    def _factor(self, tokens: int) -> float:
        above = bisect.bisect_left(self._tokens, tokens)
        if above == len(self._tokens):
            return self._factors[-1]
        if above == 0 or self._tokens[above] == tokens:
            return self._factors[above]
        low, high = self._tokens[above - 1], self._tokens[above]
        share = (tokens - low) / (high - low)
        return self._factors[above - 1] * (1 - share) + self._factors[above] * share

    def _price(self, tokens: int) -> float:
        if tokens not in self._priors:
            self._priors[tokens] = self._prior(tokens)
        return self._priors[tokens]


def step_bytes(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> Callable[[int], float]:
    """The bytes that a step of so many tokens reads, all of them with logits (`pymla.engine.costs.step_ops`).

    They bound steps of few tokens. In a mixture of experts they grow with the tokens: each chooses its own experts.
    """
    return lambda tokens: sum(op.nbytes for op in step_ops(config, tensors, tokens, tokens, logits=tokens))
