"""Chat templates: what they may use, as in transformers, and what stops them."""

import dataclasses
import datetime

import pytest

from pymla.errors import PymlaError
from pymla.text import templates
from pymla.text.chat import render

CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": [1, 2.5], "a": "é <&>"}}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds é.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  2 + 2.5? \n"},
    {"role": "assistant", "content": None, "reasoning": "A sum.", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "4.5", "tool_call_id": "1"},
    {"role": "assistant", "content": "<think>Easy.</think>4.5", "tool_calls": None},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
]

#: In the manner of the templates of DeepSeek-V3.1, GLM-4.x, Kimi-K2 and others, and each thing they use on its own.
TEMPLATES = {
    "loops": """{%- for message in messages -%}
    {%- if loop.first %}[first]{% endif -%}
    {%- if message.role == 'tool' %}{% continue %}{% endif -%}
    {{ loop.index }}/{{ loop.length }} {{ message['role'] | upper }}
    {%- if loop.index0 == 4 %}{% break %}{% endif %}
{% endfor %}""",
    "namespace": """{% set ns = namespace(first=true, system='') %}
{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system ~ m.content %}{% endif %}{% endfor %}
{{ bos_token }}{{ ns.system }}{% if ns.first %} !{% set ns.first = false %}{% endif %}{{ ns.first }}""",
    "tools": """{% if tools is defined and tools %}# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{{ tool.function | tojson(indent=2, sort_keys=true) }}{{ tool | tojson(separators=(',', ':')) }}
{% endfor %}{% endif %}{{ documents is none }} {{ documents is defined }}""",
    "tool calls": """{% for m in messages if m.tool_calls %}{% for call in m.tool_calls %}
{%- set f = call.function %}{{ f.name }}({% for k, v in f.arguments.items() -%}
{{ k }}={{ v if v is string else v | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}){% endfor %}{{ m.content is defined }}{{ m.reasoning_content }}
{%- endfor %}""",
    "thinking": """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{% for m in messages %}{% if m.role == 'assistant' and m.content is string and '</think>' in m.content -%}
{{ m.content.split('</think>')[-1].lstrip() }}{% endif %}{% endfor %}
<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}""",
    "parts": """{%- macro visible(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is iterable and content is not mapping -%}
{%- for item in content -%}
{%- if item is mapping and item.type == 'text' -%}{{- item.text -}}{%- endif -%}
{%- endfor -%}
{%- else -%}{{- content -}}{%- endif -%}{%- endmacro -%}
{%- for m in messages %}{{ visible(m.content) | trim }}|{% endfor -%}""",
    "generation": """{% for m in messages %}<{{ m.role }}>
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}""",
    "white space": "  {% if true %}  \n  a {%- if true -%}  b  {%- endif %} c\n  {# a remark #}\n{% endif %}\n\n d \n",
    "slices": "{{ messages[::-1] | map(attribute='role') | join(',') }}{{ messages[1:][0].content.strip() }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1]['content'][0]['text'] }}",
    "dict": "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['x'], 0) }}{{ dict(messages[0]).keys() | list }}",
    "filters": "{{ {'b': 1, 'a': none} | dictsort }}{{ ' x ' | trim | title }}{{ [3, 1] | sort | first }}{{ 7 // 2 }}"
    "{{ 'a,b'.split(',') }}{{ '%s-%02d' % ('n', 5) }}{{ '{:>4}'.format('r') }}{{ 'x' * 3 }}{{ missing }}{{ none }}",
    "set": "{% set block %}a{% if true %}b{% endif %}{% endset %}{{ block | length }}{{ block.startswith('a') }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token is defined }}"
    "{{ add_generation_prompt }}",
    "date": "{{ strftime_now('%Y') }}",
    "line end": "{{ messages | length }}\r\n\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_in_transformers(name):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<b>", "eos_token": "<e>", "unk_token": "<u>"}
    messages = utils._normalize_chat_messages(CHAT)
    for more in ({}, {"tools": TOOLS, "thinking": True}):
        (expected,), _ = utils.render_jinja_template(
            [messages], chat_template=TEMPLATES[name], add_generation_prompt=True, **variables, **more
        )
        assert render(TEMPLATES[name], CHAT, bos="<b>", eos="<e>", unk_token="<u>", **more) == expected


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ x | tojson }}", '{"b": "é <&>", "a": [1, 2.5]}'),
        ("{{ x | tojson(ensure_ascii=True) }}", '{"b": "\\u00e9 <&>", "a": [1, 2.5]}'),
        ("{{ x | tojson(separators=(',', ':')) }}", '{"b":"é <&>","a":[1,2.5]}'),
        ("{{ x | tojson(sort_keys=true, indent=1) }}", '{\n "a": [\n  1,\n  2.5\n ],\n "b": "é <&>"\n}'),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{%- generation -%} a {%- endgeneration -%} b", "ab"),
        ("{% for i in 'abcd' %}{% if i == 'b' %}{% continue %}{% endif %}{{ i }}{% endfor %}", "acd"),
        ("{% for i in 'abcd' %}{% if i == 'c' %}{% break %}{% endif %}{{ i }}{% endfor %}", "ab"),
        ("\ufeff{{ tools }}{{ documents }}", "NoneNone"),
        ("{% set n = namespace(a=1) %}{% for i in [2] %}{% set n.a = i %}{% endfor %}{{ n.a }}", "2"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
    ],
)
def test_what_templates_may_use(template, text):
    assert render(template, [], x={"b": "é <&>", "a": [1, 2.5]}) == text


