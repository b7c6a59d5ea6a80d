"""Constraints: masks against partial matches, JSON against its schema, and what is said to bad ones."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import bits, bytewise, sentencepiece

import pymla
from pymla.engine.speculation.ngram import NgramDrafter
from pymla.engine.speculation.step import Speculation
from pymla.engine.speculation.times import StepTimes
from pymla.errors import PymlaError
from pymla.text.constraints import Grammar, compute_masks, draft_masks
from pymla.text.sampling import Sampler, SamplingParams

BYTES = bytewise()
END = 256


@pytest.fixture(scope="module")
def demo():
    with pymla.load(ctx=512) as model:
        yield model


def walk(grammar, seed, most=60):
    """Tokens of a text that is drawn from a grammar's masks, with the mask in front of each of them."""
    chance, matcher, tokens, masks = np.random.default_rng(seed), grammar.matcher(), [], []
    while len(tokens) < most and not matcher.is_finished:
        masks.append(matcher.mask())
        tokens.append(int(chance.choice(sorted(bits(masks[-1], 1 << 20)))))
        if tokens[-1] in grammar.tokenizer.eos_ids:
            return tokens[:-1], masks
        matcher.accept(tokens[-1])
    return tokens, masks


@pytest.mark.parametrize(
    "pattern",
    ["[0-9]{3}-[0-9]{4}", "(def|class) [a-z_]+", "(a|ab)(c|bcd)*", r"[ \n]*(yes|no)?", 'x="[a-z ]{2,5}"', "[ -~]*"],
)
@pytest.mark.parametrize("seed", range(2))
def test_masks_are_those_of_partial_matches(demo, pattern, seed):
    """Of every token of the vocabulary, in every state on the way. Where the text is forced only its own next token is
    allowed."""
    grammar = Grammar.of(demo.tokenizer, regex=pattern)
    tokens, masks = walk(grammar, seed, most=6)
    plain = {
        i: demo.tokenizer.token_bytes(i) for i in range(demo.tokenizer.vocab_size) if not demo.tokenizer.is_special(i)
    }
    matcher, text = grammar.matcher(), b""
    for place, mask in enumerate(masks):
        found = bits(mask, demo.tokenizer.vocab_size)
        expected = {
            i for i, more in plain.items() if more and regex.fullmatch(pattern.encode(), text + more, partial=True)
        }
        if regex.fullmatch(pattern.encode(), text):
            expected |= demo.tokenizer.eos_ids
        forced = matcher.forced()
        assert found == ({forced[0]} if forced else expected)
        assert found <= expected
        if place < len(tokens):
            matcher.accept(tokens[place])
            text += demo.tokenizer.token_bytes(tokens[place])


def test_a_mask_is_exact_for_every_kind_of_token():
    """Two with the same bytes are allowed; neither one that ends a text for its name, nor an empty one."""
    tokenizer = bytewise(control=("a", "<end>", ""), user_defined=("ab", "ba"), eos=("<end>",))
    grammar = Grammar.of(tokenizer, regex="ab|<end>", vocab_size=300)
    assert grammar.words == 10
    mask = grammar.matcher().mask()
    assert (mask.dtype, mask.shape) == (np.uint32, (10,))
    assert bits(mask, 300) == {ord("a"), ord("<"), tokenizer.encode("ab")[0]}
    assert tokenizer.encode("ab")[0] > 256


@pytest.mark.parametrize("size", [257, 287, 288, 289, 320, 321])
def test_rows_behind_the_vocabulary_are_never_allowed(size):
    grammar = Grammar.of(BYTES, regex="(?s:.)*", vocab_size=size)
    assert bits(grammar.matcher().mask(), size) == {*range(0x80), *range(0xC2, 0xF5), END}
    ends_nowhere = bytewise(eos=())
    matcher = Grammar.of(ends_nowhere, regex="a", vocab_size=size).matcher()
    assert bits(matcher.mask(), size) == {ord("a")}
    matcher.accept(ord("a"))
    assert matcher.is_finished
    assert not matcher.mask().any()


