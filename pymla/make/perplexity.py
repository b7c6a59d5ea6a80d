"""Perplexity of a text: windows of the same number of tokens are read one by one, and of each the second half counts.

The definition is that of llama.cpp's tools/perplexity/perplexity.cpp (`perplexity`, and `perplexity_v2` with a stride),
so that figures can be compared: every window begins with BOS in the place of its first token, where the model's texts
begin with BOS; the first half of a window is read and does not count, because a model that has seen little is a poor
judge. The error is that of a mean of independent tokens.

>>> import pymla
>>> from pymla.make import perplexity
>>> model = pymla.load(ctx=512, cache_tokens=perplexity.cache_tokens(512))                  # doctest: +SKIP
>>> windows = perplexity.cut(model.tokenize(text), 512, model.tokenizer)                    # doctest: +SKIP
>>> perplexity.perplexity(list(perplexity.window_losses(model.model, windows)))             # doctest: +SKIP
Mean(value=10.3707, error=0.2519)
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pymla import checks
from pymla.engine.cache import Batch
from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files import kl_base
from pymla.pages import PAGE, pages_of
from pymla.text.tokenizer import Tokenizer

#: Tokens of a step, of several windows. More tokens a step read the weights less often.
STEP_TOKENS = 2048
#: Bytes of the logits of a step.
LOGITS_BYTES = 512 << 20

#: Told of tokens: those that have been read, and all.
Progress = Callable[[int, int], object]


class Mean(NamedTuple):
    """A mean and its standard error; NaN where too few values tell."""

    value: float
    error: float


def mean(values: np.ndarray) -> Mean:
    """The mean of independent values, float64 (n,). Its error is NaN for a single one."""
    count = len(values)
    value = float(values.mean())
    return Mean(value, math.sqrt(float(values.var()) / (count - 1)) if count > 1 else math.nan)


def perplexity(losses: Iterable[np.ndarray]) -> Mean:
    """The perplexity of windows by their losses (`window_losses`); at least one window."""
    loss = mean(np.concatenate(list(losses)))
    # A model that is sure of wrong tokens may have a loss whose exponential no float holds.
    value = math.exp(min(loss.value, 700.0))
    return Mean(value, value * loss.error)


class Windows(NamedTuple):
    """Windows of a text.

    Attributes
    ----------
    tokens : int32 array (n, ctx)
        As they follow each other in the text.
    first : int
        Logits count from those after this token of a window on, to those after the last but one: they predict tokens
        ``first + 1`` to ``ctx - 1``.
    bos : int or None
        The token that stands in the place of every window's first one.
    """

    tokens: np.ndarray
    first: int
    bos: int | None

    @property
    def ctx(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    @property
    def counted(self) -> int:
        """Tokens of a window that are predicted and count."""
        return self.ctx - 1 - self.first

    def inputs(self, window: int) -> np.ndarray:
        """The tokens of a window that the model reads: all but the last, behind which no prediction counts."""
        tokens = self.tokens[window, :-1].copy()
        if self.bos is not None:
            tokens[0] = self.bos
        return tokens

    def targets(self, window: int) -> np.ndarray:
        """The tokens of a window that are predicted and count."""
        return self.tokens[window, self.first + 1 :]


def bos_of(tokenizer: Tokenizer) -> int | None:
    """The token that stands in the place of every window's first one; None for models whose texts begin without."""
    return tokenizer.bos_id if tokenizer.add_bos else None


def cut(
    ids: Sequence[int], ctx: int, tokenizer: Tokenizer, chunks: int | None = None, stride: int | None = None
) -> Windows:
    """Cut a text into windows.

    Parameters
    ----------
    ids : list of int
        The text's tokens.
    ctx : int
        Tokens of a window: from 3 on, or from 2 with a stride.
    tokenizer : Tokenizer
        For BOS.
    chunks : int, optional
        The first so many windows; by default as many as there are. What is left at the end of the text does not count.
    stride : int, optional
        Tokens from one window to the next, of which each window counts as many, its last; 1 to ``ctx - 1``. By default
        windows do not overlap, and the second half of each counts.

    Raises
    ------
    PymlaError
        The text is shorter than a window, or an argument is out of range.
    """
    ctx = checks.integer("ctx", ctx, 3 if stride is None else 2)
    if stride is not None:
        stride = checks.integer("stride", stride, 1, ctx - 1)
    if len(ids) < ctx:
        raise PymlaError(f"the text has {len(ids)} tokens, and a window has {ctx}: lower `ctx` or take a longer text")
    step = stride or ctx
    starts = range(0, len(ids) - ctx + 1, step)
    if chunks is not None:
        starts = starts[: checks.integer("chunks", chunks, 1)]
    array = np.asarray(ids, np.int32)
    tokens = np.stack([array[start : start + ctx] for start in starts])
    return Windows(tokens, kl_base.first_record(ctx) if stride is None else ctx - 1 - stride, bos_of(tokenizer))


