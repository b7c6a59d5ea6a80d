"""Answers of chat models: their parts in every format, however the text was cut."""

import json

import pytest
from answer_texts import QUERY, TEMPLATES, TEXTS, TOOLS, WEATHER
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import bytewise

from pymla.errors import PymlaError
from pymla.text.answers import (
    FORMATS,
    Answer,
    AnswerParser,
    CallDelta,
    Content,
    Reasoning,
    ToolCall,
    Withdrawn,
    call_grammar,
    format_of,
    parse_answer,
)
from pymla.text.answers.arguments import schema_types, value_text
from pymla.text.answers.formats import DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, GLM_45, GLM_47, KIMI_K2, PLAIN
from pymla.text.constraints import Grammar

FORMS = list(TEXTS)
WITH_TOOLS = {"tools": TOOLS, "make_id": lambda: "id"}


def parsed(form, text, **options):
    return parse_answer(text, AnswerParser(form, **WITH_TOOLS | options))


def cut(form, pieces, **options):
    """The pieces of an answer whose text comes in several."""
    parser = AnswerParser(form, **WITH_TOOLS | options)
    found = [part for piece in pieces for part in parser.push(piece)]
    return found + parser.finish()


def call(name, arguments, id="id"):
    return ToolCall(id, name, json.dumps(arguments, ensure_ascii=False))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("whole_calls", [False, True])
def test_a_whole_answer(form, whole_calls):
    answer = parsed(form, TEXTS[form], opened=True, whole_calls=whole_calls)
    assert (answer.reasoning, answer.content) == ("I need it.", "One moment.")
    ids = ("functions.get_weather:0", "functions.search:1") if form is KIMI_K2 else ("id", "id")
    assert answer.tool_calls == [call("get_weather", WEATHER, ids[0]), call("search", QUERY, ids[1])]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_character_at_a_time(form):
    """No mark, nor the beginning of one, is ever given."""
    pieces = cut(form, TEXTS[form], opened=True)
    assert Answer.of(pieces) == parsed(form, TEXTS[form], opened=True)
    assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == "One moment."
    begun = [piece.name for piece in pieces if isinstance(piece, CallDelta) and piece.name]
    assert begun == ["get_weather", "search"]
    assert sum(isinstance(piece, CallDelta) for piece in pieces) > 10  # arguments come as they are written
    assert not any(isinstance(piece, Withdrawn) for piece in pieces)


def marks_of(form):
    return [
        *form.marks(),
        "get_weather",
        "\n",
        "functions.f:0",
        "function",
        "```json",
        "```",
        '{"a": 1}',
        "{",
        "x",
        " ",
    ]


@st.composite
def damaged(draw):
    """Texts of marks in a wrong order, and good texts with a part left out."""
    form = draw(st.sampled_from(FORMS))
    if draw(st.booleans()):
        return form, "".join(draw(st.lists(st.sampled_from(marks_of(form)), max_size=12)))
    text = TEXTS[form]
    start = draw(st.integers(0, len(text)))
    return form, text[:start] + text[draw(st.integers(start, len(text))) :]


@settings(max_examples=250, deadline=None)
@given(damaged(), st.data(), st.booleans(), st.booleans())
def test_every_cut_gives_the_same_answer(made, data, opened, whole_calls):
    form, text = made
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    expected = parsed(form, text, opened=opened, whole_calls=whole_calls)
    assert Answer.of(cut(form, pieces, opened=opened, whole_calls=whole_calls)) == expected
    assert Answer.of(cut(form, text, opened=opened, whole_calls=whole_calls)) == expected
    for made_call in expected.tool_calls:
        assert isinstance(json.loads(made_call.arguments), dict)
    if not expected.tool_calls and not opened and "<think>" not in text:
        assert expected.content == text.lstrip("\r\n")  # nothing is lost


VALUES = {
    "text": st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12),
    "number": st.one_of(st.integers(-99, 99), st.floats(-9, 9)),
    "list": st.lists(st.one_of(st.none(), st.booleans(), st.text('a<>"\\\n', max_size=4)), max_size=3),
}
TYPES = {"text": "string", "number": "number", "list": "array"}


