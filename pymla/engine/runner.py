"""What the engine knows of a model: sequences, their pages, and steps. Nothing above it knows where layers are."""

import threading
from collections.abc import Sequence as Items
from typing import Protocol

import numpy as np

from pymla.backend import Array, Progress, TokenSampler
from pymla.engine.cache import Batch, Sequence
from pymla.engine.forward import Outputs
from pymla.engine.model import Model, Wanted
from pymla.errors import PymlaError
from pymla.models.config import ModelConfig
from pymla.text.sampling import Sampled, SamplingParams


class Runner(Protocol):
    """A model that takes steps, wherever its parts are."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def ctx(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def pages(self) -> int:
        """Pages of the cache."""

    @property
    def room(self) -> int:
        """Pages that can be had without taking any from a sequence."""

    @property
    def turn(self) -> threading.RLock:
        """Held during a step, and until its logits are read."""

    def new_sequence(self) -> Sequence:
        """An empty sequence."""

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's pages back and empty it."""

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence with the same tokens, which shares the pages."""

    def attach(self, sequence: Sequence, tokens: Items[int]) -> int:
        """Let an empty sequence begin with the longest part of a text that the cache has kept, in whole pages, and
        without its last token. Returns the tokens of this part."""

    def keep(self, sequence: Sequence) -> None:
        """Let later sequences begin with the full pages of this one (`attach`), even when it was freed."""

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget a sequence's tokens from position `length` on."""

    def swap_out(self, sequence: Sequence) -> None:
        """Move a sequence's rows out of the cache, until a step needs them."""

    def pages_needed(self, sequence: Sequence, new_tokens: int) -> int:
        """Pages that a step with so many new tokens of a sequence takes from `room`."""

    def sampler(self, params: SamplingParams, history: Items[int]) -> TokenSampler:
        """Chooses tokens for a sequence after a text."""

    def step(self, batch: Batch, rows: np.ndarray | None, progress: Progress | None, hidden: bool) -> Outputs:
        """Append tokens to sequences; hold `turn` until the result was read.

        Parameters
        ----------
        batch : list of (Sequence, int32 array)
            An interrupted step leaves the sequences as they were.
        rows : int array (n,), optional
            The tokens after which logits are wanted, by their numbers in the step. None: the last of each sequence.
        progress : callable(done, total), optional
        hidden : bool
            Whether hidden states are wanted, too.

        Returns
        -------
        Outputs
            Logits, float32 (n, V), for `sample`; and hidden states, or else None in their place.
        """

    def take(self, logits: Array, rows: np.ndarray) -> Array:
        """Some rows of logits, int (n,), copied."""

    def sample(
        self, samplers: Items[TokenSampler], logits: Array, masks: Items[np.ndarray | None]
    ) -> "list[Sampled | PymlaError]":
        """A token for each row of logits, or why there is none."""


class LocalRunner:
    """A runner over a model in this process.

    Parameters
    ----------
    model : Model
    """

    def __init__(self, model: Model):
        self._model, self._cache = model, model.cache
        self.new_sequence, self.sampler = model.new_sequence, model.sampler
        self.free, self.fork, self.attach, self.keep = model.free, model.fork, model.attach, model.keep
        self.truncate, self.swap_out = model.truncate, model.swap_out
        self.pages_needed, self.take = self._cache.pages_needed, model.backend.memory.take

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._model.config

    @property
    def ctx(self) -> int:
        """Tokens of the longest sequence."""
        return self._model.ctx

    @property
    def pages(self) -> int:
        """Pages of the cache."""
        return self._cache.pages

    @property
    def room(self) -> int:
        """Pages that can be had without taking any from a sequence."""
        return self._cache.room

    @property
    def turn(self) -> threading.RLock:
        """The model's turn."""
        return self._model.turn

    def step(self, batch: Batch, rows: np.ndarray | None, progress: Progress | None, hidden: bool) -> Outputs:
        """`Runner.step`."""
        wanted: Wanted = "last" if rows is None else rows
        if hidden:
            return self._model.step(batch, wanted, progress, hidden=True)
        return Outputs(self._model.step(batch, wanted, progress), None)

    def sample(
        self, samplers: Items[TokenSampler], logits: Array, masks: Items[np.ndarray | None]
    ) -> list[Sampled | PymlaError]:
        """`Runner.sample`."""
        return self._model.backend.sampling.sample_batch(samplers, logits, masks)
