"""Jinja as chat templates expect it: with the names that transformers gives them, in a sandbox, within limits.

The environment is that of ``transformers.utils.chat_template_utils``: blocks are trimmed, ``break`` and ``continue``
leave loops, ``{% generation %}`` marks the model's own turns, and ``tojson``, ``raise_exception``, ``strftime_now``,
``dict`` and ``namespace`` are there. A template comes with the model, so it is not trusted: it sees nothing but plain
data, and its time and the size of its values are limited.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pymla.errors import PymlaError

#: Seconds that a template may run, checked at each pass of a loop and each call. Real ones take milliseconds.
SECONDS = 20.0

#: Characters or elements of a value that a template may make; a context of a million tokens is a tenth of it.
LARGEST = 1 << 26


def render(source: str, variables: Mapping[str, Any], where: str) -> str:
    """The text that a template makes.

    Parameters
    ----------
    source : str
    variables : dict
        Variables of the template. Values are rebuilt from plain types first, by `plain`.
    where : str
        Name of the template in errors.

    Raises
    ------
    PymlaError
        The template is damaged, fails, refuses its variables, or goes on without an end; with the line where that is
        known.
    """
    environment = _Environment()
    try:
        template = environment.from_string(_without_mark(source))
        pieces, size = [], 0
        for piece in template.generate(plain(variables)):
            size += len(piece)
            if size > LARGEST:
                raise _TooMuch(f"its text has more than {LARGEST} characters")
            pieces.append(piece)
        return "".join(pieces)
    except RecursionError as error:
        raise PymlaError(f"{where} cannot be used with these messages: it, or a value, is nested too deeply") from error
    except Exception as error:  # a template is a program: it can raise anything
        line = _line(error)
        place = "" if line is None else f"line {line}: "
        reason = str(error) or type(error).__name__
        raise PymlaError(f"{where} cannot be used with these messages: {place}{reason}") from error


def asks_for_none(source: str) -> bool:
    """Whether a template tests a message's content for being none, as DeepSeek-V3's does to find tool calls."""
    try:
        tree = _Environment().parse(_without_mark(source))
    except (jinja2.TemplateError, RecursionError):
        return False  # rendering it will fail with a message
    for test in tree.find_all(nodes.Test):
        subject = test.node
        key = subject.attr if isinstance(subject, nodes.Getattr) else getattr(subject, "arg", None)
        if test.name == "none" and (key == "content" or getattr(key, "value", None) == "content"):
            return True
    return False


def plain(value: Any) -> Any:
    """A value rebuilt from the types that JSON knows, so that a template meets no other object's methods. Data classes
    and Pydantic's models become dictionaries; of anything else only the name of its type is left."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass, which may have methods of its own
            return kind(value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else list(map(plain, value))
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


class _TooMuch(jinja2.TemplateError):
    """A template went past a limit."""


class _Code(CodeGenerator):
    """Compiles checks into a template: of the time in each loop, and of the size of results of filters and ``~``."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(check).set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._sized(super().visit_Concat, node, frame)

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        self._sized(super().visit_Filter, node, frame)

    def _sized(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.sized(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """``{% generation %}``: the turns that a model is trained on. For running it, the block's contents."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Jinja's optimiser would work out constants while it compiles, past the limits.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._end = time.monotonic() + SECONDS

    def check_time(self) -> None:
        """Raise _TooMuch after `SECONDS`; templates call it in their loops."""
        if time.monotonic() > self._end:
            raise _TooMuch(f"it runs for more than {SECONDS:g} seconds")

    def sized(self, value: Any) -> Any:
        """The value, if it is not too large."""
        if isinstance(value, str | list | tuple | dict) and len(value) > LARGEST:
            raise _TooMuch(f"a value has more than {LARGEST} characters or elements")
        return value

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        if isinstance(getattr(function, "__self__", None), str):  # "".ljust and its like make a text of any length
            self._check_count(args)
        return self.sized(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    self._check_count([len(value) * count])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_count([left.bit_length() * right])
        return self.sized(super().call_binop(context, operator, left, right))

    def _check_count(self, counts: Iterable[Any]) -> None:
        if any(isinstance(count, int) and count > LARGEST for count in counts):
            raise _TooMuch(f"a value has more than {LARGEST} characters or elements")


class _Dict:
    """``dict`` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` that holds no name with an underscore in front, which the sandbox would look up in Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name that the template gives
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace cannot hold {name!r}: a name must not begin with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes characters that are special in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _without_mark(source: str) -> str:
    """The source without a byte order mark, as an editor or a careless converter leaves it."""
    return source.removeprefix("\ufeff")


def _line(error: Exception) -> int | None:
    """The line of the template where an error was raised, or None."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line, entry = None, error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code.co_filename == "<template>":
            line = entry.tb_lineno
        entry = entry.tb_next
    return line