def written(form, tool, arguments):
    """A call as a model writes it: what the head, the pairs and the marks of its format say."""
    head = "".join(form.head).replace("{name}", tool).replace("{number}", "0")
    if not form.pairs:
        return form.call + head + json.dumps(arguments, ensure_ascii=False) + form.fence + form.call_end
    body = form.pairs.gap
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        middle = "".join(form.pairs.middle).replace("{is_text}", str(isinstance(value, str)).lower())
        body += form.pairs.key + key + middle + form.pairs.value + text + form.pairs.end + form.pairs.gap
    return form.call + head + body + form.call_end


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMS), st.lists(st.fixed_dictionaries({}, optional=VALUES), min_size=1, max_size=3), st.data())
def test_calls_that_are_written_are_read(form, calls, data):
    parameters = {"properties": {name: {"type": kind} for name, kind in TYPES.items()}}
    tools = [{"type": "function", "function": {"name": "f-1.x", "parameters": parameters}}]
    inside = form.between.join(written(form, "f-1.x", arguments) for arguments in calls)
    text = form.block + form.gap + inside + form.gap + form.block_end
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    answer = Answer.of(cut(form, pieces, tools=tools))
    assert (answer.reasoning, answer.content) == ("", "")
    assert [each.name for each in answer.tool_calls] == ["f-1.x"] * len(calls)
    assert [json.loads(each.arguments) for each in answer.tool_calls] == calls


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (form, text)
        for form, texts in {
            DEEPSEEK_V3: [
                "<｜tool▁calls▁begin｜>and then nothing",
                "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{a}\n```<｜tool▁call▁end｜>",
                '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
                '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1',
            ],
            DEEPSEEK_V31: [
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f g<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>[1]<｜tool▁call▁end｜>",
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "f" * 600 + "<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
                '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": NaN}<｜tool▁call▁end｜>',
            ],
            DEEPSEEK_V32: [
                '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\nno argument\n</｜DSML｜invoke>',
                '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">yes'
                "</｜DSML｜parameter>",
                '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f"><｜DSML｜parameter name="a">1</｜DSML｜parameter>',
            ],
            KIMI_K2: [
                "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{<|tool_call_end|>",
                "<|tool_calls_section_begin|>none<|tool_calls_section_end|>",
            ],
            GLM_47: [
                "<tool_call>f<arg_key>a</arg_key><arg_value>1",
                "<tool_call>a name of words</tool_call>",
                "<tool_call>f<arg_key>a<arg_value>1</arg_value></tool_call>",
            ],
        }.items()
        for text in texts
    ],
    ids=lambda value: value[-12:] if isinstance(value, str) else value.name,
)
def test_damaged_calls_are_content(form, text):
    assert parsed(form, f"x \n{text}") == Answer(content=f"x \n{text}")
    assert parsed(form, text, whole_calls=True) == Answer(content=text)
    good = parsed(form, TEXTS[form].partition("</think>")[2]).tool_calls
    if not text.endswith(("1", "```")):  # those that go on are not over yet
        assert parsed(form, f"{text}. {TEXTS[form].partition('</think>')[2]}").tool_calls == good


def test_what_was_given_of_a_damaged_call_is_withdrawn():
    text = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": b}<｜tool▁call▁end｜>'
    parser = AnswerParser(DEEPSEEK_V31, make_id=lambda: "id")
    assert parser.push(text[:-20]) == [CallDelta(0, '{"a":', "id", "f")]
    assert parser.push(text[-20:])[-2:] == [Withdrawn(0), Content(text)]
    assert parser.finish() == []
    assert not any(isinstance(piece, Withdrawn | CallDelta) for piece in cut(DEEPSEEK_V31, text, whole_calls=True))


@pytest.mark.parametrize(
    ("form", "text", "options", "expected"),
    [
        (DEEPSEEK_V3, "<think>\nHm.\n\nSo.\n</think>\n\nYes.", {}, Answer("Hm.\n\nSo.", "Yes.")),
        (DEEPSEEK_V3, "Hm.</think>Yes.", {"opened": True}, Answer("Hm.", "Yes.")),
        (DEEPSEEK_V3, "<think>Hm.</think>Yes.", {"opened": True}, Answer("Hm.", "Yes.")),
        (DEEPSEEK_V3, "Hm, so", {"opened": True}, Answer("Hm, so")),
        (DEEPSEEK_V3, "<think>\n\n</think>\n\nYes.\n", {}, Answer("", "Yes.\n")),
        (DEEPSEEK_V3, "Yes, <think> is a mark.", {}, Answer("", "Yes, <think> is a mark.")),
        (DEEPSEEK_V3, "<thin", {}, Answer("", "<thin")),
        (GLM_45, "\n<think>a</think>\nb", {}, Answer("a", "b")),
        (GLM_47, "a <tool_call> b</think>c", {"opened": True}, Answer("a <tool_call> b", "c")),
        (PLAIN, "\n<think>a</think>", {"thinks": False}, Answer("", "\n<think>a</think>")),
        (PLAIN, "a <tool_call>", {"thinks": False}, Answer("", "a <tool_call>")),
        (PLAIN, "", {}, Answer()),
    ],
)
def test_reasoning(form, text, options, expected):
    assert parsed(form, text, **options) == expected
    assert Answer.of(cut(form, text, **options)) == expected


