"""Constraints as llguidance takes them, and what it says of those that it refuses, in one line."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pymla import checks
from pymla.errors import PymlaError
from pymla.text import gbnf

if TYPE_CHECKING:
    from pymla.text.tokenizer import Tokenizer

#: Blanks that a text under a JSON schema may have between two of its parts. Without a bound, a small model at a low
#: temperature writes blanks for ever.
BLANKS = r"[ \t\n\r]{1,40}"

#: A rule of GBNF. Lark has a colon in place of `::=`.
_GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z0-9-]+[ \t]*::=", re.MULTILINE)

#: Where llguidance found an error in a grammar, and what it says of it.
_PLACE = re.compile(r"(?:at )?(?P<line>\d+)\((?P<column>\d+)\): (?P<reason>.*)")


def source_of(name: str, value: Any, tokenizer: "Tokenizer", after: str | None = None) -> str:
    """A constraint as llguidance takes it; `after` a mark, if one is given, up to which there may be any text."""
    source = _source(name, value, tokenizer)
    return source if after is None else _after(after, source, name == "json_schema", tokenizer)


def _source(name: str, value: Any, tokenizer: "Tokenizer") -> str:
    from llguidance import LLMatcher

    if name == "json_schema":
        schema = _schema_text(value)
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": BLANKS})
    if not isinstance(value, str):
        checks.refuse(name, value, "a text is expected")
    if name == "regex":
        return LLMatcher.grammar_from_regex(value)
    if name == "gbnf" or (name == "grammar" and _GBNF_RULE.search(value)):
        value = gbnf.to_lark(value, name, lambda text: _token_id(tokenizer, text))
    return LLMatcher.grammar_from_lark(value)


def _after(mark: str, source: str, has_blanks: bool, tokenizer: "Tokenizer") -> str:
    """A constraint for what comes after a mark. Models put line ends between their reasoning and their answer."""
    grammars = json.loads(source)["grammars"] if source.startswith('{"grammars"') else [{"lark_grammar": source}]
    token = _token_id(tokenizer, mark)
    if token is not None and tokenizer.is_special(token):  # which no text is
        lark = f"start: /(?s:.)*/ <[{token}]> blanks @answer"
    else:
        escaped = "".join(f"\\u{{{ord(character):x}}}" for character in mark)
        lark = f"start: before blanks @answer\nbefore[lazy]: /(?s:.)*{escaped}/"
    lark += f"\nblanks: {f'/{BLANKS}/?' if has_blanks else chr(34) * 2}\n"
    return json.dumps({"grammars": [{"lark_grammar": lark}, grammars[0] | {"name": "answer"}]})


def _token_id(tokenizer: "Tokenizer", text: str) -> int | None:
    """The token that a text is, or None where it is several or none."""
    ids = tokenizer.encode(text, parse_special=True, inside=True)
    return ids[0] if len(ids) == 1 else None


def _schema_text(value: Any) -> str:
    """A JSON schema as a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            message = f"{error.msg[:1].lower()}{error.msg[1:]}"
            raise PymlaError(f"`json_schema`: line {error.lineno}, column {error.colno}: {message}") from None
        except RecursionError:
            raise PymlaError("`json_schema` is nested too deeply") from None
    if not isinstance(value, Mapping | bool):
        checks.refuse("json_schema", value, "a JSON schema is expected: a dictionary, true or false")
    if value is False:
        raise PymlaError("`json_schema` is false, which no text fits")
    try:
        return json.dumps({} if value is True else dict(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise PymlaError(f"`json_schema` cannot be written as JSON: {error}") from None


def reason(name: str, message: str) -> str:
    """What llguidance says of a constraint that it refuses, in one line, with the place where it is the caller's."""
    place = _PLACE.match(message)
    told = first_line(place["reason"] if place else message)
    inner = re.search(r"^error: (.*)", message, re.MULTILINE)
    if inner:
        told = inner[1]
    if name == "regex":
        # The expression stands in a grammar that llguidance made for it.
        caret = re.search(r"^    ( *)\^", message, re.MULTILINE) if inner else None
        return f"column {len(caret[1]) + 1}: {told}" if caret else told
    # So do rules of GBNF, whose lines are others in the translation.
    shown = place and name in ("lark", "grammar")
    return f"line {place['line']}, column {place['column']}: {told}" if place and shown else told


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
