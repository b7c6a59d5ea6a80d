"""The runs of a step: which tokens attend together, and in which form."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pymla.engine.cache import Sequence
from pymla.engine.forms import Form, form_of
from pymla.models.config import ModelConfig


class Run(NamedTuple):
    """Neighbouring tokens of a step whose attention takes one form; tokens of one sequence in the expanded form."""

    form: Form
    start: int
    stop: int
    sequence: int  # of the first token: its row of the block tables
    length: int  # tokens in the last sequence's cache after the step


def runs_of(config: ModelConfig, mla: str, batch: Iterable[tuple[Sequence, np.ndarray]]) -> list[Run]:
    """The runs of a step that appends tokens to sequences; neighbours of one form are one run."""
    runs: list[Run] = []
    stop = 0
    for row, (sequence, new) in enumerate(batch):
        start, stop, length = stop, stop + len(new), sequence.length + len(new)
        form = form_of(config, mla, len(new), length)
        if runs and form == runs[-1].form != "expanded":
            runs[-1] = runs[-1]._replace(stop=stop, length=length)
        else:
            runs.append(Run(form, start, stop, row, length))
    return runs
