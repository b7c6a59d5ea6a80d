"""What an answer is made of."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of what the model says."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """The beginning of a call, which has its id and its name, or a piece of its arguments."""

    index: int
    arguments: str = ""  # a piece of a JSON object's text
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Withdrawn:
    """A call turned out to be damaged: what was given of it is void, and its text comes as content."""

    index: int


Piece = Reasoning | Content | CallDelta | Withdrawn


@dataclass
class ToolCall:
    """A call of a tool; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass
class Answer:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Answer":
        """The answer that pieces make together."""
        made, calls = cls(), dict[int, ToolCall]()
        for piece in pieces:
            if isinstance(piece, Reasoning):
                made.reasoning += piece.text
            elif isinstance(piece, Content):
                made.content += piece.text
            elif isinstance(piece, Withdrawn):
                del calls[piece.index]
            elif piece.name is not None:
                calls[piece.index] = ToolCall(piece.id or "", piece.name, piece.arguments)
            else:
                calls[piece.index].arguments += piece.arguments
        made.tool_calls = list(calls.values())
        return made
