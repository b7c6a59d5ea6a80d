"""llama.cpp's grammars (GBNF), read and translated into llguidance's notation.

The notation is that of grammars/README.md and src/llama-grammar.cpp in llama.cpp. llguidance reads text with a lexer
that takes the longest terminal and never goes back, and GBNF has no lexer: `pymla.text.lexemes` finds terminals for
which both mean the same.
"""

import re
from collections.abc import Callable, Iterator
from typing import NoReturn

from pymla.errors import PymlaError
from pymla.text.grammar_nodes import (
    LARGEST_CHARACTER,
    Characters,
    Choice,
    Node,
    Reference,
    Repeat,
    Series,
    Token,
    with_texts,
)
from pymla.text.lexemes import to_terminals

#: Most repetitions that a count may ask for, as in llama.cpp.
MOST_REPETITIONS = 2000

#: Characters of a rule's name.
_NAME = re.compile(r"[A-Za-z0-9-]+")

_BLANKS = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANKS_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")

#: Characters that a backslash makes, and the number of hexadecimal digits behind the others.
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEXADECIMAL = {"x": 2, "u": 4, "U": 8}


def to_lark(text: str, name: str, token_id: Callable[[str], int | None]) -> str:
    """A grammar in GBNF in llguidance's notation, with the same texts.

    Parameters
    ----------
    text : str
    name : str
        Of the argument, for errors.
    token_id : callable
        The id of the token that a text is, or None.

    Raises
    ------
    PymlaError
        The grammar is damaged; with the line and the column.
    """
    try:
        rules = with_texts(_Parser(text, name, token_id).rules())
        if "root" not in rules:
            raise PymlaError(f"`{name}`: rule 'root' has no texts: it refers to itself without an end")
        return to_terminals(rules, "root")
    except RecursionError:
        raise PymlaError(f"`{name}` is nested too deeply") from None


