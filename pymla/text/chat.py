"""Conversations as text and as token ids, by the chat template in the model's file."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymla.errors import PymlaError
from pymla.printable import shown
from pymla.text import templates

if TYPE_CHECKING:
    from pymla.text.tokenizer import Tokenizer

#: A conversation: dictionaries, or objects that `pymla.text.templates.plain` makes dictionaries of.
Messages = Sequence[Any]

#: DeepSeek-V2's own format, for files without a template.
DEEPSEEK = (
    "{% macro text(content) %}{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}User: {{ text(message.content) }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ text(message.content) }}{{ eos_token }}"
    "{% else %}{{ text(message.content) }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

#: Where a message's reasoning may be. Templates read the first; the others are older names for it.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str | None,
    messages: Messages,
    add_generation_prompt: bool = True,
    bos: str = "",
    eos: str = "",
    **variables: Any,
) -> str:
    """A conversation as the model was trained to see it.

    Parameters
    ----------
    template : str or None
        A Jinja template, as in ``tokenizer.chat_template``; None takes DeepSeek's.
    messages : list of dict
        With "role", "content" and other keys that the template reads, such as "tool_calls". A value of None counts as
        absent, as in transformers, unless the template tests the content for it.
    add_generation_prompt : bool
        End with the beginning of the model's answer.
    bos, eos : str
        Texts of the template's variables ``bos_token`` and ``eos_token``.
    **variables
        Further variables of the template: ``tools`` and ``documents`` (None unless given), ``enable_thinking`` …

    Raises
    ------
    PymlaError
        The template is damaged, goes on without an end, or refuses the messages.

    Notes
    -----
    The template comes with the model, so it runs in a sandbox (`pymla.text.templates`). Its variables are
    those that transformers would give it.
    """
    variables = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": add_generation_prompt} | variables
    return _render(template, _plain(messages), variables, "the model's chat template")


def encode(
    tokenizer: "Tokenizer",
    messages: Messages,
    *,
    chat_template: str | None = None,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    where: str = "the model's chat template",
) -> list[int]:
    """Token ids of a conversation up to the model's answer.

    BOS is where the template writes it, as in transformers. Where the template writes none, one BOS is put in front if
    the file says that the model expects it (``add_bos_token``), as llama.cpp does.

    Parameters
    ----------
    tokenizer : Tokenizer
    messages : list of dict
        As for `render`.
    chat_template : str, optional
        A Jinja template instead of the file's own (`choose_template`).
    tools, documents : list of dict, optional
    variables : dict, optional
        Further variables of the template. They replace special tokens of the same name.
    where : str
        Name of the template in errors.

    Raises
    ------
    PymlaError
        As for `render`.

    Notes
    -----
    Control tokens that a message spells out are tokens to the model, as in llama.cpp: take care with text that is not
    yours. BOS alone is not: a message that spells it has its text.
    """
    if chat_template is None:
        chat_template = choose_template(tokenizer, tools)
    plain = _plain(messages)
    special = {"bos_token": "", "eos_token": ""} | tokenizer.special_tokens
    given: dict[str, Any] = {"tools": tools, "documents": documents, "add_generation_prompt": True}
    given = templates.plain(given | dict(variables or {}))

    def rendered(messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
        return _render(chat_template, messages, special | given, where)

    text, bos = rendered(plain, given), special["bos_token"]
    # In the same conversation without BOS in its messages and variables, every BOS is the template's own.
    without = rendered(_without(plain, bos), _without(given, bos)) if bos and bos in text else text
    ids: list[int] = []
    for number, piece in enumerate(_split_at_spelt(text, without, bos)):
        ids += tokenizer.encode(piece, add_bos=False, parse_special=number % 2 == 0)
    if tokenizer.add_bos and tokenizer.bos_id is not None and tokenizer.bos_id not in ids:
        return [tokenizer.bos_id, *ids]
    return ids


def choose_template(tokenizer: "Tokenizer", tools: Sequence[Any] | None = None) -> str | None:
    """One of the templates in the model's file, or None if it has none.

    Files may hold several by name. With tools that is the one called "tool_use", where there is one; otherwise the
    default, or the only one.

    Raises
    ------
    PymlaError
        There are several, and none is the default.
    """
    named = tokenizer.chat_templates
    if tools and "tool_use" in named:
        return named["tool_use"]
    if tokenizer.chat_template is not None or not named:
        return tokenizer.chat_template
    if len(named) > 1:
        raise PymlaError(
            f"the model's file has the chat templates {', '.join(sorted(named))} and none of them is the default; "
            "give one as `chat_template`"
        )
    return next(iter(named.values()))


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Messages as dictionaries of plain values.

    Raises
    ------
    PymlaError
        They are something else.
    """
    plain = templates.plain(messages)
    if not isinstance(plain, list | tuple):
        raise PymlaError("`messages` must be a list of dictionaries with role and content")
    for message in plain:
        if not isinstance(message, dict):
            raise PymlaError(f"`messages` must be dictionaries with role and content; one is {shown(message)}")
    return list(plain)


def _render(template: str | None, messages: list[dict[str, Any]], variables: dict[str, Any], where: str) -> str:
    source = DEEPSEEK if template is None else template
    variables = {"tools": None, "documents": None} | variables
    no_content = any(message.get("content", "") is None for message in messages)
    if no_content and templates.asks_for_none(source):
        # DeepSeek-V3's template finds tool calls by a content of none, which transformers never shows it. Others ask
        # for none and cannot do with it; they are rendered as transformers does it.
        with contextlib.suppress(PymlaError):
            with_none = _without_nones(messages, but=("content",))
            return templates.render(source, variables | {"messages": with_none}, where)
    return templates.render(source, variables | {"messages": _without_nones(messages)}, where)


def _without_nones(messages: list[dict[str, Any]], but: Collection[str] = ()) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: a value of none counts as absent."""
    return [
        _with_reasoning({key: value for key, value in message.items() if value is not None or key in but})
        for message in messages
    ]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the name that templates read, and under that of gpt-oss."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _without(value: Any, bos: str) -> Any:
    """The value with other characters wherever a text in it spells BOS: nothing else about the text changes, be it its
    length or how it is quoted. Keys of dictionaries stay as they are."""
    if isinstance(value, str):
        return value.replace(bos, _unlike(bos))
    if isinstance(value, dict):
        return {key: _without(each, bos) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(each, bos) for each in value)
    return value


def _unlike(bos: str) -> str:
    """A text that is not BOS, of its characters, where they are not all the same: as long, and quoted as BOS is."""
    return next(text for text in (bos[::-1], bos[1:] + bos[:1], "_" * len(bos), "-" * len(bos)) if text != bos)


def _split_at_spelt(text: str, without: str, bos: str) -> list[str]:
    """Pieces of a text: every other one is BOS that a message spells, so that `without` has something else there."""
    pieces, start, found = [], 0, text.find(bos) if bos else -1
    while found >= 0:
        if not without.startswith(bos, found):
            pieces += [text[start:found], bos]
            start = found + len(bos)
        found = text.find(bos, found + len(bos))
    return [*pieces, text[start:]]
