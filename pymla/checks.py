"""Values that callers give: taken for what they obviously mean, or refused in one line that names the argument.

Messages name an argument in backticks, as Python's callers know it. The command line puts its option there
(`pymla.cli.options`).
"""

import numbers
import operator

import numpy as np

from pymla.errors import PymlaError
from pymla.printable import shown


def integer(name, value, low, high=None):
    """A whole number from `low` to `high`: an int, a NumPy integer, or a float without a fraction.

    Raises
    ------
    PymlaError
    """
    number = _scalar(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    try:
        number = None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"from {low} on" if high is None else f"from {low} to {high}"
        refuse(name, value, f"a whole number {limits} is expected")
    return number


def number(name, value, low, high):
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


def flag(name, value):
    """True or False.

    Raises
    ------
    PymlaError
    """
    given = _scalar(value)
    if not isinstance(given, bool):
        refuse(name, value, "True or False is expected")
    return given


def choice(name, value, choices):
    """One of some texts.

    Raises
    ------
    PymlaError
    """
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, f"choose {', '.join(choices)}")
    return str(value)


def refuse(name, value, reason):
    """Raise the PymlaError for a value."""
    raise PymlaError(f"`{name}` is {shown(value)}; {reason}")


def _scalar(value):
    """A NumPy number as Python's."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value