def test_calls_that_end_the_reasoning():
    """As Kimi-K2 and V3.2 write them; without the marks around them in Kimi's case."""
    text = TEXTS[KIMI_K2].replace("</think>One moment.", "").replace("<|tool_calls_section_begin|>", "")
    text = text.replace("<|tool_call_end|>", "").replace("<|tool_calls_section_end|>", "")
    for form, written in ((KIMI_K2, text), (DEEPSEEK_V32, TEXTS[DEEPSEEK_V32].replace("</think>One moment.", ""))):
        answer = parsed(form, written, opened=True)
        assert (answer.reasoning, answer.content) == ("I need it.", "")
        assert [each.name for each in answer.tool_calls] == ["get_weather", "search"]
    broken = "so <|tool_call_begin|>that</think>Yes."
    assert parsed(KIMI_K2, broken, opened=True) == Answer("so <|tool_call_begin|>that", "Yes.")


def test_text_behind_calls():
    text = TEXTS[DEEPSEEK_V31] + "\n"
    assert parsed(DEEPSEEK_V31, text, opened=True) == parsed(DEEPSEEK_V31, TEXTS[DEEPSEEK_V31], opened=True)
    assert parsed(DEEPSEEK_V31, text + "Done.", opened=True).content == "One moment.\nDone."
    assert parsed(GLM_47, TEXTS[GLM_47] + "\nDone.", opened=True).content == "One moment.\nDone."


def test_kinds_of_arguments():
    """GLM writes texts and other values alike; the parameters' types tell them, and else the value itself."""
    text = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
        for key, value in {"city": "12", "days": " 3 ", "free": "[1, 2]", "word": "a {b}", "none": "null"}.items()
    )
    (made,) = parsed(GLM_47, f"<tool_call>get_weather{text}</tool_call>").tool_calls
    assert json.loads(made.arguments) == {"city": "12", "days": 3, "free": [1, 2], "word": "a {b}", "none": None}
    assert parsed(GLM_47, "<tool_call>f</tool_call>").tool_calls == [ToolCall("id", "f", "{}")]


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("1", {"string"}, '"1"'),
        ("1", {"string", "null"}, '"1"'),
        ("null", {"string", "null"}, "null"),
        ("1", {"number"}, "1"),
        ("1.5", {"integer"}, '"1.5"'),
        ("true", {"boolean"}, "true"),
        ("yes", {"boolean"}, '"yes"'),
        ("NaN", set(), '"NaN"'),
        ('"a"', set(), '"a"'),
    ],
)
def test_values(text, types, value):
    assert value_text(text, frozenset(types)) == value


def test_types_of_schemas():
    assert schema_types({"type": ["string", "null"]}) == {"string", "null"}
    assert schema_types({"anyOf": [{"type": "array"}, {"enum": ["a", 1]}]}) == {"array", "string", "integer"}
    assert schema_types({"const": True}) == {"boolean"}
    assert schema_types(True) == schema_types({}) == frozenset()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_templates_tell_the_format(form):
    assert format_of(TEMPLATES[form]) == (form, True)
    assert AnswerParser.for_template(TEMPLATES[form], prompt="<｜Assistant｜><think>\n")._opened
    assert not AnswerParser.for_template(TEMPLATES[form], prompt="<｜Assistant｜></think>")._opened


def test_a_template_for_tools():
    tokenizer = bytewise(template="{{ messages }}")
    tokenizer.chat_templates = {"tool_use": TEMPLATES[KIMI_K2]}
    assert format_of(tokenizer) == (PLAIN, False)
    assert format_of(tokenizer, TOOLS) == (KIMI_K2, True)
    assert AnswerParser.for_template(tokenizer, tools=TOOLS).form is KIMI_K2


