"""Writing to standard output: text as it is, and JSON that every reader takes."""

import json
import math
import sys
from typing import Any

import click

from pymla.printable import for_terminal


def write_text(text: str) -> None:
    """Write generated text at once. To a terminal without control characters; to a pipe or a file as it is."""
    sys.stdout.write(for_terminal(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Any, indent: int | None = None) -> None:
    """Write a value as JSON and a line end, in ASCII under every locale. JSON has no infinity and no NaN: they
    become the strings "inf", "-inf" and "nan"."""
    click.echo(json.dumps(_finite(value), indent=indent, allow_nan=False).encode("ascii"))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
