"""The sweep: speed of prompts and of generation as the context grows.

A point of the sweep is what llama.cpp's relatives call a row of ``llama-sweep-bench``: with N_KV tokens in the cache,
first TG tokens are generated, one by one, and forgotten; then a prompt of PP tokens is appended, which stays. Token ids
are random, with a fixed seed; choosing a token from its logits is not part of the times.

>>> import pymla
>>> from pymla.measure import sweep
>>> model = pymla.load(ctx=128)                                   # doctest: +SKIP
>>> [row.n_kv for row in sweep.sweep(model, sweep.Settings(pp=32, tg=4, depths=(0, 64)))]  # doctest: +SKIP
[0, 64]
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pymla.backend import Rates
from pymla.engine import costs
from pymla.errors import PymlaError

if TYPE_CHECKING:
    from pymla.engine.language_model import LanguageModel
    from pymla.engine.model import Model


@dataclass(frozen=True)
class Settings:
    """Lengths of the prompt and of the generated text, and where they are measured.

    Raises
    ------
    PymlaError
        A number is out of range, or the depths are not in ascending order.
    """

    pp: int = 512
    tg: int = 128
    depths: tuple[int, ...] = (0,)  # N_KV of each point
    repeat: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        if self.pp < 0 or self.tg < 0 or self.pp + self.tg == 0:
            raise PymlaError(f"`pp` is {self.pp} and `tg` {self.tg}: one of them must be above 0, and none below")
        if self.repeat < 1:
            raise PymlaError(f"`repeat` is {self.repeat}; 1 at least is expected")
        if not self.depths or min(self.depths) < 0 or list(self.depths) != sorted(set(self.depths)):
            given = ",".join(map(str, self.depths))
            raise PymlaError(
                f"`depths` is {given}; numbers of tokens from 0 on are expected, in ascending order, each once"
            )

    @property
    def tokens(self) -> int:
        """Tokens of context that the last point needs."""
        return self.depths[-1] + max(self.pp, self.tg)


def sweep_depths(ctx: int, pp: int, tg: int) -> tuple[int, ...]:
    """N_KV of ``llama-sweep-bench``: every `pp` tokens, as far as the context holds what is measured from there on."""
    return tuple(range(0, ctx - max(pp, tg) + 1, pp or tg or 1))


@dataclass(frozen=True)
class Row:
    """A point of the sweep. Times are those of all repetitions; rates come from their medians."""

    model: str  # the file's name
    mla: str
    dsa: bool  # whether attention is sparse
    cache_type: str
    device: str  # "cpu", "cuda" or "reference"; with a + between them where layers are on several
    threads: int
    pp: int
    tg: int
    n_kv: int
    pp_seconds: tuple[float, ...]
    tg_seconds: tuple[float, ...]
    pp_macs: int  # multiply-adds of the prompt
    tg_bytes: int  # bytes that generation reads
    cache_bytes: int  # of N_KV tokens

    @property
    def t_pp(self) -> float | None:
        """Seconds of the prompt; None without one."""
        return statistics.median(self.pp_seconds) if self.pp else None

    @property
    def t_tg(self) -> float | None:
        """Seconds of generation; None without any."""
        return statistics.median(self.tg_seconds) if self.tg else None

    @property
    def s_pp(self) -> float | None:
        """Tokens of the prompt per second."""
        return self.pp / self.t_pp if self.t_pp else None

    @property
    def s_tg(self) -> float | None:
        """Generated tokens per second."""
        return self.tg / self.t_tg if self.t_tg else None

    def shares(self, limits: Rates) -> tuple[float | None, float | None]:
        """Shares of the device's limits: the prompt's of int8 multiply-adds, generation's of streamed bytes. A model on
        several devices has none: its layers run one after the other, each against another limit."""
        if "+" in self.device:
            return None, None
        pp = self.pp_macs / self.t_pp / limits.int8 if self.t_pp else None
        tg = self.tg_bytes / self.t_tg / limits.read if self.t_tg else None
        return pp, tg


def sweep(
    language_model: "LanguageModel", settings: Settings, progress: Callable[[int, int], object] | None = None
) -> Iterator[Row]:
    """Measure the points one after the other; the cache is filled in between.

    Parameters
    ----------
    language_model : LanguageModel
        With a context of at least ``settings.tokens``.
    settings : Settings
    progress : callable(done, total), optional
        Tokens, those that only fill the cache or warm up included.

    Yields
    ------
    Row

    Raises
    ------
    PymlaError
        The context is too short.
    """
    ctx = language_model.model.ctx
    if settings.tokens > ctx:
        raise PymlaError(f"the measurement needs a context of {settings.tokens} tokens and has {ctx}; raise `ctx`")
    engine = _Engine(language_model, settings, progress)
    try:
        engine.warm_up()
        for depth in settings.depths:
            engine.fill(depth)
            tg_seconds = [engine.generate() for _ in range(settings.repeat)]
            pp_seconds = [engine.prompt(depth) for _ in range(settings.repeat)]
            yield engine.row(depth, pp_seconds, tg_seconds)
    finally:
        engine.free()


class _Engine:
    """One sequence of random tokens that grows."""

    def __init__(
        self,
        language_model: "LanguageModel",
        settings: Settings,
        progress: Callable[[int, int], object] | None,
    ):
        self._language_model, self._settings = language_model, settings
        self._model = language_model.model
        self._sequence = self._model.new_sequence()
        self._random = np.random.default_rng(settings.seed)
        self._progress = progress
        self._warm_tokens = min(64, self._model.ctx)
        pp, tg, depths = settings.pp, settings.tg, settings.depths
        # A point's prompt fills the cache for the next one, except where depths lie closer than that.
        filled = sum(max(0, b - a - pp) for a, b in zip((0, *depths), depths, strict=False)) + depths[0]
        self._total = self._warm_tokens + filled + settings.repeat * len(depths) * (pp + tg)
        self._done = 0

    def warm_up(self) -> None:
        """A short prompt and two generated tokens, of which the first records the step."""
        self._append(self._warm_tokens)
        for _ in range(2):
            self._truncate(self._warm_tokens - 1)
            self._step()
        self._truncate(0)

    def free(self) -> None:
        """Give the cache back, so that the model can be measured again."""
        self._model.free(self._sequence)

    def fill(self, depth: int) -> None:
        """Bring the cache to `depth` tokens."""
        if self._sequence.length > depth:
            self._truncate(depth)
        elif self._sequence.length < depth:
            self._append(depth - self._sequence.length)

    def generate(self) -> float:
        """Seconds of generating; the tokens are forgotten."""
        depth = self._sequence.length
        began = time.perf_counter()
        for _ in range(self._settings.tg):
            self._step()
        seconds = time.perf_counter() - began
        self._truncate(depth)
        self._report(self._settings.tg)
        return seconds

    def prompt(self, depth: int) -> float:
        """Seconds of a prompt at `depth` tokens, which stays in the cache."""
        self._truncate(depth)
        return self._append(self._settings.pp) if self._settings.pp else 0.0

    def row(self, depth: int, pp_seconds: Sequence[float], tg_seconds: Sequence[float]) -> Row:
        """The point at `depth` tokens."""
        model, settings = self._language_model, self._settings
        kinds: dict[str, Any] = {"cache_type": self._model.cache.cache_type, "mla": self._model.mla}
        ops = costs.step_ops(model.config, None, settings.pp, depth + settings.pp, **kinds) if settings.pp else ()
        # The bytes of a token grow evenly with the cache: the mean of first and last is that of all.
        ends = [
            costs.token_bytes(model.config, model.file.tensors, depth + n, **kinds) for n in (1, max(1, settings.tg))
        ]
        return Row(
            model=Path(model.file.path).name,
            mla=self._model.mla,
            dsa=model.config.indexer is not None,
            cache_type=self._model.cache.cache_type,
            device=model.device,
            threads=thread_count(self._model),
            pp=settings.pp,
            tg=settings.tg,
            n_kv=depth,
            pp_seconds=tuple(pp_seconds),
            tg_seconds=tuple(tg_seconds),
            pp_macs=sum(op.macs for op in ops),
            tg_bytes=round(sum(ends) / 2 * settings.tg),
            cache_bytes=depth * self._model.cache.row_bytes,
        )

    def _append(self, count: int) -> float:
        """Seconds of a forward pass over random tokens."""
        tokens = self._tokens(count)
        began = time.perf_counter()
        self._forward(tokens, self._layers(count))
        seconds = time.perf_counter() - began
        self._report(count)
        return seconds

    def _step(self) -> None:
        self._forward(self._tokens(1))

    def _forward(self, tokens: np.ndarray, progress: Callable[[int, int], object] | None = None) -> None:
        """A forward pass; where logits stay on a GPU, one of them is fetched, as a chosen token would be."""
        logits = self._model.step([(self._sequence, tokens)], progress=progress)
        self._model.backend.memory.to_host(logits[:, :1])

    def _truncate(self, length: int) -> None:
        self._model.cache.truncate(self._sequence, length)

    def _tokens(self, count: int) -> np.ndarray:
        return self._random.integers(self._language_model.config.vocab_size, size=count, dtype=np.int32)

    def _layers(self, count: int) -> Callable[[int, int], object] | None:
        """`progress` of a step of `count` tokens, which is told of layers."""
        progress = self._progress
        if not progress:
            return None
        return lambda done, total: progress(self._done + count * done // total, self._total)

    def _report(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)


def thread_count(model: "Model") -> int:
    """Threads that a model's backends compute with."""
    return max(backend.thread_count() for backend in model.placement.backends)
