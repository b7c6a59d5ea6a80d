"""The forward pass: a transformer's stages through all layers, in slices of tokens, on the backends of its parts.

Layers run one after the other over all tokens, so that the keys and values of a layer are expanded once. Intermediate
results exist for a slice of tokens at a time, so that scratch memory stays bounded however long a prompt is.
"""

from typing import Any

import numpy as np

from pymla.backend import Array, Backend, Progress
from pymla.engine.cache import PagedCache
from pymla.engine.runs import Run
from pymla.engine.slices import even_slices, slices
from pymla.models.deepseek2 import DeepSeek2
from pymla.models.operations import Operations
from pymla.models.placement import Placement, moved
from pymla.models.weights import Layer
from pymla.pages import FullCache, LatentCache, Step


class Forward:
    """The forward pass of a model.

    Parameters
    ----------
    transformer : DeepSeek2
        The family's stages, with the weights.
    placement : Placement
    cache : PagedCache
    ctx : int
        The longest sequence, in tokens.
    materialised : bool
        Whether absorbed attention keeps the scores of all positions.
    dtype : float32 or float64
        Of intermediate results.
    """

    def __init__(
        self,
        transformer: DeepSeek2,
        placement: Placement,
        cache: PagedCache,
        ctx: int,
        materialised: bool,
        dtype: Any,
    ):
        self._transformer, self._placement, self._cache = transformer, placement, cache
        self._materialised, self._dtype = materialised, dtype
        inv_freq = transformer.inv_freq(ctx)
        self._inv_freq = {backend: backend.memory.to_device(inv_freq) for backend in placement.backends}

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
        transformer, place = self._transformer, self._placement
        operations = {backend: self._operations(backend, step) for backend, step in steps.items()}
        backend = place.embedding
        x = transformer.embed(operations[backend])
        layers = transformer.weights.layers
        for i, (layer, cache) in enumerate(zip(layers, self._cache.layers, strict=True)):
            x, backend = moved(x, backend, place.layers[i]), place.layers[i]
            ops = operations[backend].with_experts_on(place.experts[i])
            attended = self._attention(ops, layer, cache, x, runs)
            for part in slices(0, len(x), backend.SLICE):
                # `ops` of all tokens, as no stage of this depends on positions.
                transformer.feed_forward(ops, layer, x[part], attended[part])
            if progress:
                progress(i + 1, len(layers))
        if rows is not None:
            x = backend.memory.take(x, rows)
        x = moved(x, backend, place.output)
        return transformer.logits(operations[place.output], x)

    def _operations(self, backend: Backend, step: Step) -> Operations:
        config, inv_freq = self._transformer.config, self._inv_freq[backend]
        return Operations.of(backend, config, step, inv_freq, self._dtype, self._materialised)

    def _attention(
        self, ops: Operations, layer: Layer, cache: LatentCache | FullCache, x: Array, runs: list[Run]
    ) -> Array:
        """The result of all heads, (T, H * v), for the residual stream `x`; writes the tokens' rows into the cache."""
        config = self._transformer.config
        out = ops.empty(len(x), config.num_attention_heads, config.v_head_dim)
        for run in runs:
            attend = self._expanded if run.form == "expanded" else self._by_slices
            attend(ops, layer, cache, x, run, out)
        return out.reshape(len(x), -1)

    def _by_slices(self, ops: Operations, layer: Layer, cache: Any, x: Array, run: Run, out: Array) -> None:
        """The absorbed or the full form of a run: writes its tokens of `out`, (T, H, v)."""
        transformer = self._transformer
        for part in slices(run.start, run.stop, ops.backend.SLICE):
            own = ops.part(part.start, part.stop)
            h = transformer.attention_input(own, layer, x[part])
            transformer.store(own, layer, cache, h)
            q = transformer.queries(own, layer, h)
            if run.form == "full":
                transformer.full(own, cache, q, out[part])
            else:
                transformer.absorbed(own, layer, cache, q, out[part])

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
        exact = self._cache.exact  # keys and values need no more bits than the cache rows that they come from
        at_once = ops.backend.attention.heads_at_once(config, run.length, exact)
        for heads in even_slices(config.num_attention_heads, at_once):
            keys_values = transformer.expand(ops, layer, c_kv, k_pe, heads, exact=exact)
            for part in parts:
                own = ops.part(part.start, part.stop)
                q = transformer.queries(own, layer, transformer.attention_input(own, layer, x[part]), heads)
                transformer.expanded(own, q, keys_values, out[part, heads])
