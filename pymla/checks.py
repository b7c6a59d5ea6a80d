"""Checks of the values that callers give. A value is taken if its meaning is obvious, such as 3.0 for an integer, or
refused by an error of one line that names the argument.

Messages name an argument in backticks, as Python's callers know it; the command line replaces it by its option
(`pymla.cli.options`).
"""

import numbers
import operator
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pymla.errors import PymlaError
from pymla.printable import shown


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`: an int, a NumPy integer, or a float without a fraction.

    Raises
    ------
    PymlaError
    """
    given = _scalar(value)
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"from {low} on" if high is None else f"from {low} to {high}"
        refuse(name, value, f"a whole number {limits} is expected")
    return number


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`, as a float.

    Raises
    ------
    PymlaError
    """
    given = _scalar(value)
    real = isinstance(given, numbers.Real) and not isinstance(given, bool)
    # A comparison and not a conversion: an int may be too large for a float.
    if not (real and low <= given <= high):
        refuse(name, value, f"a number from {low:g} to {high:g} is expected")
    return float(given)


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises
    ------
    PymlaError
    """
    given = _scalar(value)
    if not isinstance(given, bool):
        refuse(name, value, "True or False is expected")
    return given


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of some texts.

    Raises
    ------
    PymlaError
    """
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, f"choose {', '.join(choices)}")
    return str(value)


def path(name: str, value: Any, reason: str) -> Path:
    """A path that the system takes; `reason` says what is expected where the value is none.

    Raises
    ------
    PymlaError
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        refuse(name, value, reason)
    if "\0" in os.fspath(value) or not os.fspath(value):
        refuse(name, value, "no file can have this name")
    return Path(value)


def refuse(name: str, value: Any, reason: str) -> NoReturn:
    """Raise the PymlaError for a value."""
    raise PymlaError(f"`{name}` is {shown(value)}; {reason}")


def _scalar(value: Any) -> Any:
    """A NumPy number as Python's; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value