def test_the_end_of_a_text():
    grammar = Grammar.of(BYTES, regex="ab?")
    matcher = grammar.matcher()
    assert (matcher.is_complete, matcher.is_finished) == (False, False)
    matcher.accept(ord("a"))
    assert (matcher.is_complete, matcher.is_finished) == (True, False)
    assert bits(matcher.mask(), 257) == {ord("b"), END}
    matcher.accept(ord("b"))
    assert (matcher.is_complete, matcher.is_finished) == (True, True)
    assert bits(matcher.mask(), 257) == {END}
    assert matcher.forced() == []
    empty = Grammar.of(BYTES, lark='start: ""').matcher()
    assert (empty.is_complete, empty.is_finished) == (True, True)


def test_accepted_tokens_are_taken_back():
    matcher = Grammar.of(BYTES, regex="ab[cd]*").matcher()
    first = matcher.mask()
    for token in b"abcd":
        matcher.accept(token)
    matcher.accept(END)
    assert matcher.is_finished
    matcher.rollback(0)
    matcher.rollback(2)
    assert bits(matcher.mask(), 257) == {ord("c"), ord("d"), END}
    matcher.rollback(3)
    assert np.array_equal(matcher.mask(), first)
    with pytest.raises(PymlaError, match="5 tokens cannot be taken back"):
        matcher.rollback(5)


def test_a_token_that_is_not_allowed_changes_nothing():
    matcher = Grammar.of(BYTES, regex="ab").matcher()
    matcher.accept(ord("a"))
    with pytest.raises(PymlaError, match="the grammar does not allow token 120 here"):
        matcher.accept(ord("x"))
    matcher.accept(ord("b"))
    assert matcher.is_finished


def test_copies_go_their_own_ways():
    matcher = Grammar.of(BYTES, regex="a(b|c)d").matcher()
    matcher.accept(ord("a"))
    other = matcher.copy()
    matcher.accept(ord("b"))
    assert bits(other.mask(), 257) == {ord("b"), ord("c")}
    assert bits(matcher.mask(), 257) == {ord("d")}


def test_forced_tokens_are_cut_as_the_tokenizer_cuts(demo):
    text = '{"name": "pymla", "kind": '
    grammar = Grammar.of(demo.tokenizer, lark=f"start: {json.dumps(text)} /[0-9]+/")
    matcher, tokens = grammar.matcher(), []
    while forced := matcher.forced():
        tokens += forced
        for token in forced:
            matcher.accept(token)
    expected = demo.tokenizer.encode(text, add_bos=False)
    assert tokens == expected[: len(tokens)]
    assert len(tokens) >= len(expected) - 1  # the last one might go on


def test_a_sentencepiece_vocabulary():
    """The blank in front of a text is the tokenizer's own, and a grammar's text has none."""
    tokenizer = sentencepiece()
    grammar = Grammar.of(tokenizer, regex="yes|no|é")
    e_acute = [3 + byte for byte in "é".encode()]
    yes = tokenizer.encode("yes", inside=True)
    assert [tokenizer.token_bytes(token) for token in yes] == [b"yes"]
    first = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b"yes", b"ye", b"y", b"no", b"n")}
    assert bits(grammar.matcher().mask(), tokenizer.vocab_size) == {*first, e_acute[0]}
    matcher = grammar.matcher()
    matcher.accept(e_acute[0])
    assert matcher.forced() == e_acute[1:]
    assert Grammar.of(tokenizer, regex="yes!").matcher().forced()[:1] == yes


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 6))
def test_masks_of_drafts(seed, wrong):
    """Those that accepting token by token gives, up to the first token that is not allowed."""
    grammars = [Grammar.of(BYTES, regex=pattern) for pattern in ("[ab]{2,4}c*", "(ab)*", "x{9}")]
    drafts = []
    for number, grammar in enumerate(grammars):
        tokens, _ = walk(grammar, seed + number, most=5)
        drafts.append((grammar.matcher(), [*tokens[:wrong], 0x80, *tokens[wrong:]] if number == seed % 3 else tokens))
    for (matcher, draft), masks in zip(drafts, draft_masks(drafts), strict=True):
        other = matcher.grammar.matcher()
        for token, mask in zip([*draft, None], masks, strict=False):
            assert np.array_equal(other.mask(), mask)
            if token is not None and token != 0x80:
                other.accept(token)
        assert len(masks) == 1 + (draft.index(0x80) if 0x80 in draft else len(draft))
        assert np.array_equal(matcher.mask(), masks[0])