def cache_tokens(ctx: int) -> int:
    """Tokens of the cache that steps with windows of `ctx` tokens use (`pymla.load`)."""
    return max(1, STEP_TOKENS // ctx) * pages_of(ctx) * PAGE


class Piece(NamedTuple):
    """Logits of a window that count."""

    window: int
    first: int  # how many of the window's come before these
    logits: np.ndarray  # float32 (n, V), which the next piece may overwrite


def counted_logits(model: Model, windows: Windows, progress: Progress | None = None) -> Iterator[Piece]:
    """The logits that count, of one window after the other.

    Several windows go through the model together, as far as the cache and `LOGITS_BYTES` permit; a window whose logits
    are larger than that goes through it in parts. The output matrix is multiplied for the tokens that count alone.

    Parameters
    ----------
    model : Model
        With a context of a window's tokens at least.
    windows : Windows
    progress : callable(done, total), optional
        Told of tokens, as layers are done.

    Yields
    ------
    Piece

    Raises
    ------
    PymlaError
        A window does not fit the context.
    """
    rows = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    pages = pages_of(windows.ctx)
    at_once = min(model.cache.pages // pages, rows // windows.counted, STEP_TOKENS // windows.ctx)
    tokens = _Tokens(windows.tokens.size, progress)
    if at_once < 2:
        for window in range(len(windows.tokens)):
            yield from _window_in_parts(model, windows, window, rows, tokens)
        return
    for start in range(0, len(windows.tokens), at_once):
        yield from _several(model, windows, range(start, min(start + at_once, len(windows.tokens))), tokens)


class _Tokens:
    """Counts the tokens of all windows, as the layers of steps are done."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done = total, progress, 0

    def layers(self, count: int) -> Progress | None:
        """`progress` of a step that has `count` tokens."""
        report = self._progress
        if not report:
            return None
        return lambda done, total: report(self._done + count * done // total, self._total)

    def add(self, count: int) -> None:
        """Count the tokens of a step that is done."""
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)


def _several(model: Model, windows: Windows, numbers: range, tokens: _Tokens) -> Iterator[Piece]:
    """The logits of some windows, in one step."""
    inputs = [windows.inputs(number) for number in numbers]
    length = windows.ctx - 1
    wanted = np.arange(windows.first, length) + length * np.arange(len(inputs))[:, None]
    batch = [(model.new_sequence(), each) for each in inputs]
    count = windows.ctx * len(inputs)
    try:
        logits = step_logits(model, batch, wanted.ravel(), tokens.layers(count))
    finally:
        for sequence, _ in batch:
            model.free(sequence)
    for i, number in enumerate(numbers):
        yield Piece(number, 0, logits[i * windows.counted : (i + 1) * windows.counted])
    tokens.add(count)


def _window_in_parts(model: Model, windows: Windows, window: int, rows: int, tokens: _Tokens) -> Iterator[Piece]:
    """The logits of a window, at most `rows` of them a step. What does not count is read with the first of them."""
    inputs, sequence = windows.inputs(window), model.new_sequence()
    try:
        for start in range(windows.first, len(inputs), rows):
            stop, done = min(start + rows, len(inputs)), sequence.length
            batch, wanted = [(sequence, inputs[done:stop])], np.arange(start, stop) - done
            # The last token of a window is not read, but counts as done.
            count = stop - done + (stop == len(inputs))
            yield Piece(window, start - windows.first, step_logits(model, batch, wanted, tokens.layers(count)))
            tokens.add(count)
    finally:
        model.free(sequence)


def step_logits(
    model: Model, batch: Batch, wanted: np.ndarray, progress: Callable[[int, int], object] | None = None
) -> np.ndarray:
    """Logits of a step after some of its tokens (`Model.forward`), in the host's memory: float32 (n, V)."""
    with model.turn:
        logits = model.backend.memory.to_host(model.step(batch, wanted, progress))
        return np.ascontiguousarray(logits, np.float32)


def compile_kernels(progress: Callable[[int, int, str], object], warn: Callable[[str], object]) -> None:
    """Have the kernels of log-probabilities ready; arguments as for `pymla.backend.Backend.compile_for`."""
    from pymla.cpu import log_probabilities  # which imports Numba

    log_probabilities.compile_kernels(progress, warn)


def log_sums_of(logits: np.ndarray, where: str) -> np.ndarray:
    """What logits, float32 (n, V), are above log-probabilities in nats, float64 (n,).

    Raises
    ------
    PymlaError
        A logit is NaN or plus infinity; `where` says what the logits belong to.
    """
    from pymla.cpu import log_probabilities  # which imports Numba

    log_sums = log_probabilities.log_sum_exp(logits, np.empty(len(logits)))
    if not np.isfinite(log_sums).all():
        raise PymlaError(f"a logit of {where} is not finite: the model's weights are damaged, or overflow")
    return log_sums


def window_losses(
    model: Model, windows: Windows, base: kl_base.BaseWriter | None = None, progress: Progress | None = None
) -> Generator[np.ndarray, None, None]:
    """The negative log-probabilities of the tokens that count, float64 (``windows.counted``,) in nats, of one window
    after the other.

    Parameters
    ----------
    model, windows, progress
        As for `counted_logits`.
    base : BaseWriter, optional
        Gets the records of all log-probabilities.

    Raises
    ------
    PymlaError
        A logit is not finite.
    """
    losses = np.empty(windows.counted)
    for piece in counted_logits(model, windows, progress):
        part = slice(piece.first, piece.first + len(piece.logits))
        targets = windows.targets(piece.window)[part]
        log_sums = log_sums_of(piece.logits, f"window {piece.window}")
        losses[part] = log_sums - piece.logits[np.arange(len(targets)), targets]
        if base is not None:
            base.write(_records(piece.logits, log_sums))
        del piece  # its logits, before the next step computes others
        if part.stop == windows.counted:
            yield losses
            losses = np.empty(windows.counted)


def _records(logits: np.ndarray, log_sums: np.ndarray) -> np.ndarray:
    """Logits, float32 (n, V), as records of a file."""
    from pymla.cpu import log_probabilities  # which imports Numba

    records = np.empty((len(logits), kl_base.record_words(logits.shape[1])), np.uint16)
    return log_probabilities.encode(logits, log_sums, records)
