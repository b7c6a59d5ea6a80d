"""Results of ``pymla perplexity``, for people and as JSON."""

from collections.abc import Iterator
from typing import Any

from pymla.make.choices import Score
from pymla.make.kl_divergence import Spread, Statistics
from pymla.make.perplexity import Mean


def perplexity_line(found: Mean) -> str:
    """A perplexity with its error."""
    return f"PPL = {found.value:.4f} ± {found.error:.5f}"


def statistics_text(found: Statistics) -> str:
    """The statistics of a comparison, under llama.cpp's names."""
    return "\n".join(_lines(found))


def score_line(name: str, found: Score, chance: float) -> str:
    """The result of questions with several answers."""
    low, high = found.interval
    return (
        f"{name}: {found.share:.2%} ± {found.error:.2%} of {found.tasks:,} tasks, with 95 % from {low:.2%} to "
        f"{high:.2%}; by chance {chance:.2%}"
    )


def plain(value: Any) -> Any:
    """A result as values that JSON can hold: named tuples become objects."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def _lines(found: Statistics) -> Iterator[str]:
    yield _line("Mean PPL(Q)", found.perplexity)
    yield _line("Mean PPL(base)", found.base_perplexity)
    yield f"{'Cor(ln(PPL(Q)), ln(PPL(base)))':30}: {found.correlation:11.2%}"
    yield _line("Mean ln(PPL(Q)/PPL(base))", found.log_ratio)
    yield _line("Mean PPL(Q)/PPL(base)", found.ratio)
    yield _line("Mean PPL(Q)-PPL(base)", found.difference)
    yield ""
    yield from _spread("KLD", found.divergence, "")
    yield ""
    yield from _spread("Δp", found.probability, "%")
    yield _line("RMS Δp", found.probability_rms, "%")
    yield _line("Same top p", found.same_top, "%")


def _spread(name: str, found: Spread, unit: str) -> Iterator[str]:
    yield _line(f"Mean {name}", found.mean, unit)
    yield _line(f"Maximum {name}", found.largest, unit)
    for share, value in found.percentiles.items():
        yield _line(f"Median {name}" if share == 50 else f"{share:4.1f}% {name}", value, unit)
    yield _line(f"Minimum {name}", found.smallest, unit)


def _line(name: str, found: Mean | float, unit: str = "") -> str:
    factor, digits = (100, 3) if unit else (1, 6)
    if isinstance(found, Mean):
        return (
            f"{name:30}: {factor * found.value:10.{digits}f} ± {factor * found.error:.{digits}f}{unit and ' ' + unit}"
        )
    return f"{name:30}: {factor * found:10.{digits}f}{unit and ' ' + unit}"
