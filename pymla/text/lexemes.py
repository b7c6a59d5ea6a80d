"""Terminals for grammars that have none, so that a lexer that takes the longest one reads them as they are meant.

llguidance reads a text with a lexer: at each place it follows all terminals that the parser allows there, goes on as
long as one of them can go on, and never goes back. A terminal for ``[0-9]+ [ \\n]*`` in front of ``"\\n"`` would
therefore take a line's end that belongs to the grammar's next part. Terminals must be long, nevertheless: masks are
computed per terminal, and character by character they would cost far more.

`to_terminals` begins with the longest terminals, which are the parts of rules without recursion. It then looks for
pairs that a lexer would confuse: after a whole terminal T comes a character with which some terminal U could still go
on (`pymla.text.confusion`). U is taken apart into its parts until no such pair is left. In the end all terminals might
be single characters, which nothing confuses.
"""

import math
from collections.abc import Mapping
from itertools import groupby

from pymla.text.confusion import confused
from pymla.text.grammar_nodes import (
    Characters,
    Choice,
    Node,
    Ranges,
    Reference,
    Repeat,
    Series,
    Terminal,
    Token,
    parts_of,
    walk,
    with_parts,
)

#: Sets of characters in a terminal, at most. Larger parts are several terminals.
LARGEST_TERMINAL = 50_000


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
        taken_apart = confused(grammar.rules, grammar.terminals())
        if not taken_apart:
            return _written(grammar)
        divided |= taken_apart


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
                waiting += [part.rule for part in walk(self.rules[rule]) if isinstance(part, Reference)]

    def terminals(self) -> dict[Node, Node]:
        """The parts that are terminals, with the same parts without references."""
        walked = (part for node in self.rules.values() for part in walk(node))
        return {part.node: self._inlined(part.node) for part in walked if isinstance(part, Terminal)}

    def _divide(self, node: Node) -> Node:
        if self._is_terminal(node):
            return Terminal(node)
        if not isinstance(node, Series):
            return with_parts(node, tuple(map(self._divide, parts_of(node))))
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
        return math.inf if isinstance(node, Token) else sum(map(self._size, parts_of(node)))

    def _inlined(self, node: Node) -> Node:
        if isinstance(node, Reference):
            return self._inlined(self._given[node.rule])
        return with_parts(node, tuple(map(self._inlined, parts_of(node))))


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
        return f"({between.join(map(write, parts_of(node)))})" if parts_of(node) else '""'

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
    parts = map(_expression, parts_of(node))
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
