"""Options of speculation: who drafts tokens of the generated text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pymla.cli.sections import SectionOption
from pymla.cli.terminal import Terminal
from pymla.engine.engine import DRAFTERS
from pymla.engine.language_model import LanguageModel
from pymla.engine.loading import load
from pymla.engine.speculation.step import MOST, Speculation
from pymla.errors import PymlaError

_SECTION = "Speculation"

_OPTIONS = (
    click.option(
        "--speculate",
        cls=SectionOption,
        section=_SECTION,
        type=click.Choice(DRAFTERS),
        help="Draft tokens that the model verifies together: ngram, what followed the last tokens where they occurred "
        "before; draft, what --draft-model writes; mtp, what the model's own block for further tokens predicts.",
    ),
    click.option(
        "--draft-model",
        cls=SectionOption,
        section=_SECTION,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="GGUF file of a smaller model with the same vocabulary, for --speculate draft.",
    ),
    click.option(
        "--draft-tokens",
        cls=SectionOption,
        section=_SECTION,
        type=click.IntRange(min=1),
        default=MOST,
        show_default=True,
        help="Tokens of the longest draft; shorter ones where they pay more.",
    ),
)


def speculation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options, for a command's arguments `speculate`, `draft_model` and `draft_tokens`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check(speculate: str | None, draft_model: Path | None) -> None:
    """Raise a PymlaError where one of the two options lacks the other."""
    if draft_model is not None and speculate != "draft":
        raise PymlaError("--draft-model is for --speculate draft: give it, too")
    if draft_model is None and speculate == "draft":
        raise PymlaError("--speculate draft: give the smaller model as --draft-model")


def speculation(
    language_model: LanguageModel,
    speculate: str | None,
    draft_model: Path | None,
    draft_tokens: int,
    threads: int | None,
    terminal: Terminal,
) -> Speculation | None:
    """What the options ask for. Loads the draft model."""
    if speculate is None:
        return None
    drafts = None if draft_model is None else load(draft_model, threads=threads, report=terminal)
    return language_model.engine.speculation(speculate, draft_model=drafts, most=draft_tokens)
