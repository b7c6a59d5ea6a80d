"""Texts and pairs that a user gives to a command."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import click

from pymla.errors import PymlaError
from pymla.files.overrides import Value
from pymla.files.textfile import decode
from pymla.printable import shown


def biases(pairs: Iterable[str]) -> dict[int, float]:
    """Logit biases, from ID=VALUE."""
    found = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            found[int(token)] = float(value)
        except ValueError:
            raise PymlaError(f"--logit-bias {pair!r}: write ID=VALUE, as in 42=-1.5") from None
    return found


def sequence_breakers(texts: Iterable[str]) -> list[str] | None:
    """DRY's sequence breakers: texts in which a backslash begins the same escapes as in llama.cpp, or one ``none``.
    None where nothing was given."""
    given = [_unescaped(argument(text)) for text in texts]
    if not given:
        return None
    return [] if given == ["none"] else given


def _unescaped(text: str) -> str:
    escapes = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}
    return re.sub(r"\\([nrt'\"\\])", lambda found: escapes[found[1]], text)


def variables(pairs: Iterable[str]) -> dict[str, Any]:
    """Variables of a chat template, from NAME=VALUE."""
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (separator and name.isidentifier()):
            raise PymlaError(f"--template-var {shown(pair)}: write NAME=VALUE, as in enable_thinking=false")
        if name == "messages":
            raise PymlaError("--template-var messages: the messages are the prompt and --system")
        found[name] = _json_or_text(value)
    return found


def overrides(pairs: Iterable[str]) -> dict[str, Value]:
    """Metadata in place of a file's own, from KEY=TYPE:VALUE as llama.cpp has it."""
    found = {}
    for pair in pairs:
        key, _, typed = pair.partition("=")
        name, colon, value = typed.partition(":")
        if not (key and colon and name in _TYPES):
            raise PymlaError(
                f"--override-kv {shown(pair)}: write KEY=TYPE:VALUE with the type {', '.join(_TYPES)}, "
                "as in deepseek2.expert_used_count=int:4"
            )
        try:
            found[argument(key)] = _TYPES[name](value)
        except (KeyError, ValueError):
            raise PymlaError(f"--override-kv {shown(pair)}: {shown(value)} is no {_TYPE_NAMES[name]}") from None
    return found


def _whole(text: str) -> int:
    """An integer as GGUF holds it, of 64 bits."""
    number = int(text)
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError
    return number


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _json_or_text(value: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(value, parse_constant=refuse)
    except (ValueError, RecursionError):
        return argument(value)


def prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt, from the command line, a file or standard input."""
    if prompt is not None and prompt_file is not None:
        raise PymlaError("give the prompt as an argument or with -f, not both")
    if prompt is not None:
        return argument(prompt)
    if prompt_file is not None:
        return read(prompt_file)
    if sys.stdin.isatty():
        click.echo("pymla: reading the prompt from the terminal; an end of file (Ctrl-D) ends it", err=True)
    try:
        return decode(sys.stdin.buffer.read(), "standard input")
    except OSError as error:
        raise PymlaError(f"standard input: {error.strerror}") from None


def read(path: Path) -> str:
    """The text of a file."""
    return decode(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The contents of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PymlaError(f"{path}: {error.strerror}") from None


def argument(text: str) -> str:
    """An argument as it was typed: in a locale without UTF-8, Python has kept its bytes in surrogates."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


#: Types of ``--override-kv``: how each is read, and its name in messages.
_TYPES: dict[str, Callable[[str], Value]] = {
    "int": _whole,
    "float": _real,
    "bool": {"true": True, "false": False}.__getitem__,
    "str": argument,
}
_TYPE_NAMES = {"int": "whole number of 64 bits", "float": "finite number", "bool": "true or false", "str": "text"}