def test_masks_of_several_texts_at_once():
    grammars = [Grammar.of(BYTES, regex=pattern) for pattern in ("a", "b|c", "[d-f]")]
    grammars.append(Grammar.of(sentencepiece(), regex="no"))
    matchers = [grammar.matcher() for grammar in grammars]
    matchers[0].mask()
    compute_masks(matchers)
    alone = [grammar.matcher().mask() for grammar in grammars]
    assert all(np.array_equal(matcher.mask(), mask) for matcher, mask in zip(matchers, alone, strict=True))
    assert not matchers[0].mask().flags.writeable


def test_threads_share_a_grammar(demo):
    grammar = Grammar.of(demo.tokenizer, json_schema={"type": "object"})
    expected = [walk(grammar, seed)[0] for seed in range(4)]
    found = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: walk(grammar, seed)[0]})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_computes_masks():
    matchers = [Grammar.of(BYTES, regex=pattern).matcher() for pattern in ("[ab]+", "c")]
    compute_masks(matchers)
    for matcher in matchers:
        matcher._mask = None
    child = os.fork()
    if not child:
        signal.alarm(20)  # which ends a child that waits for threads of its parent
        compute_masks(matchers)
        os._exit(bits(matchers[1].mask(), 257) != {ord("c")})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_keeps_a_tokenizer_alive():
    tokenizer = bytewise()
    grammar, watch = Grammar.of(tokenizer, regex="a"), weakref.ref(tokenizer)
    assert Grammar.of(tokenizer, regex="a")._prototype is grammar._prototype
    del tokenizer
    gc.collect()
    assert grammar.matcher().forced() == [ord("a")]
    assert watch() is not None
    del grammar
    gc.collect()
    assert watch() is None


SCALARS = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 300),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 2),
        st.integers(0, 5),
    ),
    st.just({"type": "string", "pattern": "^[A-Z][a-z]{1,4}$"}),
    st.lists(st.one_of(st.integers(0, 9), st.text('ab"é\\', max_size=3), st.none()), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([1, "x\ny", None, True]).map(lambda value: {"const": value}),
)


def composed(part):
    """Objects, arrays and unions of schemas."""
    names = st.sampled_from(["id", "name", "a b", "é", '"'])
    objects = st.builds(
        lambda properties, missing: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[missing:],
            "additionalProperties": False,
        },
        st.dictionaries(names, part, max_size=3),
        st.integers(0, 1),
    )
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        part,
        st.integers(0, 1),
        st.integers(0, 2),
    )
    return st.one_of(objects, arrays, st.lists(part, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}))


SCHEMAS = st.recursive(SCALARS, composed, max_leaves=4)


