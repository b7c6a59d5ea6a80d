"""Terminals that a lexer confuses: it takes the longest one, and never goes back.

Two terminals T and U are confused if there is a text of T, and a character that may come behind T, with which U could
still go on: the lexer then goes on. Whether there is such a text is decided by walking the automata of both (of
positions, after Glushkov) side by side.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product

from pymla.text.grammar_nodes import Characters, Choice, Node, Ranges, Reference, Repeat, Series, Terminal, parts_of


def confused(rules: Mapping[str, Node], terminals: Mapping[Node, Node]) -> set[Node]:
    """Terminals that may go on where another one, or they themselves, should have ended.

    Parameters
    ----------
    rules : dict of str to Node
        The grammar. Its characters are inside terminals.
    terminals : dict of Node to Node
        The parts that are terminals, with the same parts without references.
    """
    automata = {node: _Automaton(inlined) for node, inlined in terminals.items()}
    followers = _Followers(rules, automata)
    pairs = product(automata, automata)
    return {second for first, second in pairs if _goes_on(automata[first], automata[second], followers.behind[first])}


class _Positions:
    """Positions of an automaton, by their sets of characters."""

    def __init__(self, positions: Iterable[int], characters: Sequence[Ranges]):
        self.by_characters: dict[Ranges, list[int]] = {}
        for position in positions:
            self.by_characters.setdefault(characters[position], []).append(position)


class _Automaton:
    """The automaton of positions of a terminal: its states are its sets of characters, numbered from 0 on.

    Counted repetitions are taken for ones without an end. The automaton then accepts too many texts, so that too many
    terminals are divided; but none too few.

    Attributes
    ----------
    first : _Positions
        Those that texts begin with.
    last : set of int
        Those that texts end with.
    behind : list of list of _Positions
        Those that may follow each position. Positions share these, so that a repeated choice of many words is not too
        much.
    is_nullable : bool
        Whether the empty text is one.
    """

    def __init__(self, node: Node):
        self._characters: list[Ranges] = []
        self.behind: list[list[_Positions]] = []
        self.is_nullable, first, self.last = self._add(node)
        self.first = _Positions(first, self._characters)

    def _add(self, node: Node) -> tuple[bool, set[int], set[int]]:
        """Add a part. Returns whether it may be empty, and its first and last positions."""
        if isinstance(node, Characters):
            self._characters.append(node.ranges)
            self.behind.append([])
            return False, {len(self.behind) - 1}, {len(self.behind) - 1}
        if isinstance(node, Series):
            return self._add_series(node)
        parts = [self._add(part) for part in parts_of(node)]
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
        shared = _Positions(behind, self._characters)
        for position in positions:
            self.behind[position].append(shared)


class _Followers:
    """Characters that may come behind terminals, in any text of a grammar.

    Attributes
    ----------
    behind : dict of Node to set of Ranges
    """

    def __init__(self, rules: Mapping[str, Node], automata: Mapping[Node, _Automaton]):
        self._automata = automata
        self._nullable: set[str] = set()
        self._first: dict[str, set[Ranges]] = {rule: set() for rule in rules}
        self._behind_rules: dict[str, set[Ranges]] = {rule: set() for rule in rules}
        self.behind: dict[Node, set[Ranges]] = {node: set() for node in automata}
        while self._changes(rules):
            pass

    def _changes(self, rules: Mapping[str, Node]) -> bool:
        """Go through all rules once more. Whether there was anything new."""
        before = self._found()
        for rule, node in rules.items():
            if self._is_nullable(node):
                self._nullable.add(rule)
            self._first[rule] |= self._firsts(node)
            self._put_behind(node, self._behind_rules[rule])
        return self._found() != before

    def _found(self) -> int:
        sets = (*self._first.values(), *self._behind_rules.values(), *self.behind.values())
        return len(self._nullable) + sum(len(each) for each in sets)

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
            return set(self._automata[node.node].first.by_characters)
        if isinstance(node, Reference):
            return self._first[node.rule]
        found: set[Ranges] = set()
        for part in parts_of(node):
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
    seen: set[tuple[int, int]] = set()
    met: set[tuple[int, int]] = set()
    waiting = [(first.first, second.first)]
    while waiting:
        ones, others = waiting.pop()
        if (id(ones), id(others)) in met:
            continue
        met.add((id(ones), id(others)))
        for one, other in _with_common_characters(ones, others):
            if (one, other) in seen:
                continue
            seen.add((one, other))
            if one in first.last and any(_overlap_any(further, behind) for further in second.behind[other]):
                return True
            waiting += product(first.behind[one], second.behind[other])
    return False


def _with_common_characters(ones: _Positions, others: _Positions) -> Iterator[tuple[int, int]]:
    """Pairs of positions at which one text can be in both automata."""
    for characters, group in product(ones.by_characters.items(), others.by_characters.items()):
        if _overlap(characters[0], group[0]):
            yield from product(characters[1], group[1])


def _overlap_any(positions: _Positions, behind: set[Ranges]) -> bool:
    return any(_overlap(*pair) for pair in product(positions.by_characters, behind))


@lru_cache(1 << 16)
def _overlap(first: Ranges, second: Ranges) -> bool:
    """Whether two sets have a character in common."""
    return any(low <= other_high and other_low <= high for low, high in first for other_low, other_high in second)
