"""How models write their reasoning and their calls of tools, told by their chat templates.

Each format is described where its models' chat template renders a conversation that has such an answer in it;
docs/tool-calls.md has an example and the source of each.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pymla.text.chat import choose_template
from pymla.text.tokenizer import Tokenizer

#: Around reasoning, in all formats.
THINK, THINK_END = "<think>", "</think>"

#: Tokens of a prompt's end that may open the reasoning.
_PROMPT_END = 16

#: A tool's name: no blanks, no marks of another part, and no more than any API takes.
_NAME = r"(?P<name>[^\s<>\"'`{}:]{1,128})"


@dataclass(frozen=True)
class Pairs:
    """Arguments that are written one by one, each with a key and a value.

    Attributes
    ----------
    key : str
        In front of a key.
    value : str
        In front of a value.
    end : str
        Behind a value.
    pattern : re.Pattern
        What stands between `key` and `value`. Its group "string", where there is one, says "true" if the value is a
        text.
    middle : tuple of str
        What a model writes between a key and `value`: texts and marks. "{is_text}" stands for "true" or "false".
    gap : str
        What it writes behind a call's head and behind each value.
    """

    key: str
    value: str
    end: str
    pattern: re.Pattern[str]
    middle: tuple[str, ...]
    gap: str


@dataclass(frozen=True)
class Format:
    """How a model writes an answer.

    Attributes
    ----------
    name : str
    block, block_end : str
        Around all calls; empty where there are no such marks.
    call, call_end : str
        Around a call; empty for a model without a format for calls.
    pattern : re.Pattern
        A call's head, which stands between `call` and one of `ends`: the groups "name" and, where the model gives one,
        "id".
    ends : tuple of str
        What may stand behind a head.
    is_head_open : bool
        What stands behind the head belongs to the next part already.
    head : tuple of str
        What a model writes behind `call`: texts and marks, with "{name}" and "{number}" in them.
    fence : str
        Behind arguments in JSON, in front of `call_end`.
    pairs : Pairs, optional
        Arguments that are written one by one. Otherwise they are the text of a JSON object.
    is_block_optional : bool
        Models leave the marks around all calls away, and those behind a call.
    ends_reasoning : bool
        Calls may begin without an end of the reasoning.
    gap, between : str
        What a model writes inside the marks around all calls, at both ends, and between two calls.
    """

    name: str
    block: str = ""
    block_end: str = ""
    call: str = ""
    call_end: str = ""
    pattern: re.Pattern[str] = re.compile(rf"\s*{_NAME}\s*")
    ends: tuple[str, ...] = ()
    is_head_open: bool = False
    head: tuple[str, ...] = ()
    fence: str = ""
    pairs: Pairs | None = None
    is_block_optional: bool = False
    ends_reasoning: bool = False
    gap: str = ""
    between: str = ""

    def marks(self) -> Iterator[str]:
        """Texts that the parser must see, even if they are control tokens."""
        parts = (THINK, THINK_END, self.block, self.block_end, self.call, self.call_end, *self.head, *self.ends)
        pairs = (self.pairs.key, self.pairs.value, self.pairs.end, *self.pairs.middle) if self.pairs else ()
        yield from (part for part in (*parts, *pairs) if part and "{" not in part)


#: Without calls.
PLAIN = Format("plain")

_SEPARATOR = "<｜tool▁sep｜>"

#: DeepSeek-V3.1, V3.2-Exp.
DEEPSEEK_V31 = Format(
    "deepseek-v3.1",
    block="<｜tool▁calls▁begin｜>",
    block_end="<｜tool▁calls▁end｜>",
    call="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    ends=(_SEPARATOR,),
    head=("{name}", _SEPARATOR),
)

#: DeepSeek-V3, V3-0324, R1.
DEEPSEEK_V3 = replace(
    DEEPSEEK_V31,
    name="deepseek-v3",
    pattern=re.compile(rf"\s*\w+{_SEPARATOR}{_NAME}\s*"),
    ends=("```json",),
    head=("function", _SEPARATOR, "{name}\n```json\n"),
    fence="\n```",
    between="\n",
)

#: DeepSeek-V3.2 (DSML).
DEEPSEEK_V32 = Format(
    "deepseek-v3.2",
    block="<｜DSML｜function_calls>",
    block_end="</｜DSML｜function_calls>",
    call='<｜DSML｜invoke name="',
    call_end="</｜DSML｜invoke>",
    ends=('">',),
    head=("{name}", '">'),
    pairs=Pairs(
        key='<｜DSML｜parameter name="',
        value='">',
        end="</｜DSML｜parameter>",
        pattern=re.compile(r'(?P<key>[^"]*)" string="(?P<string>true|false)'),
        middle=('" string="{is_text}',),
        gap="\n",
    ),
    ends_reasoning=True,
    gap="\n",
    between="\n",
)

#: Kimi-K2, K2-Thinking.
KIMI_K2 = Format(
    "kimi-k2",
    block="<|tool_calls_section_begin|>",
    block_end="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    pattern=re.compile(rf"\s*(?P<id>(?:functions\.)?{_NAME}(?::\d+)?)\s*"),
    ends=("<|tool_call_argument_begin|>",),
    head=("functions.{name}:{number}", "<|tool_call_argument_begin|>"),
    is_block_optional=True,
    ends_reasoning=True,
)

_GLM_PAIRS = Pairs(
    key="<arg_key>",
    value="<arg_value>",
    end="</arg_value>",
    pattern=re.compile(r"\s*(?P<key>.*?)\s*</arg_key>\s*", re.DOTALL),
    middle=("</arg_key>",),
    gap="",
)

#: GLM-4.7, GLM-5.
GLM_47 = Format(
    "glm-4.7",
    call="<tool_call>",
    call_end="</tool_call>",
    ends=("<arg_key>", "</tool_call>"),
    is_head_open=True,
    head=("{name}",),
    pairs=_GLM_PAIRS,
)

#: GLM-4.5, 4.6: line ends between all parts of a call.
GLM_45 = replace(
    GLM_47,
    name="glm-4.5",
    pairs=replace(_GLM_PAIRS, middle=("</arg_key>", "\n"), gap="\n"),
    between="\n",
)

#: The formats by their names.
FORMATS = {each.name: each for each in (PLAIN, DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, KIMI_K2, GLM_45, GLM_47)}


def format_of(
    template: str | Tokenizer | None, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Format, bool]:
    """The format that a chat template is written for, and whether its model thinks.

    Parameters
    ----------
    template : str, Tokenizer or None
        A template, or a tokenizer that has one; None for a file without.
    tools : list of dict, optional
        Of a tokenizer's templates, that for tools counts where there are some.
    """
    source = choose_template(template, tools) if isinstance(template, Tokenizer) else template
    source = source or ""
    # A template builds DSML's marks of a variable.
    if "DSML" in source:
        found = DEEPSEEK_V32
    elif KIMI_K2.call in source:
        found = KIMI_K2
    elif "<arg_key>" in source:
        found = GLM_45 if "</arg_key>\n<arg_value>" in source else GLM_47
    elif DEEPSEEK_V3.call in source:
        found = DEEPSEEK_V3 if "```json" in source else DEEPSEEK_V31
    else:
        found = PLAIN
    return found, THINK in source or THINK_END in source


def opens_reasoning(prompt: str | Sequence[int], tokenizer: Tokenizer | None = None) -> bool:
    """Whether a prompt, given as text or as token ids of a tokenizer, ends with the beginning of reasoning."""
    if not isinstance(prompt, str):
        assert tokenizer is not None, "token ids need a tokenizer"
        prompt = tokenizer.decode(prompt[-_PROMPT_END:], skip_special=False)
    return prompt.rstrip().endswith(THINK)
