"""Grammars of answers that must call a tool (``tool_choice`` "required", or a tool by its name)."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pymla.errors import PymlaError
from pymla.text.answers.arguments import Tools, schema_types
from pymla.text.answers.formats import THINK_END, Format, Pairs
from pymla.text.constraint_source import BLANKS
from pymla.text.tokenizer import Tokenizer


def call_grammar(
    form: Format,
    tools: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    parallel: bool = True,
    opened: bool = False,
) -> str:
    """The Lark grammar of answers that are calls of tools and nothing else, for `Grammar.of`.

    Arguments in JSON follow the tool's schema. Where a model writes arguments one by one they come in the order of the
    schema's properties; an argument that may be a text is any text, or one of its `enum`.

    Parameters
    ----------
    form : Format
    tools : list of dict
        In OpenAI's form.
    tokenizer : Tokenizer
        Tells which marks are control tokens.
    name : str, optional
        The only tool that may be called.
    parallel : bool
        Whether there may be several calls.
    opened : bool
        Whether the prompt has opened the reasoning: it may go on, and ends before the call.

    Raises
    ------
    PymlaError
        The format has no calls, or there is no such tool.
    """
    by_name = Tools(tools).by_name
    if not form.call:
        raise PymlaError("the model's chat template has no format for calls of tools")
    if name is not None and name not in by_name:
        raise PymlaError(f"there is no tool {name!r}; there are {', '.join(by_name) or 'none'}")
    chosen = {name: by_name[name]} if name is not None else by_name
    if not chosen:
        raise PymlaError("`tools` is empty; a call needs one")
    return _Writer(form, tokenizer).written(chosen, parallel, opened)


class _Writer:
    """Writes a grammar for a format and a tokenizer."""

    def __init__(self, form: Format, tokenizer: Tokenizer):
        self._form, self._tokenizer = form, tokenizer
        self._rules: list[str] = []

    def written(self, tools: Mapping[str, Mapping[str, Any]], parallel: bool, opened: bool) -> str:
        form = self._form
        calls = [self._call(number, tool, schema) for number, (tool, schema) in enumerate(tools.items())]
        self._rules.append(f"call: {' | '.join(calls)}")
        more = f"({self._text(form.between)} call)*" if parallel else ""
        reasoning = self._any_text("thought", THINK_END) if opened else ""
        begin, end, gap = self._mark(form.block), self._mark(form.block_end), self._text(form.gap)
        start = " ".join(f"start: {reasoning} {begin} {gap} call {more} {gap} {end}".split())
        return "\n".join([start, *self._rules]) + "\n"

    def _call(self, number: int, tool: str, schema: Mapping[str, Any]) -> str:
        """The rule of a tool's call. Returns its name."""
        form, rule = self._form, f"call_{number}"
        if form.pairs:
            body = self._pairs(number, schema, form.pairs)
        else:
            self._rules.append(f"arguments_{number}: {_json_rule(schema)}")
            body = f"arguments_{number} {self._text(form.fence)}"
        head = " ".join(self._part(part, tool) for part in form.head)
        self._rules.append(f"{rule}: {self._mark(form.call)} {head} {body} {self._mark(form.call_end)}")
        return rule

    def _part(self, part: str, tool: str) -> str:
        """A part of a call's head."""
        texts = [self._mark(text.replace("{name}", tool)) for text in part.split("{number}")]
        return " /[0-9]+/ ".join(texts)

    def _pairs(self, number: int, schema: Mapping[str, Any], pairs: Pairs) -> str:
        """Arguments that are written one by one, in the schema's order."""
        required = set(schema.get("required", ()))
        parts = [self._text(pairs.gap)]
        for place, (key, value) in enumerate(schema.get("properties", {}).items()):
            rule = f"argument_{number}_{place}"
            is_text = "string" in schema_types(value)
            middle = (part.replace("{is_text}", "true" if is_text else "false") for part in pairs.middle)
            marks = " ".join(map(self._mark, (pairs.key, key, *middle, pairs.value)))
            self._rules.append(f"{rule}: {marks} {self._value(rule, value, is_text)} {self._text(pairs.gap)}")
            parts.append(rule if key in required else f"{rule}?")
        return " ".join(parts)

    def _value(self, rule: str, schema: Any, is_text: bool) -> str:
        """An argument's value and the mark behind it."""
        assert self._form.pairs is not None
        end = self._form.pairs.end
        if not is_text:
            self._rules.append(f"{rule}_value: {_json_rule(schema)}")
            return f"{rule}_value {self._mark(end)}"
        choices = [schema["const"]] if "const" in schema else schema.get("enum", [])
        if choices:
            return f"({' | '.join(self._text(_plain(each)) for each in choices)}) {self._mark(end)}"
        return self._any_text(f"{rule}_text", end)

    def _any_text(self, rule: str, end: str) -> str:
        """Any text up to a mark, and the mark."""
        token = self._control(end)
        if token is not None:
            return f"/(?s:.)*/ <[{token}]>"
        self._rules.append(f"{rule}[lazy]: /(?s:.)*{_escaped(end)}/")
        return rule

    def _mark(self, mark: str) -> str:
        token = self._control(mark)
        return self._text(mark) if token is None else f"<[{token}]>"

    def _control(self, mark: str) -> int | None:
        """The control token that a mark is, if it is one: as text it cannot come."""
        ids = self._tokenizer.encode(mark, parse_special=True, inside=True) if mark else []
        return ids[0] if len(ids) == 1 and self._tokenizer.is_special(ids[0]) else None

    def _text(self, text: str) -> str:
        return json.dumps(text, ensure_ascii=False) if text else ""


def _json_rule(schema: Any) -> str:
    options = {"x-guidance": {"whitespace_pattern": BLANKS}}
    return f"%json {json.dumps({**schema, **options} if schema else {'type': 'object', **options})}"


def _plain(value: Any) -> str:
    """A value as a model writes it without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _escaped(text: str) -> str:
    return "".join(each if each.isalnum() and each.isascii() else f"\\u{{{ord(each):x}}}" for each in text)
