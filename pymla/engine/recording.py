"""Recorded steps: the step of sequences that go on by one token each, repeated without Python.

A step is recorded once for each form of attention and each number of sequences that the backend has graphs for
(`pymla.backend.StepGraph.size`), with memory of its own for the input. A replay writes the input and runs the graph.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pymla.backend import Array, Backend, StepGraph
from pymla.engine.forms import Form
from pymla.engine.runs import Run
from pymla.pages import PAGE, Step

#: Computes logits from a step in the backend's memory.
Compute = Callable[[Step, list[Run]], Array]


class _Recorded(NamedTuple):
    packed: Array  # int32, the input: `Step.packed`
    graph: StepGraph


class RecordedSteps:
    """The recorded steps of a model that is on one backend.

    Parameters
    ----------
    backend : Backend
    ctx : int
        Tokens of the longest sequence.
    compute : callable(step, runs)
        The forward pass, which is recorded.
    """

    def __init__(self, backend: Backend, ctx: int, compute: Compute):
        self._backend, self._compute = backend, compute
        self._pages = -(-ctx // PAGE)
        self._steps: dict[tuple[int, Form], _Recorded] = {}

    def size(self, step: Step) -> int | None:
        """Sequences of the recorded step that serves a step; None: it has to be computed."""
        sequences = len(step.block_tables)
        return self._backend.Graph.size(sequences) if sequences == len(step.tokens) else None

    def replay(self, step: Step, runs: list[Run], size: int) -> Array:
        """Logits of a step as part of the recorded one of `size` sequences. The next replay may overwrite them.

        The last sequence fills the places of missing ones: its token is computed again, and its cache rows are written
        again as they are.

        Where one token attends to chosen positions, all do: the choice of a token that sees few positions is all of
        them, so that its result is the same.
        """
        count = len(step.tokens)
        form: Form = "sparse" if any(run.form == "sparse" for run in runs) else runs[0].form
        if (size, form) not in self._steps:
            self._steps[size, form] = self._record(size, runs[0]._replace(form=form, stop=size))
        recorded = self._steps[size, form]
        if size > count:
            sources = np.minimum(np.arange(size), count - 1)
            step = Step(*(array[sources] for array in step))._replace(seq_of=np.arange(size, dtype=np.int32))
        self._backend.memory.write(recorded.packed, step.packed(self._pages))
        return recorded.graph.replay()[:count]

    def _record(self, size: int, run: Run) -> _Recorded:
        packed = self._backend.memory.empty(((4 + self._pages) * size,), np.int32)
        step = Step.unpacked(packed, size, size)
        return _Recorded(packed, self._backend.Graph(lambda: self._compute(step, [run])))
