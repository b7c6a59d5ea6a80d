"""The runs of a step: which tokens attend together, and in which form; and the portions that a step is computed in."""

from collections.abc import Iterable
from typing import NamedTuple

from pymla.engine.cache import Batch
from pymla.engine.forms import Form, parts_of
from pymla.engine.slices import slices
from pymla.models.config import ModelConfig


class Run(NamedTuple):
    """Neighbouring tokens of a step whose attention takes one form; tokens of one sequence in the expanded form."""

    form: Form
    start: int
    stop: int
    sequence: int  # of the first token: its row of the block tables
    length: int  # tokens in the last sequence's cache after the run

    @property
    def sparse_tokens(self) -> int:
        """Its tokens that attend to chosen positions."""
        return self.stop - self.start if self.form == "sparse" else 0


class Portion(NamedTuple):
    """Neighbouring tokens of a step that go through all layers before those behind them do."""

    start: int
    stop: int
    runs: list[Run]  # counted from `start`


def runs_of(config: ModelConfig, mla: str, batch: Batch) -> list[Run]:
    """The runs of a step that appends tokens to sequences (`runs_at`)."""
    return runs_at(config, mla, ((sequence.length, len(new)) for sequence, new in batch))


def runs_at(config: ModelConfig, mla: str, spans: Iterable[tuple[int, int]]) -> list[Run]:
    """The runs of a step; neighbours of one form are one run.

    Parameters
    ----------
    config : ModelConfig
    mla : one of `pymla.engine.forms.MLA_MODES`
    spans : iterable of (int, int)
        Of every sequence, the position of the first token and the number of tokens.
    """
    runs: list[Run] = []
    stop = 0
    for row, (first, count) in enumerate(spans):
        for form, tokens, length in parts_of(config, mla, count, first + count):
            start, stop = stop, stop + tokens
            if runs and form == runs[-1].form != "expanded":
                runs[-1] = runs[-1]._replace(stop=stop, length=length)
            else:
                runs.append(Run(form, start, stop, row, length))
    return runs


def portions_of(runs: Iterable[Run], most: int) -> list[Portion]:
    """The portions of a step, with at most `most` tokens each that attend to chosen positions.

    Choices exist for all of a portion's tokens at once, since later layers may share them. A prompt of sparse attention
    loses nothing where it is cut: what goes through a layer together, slice by slice, is what is computed together.
    """
    portions: list[Portion] = []
    room = 0
    for run in _cut(runs, most):
        if not portions or run.sparse_tokens > room:
            portions.append(Portion(run.start, run.start, []))
            room = most
        portion, room = portions[-1], room - run.sparse_tokens
        own = run._replace(start=run.start - portion.start, stop=run.stop - portion.start)
        portions[-1] = Portion(portion.start, run.stop, [*portion.runs, own])
    return portions


def _cut(runs: Iterable[Run], most: int) -> Iterable[Run]:
    """Runs, of which sparse ones are cut so that none has more than `most` tokens."""
    for run in runs:
        if run.sparse_tokens <= most:
            yield run
            continue
        for part in slices(run.start, run.stop, most):
            yield run._replace(start=part.start, stop=part.stop)
