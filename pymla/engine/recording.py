"""Recorded steps: the step of a few tokens, repeated without Python.

A step is recorded once for each form of attention and each number of tokens that the backend has graphs for
(`pymla.backend.StepGraph.size`), with memory of its own for the input. A replay writes the input and runs the graph.

A recorded step knows tokens, and no sequences: several tokens of one sequence take part as sequences of one token each,
with the same pages. All tokens write their cache rows before the first one attends, and each attends to the positions
up to its own, so that the result is the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pymla.backend import Array, Backend, StepGraph
from pymla.engine.forms import Form
from pymla.engine.runs import Run
from pymla.pages import Step, pages_of

#: Tokens of one sequence in a recorded step, at most: as many as a draft may have. More are a prompt.
MOST_OF_SEQUENCE = 16

#: Computes results, each with a row for every token, from a step in the backend's memory and from what it has beside.
Compute = Callable[[Step, list[Run], Any], tuple[Array, ...]]


class _Recorded(NamedTuple):
    packed: Array  # int32, the input: `Step.packed`
    beside: Array | None  # float (T, K)
    graph: StepGraph


class RecordedSteps:
    """The recorded steps of a model that is on one backend.

    Parameters
    ----------
    backend : Backend
    ctx : int
        Tokens of the longest sequence.
    compute : callable(step, runs, beside)
        The forward pass, which is recorded.
    width : int
        Numbers of a token, K, that the forward pass takes beside the step: the hidden state before it, for a nextn
        block. 0: it takes None.
    dtype : float32 or float64
        Of these numbers.
    """

    def __init__(self, backend: Backend, ctx: int, compute: Compute, width: int = 0, dtype: Any = np.float32):
        self._backend, self._compute, self._width, self._dtype = backend, compute, width, dtype
        self._pages = pages_of(ctx)
        self._steps: dict[tuple[int, Form], _Recorded] = {}

    def size(self, step: Step, runs: list[Run]) -> int | None:
        """Tokens of the recorded step that serves a step; None: it has to be computed. The expanded form computes keys
        and values of one sequence, and is not recorded."""
        if any(run.form == "expanded" for run in runs) or np.bincount(step.seq_of).max() > MOST_OF_SEQUENCE:
            return None
        return self._backend.Graph.size(len(step.tokens))

    def replay(self, step: Step, runs: list[Run], size: int, beside: np.ndarray | None = None) -> tuple[Array, ...]:
        """Results after all tokens of a step, which is a part of the recorded one of `size` tokens. The next replay may
        overwrite them.

        The last token fills the places of missing ones: it is computed again, and its cache rows are written again as
        they are.

        Where one token attends to chosen positions, all do: the choice of a token that sees few positions is all of
        them, so that its result is the same.
        """
        count = len(step.tokens)
        form: Form = "sparse" if any(run.form == "sparse" for run in runs) else runs[0].form
        if (size, form) not in self._steps:
            self._steps[size, form] = self._record(size, runs[0]._replace(form=form, stop=size))
        recorded = self._steps[size, form]
        write, sources = self._backend.memory.write, np.minimum(np.arange(size), count - 1)
        step = step._replace(block_tables=step.block_tables[step.seq_of])
        step = Step(*(array[sources] for array in step))._replace(seq_of=np.arange(size, dtype=np.int32))
        write(recorded.packed, step.packed(self._pages))
        if beside is not None:
            write(recorded.beside, beside[sources])
        return tuple(result[:count] for result in recorded.graph.replay())

    def _record(self, size: int, run: Run) -> _Recorded:
        empty = self._backend.memory.empty
        packed = empty(((4 + self._pages) * size,), np.int32)
        beside = empty((size, self._width), self._dtype) if self._width else None
        step = Step.unpacked(packed, size, size)
        return _Recorded(packed, beside, self._backend.Graph(lambda: self._compute(step, [run], beside)))
