"""Parts of grammars of characters, as values: equal parts are equal."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

#: The last character of Unicode.
LARGEST_CHARACTER = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]


class Node:
    """A part of a grammar. Equal parts are equal values."""


@dataclass(frozen=True)
class Characters(Node):
    """One character of a set: ranges of code points, in order, that do not touch."""

    ranges: Ranges

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> "Characters":
        """Characters of ranges in any order, which may overlap."""
        made: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if made and first <= made[-1][1] + 1:
                made[-1] = made[-1][0], max(last, made[-1][1])
            else:
                made.append((first, last))
        return cls(tuple(made))

    def negated(self) -> "Characters":
        """All other characters."""
        ends = [-1, *(last for _, last in self.ranges)]
        starts = [*(first for first, _ in self.ranges), LARGEST_CHARACTER + 1]
        return Characters(
            tuple((end + 1, start - 1) for end, start in zip(ends, starts, strict=True) if end + 1 < start)
        )


@dataclass(frozen=True)
class Series(Node):
    """One part after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice(Node):
    """One of several parts."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat(Node):
    """A part several times; `most` None: without an end."""

    item: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Reference(Node):
    """Another rule."""

    rule: str


@dataclass(frozen=True)
class Token(Node):
    """A token of the vocabulary, or any other one."""

    token: int
    negated: bool


@dataclass(frozen=True)
class Terminal(Node):
    """What the lexer reads at once: a part without recursion."""

    node: Node


def parts_of(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Series):
        return node.items
    if isinstance(node, Choice):
        return node.options
    return (node.item,) if isinstance(node, Repeat) else ()


def with_parts(node: Node, parts: tuple[Node, ...]) -> Node:
    """The node with other parts."""
    if isinstance(node, Series):
        return Series(parts)
    if isinstance(node, Choice):
        return Choice(parts)
    return Repeat(parts[0], node.least, node.most) if isinstance(node, Repeat) else node


def walk(node: Node) -> Iterator[Node]:
    """A part and all parts of it."""
    yield node
    for part in parts_of(node):
        yield from walk(part)


def with_texts(rules: Mapping[str, Node]) -> dict[str, Node]:
    """The rules that have texts, without the parts that have none: those that refer to themselves without an end."""
    made: dict[str, Node] = {}
    while True:
        further = {rule: part for rule, node in rules.items() if (part := _with_texts(node, made)) is not None}
        if further == made:
            return made
        made = further


def _with_texts(node: Node, known: Mapping[str, Node]) -> Node | None:
    """A part without its parts that have no texts, as far as the rules that have some are known; None: it has none."""
    if isinstance(node, Reference):
        return node if node.rule in known else None
    parts = [_with_texts(part, known) for part in parts_of(node)]
    found = tuple(part for part in parts if part is not None)
    if isinstance(node, Choice):
        return Choice(found) if found else None
    if isinstance(node, Repeat) and node.least == 0 and not found:
        return Series(())
    return with_parts(node, found) if len(found) == len(parts) else None