def fits(value, schema):
    """Whether a value fits a schema of the kinds above."""
    if "anyOf" in schema:
        return any(fits(value, part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(type(value) is type(each) and value == each for each in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(properties)
            and all(fits(each, properties[name]) for name, each in value.items())
        )
    if kind == "array":
        sized = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return sized and all(fits(each, schema["items"]) for each in value)
    if kind == "string":
        sized = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
        return sized and regex.search(schema.get("pattern", ""), value) is not None
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else type(value) is bool


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.integers(0, 1 << 30))
def test_what_masks_allow_fits_the_schema(schema, seed):
    tokens, _ = walk(Grammar.of(BYTES, json_schema=schema), seed, most=400)
    text = bytes(tokens).decode()
    if len(tokens) < 400:
        assert fits(json.loads(text), schema), text


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS, st.integers(0, 1 << 30))
def test_what_a_model_writes_fits_the_schema(demo, schema, seed):
    compact = schema | {"x-guidance": {"whitespace_flexible": False}}
    generation = demo.generation("x = ", json_schema=compact, max_tokens=150, seed=seed, temperature=1)
    text = "".join(generation)
    if generation.finish_reason != "length":
        assert generation.finish_reason == "stop"
        assert fits(json.loads(text), schema), text


def test_what_a_model_writes_matches(demo):
    for seed in range(3):
        generation = demo.generation("n = ", regex="[0-9]{2,4};", seed=seed, max_tokens=20)
        assert regex.fullmatch("[0-9]{2,4};", "".join(generation))
        assert generation.finish_reason == "stop"
    text = demo.generate("n = ", grammar='root ::= "(" root ")" | [0-9]', seed=1, max_tokens=50)
    assert text.count("(") == text.count(")")
    assert text.strip("()").isdigit()


def test_texts_of_one_prompt_have_a_matcher_each(demo):
    grammar = Grammar.of(demo.tokenizer, regex="[ab]{8}", vocab_size=demo.config.vocab_size)
    texts = ["".join(each) for each in demo.engine.generations("x", 3, grammar=grammar, seed=1, max_tokens=9)]
    assert all(regex.fullmatch("[ab]{8}", text) for text in texts)


def test_a_grammar_of_another_model_is_refused(demo):
    with pytest.raises(PymlaError, match="`grammar` was compiled for another model"):
        demo.generation("x", grammar=Grammar.of(BYTES, regex="a"))


def test_a_text_has_one_constraint(demo):
    with pytest.raises(PymlaError, match="a text has one constraint"):
        demo.generation("x", regex="a", constraint=Grammar.of(demo.tokenizer, regex="b").matcher())
    with pytest.raises(PymlaError, match="there are `json_schema` and `regex`"):
        demo.generation("x", regex="a", json_schema={})
    compiled = Grammar.of(demo.tokenizer, regex="b", vocab_size=demo.config.vocab_size)
    with pytest.raises(PymlaError, match="there are `regex` and `grammar`"):
        demo.generation("x", regex="a", grammar=compiled)


def test_control_tokens_in_a_text(demo):
    """Marks of a format have their names in it, and others have not."""
    control = next(
        i for i in range(demo.tokenizer.vocab_size) if demo.tokenizer.is_special(i) and i not in demo.tokenizer.eos_ids
    )
    name = demo.tokenizer.token_bytes(control).decode()
    given = {"grammar": f'root ::= "a" <[{control}]> "b"', "seed": 1}
    assert demo.generate("x", **given) == "ab"
    assert demo.generate("x", shown_tokens={control}, **given) == f"a{name}b"


def test_drafts_of_a_constrained_text(demo):
    """Drafts are verified against the grammar, too: here they go on as the prompt did, for too long."""
    drafts = []

    class Recorder(NgramDrafter):
        def draft(self, states, most):
            made = super().draft(states, most)
            drafts.extend(draft.tokens for draft in made)
            return made

    speculation = Speculation(Recorder(), StepTimes(lambda tokens: 1.0), adapts=False)
    given = {"regex": "(first, ){4}last", "max_tokens": 60, "speculation": speculation}
    assert demo.generate("first, " * 12, **given) == "first, first, first, first, last"
    assert any(len(tokens) > 1 for tokens in drafts)


