"""Steps of a model's nextn block (`pymla.models.nextn`).

The block has a layer of the model's cache: the same sequences, pages and block tables. Its row at position p of a
sequence belongs to the model's hidden state after the token there and to the token behind it, so that a sequence of m
tokens has m rows once the token that follows is known. Rows are overwritten where a draft turns out wrong, and rows
behind a sequence's end are never read.

The last row of a page depends on the token behind the page. Sequences that share a full page share this row, too, which
then is that of the one that wrote it last: their drafts may be worse by what one row of 64 matters, and never their
texts.
"""

from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np

from pymla.backend import Array, Backend
from pymla.engine.cache import PagedCache, Sequence
from pymla.engine.forward import Forward, Outputs
from pymla.engine.recording import RecordedSteps
from pymla.engine.runs import Run, runs_at
from pymla.models.config import ModelConfig
from pymla.models.nextn import nextn_of
from pymla.models.placement import Placement, moved
from pymla.models.weights import NextnWeights
from pymla.pages import Step


class Span(NamedTuple):
    """Neighbouring inputs of a block in a sequence.

    Attributes
    ----------
    sequence : Sequence
    start : int
        Position of the first hidden state, at most the sequence's length.
    tokens : int32 array (n,)
        The token behind each hidden state.
    """

    sequence: Sequence
    start: int
    tokens: np.ndarray


class NextnBlock:
    """A model's block, which takes steps.

    Parameters
    ----------
    config : ModelConfig
    weights : NextnWeights
    model : Placement
        Of the model; the block is where its last layer is.
    cache : PagedCache
        The model's, whose last layer is the block's.
    mla, ctx, dtype
        As for `pymla.engine.model.Model`.
    inv_freq : float64 array (R / 2,)
        Of the model: radians per position.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: NextnWeights,
        model: Placement,
        cache: PagedCache,
        mla: str,
        ctx: int,
        inv_freq: np.ndarray,
        dtype: Any,
    ):
        transformer = nextn_of(config, weights)
        self._config, self._mla, self._cache, self._dtype = transformer.config, mla, cache, dtype
        self._place = place = Placement(model.embedding, model.layers[-1:], model.experts[-1:], model.output)
        self._forward = Forward(transformer, place, cache.layers[-1:], cache.exact, inv_freq, mla == "2", dtype)
        self._recorded: RecordedSteps | None = None
        if len(place.backends) == 1 and mla != "2":
            self._recorded = RecordedSteps(place.output, ctx, self._compute, config.hidden_size, dtype)

    def step(self, spans: Items[Span], hidden: np.ndarray) -> Outputs:
        """Predict the tokens behind those of some spans.

        Parameters
        ----------
        spans : list of Span
            Of at least one token each. Their pages are taken as `PagedCache.extend` does.
        hidden : float32 array (T, hidden)
            The hidden states, in the host's memory.

        Returns
        -------
        Outputs
            Logits (B, V) after the last token of each span, and the block's hidden states (T, hidden). The next step of
            the block may overwrite them.

        Raises
        ------
        CacheFull
            Before anything is computed.
        """
        step, hidden = self._at(spans), np.asarray(hidden, self._dtype)
        runs = runs_at(self._config, self._mla, ((span.start, len(span.tokens)) for span in spans))
        rows = np.cumsum([len(span.tokens) for span in spans]) - 1
        size = self._recorded.size(step, runs) if self._recorded else None
        if self._recorded and size:
            logits, own = self._recorded.replay(step, runs, size, hidden)
            return Outputs(logits if len(rows) == len(own) else self._place.output.memory.take(logits, rows), own)
        previous = self._place.layers[0].memory.to_device(hidden)
        return self._forward.outputs(self._on_backends(step), runs, rows, previous=previous)

    def fill(self, span: Span, hidden: Array) -> None:
        """Write the rows of a span whose predictions nobody needs. The attention of one layer need not be computed for
        them, nor its experts.

        Parameters
        ----------
        span : Span
        hidden : float array (n, hidden)
            In the memory of the output's backend, as `Model.step` returns hidden states.
        """
        step = self._on_backends(self._at([span]))
        self._forward.fill(step, moved(hidden, self._place.output, self._place.layers[0]))

    def _compute(self, step: Step, runs: list[Run], hidden: Array) -> Outputs:
        return self._forward.outputs({self._place.output: step}, runs, None, previous=hidden)

    def _at(self, spans: Items[Span]) -> Step:
        """The step of some spans, for which their sequences get the pages that they lack."""
        behind = [max(0, span.start + len(span.tokens) - span.sequence.length) for span in spans]
        missing = [(span.sequence, np.zeros(n, np.int32)) for span, n in zip(spans, behind, strict=True)]
        tables = self._cache.extend(missing).block_tables
        return Step.at([span.start for span in spans], [span.tokens for span in spans], tables)

    def _on_backends(self, step: Step) -> dict[Backend, Step]:
        return {backend: step.on(backend) for backend in self._place.backends}
