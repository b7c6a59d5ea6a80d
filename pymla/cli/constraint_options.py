"""Options that constrain the generated text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pymla.cli.inputs import argument, read
from pymla.engine.language_model import LanguageModel
from pymla.errors import PymlaError
from pymla.text.answers.formats import THINK_END, opens_reasoning
from pymla.text.constraints import Grammar

_OPTIONS = (
    click.option(
        "--json-schema", metavar="FILE|TEXT", help="JSON that fits a schema, in a file or on the command line."
    ),
    click.option("--regex", metavar="TEXT", help="Text that a regular expression (of Rust's regex crate) matches."),
    click.option(
        "--grammar",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Text that fits a grammar, in llama.cpp's notation (GBNF) or in Lark's.",
    ),
)


def constraint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options, for a command's arguments `json_schema`, `regex` and `grammar`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def constraints(json_schema: str | None, regex: str | None, grammar: Path | None) -> dict[str, str | None]:
    """The options of `LanguageModel.generation` that the command's options ask for."""
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise PymlaError(f"{' and '.join(names)}: a text has one constraint; give one of them")
    return {
        "json_schema": None if json_schema is None else _schema(argument(json_schema)),
        "regex": None if regex is None else argument(regex),
        "grammar": None if grammar is None else read(grammar),
    }


def after_reasoning(given: dict[str, str | None], language_model: LanguageModel, ids: Sequence[int]) -> dict[str, Any]:
    """The same options for a conversation, where the model may think first: the constraint is for its answer."""
    if all(value is None for value in given.values()) or not opens_reasoning(ids, language_model.tokenizer):
        return dict(given)
    size = language_model.config.vocab_size
    return {"grammar": Grammar.of(language_model.tokenizer, **given, after=THINK_END, vocab_size=size)}


def _schema(text: str) -> str:
    """A schema that is given as a text or as a file's name."""
    is_schema = text.lstrip().startswith("{") or text.strip() in ("true", "false")
    return text if is_schema else read(Path(text))
