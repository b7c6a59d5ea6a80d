"""A model that takes steps: weights, a cache, and whose turn it is."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np

from pymla.backend import Array, Backend, Progress, TokenSampler
from pymla.engine.cache import Batch, PagedCache, Sequence
from pymla.engine.forms import check_mode
from pymla.engine.forward import Forward, Outputs
from pymla.engine.nextn import NextnBlock, Span
from pymla.engine.recording import RecordedSteps
from pymla.engine.runs import runs_of
from pymla.errors import PymlaError
from pymla.models.config import ModelConfig
from pymla.models.families import FAMILIES
from pymla.models.placement import Placement
from pymla.models.weights import Layer, Weights
from pymla.pages import LayerCache, pages_of
from pymla.text.sampling import SamplingParams

#: Tokens of a step after which logits are wanted: `Model.forward`.
Wanted: TypeAlias = 'Literal["last", "all"] | np.ndarray'

CLOSED = "this model was closed; load it again"


class PlacedLayer(NamedTuple):
    """A layer, its cache, and the backends that compute it."""

    backend: Backend
    experts: Backend  # of its routed experts
    layer: Layer
    cache: LayerCache


class Model:
    """Weights, a cache, and the backends that compute.

    Parameters
    ----------
    config : ModelConfig
        Where the weights have a nextn block, `pymla.models.nextn.with_nextn`.
    weights : Weights
        Each in the memory of its backend.
    backend : Backend or Placement
        One for everything, or one for each part.
    cache_type : str
        One of `pymla.pages.CACHE_TYPES`.
    mla : str
        One of `pymla.engine.forms.MLA_MODES`.
    ctx : int
        The longest sequence, in tokens.
    cache_tokens : int, optional
        Tokens that the cache holds for all sequences together; `ctx` by default.
    dtype : float32 or float64
        Of intermediate results. Only the reference computes in float64.

    Attributes
    ----------
    placement : Placement
    backend : Backend
        Of the output.
    cache : PagedCache
    inv_freq : float64 array (R / 2,)
        Radians per position (`DeepSeek2.inv_freq`).
    turn : RLock
        Held during a step. Callers hold it as well while they read the result of `step`, or where no other caller's
        step may come between several of theirs.

    Raises
    ------
    PymlaError
        There is no such mode or type of cache, or it does not fit the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        backend: Backend | Placement,
        *,
        cache_type: str = "q8_0",
        mla: str = "auto",
        ctx: int,
        cache_tokens: int | None = None,
        dtype: Any = np.float32,
    ):
        check_mode(config, mla)
        layers = config.num_hidden_layers
        place = backend if isinstance(backend, Placement) else Placement.on(backend, layers)
        self.placement, self.backend = place, place.output
        self.config, self.mla, self.ctx = config, mla, ctx
        self.weights: Weights | None = weights
        pages = pages_of(cache_tokens or ctx)
        block = [] if weights.nextn is None else place.layers[-1:]
        self.cache = PagedCache(config, cache_type, mla, pages, ctx, [*place.layers, *block])
        family = FAMILIES[config.architecture](config, weights)
        self.inv_freq = family.inv_freq(ctx)
        passes = self.cache.exact, self.inv_freq, mla == "2", dtype
        forward = Forward(family, place, self.cache.layers[:layers], *passes)
        self._forward: Forward | None = forward
        # By whether they give hidden states, too. Only where all of a model is on one backend, and not with
        # ``--mla 2``: the scores of the longest context would be kept for every layer.
        self._recorded: dict[bool, RecordedSteps] = {}
        if len(place.backends) == 1 and mla != "2":
            self._recorded = {hidden: _recorded(forward, self.backend, ctx, hidden) for hidden in (False, True)}
        self._nextn: NextnBlock | None = None
        if weights.nextn is not None:
            self._nextn = NextnBlock(config, weights.nextn, place, self.cache, mla, ctx, self.inv_freq, dtype)
        self.turn = threading.RLock()
        self._stepping = False
        _models.add(self)

    def close(self) -> None:
        """Let go of the weights and of the cache, once the step that runs is done.

        Raises
        ------
        PymlaError
            The `progress` of a step asks for it.
        """
        with self.turn:
            self._refuse_if_stepping()
            self.weights, self._forward, self._nextn, self._recorded, self.cache.layers = None, None, None, {}, []

    @property
    def placed_layers(self) -> list[PlacedLayer]:
        """The layers, and behind them that of the nextn block."""
        place, weights = self.placement, self.weights
        if weights is None:
            raise PymlaError(CLOSED)
        block = [] if weights.nextn is None else [(place.layers[-1], place.experts[-1], weights.nextn.layer)]
        layers = [*zip(place.layers, place.experts, weights.layers, strict=True), *block]
        return [PlacedLayer(*layer, cache) for layer, cache in zip(layers, self.cache.layers, strict=True)]

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return Sequence()

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's cache back."""
        self.cache.free(sequence)

    def fork(self, sequence: Sequence) -> Sequence:
        """A copy of a sequence that shares its cache (`PagedCache.fork`)."""
        with self.turn:
            return self.cache.fork(sequence)

    def attach(self, sequence: Sequence, tokens: Items[int]) -> int:
        """Let an empty sequence begin with the longest kept prefix of a text; tokens of it (`PagedCache.attach`)."""
        with self.turn:
            return self.cache.attach(sequence, tokens)

    def keep(self, sequence: Sequence) -> None:
        """Let `attach` find a sequence's full pages (`PagedCache.keep`)."""
        with self.turn:
            self.cache.keep(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget a sequence's tokens from position `length` on (`PagedCache.truncate`)."""
        with self.turn:
            self.cache.truncate(sequence, length)

    def swap_out(self, sequence: Sequence) -> None:
        """Keep a sequence's cache in the host's memory until its next step (`PagedCache.swap_out`)."""
        with self.turn:
            self.cache.swap_out(sequence)

    def shift(self, sequence: Sequence, start: int, stop: int) -> None:
        """Context shift: forget a sequence's tokens at positions `start` to `stop` - 1, multiples of 64; those behind
        them move there (`PagedCache.shift`)."""
        with self.turn:
            self.cache.shift(sequence, start, stop, self._open_forward().inv_freq)

    def sampler(self, params: SamplingParams, history: Iterable[int] = ()) -> TokenSampler:
        """Chooses tokens for one sequence from rows of `step`'s logits (`pymla.backend.TokenSampler`)."""
        return self.backend.sampling.Sampler(params, history)

    def forward(self, batch: Batch, logits: Wanted = "last", progress: Progress | None = None) -> np.ndarray:
        """Append tokens to sequences and predict the tokens that follow.

        Parameters
        ----------
        batch : list of (Sequence, int array)
            At least one token each. An interrupted pass leaves the sequences as they were.
        logits : "last", "all", or int array (n,)
            The tokens after which logits are computed: the last one of each sequence, all of them, or those with these
            numbers, ascending, among the tokens of the batch; at least one.
        progress : callable(done, total), optional
            Told of layers. A GPU may be behind.

        Returns
        -------
        float32 array (len(batch), V), (T, V), or (n, V)

        Raises
        ------
        CacheFull
            Before anything is computed.
        PymlaError
            The model was closed, or `progress` of a step asks for another step.
        """
        with self.turn:
            return self.backend.memory.to_host(self.step(batch, logits, progress)).astype(np.float32)

    @overload
    def step(
        self, batch: Batch, logits: Wanted = ..., progress: Progress | None = ..., *, hidden: Literal[False] = ...
    ) -> Array: ...

    @overload
    def step(
        self, batch: Batch, logits: Wanted = ..., progress: Progress | None = ..., *, hidden: Literal[True]
    ) -> Outputs: ...

    def step(
        self, batch: Batch, logits: Wanted = "last", progress: Progress | None = None, *, hidden: bool = False
    ) -> Array | Outputs:
        """`forward` with logits that stay in the memory of `backend`, where the next step may overwrite them: hold
        `turn` until they are read.

        Parameters
        ----------
        batch, logits, progress
            As for `forward`.
        hidden : bool
            Whether the hidden states of all tokens are wanted, too: float (T, hidden), behind the last norm. A prompt
            whose hidden states are many is better computed in slices.

        Returns
        -------
        Array, or with `hidden` an Outputs
        """
        with self._own_turn() as forward:
            return self._step(forward, batch, logits, progress, hidden)

    @property
    def has_nextn(self) -> bool:
        """Whether the nextn block is loaded."""
        return self._nextn is not None

    def nextn_step(self, spans: Items[Span], hidden: np.ndarray) -> Outputs:
        """Predict further tokens with the nextn block (`NextnBlock.step`). Hold `turn` until the result is read."""
        with self._own_turn():
            return self._block.step(spans, hidden)

    def nextn_fill(self, span: Span, hidden: Array) -> None:
        """Write rows of the nextn block's cache (`NextnBlock.fill`)."""
        with self._own_turn():
            self._block.fill(span, hidden)

    @property
    def _block(self) -> NextnBlock:
        if self._nextn is None:
            raise PymlaError("no block that predicts further tokens is loaded; load the model with `nextn`")
        return self._nextn

    @contextmanager
    def _own_turn(self) -> Iterator[Forward]:
        """Hold the turn during a step, which no callback of it can interrupt with another one."""
        with self.turn:
            forward = self._open_forward()
            self._stepping = True
            try:
                yield forward
            finally:
                self._stepping = False

    def _open_forward(self) -> Forward:
        """The forward pass of a model that is open, and not in a step."""
        self._refuse_if_stepping()
        if self._forward is None:
            raise PymlaError(CLOSED)
        return self._forward

    def _refuse_if_stepping(self) -> None:
        # Only the thread that holds the turn gets here, so this is a step's own call of `progress`.
        if self._stepping:
            raise PymlaError("a model cannot be used by the progress callback of its own step; use it afterwards")

    def _step(
        self, forward: Forward, batch: Batch, logits: Wanted, progress: Progress | None, hidden: bool
    ) -> Array | Outputs:
        step = self.cache.extend(batch)
        runs = runs_of(self.config, self.mla, batch)
        # A recorded step has nothing to tell of its layers.
        recorded = self._recorded.get(hidden) if progress is None else None
        size = recorded.size(step, runs) if recorded else None
        rows = logits if isinstance(logits, np.ndarray) else None
        if isinstance(logits, str) and logits == "last" and len(batch) < len(step.tokens):
            rows = np.cumsum([len(new) for _, new in batch]) - 1
        result: tuple[Array, ...]
        if recorded and size:
            result = recorded.replay(step, runs, size)
            if rows is not None:
                result = (self.backend.memory.take(result[0], rows), *result[1:])
        else:
            steps = {backend: step.on(backend) for backend in self.placement.backends}
            result = _results(forward, hidden, steps, runs, rows, progress)
        self.cache.advance(batch)
        return Outputs(*result) if hidden else result[0]


def _results(forward: Forward, hidden: bool, *step: Any) -> tuple[Array, ...]:
    """The results of a step: logits, and where they are wanted hidden states."""
    return forward.outputs(*step) if hidden else (forward.logits(*step),)


def _recorded(forward: Forward, backend: Backend, ctx: int, hidden: bool) -> RecordedSteps:
    """The recorded steps of a model that is on one backend, with hidden states or without."""
    return RecordedSteps(backend, ctx, lambda step, runs, _: _results(forward, hidden, {backend: step}, runs, None))


_models: "weakref.WeakSet[Model]" = weakref.WeakSet()


def _forget_turns() -> None:
    """In a forked child no other thread goes on, so none gives back the turn that it had. The step that it was in is
    not finished there, as after an interrupt."""
    for model in _models:
        model.turn, model._stepping = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turns)