def test_samplers_draw_from_a_mask():
    grammar, sampler = Grammar.of(BYTES, regex="[a-c]{40}"), Sampler(SamplingParams(seed=1, top_k=0, min_p=0))
    matcher, tokens = grammar.matcher(), []
    while not matcher.is_finished:
        tokens.append(sampler.sample(np.zeros(257, np.float32), matcher.mask()).token)
        matcher.accept(tokens[-1])
    assert set(tokens) == set(b"abc")
    assert len(tokens) == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one constraint is expected, and there are none"),
        ({"regex": "a", "lark": "start: a"}, "there are `regex` and `lark`"),
        ({"regex": 3}, "`regex` is 3; a text is expected"),
        ({"regex": "a(b"}, "`regex`: column 2: unclosed group"),
        ({"regex": "(?=a)b"}, "`regex`: column 1: look-around"),
        ({"regex": r"(a)\1"}, "`regex`: column 4: backreferences are not supported"),
        ({"regex": r"a\b"}, "`regex`: invalid regex"),
        ({"lark": 'start: "a" b'}, '`lark`: line 1, column 8: unknown name: "b"'),
        ({"grammar": 'start: B\nB: B "x"'}, "`grammar`: line 2, column 4: circular reference"),
        ({"lark": 'other: "a"'}, "`lark`: no start rule found"),
        ({"gbnf": 'root ::= "a'}, "`gbnf`: line 1, column 10"),
        ({"grammar": 'root ::= "a'}, "`grammar`: line 1, column 10"),
        ({"json_schema": "{"}, "`json_schema`: line 1, column 2: expecting property name"),
        ({"json_schema": "[1]"}, "`json_schema` is an array of 1; a JSON schema is expected"),
        ({"json_schema": "[" * 100_000}, "`json_schema` is nested too deeply"),
        ({"json_schema": {"type": "strin"}}, "`json_schema`: Invalid type: strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, '`json_schema`: Unimplemented keys: ["uniqueItems"]'),
        ({"json_schema": {"type": "string", "pattern": "("}}, "`json_schema`: unclosed group"),
        ({"json_schema": {"$ref": "#/x"}}, "`json_schema`: Pointer '/x' does not exist"),
        ({"json_schema": False}, "`json_schema` is false, which no text fits"),
        ({"json_schema": {"const": {1, 2}}}, "`json_schema` cannot be written as JSON"),
    ],
    ids=str,
)
def test_errors(given, message):
    with pytest.raises(PymlaError) as raised:
        Grammar.of(BYTES, **given)
    assert message in str(raised.value)


def test_a_text_that_no_token_continues_is_an_error():
    tokenizer = bytewise(control=("<end>",))
    with pytest.raises(PymlaError, match="cannot be followed: no token fits here, and the text is not complete"):
        Grammar.of(tokenizer, lark="start: AB\nAB: /a/ & /b/").matcher().mask()


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"json_schema": {"type": "array", "items": {"type": "null"}}}, "\n\n[null, null]"),
        ({"regex": "yes|no"}, "no"),
        ({"lark": 'start: "(" start ")" | "y"'}, "((y))"),
        ({"gbnf": 'root ::= "(" root ")" | [x-z]+'}, "((y))"),
    ],
)
def test_a_constraint_behind_reasoning(control, given, answer):
    """The reasoning is any text, and does not end the text; the mark may be a control token or text."""
    tokenizer = bytewise(control=("<end>", "</think>") if control else ("<end>",))
    matcher = Grammar.of(tokenizer, after="</think>", **given).matcher()
    for token in tokenizer.encode('so: <b> [1]\n"x', add_bos=False):
        matcher.accept(token)
        assert not matcher.is_complete
        assert ord("q") in bits(matcher.mask(), tokenizer.vocab_size)
    for token in tokenizer.encode("</think>" + answer, parse_special=True):
        assert not matcher.is_finished
        matcher.accept(token)
    assert matcher.is_complete
    assert ord("q") not in bits(matcher.mask(), tokenizer.vocab_size)


def test_llguidance_is_imported_when_it_is_needed():
    program = "import sys, pymla; pymla.load; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
