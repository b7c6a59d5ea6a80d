"""Terminals for grammars that have none, so that a lexer that takes the longest one reads them as they are meant.

llguidance reads a text with a lexer: at each place it follows all terminals that the parser allows there, goes on as
long as one of them can go on, and never goes back. A terminal for ``[0-9]+ [ \\n]*`` in front of ``"\\n"`` would
therefore take a line's end that belongs to the grammar's next part. Terminals must be long, nevertheless: masks are
computed per terminal, and character by character they would cost a hundred times as much.

`to_terminals` begins with the longest terminals, which are the parts of rules without recursion. It then looks for
pairs that a lexer would confuse: after a whole terminal T comes a character with which some terminal U could still go
on. U is taken apart into its parts until no such pair is left. In the end all terminals might be single characters,
which nothing confuses. Whether a pair is confused is decided by walking both terminals' automata (of positions, after
Glushkov) side by side.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product

#: The last character of Unicode.
LARGEST_CHARACTER = 0x10FFFF

#: Sets of characters in a terminal, at most. Larger parts are several terminals.
LARGEST_TERMINAL = 1000

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


def to_terminals(rules: Mapping[str, Node], root: str) -> str:
    """A grammar of characters in llguidance's notation, with terminals of its own.

    Parameters
    ----------
    rules : parts by the names of the rules; each rule that is referred to is there, and has texts (`with_texts`)
    root : the rule that a whole text is
    """
    divided: set[Node] = set()
    while True:
        grammar = _Division(rules, root, divided)
        confused = _confused(grammar)
        if not confused:
            return _written(grammar)
        divided |= confused


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
    parts = [_with_texts(part, known) for part in _parts(node)]
    found = tuple(part for part in parts if part is not None)
    if isinstance(node, Choice):
        return Choice(found) if found else None
    if isinstance(node, Repeat) and node.least == 0 and not found:
        return Series(())
    return _with_parts(node, found) if len(found) == len(parts) else None


class _Division:
    """Rules whose parts without recursion are terminals, apart from parts of the set `divided`.

    Attributes
    ----------
    root : str
    rules : dict of str to Node
        The rules that the root needs. Their characters are inside terminals.
    """

    def __init__(self, given: Mapping[str, Node], root: str, divided: set[Node]):
        self._given, self._divided = given, divided
        self._sizes: dict[str, float] = {}
        self.root = root
        self.rules: dict[str, Node] = {}
        waiting = [root]
        while waiting:
            rule = waiting.pop()
            if rule not in self.rules:
                self.rules[rule] = self._divide(given[rule])
                waiting += [part.rule for part in _walk(self.rules[rule]) if isinstance(part, Reference)]

    def terminals(self) -> dict[Node, Node]:
        """The parts that are terminals, with the same parts without references."""
        walked = (part for node in self.rules.values() for part in _walk(node))
        return {part.node: self._inlined(part.node) for part in walked if isinstance(part, Terminal)}

    def _divide(self, node: Node) -> Node:
        if self._is_terminal(node):
            return Terminal(node)
        if not isinstance(node, Series):
            return _with_parts(node, tuple(map(self._divide, _parts(node))))
        items: list[Node] = []
        for is_terminal, run in groupby(node.items, self._is_terminal):
            together = Series(tuple(run))
            if is_terminal and self._is_terminal(together):
                items.append(Terminal(together))
            else:
                items += map(self._divide, together.items)
        return Series(tuple(items))

    def _is_terminal(self, node: Node) -> bool:
        return node not in self._divided and self._size(node) <= LARGEST_TERMINAL

    def _size(self, node: Node) -> float:
        """Sets of characters in a part; infinity for one with recursion or with tokens."""
        if isinstance(node, Reference):
            if node.rule not in self._sizes:
                self._sizes[node.rule] = math.inf  # as long as it is not known, this is where recursion leads
                self._sizes[node.rule] = self._size(self._given[node.rule])
            return self._sizes[node.rule]
        if isinstance(node, Characters):
            return 1
        return math.inf if isinstance(node, Token) else sum(map(self._size, _parts(node)))

    def _inlined(self, node: Node) -> Node:
        if isinstance(node, Reference):
            return self._inlined(self._given[node.rule])
        return _with_parts(node, tuple(map(self._inlined, _parts(node))))


def _parts(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Series):
        return node.items
    if isinstance(node, Choice):
        return node.options
    return (node.item,) if isinstance(node, Repeat) else ()


def _with_parts(node: Node, parts: tuple[Node, ...]) -> Node:
    """The node with other parts."""
    if isinstance(node, Series):
        return Series(parts)
    if isinstance(node, Choice):
        return Choice(parts)
    return Repeat(parts[0], node.least, node.most) if isinstance(node, Repeat) else node


def _walk(node: Node) -> Iterator[Node]:
    """A part and all parts of it."""
    yield node
    for part in _parts(node):
        yield from _walk(part)


def _confused(grammar: _Division) -> set[Node]:
    """Terminals that may go on where another one, or they themselves, should have ended."""
    automata = {node: _Automaton(inlined) for node, inlined in grammar.terminals().items()}
    followers = _Followers(grammar, automata)
    pairs = product(automata, automata)
    return {second for first, second in pairs if _goes_on(automata[first], automata[second], followers.behind[first])}


class _Automaton:
    """The automaton of positions of a terminal: its states are its sets of characters, numbered from 0 on.

    Counted repetitions are taken for ones without an end. The automaton then accepts too many texts, so that too many
    terminals are divided; but none too few.

    Attributes
    ----------
    characters : list of Ranges
        Of each position.
    behind : list of set of int
        Positions that may follow each position.
    first, last : set of int
        Positions that texts begin and end with.
    is_nullable : bool
        Whether the empty text is one.
    """

    def __init__(self, node: Node):
        self.characters: list[Ranges] = []
        self.behind: list[set[int]] = []
        self.is_nullable, self.first, self.last = self._add(node)

    def _add(self, node: Node) -> tuple[bool, set[int], set[int]]:
        """Add a part. Returns whether it may be empty, and its first and last positions."""
        if isinstance(node, Characters):
            self.characters.append(node.ranges)
            self.behind.append(set())
            return False, {len(self.behind) - 1}, {len(self.behind) - 1}
        if isinstance(node, Series):
            return self._add_series(node)
        parts = [self._add(part) for part in _parts(node)]
        first = set[int]().union(*(each[1] for each in parts))
        last = set[int]().union(*(each[2] for each in parts))
        if not isinstance(node, Repeat):
            return any(each[0] for each in parts), first, last
        if node.most == 0:
            return True, set(), set()
        if node.most != 1:
            self._join(last, first)
        return node.least == 0 or parts[0][0], first, last

    def _add_series(self, node: Series) -> tuple[bool, set[int], set[int]]:
        nullable, first, last = True, set[int](), set[int]()
        for part in node.items:
            part_nullable, part_first, part_last = self._add(part)
            self._join(last, part_first)
            first |= part_first if nullable else set()
            last = last | part_last if part_nullable else part_last
            nullable &= part_nullable
        return nullable, first, last

    def _join(self, positions: Iterable[int], behind: set[int]) -> None:
        for position in positions:
            self.behind[position] |= behind


class _Followers:
    """Characters that may come behind terminals, in any text of a grammar.

    Attributes
    ----------
    behind : dict of Node to set of Ranges
    """

    def __init__(self, grammar: _Division, automata: Mapping[Node, _Automaton]):
        self._automata = automata
        self._nullable: set[str] = set()
        self._first: dict[str, set[Ranges]] = {rule: set() for rule in grammar.rules}
        self._behind_rules: dict[str, set[Ranges]] = {rule: set() for rule in grammar.rules}
        self.behind: dict[Node, set[Ranges]] = {node: set() for node in automata}
        while self._changes(grammar):
            pass

    def _changes(self, grammar: _Division) -> bool:
        """Go through all rules once more. Whether there was anything new."""
        before = self._found()
        for rule, node in grammar.rules.items():
            if self._is_nullable(node):
                self._nullable.add(rule)
            self._first[rule] |= self._firsts(node)
            self._put_behind(node, self._behind_rules[rule])
        return self._found() != before

    def _found(self) -> int:
        sets = (*self._first.values(), *self._behind_rules.values(), *self.behind.values(), self._nullable)
        return sum(map(len, sets))

    def _is_nullable(self, node: Node) -> bool:
        if isinstance(node, Terminal):
            return self._automata[node.node].is_nullable
        if isinstance(node, Reference):
            return node.rule in self._nullable
        if isinstance(node, Repeat):
            return node.least == 0 or self._is_nullable(node.item)
        if isinstance(node, Choice):
            return any(map(self._is_nullable, node.options))
        return isinstance(node, Series) and all(map(self._is_nullable, node.items))

    def _firsts(self, node: Node) -> set[Ranges]:
        """Characters that a part may begin with. A token is no characters: it ends every terminal."""
        if isinstance(node, Terminal):
            automaton = self._automata[node.node]
            return {automaton.characters[position] for position in automaton.first}
        if isinstance(node, Reference):
            return self._first[node.rule]
        found: set[Ranges] = set()
        for part in _parts(node):
            found |= self._firsts(part)
            if isinstance(node, Series) and not self._is_nullable(part):
                break
        return found

    def _put_behind(self, node: Node, behind: set[Ranges]) -> None:
        """Note the characters that come behind a part."""
        if isinstance(node, Terminal):
            self.behind[node.node] |= behind
        elif isinstance(node, Reference):
            self._behind_rules[node.rule] |= behind
        elif isinstance(node, Repeat):
            again = set() if node.most in (0, 1) else self._firsts(node.item)
            self._put_behind(node.item, behind | again)
        elif isinstance(node, Choice):
            for option in node.options:
                self._put_behind(option, behind)
        elif isinstance(node, Series):
            for item in reversed(node.items):
                self._put_behind(item, behind)
                behind = self._firsts(item) | (behind if self._is_nullable(item) else set())


def _goes_on(first: _Automaton, second: _Automaton, behind: set[Ranges]) -> bool:
    """Whether, after a text of the first terminal, a character that may come `behind` it goes on in the second."""
    if not behind:
        return False
    waiting = list(product(first.first, second.first))
    seen = set(waiting)
    while waiting:
        one, other = waiting.pop()
        if not _overlap(first.characters[one], second.characters[other]):
            continue
        further = (second.characters[position] for position in second.behind[other])
        if one in first.last and any(_overlap(*pair) for pair in product(further, behind)):
            return True
        pairs = set(product(first.behind[one], second.behind[other])) - seen
        seen |= pairs
        waiting += pairs
    return False


@lru_cache(1 << 16)
def _overlap(first: Ranges, second: Ranges) -> bool:
    """Whether two sets have a character in common."""
    return any(low <= other_high and other_low <= high for low, high in first for other_low, other_high in second)


def _written(grammar: _Division) -> str:
    """The grammar in llguidance's notation."""
    rules = {rule: f"r{number}" for number, rule in enumerate(grammar.rules)}
    expressions = {node: _expression(inlined) for node, inlined in grammar.terminals().items()}
    names = {text: f"T{number}" for number, text in enumerate(sorted(set(expressions.values()) - {""}))}
    terminals = {node: names.get(text, '""') for node, text in expressions.items()}

    def write(node: Node) -> str:
        if isinstance(node, Terminal):
            return terminals[node.node]
        if isinstance(node, Reference):
            return rules[node.rule]
        if isinstance(node, Token):
            return f"<[{'^' if node.negated else ''}{node.token}]>"
        if isinstance(node, Repeat):
            return '""' if node.most == 0 else f"({write(node.item)}){_counts(node)}"
        between = " | " if isinstance(node, Choice) else " "
        return f"({between.join(map(write, _parts(node)))})" if _parts(node) else '""'

    lines = [f"start: {rules[grammar.root]}"]
    lines += [f"{rules[rule]}: {write(node)}" for rule, node in grammar.rules.items()]
    lines += [f"{name}: /{text}/" for text, name in names.items()]
    return "\n".join(lines) + "\n"


def _expression(node: Node) -> str:
    """The regular expression of a part without references."""
    if isinstance(node, Characters):
        return _set_expression(node.ranges)
    if isinstance(node, Repeat):
        return "" if node.most == 0 else f"(?:{_expression(node.item)}){_counts(node)}"
    parts = map(_expression, _parts(node))
    return f"(?:{'|'.join(parts)})" if isinstance(node, Choice) else "".join(parts)


def _set_expression(ranges: Ranges) -> str:
    if not ranges:
        return r"[^\s\S]"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _escaped(ranges[0][0])
    shown = (_escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}" for low, high in ranges)
    return f"[{''.join(shown)}]"


def _escaped(character: int) -> str:
    text = chr(character)
    return text if text.isascii() and text.isalnum() else f"\\u{{{character:x}}}"


def _counts(node: Repeat) -> str:
    marks = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    most = "" if node.most is None else node.most
    return marks.get((node.least, node.most)) or f"{{{node.least},{most}}}"
