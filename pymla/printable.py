"""Text that is safe to print. Names and values from model files, and texts that users type, end up in messages and in
tables; none of it may steer the terminal, and no message is longer than a screen."""

from __future__ import annotations

import re

TYPE_CHECKING = False  # as in `typing`, whose import takes milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Characters of the longest message.
LONGEST = 960

# Python calls these printable, but a terminal shows nothing for them: joiners, fillers and variation selectors.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

# All control characters but tabs and line ends.
_CONTROL = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""A text with an escape, as in Python's source (``\x1b``), for every character that steers a terminal or cannot be
    seen: control characters, line ends, controls of the writing direction, spaces and joiners without a width, lone
    surrogates, characters that Unicode has not assigned."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else _escape(each) for each in text)
    return _INVISIBLE.sub(lambda found: _escape(found[0]), text)


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text of at most `longest` characters; of a longer one the beginning and the end, around an ellipsis."""
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"


def one_line(text: str, longest: int = LONGEST) -> str:
    """A message for a terminal: one line, printable, short."""
    # Shortened before escaping, as a text may have millions of characters, and again after it, because an escape is
    # longer than its character.
    lines = (line.strip() for line in text.splitlines())
    text = " ".join(line for line in lines if line)
    return shortened(printable(shortened(text, longest)), longest)


def shown(value: Any, longest: int = 60, write: Callable[[Any], str] = repr) -> str:
    """A value as a message quotes it: printable and short. Of an array the length is told.

    Parameters
    ----------
    value : anything; a NumPy number is written as Python's
    write : how other values are written: by default as in Python's source
    """
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, list | tuple) or hasattr(value, "shape"):
        return f"an array of {len(value)}"
    if isinstance(value, str):
        value = shortened(value, longest)
    try:
        return shortened(printable(write(value)), longest)
    except ValueError:  # Python does not write out an integer of thousands of digits
        return "an integer of thousands of digits"
    except Exception:  # a caller's own class
        return f"a {type(value).__name__} that cannot be written out"


def for_terminal(text: str) -> str:
    """Generated text for a terminal: control characters but tabs and line ends are escaped, the rest stays as it is."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
