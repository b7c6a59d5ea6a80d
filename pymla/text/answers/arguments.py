"""Arguments of calls that models write one by one, as values of a JSON object."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

#: Names that JSON schemas have for the types of Python's values.
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


class Tools:
    """The tools of a request, in OpenAI's form, for their parameters' types."""

    def __init__(self, tools: Iterable[Mapping[str, Any]] | None = None):
        functions = [tool.get("function", tool) for tool in tools or ()]
        self.by_name: dict[str, Mapping[str, Any]] = {each["name"]: each.get("parameters") or {} for each in functions}

    def types(self, tool: str, parameter: str) -> frozenset[str]:
        """The types that a parameter's schema allows; none where it does not say."""
        properties = self.by_name.get(tool, {}).get("properties", {})
        return schema_types(properties.get(parameter, {}))


def schema_types(schema: Any) -> frozenset[str]:
    """The types that a JSON schema allows; none where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type", ())
    found = {named} if isinstance(named, str) else set(named)
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found |= schema_types(part)
    for value in (*schema.get("enum", ()), *((schema["const"],) if "const" in schema else ())):
        found.add(type_name(value))
    return frozenset(found)


def type_name(value: Any) -> str:
    """JSON schema's name for the type of a value."""
    return _TYPES.get(type(value), "null")


def value_text(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that a model has written: a text as it is, anything else as JSON.

    A text that is JSON, as ``12``, is a text where the schema allows texts and not what it would be.
    """
    if types != {"string"}:
        value = _json(text)
        allowed = types | {"integer"} if "number" in types else types
        if value is not _NONE and (not types or type_name(value) in allowed):
            return text.strip()
    return json.dumps(text, ensure_ascii=False)


def is_json(text: str) -> bool:
    """Whether a text is JSON."""
    return _json(text) is not _NONE


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    return isinstance(_json(text), dict)


_NONE = object()


def _json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NONE