def test_templates_without_calls_or_reasoning():
    assert format_of(None) == (PLAIN, False)
    assert format_of("{{ messages }}") == (PLAIN, False)
    assert format_of("{% if '</think>' in content %}") == (PLAIN, True)
    assert format_of(TEMPLATES[KIMI_K2].replace("<think>{{rc}}</think>", "")) == (KIMI_K2, False)
    parser = AnswerParser.for_template("{{ messages }}", prompt="<think>")
    assert parse_answer("<think>a", parser) == Answer(content="<think>a")
    assert set(FORMATS) == {"plain", *(form.name for form in FORMS)}


def test_control_tokens_are_shown():
    """Marks that are control tokens reach the parser; other control tokens do not."""
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>")
    tokenizer = bytewise(control=("<end>", *marks), user_defined=("</arg_value>",), template=TEMPLATES[GLM_47])
    ids = tokenizer.encode("<think>" + TEXTS[GLM_47] + "<end>", parse_special=True)
    prompt = tokenizer.encode("x<think>", parse_special=True)
    parser = AnswerParser.for_template(tokenizer, prompt=prompt, **WITH_TOOLS)
    stream = tokenizer.stream(shown=parser.shown_tokens(tokenizer))
    pieces = [part for token in ids[1:] for part in parser.push(stream.push(token))]
    assert Answer.of(pieces + parser.finish()) == parsed(GLM_47, TEXTS[GLM_47], opened=True)
    assert tokenizer.encode("<end>", parse_special=True)[0] not in parser.shown_tokens(tokenizer)


def vocabulary(form, control):
    """A tokenizer with a format's marks as control tokens, or as text."""
    marks = [mark for mark in dict.fromkeys(form.marks()) if mark.startswith("<") and not mark.endswith('"')]
    return bytewise(control=("<end>", *marks)) if control else bytewise(user_defined=())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("control", [False, True])
def test_grammars_of_calls(form, control):
    """They have what the model writes, and nothing without a call; what they have the parser reads."""
    tokenizer = vocabulary(form, control)
    grammar = Grammar.of(tokenizer, lark=call_grammar(form, TOOLS, tokenizer, opened=True))
    text = TEXTS[form].replace("One moment.", "").replace("</think>\n\n", "</think>").replace("</think>\n", "</think>")
    matcher = grammar.matcher()
    for token in tokenizer.encode(text, parse_special=True):
        assert not matcher.is_finished
        matcher.accept(token)
    assert matcher.is_complete
    named = Grammar.of(tokenizer, lark=call_grammar(form, TOOLS, tokenizer, name="search", parallel=False)).matcher()
    forced = tokenizer.decode(named.forced(), skip_special=False)
    assert "search" in forced
    assert "get_weather" not in forced


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_texts_of_grammars_are_calls(form):
    from test_constraints import walk

    tools = [
        {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "kind": {"enum": ["one", "two"]},
                    "flag": {"type": "boolean"},
                    "count": {"type": "integer", "minimum": 0, "maximum": 99},
                },
                "required": ["kind", "count"],
                "additionalProperties": False,
            },
        }
    ]
    tokenizer = bytewise()
    grammar = Grammar.of(tokenizer, lark=call_grammar(form, tools, tokenizer, name="f", parallel=False))
    for seed in range(5):
        tokens, _ = walk(grammar, seed, most=1000)
        answer = parse_answer(tokenizer.decode(tokens), AnswerParser(form, thinks=False, tools=tools))
        assert answer.content == ""
        (made,) = answer.tool_calls
        arguments = json.loads(made.arguments)
        assert made.name == "f"
        assert set(arguments) - {"flag"} == {"kind", "count"}
        assert arguments["kind"] in ("one", "two")
        assert type(arguments["count"]) is int


def test_grammars_that_cannot_be():
    with pytest.raises(PymlaError, match="no format for calls of tools"):
        call_grammar(PLAIN, TOOLS, bytewise())
    with pytest.raises(PymlaError, match="there is no tool 'f'; there are get_weather, search"):
        call_grammar(GLM_47, TOOLS, bytewise(), name="f")
    with pytest.raises(PymlaError, match="`tools` is empty"):
        call_grammar(GLM_47, [], bytewise())


def test_pieces_of_a_kind_come_together():
    assert cut(DEEPSEEK_V31, ["<think>a", "b</think>c d"]) == [Reasoning("a"), Reasoning("b"), Content("c d")]