class _Parser:
    """A recursive-descent parser of GBNF."""

    def __init__(self, text: str, name: str, token_id: Callable[[str], int | None]):
        self._text, self._name, self._token_id = text.removeprefix("\ufeff"), name, token_id
        self._at = 0
        self._references: dict[str, int] = {}

    def rules(self) -> dict[str, Node]:
        """The rules by their names."""
        rules: dict[str, Node] = {}
        self._skip(_BLANKS_AND_LINES)
        while self._at < len(self._text):
            start = self._at
            rule = self._name_here("a rule's name")
            if rule in rules:
                self._refuse(f"rule {rule!r} is defined a second time", start)
            self._skip(_BLANKS)
            self._expect("::=")
            self._skip(_BLANKS_AND_LINES)
            rules[rule] = self._choice(nested=False)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                self._refuse(f"{self._text[self._at]!r} is not expected here: a rule's parts, or the end of the line")
            self._skip(_BLANKS_AND_LINES)
        if "root" not in rules:
            raise PymlaError(f"`{self._name}`: there is no rule 'root', which GBNF begins with")
        for rule, start in self._references.items():
            if rule not in rules:
                self._refuse(f"there is no rule {rule!r}", start)
        return rules

    def _choice(self, nested: bool) -> Node:
        options = [self._series(nested)]
        while self._take("|"):
            self._skip(_BLANKS_AND_LINES)
            options.append(self._series(nested))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _series(self, nested: bool) -> Node:
        blanks = _BLANKS_AND_LINES if nested else _BLANKS
        items: list[Node] = []
        while True:
            counts = self._counts(blanks)
            if counts is not None:
                if not items:
                    self._refuse("a repetition needs something in front of it")
                items[-1] = Repeat(items[-1], *counts)
            else:
                item = self._item(nested)
                if item is None:
                    return items[0] if len(items) == 1 else Series(tuple(items))
                items.append(item)
            self._skip(blanks)

    def _item(self, nested: bool) -> Node | None:
        """A literal, a set of characters, a token, a group or a rule's name; None where there is none."""
        start = self._at
        if self._take('"'):
            return Series(tuple(self._literal()))
        if self._take("["):
            return self._set()
        if self._take("."):
            return Characters(((0, LARGEST_CHARACTER),))
        if self._take("("):
            self._skip(_BLANKS_AND_LINES)
            group = self._choice(nested=True)
            if not self._take(")"):
                self._refuse("a ')' is expected: this is the '(' without one", start)
            return group
        if self._at < len(self._text) and self._text[self._at] in "<!":
            return self._token()
        if _NAME.match(self._text, self._at):
            rule = self._name_here("a rule's name")
            self._references.setdefault(rule, start)
            return Reference(rule)
        return None

    def _literal(self) -> Iterator[Node]:
        start = self._at - 1
        while not self._take('"'):
            character = self._character(start)
            yield Characters(((character, character),))

    def _set(self) -> Node:
        start = self._at - 1
        negated = self._take("^")
        ranges = []
        while not self._take("]"):
            first = last = self._character(start)
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._character(start)
                if last < first:
                    self._refuse("the range's last character comes before its first one")
            ranges.append((first, last))
        if not ranges and not negated:
            self._refuse("a set of characters is empty", start)
        made = Characters.of(ranges)
        return made.negated() if negated else made

    def _character(self, start: int) -> int:
        """A character of a literal or set that begins at `start`."""
        if self._at >= len(self._text):
            self._refuse(f"this {self._text[start]!r} is not closed", start)
        character = self._text[self._at]
        self._at += 1
        if character != "\\":
            return ord(character)
        escape = self._text[self._at : self._at + 1]
        self._at += 1
        if escape in _HEXADECIMAL:
            digits = self._text[self._at : self._at + _HEXADECIMAL[escape]]
            if not re.fullmatch(f"[0-9A-Fa-f]{{{_HEXADECIMAL[escape]}}}", digits):
                self._refuse(f"{_HEXADECIMAL[escape]} hexadecimal digits are expected after \\{escape}")
            value = int(digits, 16)
            if value > LARGEST_CHARACTER or 0xD800 <= value < 0xE000:
                self._refuse(f"\\{escape}{digits} is no character of Unicode")
            self._at += len(digits)
            return value
        if escape not in _ESCAPES:
            self._refuse(f"there is no escape \\{escape}", self._at - 2)
        return ord(_ESCAPES[escape])

    def _token(self) -> Node:
        start = self._at
        negated = self._take("!")
        self._expect("<")
        end = self._text.find(">", self._at)
        if end < 0:
            self._refuse("this '<' is not closed", self._at - 1)
        inner = self._text[self._at : end]
        self._at = end + 1
        number = re.fullmatch(r"\[(\d+)\]", inner)
        token = int(number[1]) if number else self._token_id(f"<{inner}>")
        if token is None:
            self._refuse(f"<{inner}> is no token of this model's vocabulary", start)
        return Token(token, negated)

    def _counts(self, blanks: re.Pattern[str]) -> tuple[int, int | None] | None:
        """Least and most repetitions of what stands in front; None where no repetition is asked for."""
        for mark, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(mark):
                return counts
        start = self._at
        if not self._take("{"):
            return None
        self._skip(blanks)
        least = self._number()
        most: int | None = least
        self._skip(blanks)
        if self._take(","):
            self._skip(blanks)
            most = self._number() if self._text[self._at : self._at + 1].isdecimal() else None
            self._skip(blanks)
        self._expect("}")
        if most is not None and most < least:
            self._refuse(f"at least {least} and at most {most} repetitions cannot be", start)
        if max(least, most or 0) > MOST_REPETITIONS:
            self._refuse(f"more than {MOST_REPETITIONS} repetitions are not supported", start)
        return least, most

    def _number(self) -> int:
        digits = re.compile(r"[0-9]+").match(self._text, self._at)
        if not digits:
            self._refuse("a number is expected")
        self._at = digits.end()
        return int(digits[0])

    def _name_here(self, what: str) -> str:
        found = _NAME.match(self._text, self._at)
        if not found:
            self._refuse(f"{what} is expected")
        self._at = found.end()
        return found[0]

    def _skip(self, blanks: re.Pattern[str]) -> None:
        found = blanks.match(self._text, self._at)
        assert found
        self._at = found.end()

    def _take(self, mark: str) -> bool:
        """Whether the text goes on with `mark`, which is passed then."""
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            self._refuse(f"{mark!r} is expected")

    def _refuse(self, reason: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        line, column = self._text.count("\n", 0, at) + 1, at - self._text.rfind("\n", 0, at)
        raise PymlaError(f"`{self._name}`: line {line}, column {column}: {reason}")
