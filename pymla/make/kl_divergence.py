"""How far a model's predictions are from those of a base, such as the same model before it was quantised.

The base's log-probabilities are in a file (`pymla.files.kl_base`), with the tokens of its text. The statistics are
those of llama.cpp's tools/perplexity/perplexity.cpp (`kl_divergence`), where Q stands for the model, and p for the
probability of the token that follows in the text.
"""

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np

from pymla.engine.model import Model
from pymla.errors import PymlaError
from pymla.files import kl_base
from pymla.make.perplexity import Mean, Progress, Windows, counted_logits, log_sums_of, mean, perplexity

#: Percentiles of divergences and of differences of probabilities that are told.
PERCENTILES = 99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1


class Comparison(NamedTuple):
    """Tokens of a window that count; arrays (n,). Losses are negative log-probabilities, in nats."""

    losses: np.ndarray  # float64
    base_losses: np.ndarray  # float64
    divergences: np.ndarray  # float64, nats
    same_top: np.ndarray  # int32: 1 where the likeliest token is the base's


def windows_of(base: kl_base.BaseFile, bos: int | None, chunks: int | None = None) -> Windows:
    """The windows of a file; the first `chunks`, or all."""
    return Windows(base.tokens[:chunks], kl_base.first_record(base.ctx), bos)


def check_same(
    base: kl_base.BaseFile, vocab_size: int, ctx: int | None = None, ids: Sequence[int] | None = None
) -> None:
    """Refuse a base of another vocabulary, context or text.

    Parameters
    ----------
    base : BaseFile
    vocab_size : int
        Of the model.
    ctx : int, optional
        Tokens of a window, if they were asked for.
    ids : list of int, optional
        Tokens of the text, if there is one.

    Raises
    ------
    PymlaError
    """
    if base.vocab_size != vocab_size:
        raise PymlaError(f"{base.path}: has a vocabulary of {base.vocab_size} tokens, and the model has {vocab_size}")
    if ctx is not None and ctx != base.ctx:
        raise PymlaError(f"{base.path}: has windows of {base.ctx} tokens, and `ctx` is {ctx}; leave it out")
    if ids is None:
        return
    wanted = base.tokens.ravel()
    if len(ids) < len(wanted):
        raise PymlaError(
            f"{base.path}: was made of {len(wanted)} tokens at least, and the text has {len(ids)}: it is another"
        )
    different = np.flatnonzero(np.asarray(ids[: len(wanted)]) != wanted)
    if len(different):
        at = int(different[0])
        raise PymlaError(
            f"{base.path}: was made of another text, or by another tokenizer: its token {at} is {wanted[at]}, and the "
            f"text's is {ids[at]}"
        )


def compare_windows(
    model: Model, windows: Windows, base: kl_base.BaseFile, progress: Progress | None = None
) -> Generator[Comparison, None, None]:
    """Compare a model with a base, one window after the other.

    Parameters
    ----------
    model, progress
        As for `pymla.make.perplexity.counted_logits`.
    windows : Windows
        From `windows_of`.
    base : BaseFile

    Raises
    ------
    PymlaError
        A logit is not finite, or the file is damaged.
    """
    parts: list[Comparison] = []
    for piece in counted_logits(model, windows, progress):
        records = base.records(piece.window, piece.first, len(piece.logits))
        stop = piece.first + len(piece.logits)
        targets = windows.targets(piece.window)[piece.first : stop]
        parts.append(compare(piece.logits, records, targets, f"window {piece.window}"))
        del piece  # its logits, before the next step computes others
        if stop == windows.counted:
            yield Comparison(*(np.concatenate(each) for each in zip(*parts, strict=True)))
            parts = []


def compare(logits: np.ndarray, records: np.ndarray, targets: np.ndarray, where: str) -> Comparison:
    """Compare rows of logits, float32 (n, V), with a base's records, for the tokens that followed, int (n,)."""
    from pymla.cpu import log_probabilities  # which imports Numba

    log_sums, rows = log_sums_of(logits, where), np.arange(len(logits))
    heads = np.ascontiguousarray(records[:, :4]).view("<f4").astype(np.float64)
    base_losses = -(heads[:, 0] * records[rows, 4 + targets] + heads[:, 1])
    divergences, same = np.empty(len(logits)), np.empty(len(logits), np.int32)
    log_probabilities.divergence(logits, log_sums, records, divergences, same)
    return Comparison(log_sums - logits[rows, targets], base_losses, divergences, same)


class Spread(NamedTuple):
    """A mean with its error, and how values are spread."""

    mean: Mean
    largest: float
    percentiles: dict[float, float]  # by `PERCENTILES`
    smallest: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Of float64 (n,). Between two values a percentile is interpolated linearly."""
        percentiles = dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))
        return cls(mean(values), float(values.max()), percentiles, float(values.min()))


class Statistics(NamedTuple):
    """All that is told of a comparison. Errors are those of means of independent tokens."""

    tokens: int
    perplexity: Mean
    base_perplexity: Mean
    correlation: float  # of both losses, -1 to 1; NaN where one of them is always the same
    log_ratio: Mean  # ln of the ratio of both perplexities
    ratio: Mean
    difference: Mean  # of both perplexities
    divergence: Spread  # nats
    probability: Spread  # Δp: the probability of the token that followed, less the base's
    probability_rms: Mean
    same_top: Mean  # share of tokens with the same likeliest token


def statistics(comparisons: Sequence[Comparison]) -> Statistics:
    """The statistics of windows that were compared; at least one."""
    losses, base_losses, divergences, same_top = (np.concatenate(each) for each in zip(*comparisons, strict=True))
    own, base = perplexity([losses]), perplexity([base_losses])
    log_ratio = mean(losses - base_losses)
    ratio = math.exp(min(log_ratio.value, 700.0))
    covariance = _covariance_of_means(losses, base_losses)
    difference = own.error**2 + base.error**2 - 2 * covariance * own.value * base.value
    change = np.exp(-losses) - np.exp(-base_losses)
    squares = mean(change**2)
    rms = math.sqrt(squares.value)
    return Statistics(
        tokens=len(losses),
        perplexity=own,
        base_perplexity=base,
        correlation=_correlation(losses, base_losses),
        log_ratio=log_ratio,
        ratio=Mean(ratio, ratio * log_ratio.error),
        difference=Mean(own.value - base.value, math.sqrt(max(difference, 0.0))),
        divergence=Spread.of(divergences),
        probability=Spread.of(change),
        probability_rms=Mean(rms, squares.error / (2 * rms) if rms else 0.0),
        same_top=mean(same_top.astype(np.float64)),
    )


def _covariance_of_means(x: np.ndarray, y: np.ndarray) -> float:
    """The covariance of the means of two arrays (n,); NaN for a single pair."""
    count = len(x)
    return float(((x - x.mean()) * (y - y.mean())).mean()) / (count - 1) if count > 1 else math.nan


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread else math.nan
