"""GBNF: how it is read, and that its terminals say what the grammar says."""

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vocabularies import bytewise

from pymla.errors import PymlaError
from pymla.text.constraints import Grammar
from pymla.text.gbnf import to_lark
from pymla.text.grammar_nodes import Characters, Choice, Reference, Repeat, Series, with_texts
from pymla.text.lexemes import to_terminals

TOKENIZER = bytewise()


def texts(grammar, length, alphabet=b"ab"):
    """The texts that a grammar has, up to a length, by walking matchers."""
    found, waiting = set(), [(b"", grammar.matcher())]
    while waiting:
        text, matcher = waiting.pop()
        if matcher.is_complete:
            found.add(text)
        mask = matcher.mask() if len(text) < length and not matcher.is_finished else []
        for byte in alphabet if len(mask) else b"":
            if mask[byte // 32] >> byte % 32 & 1:
                further = matcher.copy()
                further.accept(byte)
                waiting.append((text + bytes((byte,)), further))
    return found


def of(text):
    return Grammar.of(TOKENIZER, gbnf=text)


def spans(node, text, known):
    """The pairs of places between which a part of a grammar stands, as far as those of rules are known."""
    places = range(len(text) + 1)
    if isinstance(node, Characters):
        return {(i, i + 1) for i in places[:-1] if any(low <= text[i] <= high for low, high in node.ranges)}
    if isinstance(node, Reference):
        return known[node.rule]
    if isinstance(node, Choice):
        return set().union(*(spans(option, text, known) for option in node.options))
    items = list(node.items) if isinstance(node, Series) else [node.item] * node.least
    found = {(i, i) for i in places}
    for item in items:
        further = spans(item, text, known)
        found = {(i, k) for i, j in found for start, k in further if start == j}
    if isinstance(node, Repeat):
        item, more = spans(node.item, text, known), found
        for _ in range(len(text) + 1 if node.most is None else node.most - node.least):
            more = {(i, k) for i, j in more for start, k in item if start == j}
            found = found | more
    return found


def is_text(rules, text):
    """Whether a text is one of a grammar: by definition, the least solution of its rules."""
    known = {rule: set() for rule in rules}
    while True:
        new = {rule: spans(node, text, known) for rule, node in rules.items()}
        if new == known:
            return (0, len(text)) in known["root"]
        known = new


LETTERS = st.sampled_from([Characters(((97, 97),)), Characters(((98, 98),)), Characters(((97, 98),))])
PARTS = st.recursive(
    st.one_of(LETTERS, LETTERS, st.sampled_from([Reference("root"), Reference("x"), Reference("y")])),
    lambda part: st.one_of(
        st.lists(part, max_size=3).map(lambda items: Series(tuple(items))),
        st.lists(part, min_size=1, max_size=3).map(lambda items: Choice(tuple(items))),
        st.tuples(part, st.sampled_from([(0, None), (1, None), (0, 1), (2, 2), (1, 3)])).map(
            lambda made: Repeat(made[0], *made[1])
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(PARTS, PARTS, PARTS)
def test_terminals_say_what_the_grammar_says(root, x, y):
    rules = {"root": root, "x": x, "y": y}
    words = [bytes(word) for length in range(5) for word in product(b"ab", repeat=length)]
    expected = {word for word in words if is_text(rules, word)}
    rules = with_texts(rules)
    assume("root" in rules)
    assert texts(Grammar.of(TOKENIZER, lark=to_terminals(rules, "root")), 4) == expected


def test_a_terminal_leaves_the_next_one_its_text():
    """As in arithmetic.gbnf of llama.cpp: blanks behind a number may be line ends, and a line's end must follow."""
    grammar = of('root ::= (num "=" expr "\\n")+\nexpr ::= num | "(" expr ")"\nnum ::= [a]+ ws\nws ::= [ \\n]*\n')
    for text, complete in ((b"a=(a)\na =a\n", True), (b"a\n=a\n\n", True), (b"aa=((a\n))", False)):
        matcher = grammar.matcher()
        for byte in text:
            matcher.accept(byte)
        assert matcher.is_complete == complete


def test_many_words_are_one_terminal():
    """Or few: a lexer that follows each word on its own would be slow."""
    words = " | ".join(f'"{number:03d}"' for number in range(300))
    lark = to_lark(f'root ::= item+ "." | "(" root ")"\nitem ::= ({words})+ ","\n', "grammar", lambda text: None)
    assert lark.count("\nT") < 5


def test_keywords_and_names():
    grammar = of('root ::= stmt+\nstmt ::= "ab" " " name ";" | name "=" stmt\nname ::= [ab]+\n')
    found = texts(grammar, 5, b"ab =;")
    assert found == {b"ab a;", b"ab b;"}
    assert texts(grammar, 6, b"a =;") == set()
    assert b"a=ab a;" in texts(grammar, 7, b"ab =;")


@pytest.mark.parametrize(
    ("grammar", "inside", "outside"),
    [
        ('root ::= "a" | "b" # or\n', ["a", "b"], ["ab", ""]),
        ('# before\n\nroot ::=\n  "a"\n', ["a"], ["b"]),
        ('root ::= ( "a"\n | "b" # comment )\n )', ["a", "b"], ["c"]),
        ('root ::= "a" |\n "b"', ["a", "b"], [""]),
        ('root ::= "a"{2,3} "b"{2} "c"{1,}', ["aabbc", "aaabbccc"], ["abbc", "aabbb"]),
        ('root ::= "ab"* "c"?', ["", "abab", "abc"], ["aab"]),
        ("root ::= [^a-c\\]x-]", ["d", "é", "\n", "€"], ["a", "b", "]", "x", "-"]),
        ("root ::= [a-]+", ["a-"], ["b"]),
        ('root ::= "\\x41\\u00e9\\U0001F600\\t\\"\\\\" .', ['Aé😀\t"\\\n'], ['Aé😀\t"\\']),
        ('root ::= foo-Bar2 foo-bar2\nfoo-Bar2 ::= "A"\nfoo-bar2 ::= "b"\n', ["Ab"], ["bA"]),
        ('root ::= ""', [""], ["a"]),
        ('root ::= a\na ::= a "x" | "x"', ["x", "xxx"], [""]),
        ('root ::= "/" "[" "\\n"', ["/[\n"], ["//"]),
        ('\ufeffroot ::= "a"\r\nb ::= "b"\r\n', ["a"], ["b"]),
    ],
)
def test_notation(grammar, inside, outside):
    for text in inside + outside:
        matcher = of(grammar).matcher()
        whole = True
        for byte in text.encode():
            allowed = not matcher.is_finished and matcher.mask()[byte // 32] >> byte % 32 & 1
            if not allowed:
                whole = False
                break
            matcher.accept(byte)
        assert (whole and matcher.is_complete) == (text in inside), text


def test_tokens():
    tokenizer = bytewise(control=("<end>", "<think>"))
    think = tokenizer.encode("<think>", parse_special=True)[0]
    grammar = Grammar.of(tokenizer, gbnf=f'root ::= <think> "a"* <[{think}]> !<think>')
    matcher = grammar.matcher()
    for token in (think, ord("a"), think):
        matcher.accept(token)
    assert not matcher.mask()[think // 32] >> think % 32 & 1
    matcher.accept(ord("b"))
    assert matcher.is_finished


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root = "a"', "line 1, column 6: '::=' is expected"),
        ('start ::= "a"', "there is no rule 'root'"),
        ('root ::= "a" item\n', "line 1, column 14: there is no rule 'item'"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: rule 'root' is defined a second time"),
        ('root ::= "a', "line 1, column 10: this '\"' is not closed"),
        ("root ::=\n [ab", "line 2, column 2: this '[' is not closed"),
        ('root ::= ("a"', r"line 1, column 10: a ')' is expected"),
        ('root ::= "a")', r"line 1, column 13: ')' is not expected here"),
        ('root ::= * "a"', "line 1, column 11: a repetition needs something in front of it"),
        ('root ::= "a"{3,2}', "line 1, column 13: at least 3 and at most 2 repetitions cannot be"),
        ('root ::= "a"{x}', "line 1, column 14: a number is expected"),
        ('root ::= "a"{1,99999}', "line 1, column 13: more than 2000 repetitions are not supported"),
        ('root ::= "\\q"', r"line 1, column 11: there is no escape \q"),
        ('root ::= "\\x4"', r"2 hexadecimal digits are expected after \x"),
        ('root ::= "\\uD800"', r"\uD800 is no character of Unicode"),
        ('root ::= "a" root', "rule 'root' has no texts: it refers to itself without an end"),
        ("root ::= [b-a]", "the range's last character comes before its first one"),
        ("root ::= []", "line 1, column 10: a set of characters is empty"),
        ("root ::= <nothing>", "line 1, column 10: <nothing> is no token of this model's vocabulary"),
        ("root ::= <[1]", "this '<' is not closed"),
        ("root ::= " + "(" * 5000, "is nested too deeply"),
    ],
)
def test_errors(grammar, message):
    with pytest.raises(PymlaError) as raised:
        to_lark(grammar, "grammar", lambda text: None)
    assert str(raised.value).startswith("`grammar`")
    assert message in str(raised.value)
