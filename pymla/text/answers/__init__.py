"""Answers of chat models taken apart: reasoning, content and calls of tools, each in the model's own format.

>>> from pymla.text.answers import AnswerParser
>>> parser = AnswerParser.for_template(tokenizer, prompt=ids, tools=tools)      # doctest: +SKIP
>>> for piece in stream:                                                       # doctest: +SKIP
...     for part in parser.push(piece):                                        # doctest: +SKIP
...         show(part)                                                         # doctest: +SKIP
>>> parser.finish()                                                            # doctest: +SKIP

docs/tool-calls.md shows the formats and where they are described.
"""

from pymla.text.answers.formats import FORMATS, Format, format_of, opens_reasoning
from pymla.text.answers.grammars import call_grammar
from pymla.text.answers.parser import AnswerParser, parse_answer
from pymla.text.answers.pieces import Answer, CallDelta, Content, Piece, Reasoning, ToolCall, Withdrawn

__all__ = [
    "FORMATS",
    "Answer",
    "AnswerParser",
    "CallDelta",
    "Content",
    "Format",
    "Piece",
    "Reasoning",
    "ToolCall",
    "Withdrawn",
    "call_grammar",
    "format_of",
    "opens_reasoning",
    "parse_answer",
]
