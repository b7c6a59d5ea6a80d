"""A parser of answers that takes their text in any pieces.

It goes from part to part of an answer and takes of the text what is certain: what may be the beginning of a mark waits
for the rest. Where it goes next depends on the text alone and never on how it was cut, so every cut gives the same
answer.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pymla.text.answers.arguments import Tools, is_json, is_object, value_text
from pymla.text.answers.formats import THINK, THINK_END, Format, Pairs, format_of, opens_reasoning
from pymla.text.answers.pieces import Answer, CallDelta, Content, Piece, Reasoning, Withdrawn
from pymla.text.tokenizer import Tokenizer

#: Characters of a call's head, or of a key, at most.
_LONGEST_HEAD = 512

_BLANKS = " \t\r\n"
_TEXT = frozenset({"string"})


@dataclass
class _Call:
    """A call that is being read."""

    index: int
    name: str
    arguments: str = ""  # what was given of them
    waiting: str = ""  # text of the arguments that is not certain yet
    types: frozenset[str] = frozenset()  # of the argument that is being read
    is_json: bool = False  # whether the model says that this argument is JSON
    held: list[Piece] = field(default_factory=list)  # pieces that wait for the call's end


class AnswerParser:
    """Takes an answer apart while it is generated.

    Blanks around the reasoning, and in front of calls and between them, belong to no part and are left out; so are line
    ends in front of the content where the model thinks. A damaged call is content: its text, unchanged.

    Parameters
    ----------
    form : Format
    thinks : bool
        Whether the answer may begin with reasoning.
    opened : bool
        Whether the prompt has opened the reasoning already.
    tools : list of dict, optional
        Tools in OpenAI's form. GLM writes texts and numbers alike; the types of parameters tell which they are.
    whole_calls : bool
        Give a call once it is complete, and not its arguments as they come. Then nothing is withdrawn.
    make_id : callable, optional
        Gives ids to calls whose model gives none.
    """

    def __init__(
        self,
        form: Format,
        *,
        thinks: bool = True,
        opened: bool = False,
        tools: Iterable[Mapping[str, Any]] | None = None,
        whole_calls: bool = False,
        make_id: Callable[[], str] | None = None,
    ):
        self.form = form
        self._thinks, self._opened, self._whole_calls = thinks, opened, whole_calls
        self._tools = Tools(tools)
        self._make_id = make_id or (lambda: f"call_{uuid.uuid4().hex[:24]}")
        self._text = ""  # what is not taken yet
        self._pieces: list[Piece] = []
        self._state: Callable[[bool], bool] = self._begin if thinks or opened else self._speak
        self._has_reasoning = self._has_content = self._is_after_call = False
        self._raw = ""  # of the call that is being read, with all that stands between it and what was given before
        self._outside: Callable[[bool], bool] = self._speak  # the state that a damaged call's text belongs to
        self._calls = 0
        self._call: _Call | None = None

    @classmethod
    def for_template(
        cls,
        template: str | Tokenizer | None,
        *,
        prompt: str | Sequence[int] = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> "AnswerParser":
        """The parser for a chat template's model.

        Parameters
        ----------
        template : str, Tokenizer or None
            A template, or a tokenizer that has one.
        prompt : str, or sequence of int
            What the answer follows, as text or, with a tokenizer, as token ids: its end may open the reasoning.
        tools : list of dict, optional
            Tools in OpenAI's form.
        **options
            `whole_calls` and `make_id`.
        """
        form, thinks = format_of(template, tools)
        tokenizer = template if isinstance(template, Tokenizer) else None
        opened = thinks and opens_reasoning(prompt, tokenizer)
        return cls(form, thinks=thinks, opened=opened, tools=tools, **options)

    def shown_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens whose names the parser must see, for `Tokenizer.stream`."""
        ids = [tokenizer.encode(mark, parse_special=True, inside=True) for mark in self.form.marks()]
        return frozenset(each[0] for each in ids if len(each) == 1 and tokenizer.is_special(each[0]))

    def push(self, text: str) -> list[Piece]:
        """Pieces that are certain with more of the answer's text."""
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[Piece]:
        """Pieces that are certain with the end of the text."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Piece]:
        while self._state(final):
            pass
        taken, self._pieces = self._pieces, []
        return taken

    # States outside calls. A state takes a part of the text, and says whether there is more to do.

    def _begin(self, final: bool) -> bool:
        rest = self._text.lstrip(_BLANKS)
        if not final and THINK.startswith(rest[: len(THINK)]) and len(rest) < len(THINK):
            return False
        if rest.startswith(THINK):
            self._text = rest[len(THINK) :]
        self._state = self._reason if self._opened or rest.startswith(THINK) else self._speak
        return True

    def _reason(self, final: bool) -> bool:
        text, mark = self._until((THINK_END, *(self._openers() if self.form.ends_reasoning else ())), final)
        body = text.rstrip(_BLANKS)
        blanks = text[len(body) :]
        self._give(Reasoning(body if self._has_reasoning else body.lstrip(_BLANKS)))
        if mark is None:
            self._text = "" if final else blanks + self._text
            return False
        if mark == THINK_END:
            self._state = self._speak
        else:
            self._open(blanks + mark, mark, self._reason)
        return True

    def _speak(self, final: bool) -> bool:
        text, mark = self._until(self._openers(), final)
        if self._thinks and not self._has_content:
            text = text.lstrip("\r\n")
        body = text.rstrip(_BLANKS)
        blanks = text[len(body) :]
        self._give(Content(body))
        if mark is not None:
            self._open(blanks + mark, mark, self._speak)
            return True
        if final and not self._is_after_call:
            self._give(Content(blanks))
        self._text = "" if final else blanks + self._text
        return False

    def _openers(self) -> tuple[str, ...]:
        """Marks that calls begin with."""
        if not self.form.block or self.form.is_block_optional:
            return tuple(filter(None, (self.form.block, self.form.call)))
        return (self.form.block,)

    def _open(self, raw: str, mark: str, outside: Callable[[bool], bool]) -> None:
        """Go into calls, which the text `raw` opens."""
        self._raw, self._outside = raw, outside
        self._state = self._head if mark == self.form.call else self._between

    # States within calls. Their text is kept in `_raw` until a call is complete.

    def _between(self, final: bool) -> bool:
        """In front of a call, or of the end of all calls. There is no raw text after a call."""
        rest = self._text.lstrip(_BLANKS)
        blanks = self._text[: len(self._text) - len(rest)]
        found = self._mark_here(rest, (self.form.call, self.form.block_end), final)
        if found == "":
            return False
        if found == self.form.call:
            self._take(blanks + found)
            self._state = self._head
            return True
        if self._raw:  # all calls are opened, and then there is none
            return self._fail()
        if found is not None:
            self._text = rest[len(found) :]
        elif not rest:
            self._text = ""
        self._state = self._speak
        return True

    def _head(self, final: bool) -> bool:
        found = self._part(self.form.ends, self.form.pattern, final, self.form.is_head_open)
        if found is None:
            return self._state != self._head
        self._call = _Call(self._calls, found["name"])
        self._calls += 1
        self._give_call(CallDelta(self._call.index, "", found.groupdict().get("id") or self._make_id(), found["name"]))
        self._state = self._pair if self.form.pairs else self._object
        return True

    def _object(self, final: bool) -> bool:
        """Arguments that are the text of a JSON object."""
        form, call = self.form, self._call
        assert call is not None
        ends = (form.call_end, form.call, form.block_end) if form.is_block_optional else (form.call_end,)
        text, mark = self._until(ends, final)
        self._raw += text + (mark if mark == form.call_end else "")
        if mark is not None and mark != form.call_end:
            self._text = mark + self._text
        call.waiting += text
        fence = form.fence.strip()
        body = call.waiting.rstrip(_BLANKS + fence[:1])
        tail = call.waiting[len(body) :]
        self._argue(body if call.arguments else body.lstrip(_BLANKS))
        call.waiting = tail
        if mark is None and not final:
            return False
        whole = tail.strip(_BLANKS) in ("", fence) and is_object(call.arguments)
        return self._close() if whole else self._fail()

    def _pair(self, final: bool) -> bool:
        """In front of an argument with its key, or of the call's end."""
        pairs, call = self._in_pairs()
        rest = self._text.lstrip(_BLANKS)
        found = self._mark_here(rest, (pairs.key, self.form.call_end), final)
        if found == "":
            return False
        if found is None:
            return self._fail()
        self._take(self._text[: len(self._text) - len(rest)] + found)
        if found == pairs.key:
            self._state = self._key
            return True
        self._argue("}" if call.arguments else "{}")
        return self._close()

    def _key(self, final: bool) -> bool:
        pairs, call = self._in_pairs()
        found = self._part((pairs.value,), pairs.pattern, final)
        if found is None:
            return self._state != self._key
        kind = found.groupdict().get("string")
        call.is_json = kind == "false"
        call.types = _TEXT if kind == "true" else self._tools.types(call.name, found["key"])
        begins = ", " if call.arguments else "{"
        quote = '"' if call.types == _TEXT and not call.is_json else ""
        self._argue(f"{begins}{json.dumps(found['key'], ensure_ascii=False)}: {quote}")
        self._state = self._value
        return True

    def _value(self, final: bool) -> bool:
        pairs, call = self._in_pairs()
        is_text = call.types == _TEXT and not call.is_json
        text, mark = self._until((pairs.end,), final)
        self._raw += text + (mark or "")
        if is_text:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            call.waiting += text
        if mark is None:
            return final and self._fail()
        value, call.waiting = call.waiting, ""
        if call.is_json and not is_json(value):
            return self._fail()
        self._argue('"' if is_text else value.strip(_BLANKS) if call.is_json else value_text(value, call.types))
        self._state = self._pair
        return True

    def _in_pairs(self) -> tuple[Pairs, _Call]:
        assert self.form.pairs is not None
        assert self._call is not None
        return self.form.pairs, self._call

    def _close(self) -> bool:
        """The call is complete."""
        assert self._call is not None
        for piece in self._call.held:
            self._give(piece)
        self._raw, self._call, self._outside, self._is_after_call = "", None, self._speak, True
        self._state = self._between
        return True

    def _fail(self) -> bool:
        """What stands here is no call. Its text goes where it would have gone without the mark that opened it."""
        if self._call is not None and not self._whole_calls:
            self._give(Withdrawn(self._call.index))
        raw, self._raw, self._call = self._raw, "", None
        self._give(Reasoning(raw) if self._outside == self._reason else Content(raw))
        self._state = self._outside
        return True

    # Taking text

    def _until(self, marks: Sequence[str], final: bool) -> tuple[str, str | None]:
        """Take the text up to the first of several marks, and the mark. Without one, what cannot belong to one."""
        found = [(at, mark) for mark in marks if (at := self._text.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            text, self._text = self._text[:at], self._text[at + len(mark) :]
            return text, mark
        kept = 0 if final else max((_overlap(self._text, mark) for mark in marks), default=0)
        at = len(self._text) - kept
        text, self._text = self._text[:at], self._text[at:]
        return text, None

    def _mark_here(self, rest: str, marks: Sequence[str], final: bool) -> str | None:
        """The mark that the text `rest` begins with; "" where it is not certain yet, and None where there is none."""
        for mark in filter(None, marks):
            if rest.startswith(mark):
                return mark
        return "" if not final and any(mark.startswith(rest) for mark in marks if mark) else None

    def _part(
        self, ends: Sequence[str], pattern: re.Pattern[str], final: bool, keep_end: bool = False
    ) -> re.Match[str] | None:
        """Take a short part up to one of several ends, and the end. None if it is not there yet, or if it is not as the
        pattern says: then the call has failed."""
        found = [(at, end) for end in ends if (at := self._text.find(end)) >= 0]
        at, end = min(found, default=(len(self._text) if final else len(self._text) - max(map(len, ends)), ""))
        if at > _LONGEST_HEAD or (final and not end):
            self._fail()
            return None
        if not end:
            return None
        match = pattern.fullmatch(self._text, 0, at)
        if match is None:
            self._fail()
            return None
        self._take(self._text[: at if keep_end else at + len(end)])
        return match

    def _take(self, text: str) -> None:
        """Take the text that comes next as a call's."""
        self._raw += text
        self._text = self._text[len(text) :]

    # Giving pieces

    def _argue(self, text: str) -> None:
        assert self._call is not None
        self._call.arguments += text
        self._give_call(CallDelta(self._call.index, text))

    def _give_call(self, piece: CallDelta) -> None:
        if self._whole_calls:
            assert self._call is not None
            self._call.held.append(piece)
        else:
            self._give(piece)

    def _give(self, piece: Piece) -> None:
        """Give a piece, if there is anything in it, together with the one before it where they belong together."""
        last = self._pieces[-1] if self._pieces else None
        if isinstance(piece, Reasoning | Content):
            if not piece.text:
                return
            if isinstance(piece, Content):
                self._has_content, self._is_after_call = True, False
            else:
                self._has_reasoning = True
            if isinstance(last, Reasoning | Content) and type(last) is type(piece):
                self._pieces[-1] = replace(last, text=last.text + piece.text)
                return
        elif isinstance(piece, CallDelta) and piece.name is None:
            if not piece.arguments:
                return
            if isinstance(last, CallDelta) and last.index == piece.index:
                self._pieces[-1] = replace(last, arguments=last.arguments + piece.arguments)
                return
        self._pieces.append(piece)


def parse_answer(text: str, parser: AnswerParser) -> Answer:
    """The parts of a whole answer."""
    return Answer.of([*parser.push(text), *parser.finish()])


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that a mark may begin with."""
    longest = min(len(text), len(mark) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(mark[:count])), 0)
