"""The forward pass: a transformer's stages through all layers, in slices of tokens, on the backends of its parts.

Layers run one after the other over all tokens, so that the keys and values of a layer are expanded once. Intermediate
results exist for a slice of tokens at a time, so that scratch memory stays bounded however long a prompt is. The
positions that tokens chose are needed until the last layer that shares the choice, for all tokens: a long prompt of
sparse attention goes through the layers in portions (`pymla.engine.runs.portions_of`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from pymla.backend import Array, Backend, Progress
from pymla.engine.runs import Run, portions_of
from pymla.engine.slices import even_slices, slices
from pymla.models.deepseek2 import DeepSeek2
from pymla.models.deepseek32 import DeepSeek32
from pymla.models.nextn import Nextn
from pymla.models.operations import Operations
from pymla.models.placement import Placement, moved
from pymla.models.weights import Layer
from pymla.pages import LayerCache, Step
from pymla.scratch import most_choosing


class Outputs(NamedTuple):
    """The results of a step, in the memory of the output's backend."""

    logits: Array  # float (n, V), of the tokens whose logits are wanted
    hidden: Array  # float (T, hidden), hidden states behind the last norm, of all tokens


class Forward:
    """The forward pass of a model, or of its nextn block.

    Parameters
    ----------
    transformer : DeepSeek2
        The family's stages, with the weights.
    placement : Placement
    caches : sequence of LayerCache
        Of every layer.
    exact : bool
        `PagedCache.exact`.
    inv_freq : float64 array (R / 2,)
        Radians per position.
    materialised : bool
        Whether absorbed attention keeps the scores of all positions.
    dtype : float32 or float64
        Of intermediate results.

    Attributes
    ----------
    inv_freq : dict of Backend and float64 array (R / 2,)
        The same, in the memory of each backend.
    """

    def __init__(
        self,
        transformer: DeepSeek2,
        placement: Placement,
        caches: Sequence[LayerCache],
        exact: bool,
        inv_freq: np.ndarray,
        materialised: bool,
        dtype: Any,
    ):
        self._transformer, self._placement, self._caches, self._exact = transformer, placement, caches, exact
        self._materialised, self._dtype = materialised, dtype
        self.inv_freq = {backend: backend.memory.to_device(inv_freq) for backend in placement.backends}

    def logits(
        self, steps: dict[Backend, Step], runs: list[Run], rows: np.ndarray | None, progress: Progress | None = None
    ) -> Array:
        """Logits of the next token, float (n, V), in the memory of the output's backend.

        Parameters
        ----------
        steps : dict of Backend and Step
            The step in the memory of each backend.
        runs : list of Run
        rows : int array (n,), optional
            The tokens whose logits are wanted; by default all.
        progress : callable(done, total), optional
            Told of layers.
        """
        transformer = self._transformer
        ops, x = self._behind_layers(steps, runs, rows, progress)
        return transformer.logits(ops, transformer.hidden_states(ops, x))

    def outputs(
        self,
        steps: dict[Backend, Step],
        runs: list[Run],
        rows: np.ndarray | None,
        progress: Progress | None = None,
        previous: Array | None = None,
    ) -> Outputs:
        """`logits`, and the hidden states of all tokens.

        Parameters
        ----------
        steps, runs, rows, progress
            As for `logits`.
        previous : float array (T, hidden), optional
            The input of a nextn block beside the tokens, in the memory of its layer's backend: the hidden states after
            the tokens before them.
        """
        transformer = self._transformer
        ops, x = self._behind_layers(steps, runs, None, progress, previous)
        h = transformer.hidden_states(ops, x)
        wanted = h if rows is None else ops.activation(ops.backend.memory.take(h.x, rows))
        return Outputs(transformer.logits(ops, wanted), h.x)

    def fill(self, steps: dict[Backend, Step], previous: Array) -> None:
        """Write the cache rows of a nextn block, for which its one layer's attention need not be computed; `previous`
        as for `outputs`."""
        transformer, backend = self._transformer, self._placement.layers[0]
        operations = {each: self._operations(each, step) for each, step in steps.items()}
        for part in slices(0, len(previous), backend.SLICE):
            own = {each: ops.part(part.start, part.stop) for each, ops in operations.items()}
            layer, ops = transformer.weights.layers[0], own[backend]
            x = self._entering(own, previous[part])
            transformer.store(ops, layer, self._caches[0], transformer.attention_input(ops, layer, x))

    def _behind_layers(
        self,
        steps: dict[Backend, Step],
        runs: list[Run],
        rows: np.ndarray | None,
        progress: Progress | None,
        previous: Array | None = None,
    ) -> tuple[Operations, Array]:
        """The output's operations, and the residual stream behind the last layer: of all tokens, or of some `rows`."""
        place, layers = self._placement, len(self._placement.layers)
        operations = {backend: self._operations(backend, step) for backend, step in steps.items()}
        last = place.layers[-1]
        indexer = self._transformer.config.indexer
        portions = portions_of(runs, most_choosing(indexer.top_k) if indexer else 1)
        results = []
        for i, (start, stop, own_runs) in enumerate(portions):
            own = {backend: ops.part(start, stop) for backend, ops in operations.items()}

            def report(done: int, before: int = i * layers) -> None:
                if progress:
                    progress(before + done, len(portions) * layers)

            x = self._entering(own, None if previous is None else previous[start:stop])
            x = self._through_layers(own, own_runs, x, report)
            if rows is None:
                results.append(x)
            elif len(wanted := rows[(start <= rows) & (rows < stop)]):
                results.append(last.memory.take(x, wanted - start))
        if len(results) > 1:
            results = [last.memory.to_device(np.concatenate([last.memory.to_host(x) for x in results]))]
        return operations[place.output], moved(results[0], last, place.output)

    def _entering(self, operations: dict[Backend, Operations], previous: Array | None) -> Array:
        """The residual stream as it enters the first layer, (T, hidden), in the memory of that layer's backend."""
        transformer, embedding, backend = self._transformer, self._placement.embedding, self._placement.layers[0]
        x = moved(transformer.embed(operations[embedding]), embedding, backend)
        return x if previous is None else cast(Nextn, transformer).join(operations[backend], x, previous)

    def _through_layers(
        self, operations: dict[Backend, Operations], runs: list[Run], x: Array, report: Callable[[int], None]
    ) -> Array:
        """The residual stream `x`, (T, hidden), behind the last layer, in the memory of that layer's backend."""
        transformer, place = self._transformer, self._placement
        backend, chosen = place.layers[0], None
        sparse = any(run.sparse_tokens for run in runs)
        for i, (layer, cache) in enumerate(zip(transformer.weights.layers, self._caches, strict=True)):
            source, backend = backend, place.layers[i]
            x = moved(x, source, backend)
            ops = operations[backend].with_experts_on(place.experts[i])
            if sparse:
                chosen = ops.choices() if layer.has_indexer else moved(chosen, source, backend)
            attended = self._attention(ops, layer, cache, x, runs, chosen)
            for part in slices(0, len(x), backend.SLICE):
                # `ops` of all tokens, as no stage of this depends on positions.
                transformer.feed_forward(ops, layer, x[part], attended[part])
            report(i + 1)
        return x

    def _operations(self, backend: Backend, step: Step) -> Operations:
        config, inv_freq = self._transformer.config, self.inv_freq[backend]
        return Operations.of(backend, config, step, inv_freq, self._dtype, self._materialised)

    def _attention(
        self, ops: Operations, layer: Layer, cache: LayerCache, x: Array, runs: list[Run], chosen: Array | None
    ) -> Array:
        """The result of all heads, (T, H * v), for the residual stream `x`; writes the tokens' rows into the cache.

        `chosen`, (T, k), gets the positions that tokens choose, or has those that they chose in a layer before.
        """
        config = self._transformer.config
        out = ops.empty(len(x), config.num_attention_heads, config.v_head_dim)
        for run in runs:
            if run.form == "sparse":
                self._sparse(ops, layer, cache, x, run, chosen, out)
            elif run.form == "expanded":
                self._expanded(ops, layer, cache, x, run, out)
            else:
                self._by_slices(ops, layer, cache, x, run, out)
        return out.reshape(len(x), -1)

    def _by_slices(self, ops: Operations, layer: Layer, cache: Any, x: Array, run: Run, out: Array) -> None:
        """The absorbed or the full form of a run: writes its tokens of `out`, (T, H, v)."""
        transformer = self._transformer
        for part in slices(run.start, run.stop, ops.backend.SLICE):
            own = ops.part(part.start, part.stop)
            h = transformer.attention_input(own, layer, x[part])
            transformer.store(own, layer, cache, h)
            q = transformer.queries(own, layer, transformer.query_input(own, layer, h))
            if run.form == "full":
                transformer.full(own, cache, q, out[part])
            else:
                transformer.absorbed(own, layer, cache, q, out[part])

    def _sparse(self, ops: Operations, layer: Layer, cache: Any, x: Array, run: Run, chosen: Array, out: Array) -> None:
        """Attention of a run over chosen positions: writes its tokens of `out`, (T, H, v), and, where the layer has an
        indexer, of `chosen`, (T, k)."""
        transformer = cast(DeepSeek32, self._transformer)  # the family of every configuration with an indexer
        for part in slices(run.start, run.stop, ops.backend.SLICE):
            own = ops.part(part.start, part.stop)
            h = transformer.attention_input(own, layer, x[part])
            transformer.store(own, layer, cache, h)
            c_q = transformer.query_input(own, layer, h)
            if layer.has_indexer:
                transformer.choose(own, layer, cache, h, c_q, chosen[part])
            transformer.sparse(own, layer, cache, transformer.queries(own, layer, c_q), chosen[part], out[part])

    def _expanded(self, ops: Operations, layer: Layer, cache: Any, x: Array, run: Run, out: Array) -> None:
        """The expanded form of a run: writes its tokens of `out`, (T, H, v).

        All rows are stored first. Keys and values exist for as many heads at a time as fit the backend's scratch, and
        queries, which are cheap, are computed again for each of these.
        """
        transformer, config = self._transformer, self._transformer.config
        parts = slices(run.start, run.stop, ops.backend.SLICE)
        for part in parts:
            own = ops.part(part.start, part.stop)
            transformer.store(own, layer, cache, transformer.attention_input(own, layer, x[part]))
        c_kv, k_pe = transformer.load(ops, cache, ops.step.block_tables[run.sequence], run.length)
        exact = self._exact  # keys and values need no more bits than the cache rows that they come from
        at_once = ops.backend.attention.heads_at_once(config, run.length, exact)
        for heads in even_slices(config.num_attention_heads, at_once):
            keys_values = transformer.expand(ops, layer, c_kv, k_pe, heads, exact=exact)
            for part in parts:
                own = ops.part(part.start, part.stop)
                h = transformer.attention_input(own, layer, x[part])
                q = transformer.queries(own, layer, transformer.query_input(own, layer, h), heads)
                transformer.expanded(own, q, keys_values, out[part, heads])