def test_a_content_that_is_none():
    """It counts as absent, as in transformers; DeepSeek-V3's template asks for it and gets it."""
    messages = [{"role": "assistant", "content": None, "tool_calls": None}]
    assert (
        render("{% for m in messages %}{{ m.content }}{{ m.tool_calls is defined }}{% endfor %}", messages) == "False"
    )
    for content in ("m.content", "m['content']"):
        for test, text in (("is none", "calls"), ("is not none", "")):
            template = f"{{% for m in messages %}}{{% if {content} {test} %}}calls{{% endif %}}{{% endfor %}}"
            assert render(template, messages) == text
    template = "{% for m in messages %}{% if m.content is none %}{% endif %}{{ m.content | length }}{% endfor %}"
    assert render(template, messages) == "0"


def test_reasoning_by_any_of_its_names():
    template = "{% for m in messages %}{{ m.reasoning_content }},{{ m.thinking }};{% endfor %}"
    messages = [{"reasoning": "a"}, {"thinking": "b"}, {"reasoning_content": "c", "thinking": "d"}, {}]
    assert render(template, messages) == "a,a;b,b;c,d;,;"


def test_templates_see_plain_data_only(tmp_path):
    @dataclasses.dataclass
    class Message:
        role: str
        content: str

    class Text(str):
        def harm(self):
            raise AssertionError

    messages = [Message("user", Text("x"))]
    assert render("{{ messages }}{{ extra }}", messages, extra=tmp_path) == (
        "[{'role': 'user', 'content': 'x'}]" + f"<{type(tmp_path).__name__}>"
    )
    with pytest.raises(PymlaError, match="harm"):
        render("{{ messages[0].content.harm() }}", messages)


@pytest.mark.parametrize("messages", ["Hi", {"role": "user"}, ["Hi"], [None], None, 3])
def test_messages_of_another_kind(messages):
    with pytest.raises(PymlaError, match="`messages` must be"):
        render(None, messages)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "line 1: "),
        ("a\n{% nonsense %}", "line 2: .*nonsense"),
        ("a\n\n{{ raise_exception('roles\x1b[31m must\nalternate') }}", r"line 3: roles\\x1b\[31m must alternate"),
        ("{% macro f(x) %}\n{{ x + 'a' }}{% endmacro %}\n\n{{ f(1) }}", "line 2: unsupported operand"),
        ("{{ 1 / 0 }}", "line 1: division by zero"),
        ("{{ x.y.z }}", "line 1: .*undefined"),
        ("{{ ''.__class__.__mro__ }}", "line 1: .*unsafe"),
        ("{{ messages.append(1) }}", "line 1: .*unsafe"),
        ("{{ namespace(__x=1) }}", "line 1: .*underscore"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "line 1: .*underscore"),
        ("{{ missing | tojson }}", "line 1: .*serializable"),
        ("{% include 'other' %}", "line 1: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it, or a value, is nested too deeply"),
        ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "it, or a value, is nested too deeply"),
    ],
)
def test_errors_name_the_line(template, words):
    with pytest.raises(
        PymlaError, match=f"the model's chat template cannot be used with these messages: {words}"
    ) as caught:
        render(template, [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    ],
)
def test_endless_templates_are_stopped(monkeypatch, template):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(PymlaError, match=r"line 1: it runs for more than 0.2 seconds"):
        render(template, [])


GROWING = "{% set n = namespace(s='0123456789') %}{% for i in range(99) %}{% set n.s = EXPRESSION %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}abcdefghijkl{% endfor %}",
        "{{ 'a' * 10 ** 15 }}",
        "{{ [0] * 10 ** 15 }}",
        "{{ 3 ** (10 ** 12) }}",
        "{{ 'a'.ljust(10 ** 15) }}",
        "{{ 'ab' | center(2000000) }}",
        GROWING.replace("EXPRESSION", "n.s ~ n.s"),
        GROWING.replace("EXPRESSION", "n.s + n.s"),
        GROWING.replace("EXPRESSION", "[n.s, n.s] | join"),
        GROWING.replace("EXPRESSION", "'%s%s' % (n.s, n.s)"),
        GROWING.replace("EXPRESSION", "n.s.replace('', n.s)"),
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_huge_values_are_stopped(monkeypatch, template):
    monkeypatch.setattr(templates, "LARGEST", 1_000_000)
    with pytest.raises(PymlaError, match=r"more than 1000000 characters|Range too big"):
        render(template, [])
